"""Calls of a balancer's methods: who raised an exception, and random draws that are the same in all processes."""

from collections.abc import Iterator
from contextlib import contextmanager

from mtl.balancers import Balancer
from mtl.errors import FOREIGN, UserError
from mtl.process.seeding import common_generators
from mtl.step import balancer_errors

METHODS = ("weights", "combine", "alone", "learn", "after", "epoch_end")  # those that may draw random numbers


@contextmanager
def calling(balancer: Balancer, method: str, common: tuple[int, ...] | None) -> Iterator[None]:
    """Names the balancer in an exception that is raised within the block.

    Args:
        balancer: The balancer.
        method: The method that is called.
        common: With several processes, numbers that are the same in all of them, with which they seed the draws. The
            methods of one step draw different numbers. None with one process, which draws from its own generators.
    """
    overridden = getattr(type(balancer), method) is not getattr(Balancer, method)  # the base class draws nothing
    try:
        if common is not None and overridden:
            with common_generators(*common, METHODS.index(method)):
                yield
        else:
            yield
    except UserError:
        raise
    except FOREIGN as error:
        raise balancer_errors.failed(balancer, error) from error
