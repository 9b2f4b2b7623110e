"""Chooses the config's device."""

import torch

from mtl.distributed.collectives import gather_objects, world_size
from mtl.errors import UserError


def choose_device(name: str) -> torch.device:
    """Returns the device that the config names; `auto` is the first GPU if there is one, and the CPU otherwise.

    With several processes, each has a GPU of its own on its machine.

    Raises:
        UserError: If the named GPU doesn't exist, or if two processes have the same GPU.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if world_size() > 1 and torch.device(name).type == "cuda":
        if torch.device(name).index is not None:
            raise UserError(f"device: '{name}' is one GPU, and there are {world_size()} processes. Set it to cuda")
        name = f"cuda:{torch.cuda.current_device()}"
        _check_own(torch.cuda.current_device())
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device: there is no '{name}'; {torch.cuda.device_count()} GPUs are visible. Try cpu")
    return device


def _check_own(number: int) -> None:
    """Checks that no two processes use the same GPU, which NCCL can't do.

    Their numbers don't tell: a launcher may show each process one GPU only.
    """
    gpus = gather_objects(str(torch.cuda.get_device_properties(number).uuid))
    for other, gpu in enumerate(gpus):
        if (first := gpus.index(gpu)) < other:
            raise UserError(
                f"device: the processes of rank {first} and {other} would use the same GPU, and each needs its own; "
                f"{torch.cuda.device_count()} GPUs are visible. Start as many processes on a machine as it has GPUs, "
                "or set device=cpu"
            )
