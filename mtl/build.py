"""Builds everything that a config describes, in a fixed order for training, evaluation and inspection."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mtl.config.data import build_loaders, build_splits, check_facts, fill_from_data
from mtl.config.device import choose_device
from mtl.config.model import build_model
from mtl.config.targets import add_code_folders
from mtl.config.tasks import build_tasks
from mtl.data import Loader, Mix, Sources, Splits
from mtl.distributed import prepare, sync_batchnorm
from mtl.errors import UserError
from mtl.model import MultiTaskModel
from mtl.process.seeding import seed_all, use_deterministic_algorithms
from mtl.runs import loading as runs
from mtl.runs.resume import Refused
from mtl.step.lazy import materialise
from mtl.task import Task


@dataclass
class Built:
    """A problem built from a config.

    Attributes:
        config: The config, with values that depend on the data filled in.
        splits: The data.
        loaders: The data loaders, by split.
        tasks: The tasks, in the order of the config.
        model: The model on the device, with the parameters of `init_from` if the config names a run.
        device: The device of model and batches.
    """

    config: dict[str, Any]
    splits: Splits | Sources
    loaders: dict[str, Loader | Mix]
    tasks: list[Task]
    model: MultiTaskModel
    device: torch.device

    @property
    def total_steps(self) -> int:
        """The number of optimizer steps in the whole training."""
        epochs: int = self.config["trainer"]["max_epochs"]
        return len(self.loaders["train"]) * epochs


def build(
    config: dict[str, Any],
    *,
    code_folders: Sequence[str],
    trained_on: Mapping[str, Any] | None = None,
    loaded: bool = False,
    report: Callable[[str], None] = print,
) -> Built:
    """Seeds the random generators and builds the problem.

    Args:
        config: The checked config.
        code_folders: Folders with the user's own modules.
        trained_on: The facts of the data on which the parameters to be loaded were trained.
        loaded: Whether parameters will be loaded, which also determine the shapes of lazy modules. Otherwise the first
            training batch determines these shapes.
        report: A function that receives a line for each part of `init_from`.

    Raises:
        UserError: If something can't be built; the message names the place in the config.
        Refused: If the data differ from those of the training.
    """
    add_code_folders(code_folders)
    use_deterministic_algorithms(config["deterministic"])
    device = choose_device(config["device"])
    seed_all(config["seed"])
    splits = build_splits(config)
    if trained_on is not None:
        try:
            check_facts(splits, trained_on)
        except UserError as error:
            raise Refused(str(error)) from error
    config = fill_from_data(config, splits)
    seed_all(config["seed"])  # so that random draws of the data don't affect the model
    loaders = build_loaders(config, splits, device)
    tasks = build_tasks(config, splits)
    model = build_model(config, tasks).to(device)
    if not loaded:
        materialise(model, tasks, loaders["train"])
        if config["model"].get("sync_batchnorm"):
            sync_batchnorm(model)  # of layers that were lazy
    if config["init_from"] is not None:
        for line in runs.start_from(model, config["init_from"]):
            report(f"init     {line}")
    how = config.get("distributed", "auto")
    prepare(model, "ddp" if how == "auto" else how)
    return Built(config, splits, loaders, tasks, model, device)
