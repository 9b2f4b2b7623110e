"""Dropout differs between the processes; the order of the data and their random draws are those of one process."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from processes import processes
from test_schema import composed
from torch import Tensor, nn
from torch.utils.data import Dataset

from mtl import schema
from mtl.cli import processes as launched
from mtl.data import Splits

COUNT, EPOCHS = 11, 2
SIZES = [4, 4, 3] * EPOCHS  # of the batches; with three processes, the last one of an epoch has one sample in each
UNITS = 48
RECORD: list[tuple[list[Any], list[Any]]] = []  # by step, the pictures and the masks of this process


class Augmented(Dataset[Any]):
    """Pictures that begin with their number, shifted and mirrored at random, and with noise."""

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> dict[str, Any]:
        picture = torch.arange(12.0).view(1, 3, 4).roll(int(torch.randint(4, ())), 2)
        picture = picture.flip(1) if random.random() < 0.5 else picture
        noise = torch.from_numpy(np.random.rand(1, 3, 4)).float()
        first = torch.full((1, 1, 4), float(index))
        return {"image": torch.cat([first, picture + noise], 1), "digit": index % 3, "parity": index % 2}


def augmented() -> Splits:
    return Splits(Augmented(), None, None, name="augmented pictures")


class Watched(nn.Module):
    """A trunk that keeps the pictures and the dropout masks of its last forward pass."""

    num_features = UNITS

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, UNITS)
        self.dropout = nn.Dropout(0.5)
        self.last: tuple[list[Any], list[Any]] = ([], [])

    def forward(self, image: Tensor) -> Tensor:
        mask = self.dropout(torch.ones(len(image), UNITS))
        self.last = image.flatten(1).tolist(), mask.tolist()
        return self.linear(image.flatten(1)) * mask


class Record:
    """A callback that notes what the trunk has kept; nothing, if the process had no samples in the step."""

    def __call__(self, trainer: Any, result: Any) -> None:
        trunk = trainer.step.model.trunk
        RECORD.append(trunk.last)
        trunk.last = ([], [])


def trained(config: dict[str, Any], folder: Path) -> list[tuple[list[Any], list[Any]]]:
    """Trains as the command line does in a process of torchrun, and returns the record of this process."""
    RECORD.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launched, "check_same_arguments", lambda: None)  # spawned processes have arguments of their own
        assert launched.train_along(config, [], None, str(folder)) == 0
    return list(RECORD)


def config_of(*overrides: str) -> dict[str, Any]:
    settings = ("task=mnist_two_head", "data.batch_size=4", "data.eval_batch_size=4", "log.pictures=null", *overrides)
    config: Any = OmegaConf.to_container(composed(f"trainer.max_epochs={EPOCHS}", *settings), resolve=False)
    own = {key: config["data"][key] for key in ("batch_size", "eval_batch_size", "num_workers")}
    config["data"] = {"_target_": f"{__name__}.augmented", **own}
    config["model"]["trunk"] = {"_target_": f"{__name__}.Watched"}
    config["callbacks"] = {"record": {"_target_": f"{__name__}.Record"}}
    return schema.check(OmegaConf.create(config))


def test_pictures_are_those_of_one_process_and_masks_are_not(tmp_path: Path) -> None:
    config = config_of()
    pictures = [step for step, _ in trained(config, tmp_path / "1")]
    assert [len(step) for step in pictures] == SIZES
    numbers = [[int(picture[0]) for step in pictures[a:b] for picture in step] for a, b in ((0, 3), (3, 6))]
    assert numbers[0] != numbers[1]
    assert all(sorted(epoch) == list(range(COUNT)) for epoch in numbers)
    assert len({tuple(picture[4:]) for step in pictures for picture in step}) == EPOCHS * COUNT  # new draws each time
    for world in (2, 3):
        of_ranks = processes(world)(trained, config, tmp_path / str(world))
        for number, expected in enumerate(pictures):
            joined: list[Any] = [None] * len(expected)
            for rank, steps in enumerate(of_ranks):
                joined[rank::world] = steps[number][0]
            assert joined == expected
        masks = [tuple(mask) for steps in of_ranks for _, of_step in steps for mask in of_step]
        assert len(set(masks)) == len(masks) == EPOCHS * COUNT  # no two samples of any processes and steps have one
