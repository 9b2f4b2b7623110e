"""Builds the config's trainer, with its callbacks and loggers."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtl.config.targets import make
from mtl.distributed import rank
from mtl.loggers import Loggers
from mtl.process.seeding import preserved_generators
from mtl.step import Step
from mtl.training.gallery import Gallery
from mtl.training.hooks import Hooks
from mtl.training.options import Checkpoints, Logs
from mtl.training.selection import Criterion
from mtl.training.trainer import Trainer

if TYPE_CHECKING:
    from mtl.build import Built


def build_callbacks(config: Mapping[str, Any]) -> list[Any]:
    """Builds the config's callbacks. Random numbers that are drawn meanwhile don't affect the training."""
    with preserved_generators():
        return [make(node, f"callbacks.{key}") for key, node in (config["callbacks"] or {}).items()]


def build_loggers(config: Mapping[str, Any], folder: Path, names: Sequence[str]) -> list[Any]:
    """Builds the config's loggers. Random numbers that are drawn meanwhile don't affect the training.

    Args:
        config: The config of the run.
        folder: The folder that the loggers write to.
        names: The names of the tasks.
    """
    with preserved_generators():
        return [make(node, f"logger.{key}", folder, names) for key, node in (config["logger"] or {}).items()]


def build_trainer(
    problem: "Built", step: Step, hooks: Hooks, loggers: Loggers, folder: Path, more: Mapping[str, Any]
) -> Trainer:
    """Builds the trainer that the config describes.

    Args:
        problem: The config, with the data, tasks and model that were built from it.
        step: The optimizer step of the training.
        hooks: Callbacks after each step; callbacks for pictures and histograms after each epoch are added.
        loggers: Loggers for all metrics, through which the trainer also reports problems.
        folder: The folder of the run.
        more: Plain data to be stored in each checkpoint, in addition to the trainer's state.
    """
    config, loaders = problem.config, problem.loaders
    log, checkpoint = config["log"], config["checkpoint"]
    gallery = Gallery(
        loaders.get("val", loaders.get("test")),
        pictures_every=log["pictures"],
        histograms_every=log["histograms"],
        facts=problem.splits.facts,
    )
    return Trainer(
        step,
        loaders["train"],
        loaders.get("val"),
        test=loaders.get("test"),
        max_epochs=config["trainer"]["max_epochs"],
        checkpoints=Checkpoints(
            folder / "checkpoints",
            every_steps=checkpoint["every_steps"],
            every_minutes=checkpoint["every_minutes"],
            keep=None if checkpoint["keep"] == "all" else checkpoint["keep"],
            best=checkpoint["best"],
            more=more,
            timeout=config["trainer"].get("timeout"),
        ),
        criterion=Criterion(
            config["trainer"]["monitor"], config["trainer"]["patience"], config["trainer"].get("last_epochs")
        ),
        hooks=replace(hooks, after_epoch=[*hooks.after_epoch, gallery]),
        logs=Logs(
            loggers,
            every=log["every"],
            report=loggers.report,
            nonfinite=folder / "nonfinite.jsonl" if rank() == 0 else None,
        ),
    )
