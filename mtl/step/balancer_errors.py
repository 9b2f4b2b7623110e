"""Error messages about balancers that return invalid weights or raise an exception."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from mtl.balancers import Balancer
from mtl.errors import FOREIGN, UserError, text_of, told


def cannot_follow(balancer: Balancer, names: Sequence[str], task_weights: Tensor) -> UserError:
    """Returns the error for task weights that the balancer would ignore, since it is invariant to the losses' scale.

    Args:
        balancer: The balancer.
        names: The names of the tasks.
        task_weights: The weights that the user gave to the tasks, in the same order.
    """
    listed = ", ".join(f"{name} {weight:g}" for name, weight in zip(names, task_weights, strict=True))
    return UserError(
        f"balancer {_name(balancer)} can't follow the tasks' weights ({listed}): it doesn't see the scale of the "
        "losses. Set tasks.*.weight to 1, or take another balancer"
    )


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


@contextmanager
def naming(balancer: Balancer) -> Iterator[None]:
    """Turns an exception that the balancer raises within the context into a UserError that names the balancer.

    Raises:
        UserError: If the balancer raises an exception.
    """
    try:
        yield
    except UserError:
        raise
    except ArithmeticError as error:
        raise UserError(f"balancer {_name(balancer)}: {text_of(error)}") from error
    except FOREIGN as error:
        raise UserError(f"balancer {_name(balancer)} failed: {told(error)}") from error


def _name(balancer: Balancer) -> str:
    return type(balancer).__name__
