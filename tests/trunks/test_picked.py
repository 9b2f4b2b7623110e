"""A part of another module's output."""

import re
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


class Recurrent(nn.Module):
    """A recurrent module of torch, with batch as second or first dimension and inputs (N, L, 2)."""

    def __init__(self, kind: type[nn.Module], **options) -> None:
        super().__init__()
        self.rnn = kind(2, 3, **options)
        self.first = options.get("batch_first", False)

    def forward(self, x: torch.Tensor) -> object:
        return self.rnn(x if self.first else x.transpose(0, 1))


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize(
    ("kind", "options", "output", "by_hand"),
    [
        (nn.GRU, {}, "1.-1", lambda out: out[1][-1]),
        (nn.GRU, {}, "1[0]", lambda out: out[1][0]),
        (nn.GRU, {"num_layers": 3}, "1.1", lambda out: out[1][1]),
        (nn.LSTM, {"num_layers": 2}, "1.0.-1", lambda out: out[1][0][-1]),
        (nn.LSTM, {"num_layers": 2}, "1.1.0", lambda out: out[1][1][0]),
        (nn.LSTM, {"num_layers": 2}, "1[0][-1]", lambda out: out[1][0][-1]),
        (nn.GRU, {"bidirectional": True}, ["1.-2", "1.-1"], lambda out: torch.cat([out[1][-2], out[1][-1]], 1)),
        (
            nn.LSTM,
            {"bidirectional": True, "num_layers": 2},
            ["1.0.2", "1.0.3"],
            lambda out: torch.cat([out[1][0][2], out[1][0][3]], 1),
        ),
    ],
)
def test_states_of_recurrent_networks(kind, options, output, by_hand, batch_first) -> None:
    module = Recurrent(kind, **options, batch_first=batch_first)
    x = torch.randn(5, 4, 2)
    expected = by_hand(module(x))
    picked = Picked(module, output=output, num_features=3)(x)
    assert picked.shape == (5, 6 if isinstance(output, list) else 3)
    assert torch.equal(picked, expected)


@pytest.mark.parametrize(
    ("output", "by_hand"),
    [
        ("0[:, -1]", lambda x: x[:, -1]),
        ("0[:,1:3]", lambda x: x[:, 1:3]),
        ("0.[:, ::2, 0]", lambda x: x[:, ::2, 0]),
        ("0[-2:]", lambda x: x[-2:]),
        (["0[:, 0]", "0[:, -1]"], lambda x: torch.cat([x[:, 0], x[:, -1]], 1)),
    ],
)
def test_indices_as_python_writes_them(output, by_hand) -> None:
    module = nn.GRU(2, 3, batch_first=True)
    x = torch.randn(5, 4, 2)
    assert torch.equal(Picked(module, output=output, num_features=3)(x), by_hand(module(x)[0]))


@pytest.mark.parametrize("passes", ["joint", "sequential", "shared"])
@pytest.mark.parametrize("micro", [None, 3])
@pytest.mark.parametrize(("kind", "output"), [(nn.GRU, "1.-1"), (nn.LSTM, "1.0.-1")])
def test_a_state_whose_samples_are_its_second_dimension_trains_as_by_hand(passes, micro, kind, output) -> None:
    torch.manual_seed(0)
    trunk = Picked(Recurrent(kind, num_layers=2), output=output, num_features=3).double()
    loss = nn.CrossEntropyLoss()
    tasks = [mtl.Task(name, head=nn.Linear(3, 4).double(), loss=loss, target=name) for name in ("a", "b")]
    model = mtl.MultiTaskModel(trunk, tasks, inputs=["x"])
    batch = {"x": torch.randn(8, 5, 2).double(), **{n: torch.randint(0, 4, (8,)) for n in ("a", "b")}}
    out = trunk.module(batch["x"])
    features = out[1][-1] if kind is nn.GRU else out[1][0][-1]
    total = sum(loss(task.head(features), batch[task.name]) for task in tasks)
    expected = torch.autograd.grad(total, list(model.parameters()))
    mtl.Step(model, tasks, passes=passes, micro_batch_size=micro).backward(batch)
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("output", ["1..2", "1[", "1[a]", "1[0]]", "", "0[1.5]", [], [""], 1.1, [1.1]])
def test_outputs_that_cannot_be_read(output) -> None:
    with pytest.raises(mtl.UserError, match=r"model\.trunk\.output is "):
        Picked(nn.GRU(2, 3), output=output, num_features=3)


def test_parts_that_cannot_be_joined_are_named() -> None:
    trunk = Picked(nn.GRU(2, 3), output=["0", "1.-1"], num_features=3)
    with pytest.raises(mtl.UserError, match=r"can't be joined along their last dimension: \(4, 5, 3\), \(5, 3\)"):
        trunk(torch.randn(4, 5, 2))


def test_a_trunk_that_gives_a_tuple_is_told_of_picked() -> None:
    task = mtl.Task("a", head=nn.Linear(3, 4), loss=nn.CrossEntropyLoss(), target="a")
    model = mtl.MultiTaskModel(nn.LSTM(2, 3), [task], inputs=["x"])
    with pytest.raises(
        mtl.UserError, match=r"trunk returns a tuple: model/trunk=picked .*model\.trunk\.output=1\.0\.-1"
    ):
        model({"x": torch.randn(4, 5, 2)})


@pytest.mark.parametrize(
    ("kind", "output", "message"),
    [
        (lambda x: (x, x), "1.4", r"for a tensor of shape \(4, 3\): index 4 is out of bounds for dimension 0 with size 4"),
        (lambda x: (x, x), "1[:, :, 0]", r"for a tensor of shape \(4, 3\): too many indices"),
        (lambda x: {"a": x}, "[0]", r"and a dict of the module's output takes no index in brackets"),
    ],
)  # fmt: skip
def test_indices_that_do_not_fit(kind, output, message) -> None:
    with pytest.raises(mtl.UserError, match=rf"model\.trunk\.output is '{re.escape(output)}', {message}"):
        Picked(Library(kind), output=output, num_features=3)(torch.randn(4, 2))


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
