"""The base class of loggers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class Refusal(Exception):
    """Raised where a logger's store never takes some of what it was given; the rest has been logged."""


class Logger:
    """Is given a run's figures. A logger overrides what it takes; all methods do nothing here.

    A method that raises an `OSError` is reported once, and is called again later; the training goes on. Whatever a
    logger draws from the random generators changes no draw of the training.

    Args:
        folder: the run's.
        tasks: the tasks' names.
    """

    def __init__(self, folder: Path, tasks: Sequence[str]) -> None:
        pass

    def begin(self, config: str, options: Mapping[str, Any], swept: Sequence[str], finals: Sequence[str]) -> None:
        """Takes what describes the run, before its first step.

        Args:
            config: the whole config as YAML.
            options: what distinguishes the run from others, by key.
            swept: the keys that the sweep goes over.
            finals: the tags of the run's results.
        """

    def log(self, step: int, epoch: int, scalars: Mapping[str, float]) -> None:
        """Takes scalars.

        Args:
            step: optimizer steps so far.
            epoch: from 1.
            scalars: by tag, see `mtl.tags`.
        """

    def picture(self, tag: str, step: int, picture: Any) -> None:
        """Takes a picture: an array (H, W, 3) of uint8."""

    def histogram(self, tag: str, step: int, values: Any) -> None:
        """Takes the values of a histogram: a tensor of any shape."""

    def flush(self) -> None:
        """Writes what was held back, before `state_dict` is called."""

    def state_dict(self) -> Any:
        """How far the logger has come, for a checkpoint: plain types; None for nothing."""
        return None

    def load_state_dict(self, state: Any) -> None:
        """Removes what was logged after that state, so that a run that is resumed logs nothing twice."""

    def end(self) -> None:
        """Called when the run is finished."""

    def fail(self) -> None:
        """Called when the run has failed."""

    def close(self) -> None:
        """Writes what was held back, and closes files and connections."""
