"""Another library's module, and what of its output are the features."""

from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

from torch import nn

from mtl.errors import UserError, suggest


class Picked(nn.Module):
    """A module whose output is a dict, a tuple or an object, and of that the part that the heads are given.

    Args:
        module: called with the inputs.
        output: the part's key, number or attribute, and so on with dots: `last_hidden_state`, `1`, `hidden_states.-1`.
        num_features: width of that part.
    """

    def __init__(self, module: nn.Module, *, output: str | int, num_features: int) -> None:
        super().__init__()
        self.module = module
        self.output = str(output)
        self.num_features = num_features

    def forward(self, *inputs: Any) -> Any:
        """The part.

        Raises:
            UserError: where there is no such part, with those that there are.
        """
        value = self.module(*inputs)
        for key in self.output.split("."):
            value = _part(value, key, self.output)
        return value


def _is_data(value: Any) -> bool:
    """Whether it is no function, class or module: by these an attribute leads out of the output."""
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
