"""Errors of balancers: weights that can't be used, and a balancer that fails."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from mtl.balancers import Balancer
from mtl.errors import FOREIGN, UserError, text_of, told


def cannot_follow(balancer: Balancer, names: Sequence[str], own: Tensor) -> UserError:
    """For tasks with weights of their own, which a balancer that doesn't see the scale of the losses would ignore."""
    listed = ", ".join(f"{name} {weight:g}" for name, weight in zip(names, own, strict=True))
    return UserError(
        f"balancer {_name(balancer)} can't follow the tasks' weights ({listed}): it doesn't see the scale of the "
        "losses. Set tasks.*.weight to 1, or take another balancer"
    )


def wrong_shape(balancer: Balancer, weights: object, count: int) -> UserError:
    """For weights that aren't one number for each of so many tasks."""
    shown = f"of shape {tuple(weights.shape)}" if isinstance(weights, Tensor) else f"a {type(weights).__name__}"
    return UserError(f"balancer {_name(balancer)}: its weights are {shown}; they must be a tensor of shape ({count},)")


def not_finite(balancer: Balancer, names: Sequence[str], losses: Tensor, *, by_losses: bool) -> UserError:
    """For weights that aren't finite.

    Args:
        balancer: which computed them.
        names: of the tasks.
        losses: of the tasks, in the same order.
        by_losses: whether the weights depend on the losses alone.
    """
    listed = ", ".join(f"{name} {loss:.4g}" for name, loss in zip(names, losses.tolist(), strict=True))
    hint = ". Methods that take logarithms or inverses of losses need them above 0" if by_losses else ""
    return UserError(f"balancer {_name(balancer)} has no finite weights for these losses: {listed}{hint}")


@contextmanager
def naming(balancer: Balancer) -> Iterator[None]:
    """Names the balancer where a call of it fails.

    Raises:
        UserError: for the exception of the call.
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
