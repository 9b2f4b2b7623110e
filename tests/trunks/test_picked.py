"""A part of another module's output."""

from collections import OrderedDict, namedtuple
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import mtl
from mtl.trunks import Picked

Pair = namedtuple("Pair", ["first", "second"])


@dataclass
class Output:
    last: torch.Tensor
    states: tuple[torch.Tensor, ...]


class Library(nn.Module):
    def __init__(self, kind) -> None:
        super().__init__()
        self.linear, self.kind = nn.Linear(2, 3), kind

    def forward(self, x, y=0):
        return self.kind(self.linear(x) + y)


@pytest.mark.parametrize(
    ("kind", "output", "factor"),
    [
        (lambda x: {"out": x, "aux": 2 * x}, "out", 1),
        (lambda x: OrderedDict(features={"deep": 2 * x}), "features.deep", 2),
        (lambda x: (x, 2 * x), 1, 2),
        (lambda x: [x, [x, 3 * x]], "1.-1", 3),
        (lambda x: Pair(x, 2 * x), "second", 2),
        (lambda x: Output(x, (x, 4 * x)), "states.1", 4),
    ],
)
def test_parts(kind, output, factor) -> None:
    trunk = Picked(Library(kind), output=output, num_features=3)
    x = torch.randn(4, 2)
    assert torch.equal(trunk(x), factor * trunk.module.linear(x))
    assert torch.equal(trunk(x, 1.0), factor * (trunk.module.linear(x) + 1.0))
    assert trunk.num_features == 3


@pytest.mark.parametrize(
    ("kind", "output", "message"),
    [
        (lambda x: {"out": x}, "uot", r"a dict of the module's output has no 'uot'; did you mean 'out'\? \(possible: out\)"),
        (lambda x: (x, x), "2", r"a tuple of the module's output has no '2' \(possible: 0, 1\)"),
        (lambda x: (x, x), "first", r"a tuple of the module's output has no 'first' \(possible: 0, 1\)"),
        (lambda x: Output(x, ()), "lst", r"an? Output of the module's output has no 'lst'; did you mean 'last'\?"),
        (lambda x: x, "0", r"a Tensor of the module's output has no '0'"),
    ],
)  # fmt: skip
def test_parts_that_are_not_there(kind, output, message) -> None:
    with pytest.raises(mtl.UserError, match=rf"model\.trunk\.output is '{output}', and {message}"):
        Picked(Library(kind), output=output, num_features=3)(torch.randn(4, 2))
