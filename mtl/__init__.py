"""Multi-task training for PyTorch: several tasks, one optimizer step.

The names of this package are imported when they are first used, so that the command line can respond before torch is
loaded.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mtl import architectures, balancers, data, distributed, heads, loggers, losses, optimizers, schedulers, trunks
    from mtl.errors import UserError
    from mtl.model import MultiTaskModel
    from mtl.runs.loading import load
    from mtl.schedule import Schedule
    from mtl.step import Gradients, Step, StepResult, Update
    from mtl.task import Task

__all__ = [
    "Gradients",
    "MultiTaskModel",
    "Schedule",
    "Step",
    "StepResult",
    "Task",
    "Update",
    "UserError",
    "architectures",
    "balancers",
    "data",
    "distributed",
    "heads",
    "load",
    "loggers",
    "losses",
    "optimizers",
    "schedulers",
    "trunks",
]
__version__ = "0.1.0"

_WHERE = {
    "MultiTaskModel": "mtl.model",
    "Schedule": "mtl.schedule",
    "Gradients": "mtl.step.step",
    "Step": "mtl.step.step",
    "StepResult": "mtl.step.step",
    "Update": "mtl.step.step",
    "Task": "mtl.task",
    "UserError": "mtl.errors",
    "load": "mtl.runs.loading",
}


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(import_module(_WHERE[name]), name)
    if name in __all__:
        return import_module(f"mtl.{name}")
    raise AttributeError(f"module 'mtl' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
