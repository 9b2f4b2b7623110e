"""What the entry points have in common: the command line, Hydra, jobs, and errors for a person."""

from mtl.cli.composing import left_out, naming_origins
from mtl.cli.folders import CONFIG_DIR, checked, code_folders, shadowed
from mtl.cli.jobs import beside_others
from mtl.cli.launch import launch
from mtl.cli.overrides import arguments, keys

__all__ = [
    "CONFIG_DIR",
    "arguments",
    "beside_others",
    "checked",
    "code_folders",
    "keys",
    "launch",
    "left_out",
    "naming_origins",
    "shadowed",
]
