"""The stages of a trunk: modules that are called one after the other, between which architectures add connections."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from mtl.batch import describe
from mtl.errors import UserError


class Applied(nn.Module):
    """A module that applies a function without parameters, such as a mean over positions.

    Args:
        function: The function.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *values: Any) -> Any:
        """Returns the function's value."""
        return self.function(*values)


def stages_of(trunk: nn.Module, *, least: int = 1) -> list[nn.Module]:
    """Returns the stages of a trunk; called one after the other, they compute what the trunk computes.

    The first stage is called with the trunk's inputs, and each other one with the output of the stage before it. The
    output of a stage is a tensor, or a tuple that begins with a tensor and is passed on as several arguments, such as a
    sequence and its mask.

    The stages are those of the trunk's method `stages()`, or the modules in a `torch.nn.Sequential`. Any other trunk is
    a single stage. They share the trunk's parameters.

    Args:
        trunk: The trunk.
        least: The smallest number of stages that the caller supports.

    Raises:
        UserError: If the trunk has fewer stages.
    """
    own = getattr(trunk, "stages", None)
    stages: list[nn.Module] = [trunk]
    if callable(own):
        stages = list(own())
    elif type(trunk).forward is nn.Sequential.forward:
        stages = list(trunk.children())
    if len(stages) < least:
        raise UserError(
            f"model.trunk: this architecture needs a trunk of at least {least} stages, and {type(trunk).__name__} has "
            f"{len(stages)}. A trunk has stages if it is a torch.nn.Sequential of them, or if it has a method stages() "
            "that returns a list of modules, such as those of mtl.trunks.CNN, MLP, LeNet and Torchvision"
        )
    return stages


def new_trunk(trunk: Callable[[], nn.Module]) -> nn.Module:
    """Returns a new trunk from a function that makes one.

    Raises:
        UserError: If `trunk` is a module, of which there would be only one, or if the function gives no module.
    """
    if isinstance(trunk, nn.Module):
        name = type(trunk).__name__
        raise UserError(f"trunk is a {name}; this architecture needs a function that makes one: lambda: {name}(…)")
    made = trunk()
    if not isinstance(made, nn.Module):
        raise UserError(f"the function that makes a trunk returned {describe(made)}, not a torch.nn.Module")
    return made


def run_stages(stages: Sequence[nn.Module], *inputs: Any) -> Any:
    """Returns the output of the last stage; without stages, the inputs, or the input if there is only one."""
    value: Any = inputs if len(inputs) > 1 else inputs[0]
    for stage in stages:
        value = stage(*value) if isinstance(value, tuple) else stage(value)
    return value


class Stages(nn.Sequential):
    """Consecutive stages of a trunk as one module; without stages, it returns its inputs, see `run_stages`."""

    def forward(self, *inputs: Any) -> Any:
        """Returns the output of the last stage."""
        return run_stages(list(self), *inputs)


def tensor_of(value: Any) -> Tensor:
    """Returns the tensor with which a value between two stages begins.

    Raises:
        UserError: If there is no tensor.
    """
    first = value[0] if isinstance(value, tuple) and value else value
    if not isinstance(first, Tensor):
        raise UserError(
            "model.trunk: this architecture needs stages whose outputs are tensors, or tuples that begin with a "
            f"tensor, and the output of a stage is a {type(first).__name__}"
        )
    return first


def averaged(features: Tensor) -> Tensor:
    """Averages maps (N, C, H, W) and tokens (N, T, C) over their positions, to (N, C); vectors are returned as is."""
    if features.ndim == 2:
        return features
    return features.mean(1) if features.ndim == 3 else features.mean((2, 3))
