"""Rebuilds the content of a checkpoint from plain types."""

from collections import OrderedDict
from types import NoneType
from typing import Any

import torch
from torch import Tensor, nn

from mtl.errors import UserError

_LEAVES = (str, int, float, complex, bool, bytes, NoneType, torch.Size, torch.dtype, torch.device)


def plain_types(value: Any, where: str = "state") -> Any:
    """Returns the value rebuilt from new dicts, lists, tuples and tensors of exactly these types.

    PyTorch's reader of checkpoints runs no code, but it sets attributes that the file names on OrderedDicts and some
    tensors, which can replace their methods.

    Args:
        value: The value that was read.
        where: The path of the value, for error messages.

    Raises:
        UserError: If a value has another type.
    """
    kind = type(value)
    if kind in (dict, OrderedDict):
        items = [(plain_types(key, where), each) for key, each in dict.items(value)]
        new = kind((key, plain_types(each, f"{where}.{key}")) for key, each in items)
        metadata = vars(value).get("_metadata") if kind is OrderedDict else None
        if metadata is not None:  # versions of the modules in a state dict
            vars(new)["_metadata"] = plain_types(metadata, f"{where}._metadata")
        return new
    if kind in (list, tuple):
        return kind(plain_types(each, f"{where}[{index}]") for index, each in enumerate(kind.__iter__(value)))
    if kind is set:
        return {plain_types(each, where) for each in value}
    if kind in (Tensor, nn.Parameter):
        return Tensor.detach(value)
    if kind in _LEAVES:
        return value
    raise UserError(f"{where} is of type {kind.__module__}.{kind.__qualname__}, which a run doesn't write")
