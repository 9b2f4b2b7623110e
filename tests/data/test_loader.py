"""Batches: their order depends on seed and epoch alone, and they are the same however they are loaded."""

import pytest
import torch
from torch.utils.data import Dataset

import mtl
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


def test_collate_makes_the_batches() -> None:
    def flat(samples: list[dict[str, torch.Tensor]]) -> dict[str, object]:
        return {"rows": torch.cat([sample["x"] for sample in samples]), "names": [int(s["y"]) for s in samples]}

    for dataset in (FIELDS, Samples()):
        batches = list(Loader(dataset, batch_size=4, collate=flat).batches())
        assert [batch["names"] for batch in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
        assert batches[2]["rows"].tolist() == [8, 9]
    with pytest.raises(mtl.UserError, match=r"data\.collate gives a list; a batch must be a dict of fields"):
        list(Loader(Samples(), batch_size=4, collate=list).batches())


class Broken(Samples):
    def __init__(self, error: Exception) -> None:
        self.error = error

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if index == 7:
            raise self.error
        return super().__getitem__(index)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_what_went_wrong_in_a_worker_is_told(num_workers: int) -> None:
    with pytest.raises(mtl.UserError) as error:
        list(Loader(Broken(mtl.UserError("7.jpg is damaged")), batch_size=4, num_workers=num_workers).batches())
    assert str(error.value) == "data: a batch of Broken can't be loaded: 7.jpg is damaged"
    with pytest.raises(mtl.UserError, match=r"a batch of Broken can't be loaded: RuntimeError: no more"):
        list(Loader(Broken(RuntimeError("no more")), batch_size=4, num_workers=num_workers).batches())
