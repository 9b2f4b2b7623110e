"""Everything that a config describes, built in one order: whoever trains, evaluates or looks has the same."""

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
from mtl.errors import UserError
from mtl.model import MultiTaskModel
from mtl.process.seeding import seed_all, use_deterministic_algorithms
from mtl.runs import loading as runs
from mtl.runs.resume import Refused
from mtl.step.lazy import materialise
from mtl.task import Task


@dataclass
class Built:
    """A problem that is there.

    Attributes:
        config: with what only the data know in its place.
        splits: the data.
        loaders: by split.
        tasks: in the config's order.
        model: on the device, with the parameters of `init_from` where the config names a run.
        device: where batches and model are.
    """

    config: dict[str, Any]
    splits: Splits | Sources
    loaders: dict[str, Loader | Mix]
    tasks: list[Task]
    model: MultiTaskModel
    device: torch.device

    @property
    def total_steps(self) -> int:
        """The optimizer steps of the whole training."""
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
    """Seeds the generators and builds the problem.

    Args:
        config: checked.
        code_folders: where the user's own modules are.
        trained_on: the facts of the data that parameters are to go on with, or to be measured on.
        loaded: whether the model's parameters will be loaded, with the shapes that lazy modules wait for. Else the
            training's first batch gives these.
        report: is given a line for each part of `init_from`.

    Raises:
        UserError: for whatever can't be built, with its place in the config.
        Refused: where the data aren't those that were trained on.
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
    seed_all(config["seed"])  # what the data drew, validation's too, makes no other model
    loaders = build_loaders(config, splits, device)
    tasks = build_tasks(config, splits)
    model = build_model(config, tasks).to(device)
    if not loaded:
        materialise(model, tasks, loaders["train"])
    if config["init_from"] is not None:
        for line in runs.start_from(model, config["init_from"]):
            report(f"init     {line}")
    return Built(config, splits, loaders, tasks, model, device)
