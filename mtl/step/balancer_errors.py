"""Errors about balancers that get invalid losses, return invalid weights or raise an exception."""

import math
from collections.abc import Sequence

from torch import Tensor

from mtl.balancers import Balancer
from mtl.errors import NotFinite, UserError, describe_error, text_of


def set_preference(balancer: Balancer, needs: str, names: Sequence[str], task_weights: Tensor) -> None:
    """Passes the task weights to a balancer that takes them as a preference.

    Args:
        balancer: The balancer.
        needs: The quantity that the balancer requires, see `Balancer.needs`. A balancer with `nothing` has fixed
            weights, which are multiplied by the task weights.
        names: The names of the tasks.
        task_weights: The weights that the user gave to the tasks, in the same order.

    Raises:
        UserError: If the balancer would ignore the task weights, since it is invariant to the scale of the losses.
    """
    if needs == "nothing":
        return
    if balancer.preference == "none" and not (task_weights == 1).all():
        listed = ", ".join(f"{name} {weight:g}" for name, weight in zip(names, task_weights, strict=True))
        raise UserError(
            f"balancer {_name(balancer)} doesn't support task weights ({listed}): it doesn't see the scale of the "
            "losses. Set tasks.*.weight to 1, or take another balancer"
        )
    if balancer.preference == "steer":
        balancer.own = task_weights


def check_losses(names: Sequence[str], losses: Tensor) -> None:
    """Raises NotFinite if a loss on the CPU isn't finite; on a GPU, the check would wait for the device."""
    if losses.device.type != "cpu" or losses.isfinite().all():
        return
    named = zip(names, losses.tolist(), strict=True)
    raise NotFinite({name: f"its loss is {loss}" for name, loss in named if not math.isfinite(loss)})


def wrong_shape(balancer: Balancer, weights: object, count: int) -> UserError:
    """Returns the error for weights that are not a tensor with one number for each of `count` tasks."""
    shown = f"of shape {tuple(weights.shape)}" if isinstance(weights, Tensor) else f"a {type(weights).__name__}"
    return UserError(f"balancer {_name(balancer)}: its weights are {shown}; they must be a tensor of shape ({count},)")


def not_finite(balancer: Balancer, names: Sequence[str], losses: Tensor, *, by_losses: bool) -> UserError:
    """Returns the error for weights that are not finite.

    Args:
        balancer: The balancer that computed the weights.
        names: The names of the tasks.
        losses: The losses of the tasks, in the same order.
        by_losses: Whether the weights depend on the losses alone.
    """
    listed = ", ".join(f"{name} {loss:.4g}" for name, loss in zip(names, losses.tolist(), strict=True))
    hint = ". Methods that take logarithms or inverses of losses need them above 0" if by_losses else ""
    return UserError(f"balancer {_name(balancer)} has no finite weights for these losses: {listed}{hint}")


def failed(balancer: Balancer, error: BaseException) -> UserError:
    """Returns the error for an exception that the balancer raised."""
    if isinstance(error, ArithmeticError):
        return UserError(f"balancer {_name(balancer)}: {text_of(error)}")
    return UserError(f"balancer {_name(balancer)} failed: {describe_error(error)}")


def _name(balancer: Balancer) -> str:
    return type(balancer).__name__
