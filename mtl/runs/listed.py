"""An allow list: the names that a run's checkpoint may use without being trusted."""

import inspect
from collections.abc import Callable, Sequence
from functools import cache, partial
from importlib import import_module
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

# All listed names either build modules, optimizers and data, or compute with tensors. None of them runs code from a
# text, unpickles a file, writes a file, or imports a module by name.
PACKAGES = ("mtl", "torch", "torchvision", "torchmetrics")
LISTED = "mtl, torch.nn, torch.optim, torchvision and torchmetrics"  # for messages
_BASES = (nn.Module, Optimizer, LRScheduler)  # torchmetrics.Metric and the transforms of torchvision are modules
_CLASSES = (
    *("torch.nn", "torch.optim", "torch.optim.lr_scheduler"),
    *("torchvision.models", "torchvision.ops", "torchvision.transforms", "torchvision.transforms.v2"),
    *("torchmetrics", "torchmetrics.aggregation", "torchmetrics.classification", "torchmetrics.clustering"),
    *("torchmetrics.detection", "torchmetrics.nominal", "torchmetrics.regression", "torchmetrics.retrieval"),
    *("torchmetrics.segmentation", "torchmetrics.wrappers"),
)
_FUNCTIONS = {  # by module, the modules that define its own functions; its other functions are imported
    "torch.nn.functional": ("torch", "torch.nn.functional", "torch._C._nn"),
    "torchvision.models": ("torchvision.models.",),
    "torchvision.ops": ("torchvision.ops.",),
    "mtl.problems.burgers": ("mtl.problems.burgers",),
}
_NAMES = {
    "mtl": ("MultiTaskModel", "Schedule"),
    "mtl.data.augment": ("RandomScaleCrop",),
    "torch": ("relu", "sigmoid", "softmax", "tanh", "tensor"),
    "torchvision.transforms": ("Compose", "PILToTensor", "ToTensor"),
}
OF_TENSORS = ("torch.nn.functional.", "torch.relu", "torch.sigmoid", "torch.softmax", "torch.tanh", "torchvision.ops.")
_EXPORTED = tuple(  # everything that these modules export
    f"mtl.{name}" for name in ("architectures", "balancers", "data", "heads", "losses", "metrics", "trunks")
)
_DEFINED = (
    "mtl.model",
    "mtl.optimizers",
    "mtl.problems.burgers",
    "mtl.problems.celeba",
    "mtl.problems.qm9",
    "mtl.schedule",
    "mtl.schedulers",
)
_ALIASES = ("torchmetrics.image", "torchmetrics.text")  # modules with other names for exports of torchmetrics
_LEFT_OUT = ("torchmetrics.SacreBLEUScore",)  # downloads a tokenizer


@cache
def listed(package: str) -> dict[str, Any]:
    """Returns what a run may use of the package `mtl`, `torch`, `torchvision` or `torchmetrics`, by dotted name.

    These are classes of modules, optimizers, schedulers and metrics, the functions of `torch.nn.functional`,
    `torchvision.models` and `torchvision.ops`, and what mtl exports for configs. Code that loads files or pretrained
    networks of other packages is left out.
    """
    values: dict[str, Any] = {}

    def add(module: str, names: Sequence[str] | None, wanted: Callable[[Any], bool] = lambda _: True) -> None:
        if module.split(".")[0] == package:
            imported = import_module(module)
            names = [name for name in dir(imported) if not name.startswith("_")] if names is None else names
            pairs = {f"{module}.{name}": getattr(imported, name) for name in names}
            values.update({name: x for name, x in pairs.items() if name not in _LEFT_OUT and wanted(x)})

    for module in _CLASSES:
        add(module, None, lambda value: isinstance(value, type) and issubclass(value, _BASES))
    for module, places in _FUNCTIONS.items():
        add(module, None, partial(_is_function_of, places))
    for module, names in _NAMES.items():
        add(module, names)
    for module in _EXPORTED if package == "mtl" else ():
        add(module, import_module(module).__all__)
    for module in _DEFINED:
        add(module, None, lambda value, module=module: getattr(value, "__module__", None) == module)  # type: ignore[misc]
    ids = {id(value) for value in values.values()}
    for module in _ALIASES:
        add(module, None, lambda value: id(value) in ids)
    return values


@cache
def names_of(package: str) -> dict[str, Any]:
    """Returns `listed`, with classes also by their defining modules, such as torch.nn.modules.linear.Linear."""
    known = listed(package)
    return {**{f"{x.__module__}.{x.__qualname__}": x for x in known.values() if isinstance(x, type)}, **known}


def _is_function_of(places: Sequence[str], value: Any) -> bool:
    home = getattr(value, "__module__", None)
    return (
        inspect.isroutine(value)
        and isinstance(home, str)
        and any(home == place or (place.endswith(".") and home.startswith(place)) for place in places)
        and not home.startswith("torchvision.models._")
    )
