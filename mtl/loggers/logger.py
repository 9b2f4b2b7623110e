"""The base class of loggers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class Refusal(Exception):
    """Raised if a logger's backend permanently rejects some of the values; the other values have been logged."""


class Logger:
    """The base class of loggers. All methods do nothing; a logger overrides those that it needs.

    If a method raises an `OSError`, the error is reported once, the training goes on, and the method is called again
    later. Random numbers that a logger draws don't affect the training.

    Args:
        folder: The folder of the run.
        tasks: The names of the tasks.
    """

    def __init__(self, folder: Path, tasks: Sequence[str]) -> None:
        pass

    def begin(self, config: str, options: Mapping[str, Any], swept: Sequence[str], finals: Sequence[str]) -> None:
        """Logs the description of the run, before the first step.

        Args:
            config: The whole config as YAML.
            options: The options that distinguish the run from others, by key.
            swept: The keys that the sweep varies.
            finals: The tags of the run's results.
        """

    def log(self, step: int, epoch: int, scalars: Mapping[str, float]) -> None:
        """Logs scalars.

        Args:
            step: The number of optimizer steps so far.
            epoch: The epoch, counted from 1.
            scalars: The values by tag, see `mtl.tags`.
        """

    def picture(self, tag: str, step: int, picture: Any) -> None:
        """Logs a picture: a uint8 array (H, W, 3)."""

    def histogram(self, tag: str, step: int, values: Any) -> None:
        """Logs the values of a histogram: a tensor of any shape."""

    def flush(self) -> None:
        """Writes buffered values; called before `state_dict`."""

    def state_dict(self) -> Any:
        """Returns the logger's progress for a checkpoint, in plain types; None if there is no state."""
        return None

    def load_state_dict(self, state: Any) -> None:
        """Removes what was logged after the state was saved, so that a resumed run logs nothing twice."""

    def end(self) -> None:
        """Called when the run has finished."""

    def fail(self) -> None:
        """Called when the run has failed."""

    def close(self) -> None:
        """Writes buffered values, and closes files and connections."""
