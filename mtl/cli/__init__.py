"""The command line of all entry points: Hydra, jobs and multiruns, and error messages for users."""

from mtl.cli.composing import left_out, naming_origins
from mtl.cli.folders import CONFIG_DIR, checked, code_folders, shadowed
from mtl.cli.jobs import runs_in_parallel
from mtl.cli.launch import launch
from mtl.cli.overrides import arguments, keys

__all__ = [
    "CONFIG_DIR",
    "arguments",
    "checked",
    "code_folders",
    "keys",
    "launch",
    "left_out",
    "naming_origins",
    "runs_in_parallel",
    "shadowed",
]
