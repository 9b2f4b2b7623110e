"""A trunk that uses a part of the output of any module, such as one from another library."""

import re
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from mtl.errors import UserError, suggest

_STEP = re.compile(r"(?:^|\.)(?P<name>[^.\[\]]+)|\.?\[(?P<index>[-\d:,\s]+)\]")


class Picked(nn.Module):
    """A module whose output is a dict, a tuple or an object, of which a part is used as the features.

    Args:
        module: The module, which is called with the inputs.
        output: The path of the part: keys, numbers or attributes with dots between them, such as `last_hidden_state`,
            `1` or `hidden_states.-1`. A number also indexes the first dimension of a tensor: in the output of a GRU,
            `1.-1` is the last state of the last layer, (N, H); for an LSTM, this is `1.0.-1`. Brackets contain a Python
            index: `0[:, -1]` is the last position of each sequence for a module with `batch_first`. A list of paths
            concatenates several parts along the last dimension: `[1.-2, 1.-1]` are the states of both directions,
            (N, 2H).
        num_features: The number of features in the part.

    Raises:
        UserError: If `output` isn't a valid path.
    """

    def __init__(self, module: nn.Module, *, output: str | int | Sequence[str | int], num_features: int) -> None:
        super().__init__()
        self.module = module
        several = isinstance(output, Sequence) and not isinstance(output, str)
        self.output: list[str] = [_text(each) for each in output] if several else [_text(output)]  # type: ignore[union-attr]
        self.num_features = num_features
        self._steps = [_read(each) for each in self.output]
        if not self._steps:
            raise UserError("model.trunk.output is an empty list; name at least one part of the module's output")

    def forward(self, *inputs: Any) -> Any:
        """Calls the module and returns the part of the output.

        Raises:
            UserError: If the output has no such part; the message lists the parts that exist.
        """
        whole = self.module(*inputs)
        picked = [_walk(whole, steps, output) for steps, output in zip(self._steps, self.output, strict=True)]
        if len(picked) == 1:
            return picked[0]
        if not all(isinstance(each, Tensor) and each.shape[:-1] == picked[0].shape[:-1] for each in picked):
            kinds = [tuple(each.shape) if isinstance(each, Tensor) else type(each).__name__ for each in picked]
            raise UserError(
                f"model.trunk.output is {self.output}, and its parts can't be joined along their last dimension: "
                f"{', '.join(map(str, kinds))}"
            )
        return torch.cat(picked, -1)


def _text(output: Any) -> str:
    if isinstance(output, float):  # YAML would read the path 1.10 as the number 1.1
        raise UserError(f"model.trunk.output is the number {output}; write it as a text, in quotes: '{output}'")
    return str(output)


def _read(output: str) -> list[str | tuple[int | slice, ...]]:
    """Parses a path to the steps from the output to the part: names, and indices of tensors."""
    steps: list[str | tuple[int | slice, ...]] = []
    end = 0
    while end < len(output):
        match = _STEP.match(output, end)
        try:
            if match is None:
                raise ValueError
            steps.append(match["name"] or tuple(map(_index, match["index"].split(","))))
        except ValueError:
            raise UserError(
                f"model.trunk.output is '{output}'; it must be names and numbers with dots between them, and indices "
                "in brackets, such as last_hidden_state, 1.-1 or 0[:, -1]"
            ) from None
        end = match.end()
    if not steps:
        raise UserError("model.trunk.output is empty; name a part of the module's output")
    return steps


def _index(text: str) -> int | slice:
    if ":" not in text:
        return int(text)
    return slice(*(int(each) if each.strip() else None for each in text.split(":")))


def _walk(value: Any, steps: Sequence[str | tuple[int | slice, ...]], output: str) -> Any:
    for number, step in enumerate(steps):
        if not isinstance(step, str):
            value = _indexed(value, step, output)
        elif number and isinstance(value, Tensor) and step.removeprefix("-").isdecimal():
            value = _indexed(value, (int(step),), output)
        else:  # the first number of a path doesn't index a tensor, whose first dimension is the sample
            value = _part(value, step, output)
    return value


def _is_data(value: Any) -> bool:
    """Returns whether a value is data: attributes of functions, classes and modules lead out of the output."""
    return value is not None and not callable(value) and not isinstance(value, ModuleType)


def _part(value: Any, key: str, output: str) -> Any:
    if isinstance(value, Mapping):
        if key in value:
            return value[key]
        possible = list(map(str, value))
    elif not key.startswith("_") and _is_data(getattr(value, key, None)):
        return getattr(value, key)
    elif isinstance(value, Sequence):
        if key.removeprefix("-").isdecimal() and -len(value) <= int(key) < len(value):
            return value[int(key)]
        possible = list(map(str, range(len(value))))
    else:
        possible = list(vars(value)) if hasattr(value, "__dict__") else []
    raise UserError(
        f"model.trunk.output is '{output}', and a {type(value).__name__} of the module's output has no '{key}'"
        + suggest(key, possible)
    )


def _indexed(value: Any, index: tuple[int | slice, ...], output: str) -> Any:
    if isinstance(value, Tensor):
        try:
            return value[index]
        except (IndexError, ValueError) as error:
            shape = tuple(value.shape)
            raise UserError(f"model.trunk.output is '{output}', for a tensor of shape {shape}: {error}") from None
    if isinstance(value, Sequence) and len(index) == 1 and isinstance(index[0], int):
        return _part(value, str(index[0]), output)
    raise UserError(
        f"model.trunk.output is '{output}', and a {type(value).__name__} of the module's output takes no index in "
        "brackets; a tensor does"
    )
