"""Chooses the config's device."""

import torch

from mtl.distributed.collectives import world_size
from mtl.errors import UserError


def choose_device(name: str) -> torch.device:
    """Returns the device that the config names; `auto` is the first GPU if there is one, and the CPU otherwise.

    With several processes, each has a GPU of its own on its machine.

    Raises:
        UserError: If the named GPU doesn't exist.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if world_size() > 1 and torch.device(name).type == "cuda":
        if torch.device(name).index is not None:
            raise UserError(f"device: '{name}' is one GPU, and there are {world_size()} processes. Set it to cuda")
        name = f"cuda:{torch.cuda.current_device()}"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device: there is no '{name}'; {torch.cuda.device_count()} GPUs are visible. Try cpu")
    return device
