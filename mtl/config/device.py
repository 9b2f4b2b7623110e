"""Chooses the config's device."""

import torch

from mtl.errors import UserError


def choose_device(name: str) -> torch.device:
    """Returns the device that the config names; `auto` is the first GPU if there is one, and the CPU otherwise.

    Raises:
        UserError: If the named GPU doesn't exist.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device: there is no '{name}'; {torch.cuda.device_count()} GPUs are visible. Try cpu")
    return device
