"""Batches: their order depends on seed and epoch alone, and they are the same however they are loaded."""

import pytest
import torch
from torch.utils.data import Dataset

from mtl.data import Fields, Loader

FIELDS = Fields({"x": torch.arange(10.0).view(10, 1), "y": torch.arange(10)})


class Samples(Dataset):
    """The same data, sample by sample."""

    def __len__(self) -> int:
        return len(FIELDS)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        worker = torch.utils.data.get_worker_info()
        return {**FIELDS[index], "in_worker": torch.tensor(worker is not None)}


def order(loader: Loader, epoch: int) -> list[list[int]]:
    return [batch["y"].tolist() for batch in loader.batches(epoch)]


def test_every_sample_once_and_a_short_last_batch() -> None:
    loader = Loader(FIELDS, batch_size=4, shuffle=True)
    batches = order(loader, 1)
    assert len(loader) == 3
    assert [len(b) for b in batches] == [4, 4, 2]
    assert sorted(sum(batches, [])) == list(range(10))
    assert order(Loader(FIELDS, batch_size=4), 1) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_order_depends_on_seed_and_epoch_alone() -> None:
    first = order(Loader(FIELDS, batch_size=4, shuffle=True, seed=3), 2)
    loader = Loader(FIELDS, batch_size=4, shuffle=True, seed=3)
    order(loader, 1)
    torch.rand(5)
    assert order(loader, 2) == first
    assert order(loader, 1) != first
    assert order(Loader(FIELDS, batch_size=4, shuffle=True, seed=4), 2) != first


@pytest.mark.parametrize("num_workers", [0, 2])
def test_samples_through_a_dataloader_come_as_the_fields_do(num_workers: int) -> None:
    draws = torch.get_rng_state()
    memory = Loader(FIELDS, batch_size=4, shuffle=True, seed=3)
    loaded = Loader(Samples(), batch_size=4, shuffle=True, seed=3, num_workers=num_workers)
    for epoch in (1, 2):
        for expected, batch in zip(memory.batches(epoch), loaded.batches(epoch), strict=True):
            assert torch.equal(expected["x"], batch["x"])
            assert torch.equal(expected["y"], batch["y"])
            assert batch["in_worker"].all() == (num_workers > 0)
    assert torch.equal(draws, torch.get_rng_state())  # nothing is drawn from the generator that training draws from
