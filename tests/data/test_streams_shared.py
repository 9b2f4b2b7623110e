"""What several processes get of a stream: the sizes of their shares, and what is refused."""

from typing import Any

import pytest
import torch
from processes import processes
from streams_by_hand import Parts, data_set
from torch import nn

import mtl
from mtl.data import Loader
from mtl.distributed.collectives import rank
from mtl.training.rehearsal import check_shares


def own(kind: str) -> list[tuple[int, int]]:
    loader = Loader(data_set(kind, []), batch_size=16)
    return [(size, len(batch["x"]) if batch else 0) for batch, size in loader.shares()]


@pytest.mark.parametrize(("kind", "total"), [("parts", 40 * 3 + 13 + 2 * 13), ("plain", 101)])
def test_the_size_of_a_share_is_the_number_of_its_samples(kind: str, total: int) -> None:
    answers = processes(3)(own, kind)
    assert all(size == count for answer in answers for size, count in answer)
    assert len({len(answer) for answer in answers}) == 1
    assert sum(size for answer in answers for size, _ in answer) == total


def reordered() -> None:
    shards = [[10 * number, 10 * number + 1] for number in range(40)]
    list(Loader(Parts(shards[::-1] if rank() else shards), batch_size=16).batches())


def test_shards_in_another_order_are_refused() -> None:
    with pytest.raises(RuntimeError, match="Parts gives different samples in the processes of rank 0 and 1"):
        processes(2)(reordered)


def sharded(how: str, drop_last: bool) -> None:
    torch.manual_seed(0)
    tasks = [mtl.Task("a", head=nn.Linear(4, 1), loss=nn.MSELoss(), target="y")]
    model = mtl.MultiTaskModel(nn.Sequential(nn.Linear(2, 4), nn.ReLU()), tasks, inputs=["x"])
    mtl.distributed.prepare(model, how)
    step = mtl.Step(model, tasks, torch.optim.SGD(model.parameters(), lr=0.1))
    loader: Any = Loader(data_set("parts", []), batch_size=16, shuffle=True, steps=25, drop_last=drop_last)
    check_shares(step, loader)
    sizes = []
    for batch, size in loader.sized_batches(1):
        sizes.append(size)
        step({"x": batch["x"], "y": batch["x"].sum(1, keepdim=True)})
    loader.close()
    assert how == "ddp" or set(sizes) == {16}


def test_small_last_batches_of_a_sharded_model_are_refused() -> None:
    with pytest.raises(RuntimeError, match=r"Parts may have too few\. Set trainer\.tail=drop"):
        processes(2)(sharded, "fsdp", False)
    processes(2)(sharded, "fsdp", True)
    processes(3)(sharded, "fsdp", True)
    processes(2)(sharded, "ddp", False)
