"""What several processes get of a stream: the sizes of their shares, and what is refused."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from processes import processes
from streams_by_hand import Parts, Plain, data_set
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


def reordered(how: str) -> None:
    """Reads shards of which the process of rank 1 has another list."""
    shards = [[10 * number, 10 * number + 1] for number in range(40)]
    if rank() == 1:
        lists = {
            "reversed": shards[::-1],
            "sorted as texts": [shards[int(name)] for name in sorted(map(str, range(40)))],
            "one missing and another one added": shards[:10] + shards[11:31] + [[1000]] + shards[31:],
            "fewer": shards[:9],
        }
        shards = lists.get(how, shards)
    list(Loader(Parts(shards), batch_size=16, readers={"processes": 2}).batches())


OTHERS = ["reversed", "sorted as texts", "one missing and another one added", "fewer"]


@pytest.mark.parametrize("how", OTHERS)
def test_shards_in_another_order_are_refused(how: str) -> None:
    with pytest.raises(RuntimeError, match="Parts gives different samples in the processes of rank 0 and 1"):
        processes(2)(reordered, how)


def test_shards_in_the_same_order_are_read() -> None:
    processes(2)(reordered, "the same")


class Turns(Plain):
    """Samples that differ in the process of rank 1 after some batches."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for number in range(self.total):
            yield {"number": number, "x": torch.full((2,), float(rank() if number > 50 else 0))}


def turns(total: int, how: str) -> None:
    data: Any = Turns(total) if how == "differ" else Plain(total)
    list(Loader(data, batch_size=2, shuffle=True, num_workers=0).batches())


def test_samples_that_differ_later_are_refused() -> None:
    with pytest.raises(RuntimeError, match="Turns gives different samples in the processes of rank 0 and 1"):
        processes(2)(turns, 100, "differ")
    processes(2)(turns, 100, "same")


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
