"""The config's device."""

import torch

from mtl.errors import UserError


def choose_device(name: str) -> torch.device:
    """The device that the config means; `auto` is the first GPU, or the CPU.

    Raises:
        UserError: for a GPU that isn't there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device: there is no '{name}' here; {torch.cuda.device_count()} GPUs are visible. Try cpu")
    return device
