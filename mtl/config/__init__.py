"""From a checked config to objects, and every message for what can't be built."""

from mtl.config.data import build_loaders, build_splits, check_facts, fill_from_data
from mtl.config.device import choose_device
from mtl.config.model import build_model
from mtl.config.other_data import with_other_data
from mtl.config.tasks import build_tasks
from mtl.config.training import build_step, without_effect

__all__ = [
    "build_loaders",
    "build_model",
    "build_splits",
    "build_step",
    "build_tasks",
    "check_facts",
    "choose_device",
    "fill_from_data",
    "with_other_data",
    "without_effect",
]
