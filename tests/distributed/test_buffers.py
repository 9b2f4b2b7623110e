"""Buffers and parameters of kinds that the sums of gradients don't meet."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from processes import processes
from torch import Tensor, nn

import mtl

BUFFERS: dict[str, Callable[[], Tensor]] = {
    "int16": lambda: torch.arange(4, dtype=torch.int16),
    "uint16": lambda: torch.arange(4).to(torch.uint16),
    "bool": lambda: torch.tensor([True, False, True, True]),
    "complex": lambda: torch.arange(4) * 1j,
    "sparse": lambda: torch.diag(torch.arange(4.0)).to_sparse(),
    "sparse rows": lambda: torch.diag(torch.arange(4.0)).to_sparse_csr(),
    "sparse columns": lambda: torch.diag(torch.arange(4.0)).to_sparse_csc(),
    "repeated": lambda: torch.ones(1).expand(4),
}


class Trunk(nn.Module):
    """A linear layer with a buffer that grows to the number of samples, or is made in the first pass."""

    def __init__(self, buffer: Tensor | None) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 4)
        self.register_buffer("state", buffer)
        self.grows = False

    def forward(self, x: Tensor) -> Any:
        if self.grows and (self.state is None or len(self.state) < len(x)):
            self.state = torch.ones(len(x))
        return self.layer(x)


def model_with(buffer: Tensor | None) -> tuple[mtl.MultiTaskModel, list[mtl.Task]]:
    torch.manual_seed(0)
    tasks = [mtl.Task(n, head=nn.Linear(4, 1), loss=nn.MSELoss(), target=n) for n in ("a", "b")]
    return mtl.MultiTaskModel(Trunk(buffer), tasks, inputs=["x"]), tasks


def prepared(kind: str) -> tuple[list[Any], list[float]]:
    """Gives all processes the buffer of rank 0 and takes a measured step; returns the buffer and the parameters."""
    buffer = BUFFERS[kind]()
    if mtl.distributed.rank():
        buffer = (buffer * 0).to(buffer.dtype) if kind != "repeated" else torch.zeros(1).expand(4)
    model, tasks = model_with(buffer)
    mtl.distributed.prepare(model)
    data = {"x": torch.ones(2, 3), "a": torch.ones(2, 1), "b": torch.zeros(2, 1)}
    mtl.Step(model, tasks, torch.optim.SGD(model.parameters(), lr=0.1), passes="sequential")(data, measure=True)
    return model.trunk.state.to_dense().tolist(), [x for p in model.parameters() for x in p.flatten().tolist()]


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("kind", BUFFERS)
def test_buffers_of_all_kinds_are_those_of_rank_0(kind: str) -> None:
    _, alone = prepared(kind)
    for buffer, parameters in processes(2)(prepared, kind):
        assert buffer == BUFFERS[kind]().to_dense().tolist()
        assert parameters == pytest.approx(alone)


def growing(counts: list[int]) -> str:
    """Takes a step with a buffer that grows with the samples, and returns the message of the error."""
    model, tasks = model_with(None)
    model.trunk.grows = True
    count = counts[mtl.distributed.rank()]
    data = {"x": torch.ones(count, 3), "a": torch.ones(count, 1), "b": torch.ones(count, 1)} if count else {}
    try:
        mtl.Step(model, tasks, torch.optim.SGD(model.parameters(), lr=0.1))(data)
    except mtl.UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("counts", "kind"), [([3, 2], "float32 (3,)"), ([2, 3], "float32 (2,)"), ([0, 2], "missing"), ([2, 2], "")]
)
def test_buffers_of_different_shapes_are_refused(counts: list[int], kind: str) -> None:
    for message in processes(2)(growing, counts):
        start = f"the buffer 'trunk.state' of the model is {kind} in the process of rank 0"
        assert message.startswith(start) if kind else not message


def unlike() -> str:
    model, _ = model_with(None)
    if mtl.distributed.rank():
        model.heads["b"] = nn.Linear(4, 2)
    try:
        mtl.distributed.prepare(model)
    except mtl.UserError as error:
        return str(error)
    return ""


def test_models_of_different_shapes_are_refused_by_prepare() -> None:
    for message in processes(2)(unlike):
        assert message.startswith("the models in the processes of rank 0 and 1 have different parameters")


def sharded(kind: str) -> str:
    model, _ = model_with(None)
    if kind == "scalar":
        model.trunk.scale = nn.Parameter(torch.ones(()))
    else:
        model.trunk.layer.weight = nn.Parameter(torch.ones(3, 4).T)
    try:
        mtl.distributed.prepare(model, "fsdp")
    except mtl.UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("kind", "why"), [("scalar", "scalar parameters"), ("transposed", "non-contiguous parameters")]
)
def test_parameters_that_can_not_be_sharded_are_refused(kind: str, why: str) -> None:
    for message in processes(2)(sharded, kind):
        assert message.startswith("distributed: 'trunk' can't be sharded: ")
        assert why in message
        assert message.endswith("take ddp")
