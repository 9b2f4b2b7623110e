"""Records and reports of losses and gradients that aren't finite."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mtl.data import Loader, Mix
from mtl.errors import NotFinite, UserError, first_line
from mtl.safety.regular import regular
from mtl.step import StepResult

TOO_MANY = 10  # the number of successive steps with a value that isn't finite after which training ends
TOO_MANY_OVERFLOWS = 60  # the number of successive fp16 overflows, each of which halves the scale


class Place(NamedTuple):
    """A step: the number of the step, the epoch, and the number of the batch in the epoch."""

    step: int
    epoch: int
    batch: int


class Faults:
    """Records and reports the steps in which a loss or a gradient wasn't finite.

    Args:
        path: The file that gets a line of JSON for each such step; None for no file.
        train: The loader of the training data.
        report: Called with a message for each step that was skipped, or in which a task was left out.
    """

    def __init__(self, path: Path | None, train: Loader | Mix, report: Callable[[str], None]) -> None:
        self.path = path
        self._train = train
        self._report = report
        self._in_a_row = 0  # the number of successive steps with a value that wasn't finite
        self._overflows = 0  # the number of successive steps that were skipped because of an fp16 overflow

    def note(self, place: Place, nonfinite: Mapping[str, str], done: str, *, all_at_once: bool = False) -> NotFinite:
        """Records a step in which a loss or a gradient wasn't finite.

        Args:
            place: The step.
            nonfinite: What wasn't finite, by task name.
            done: How the training reacts, for the record.
            all_at_once: Whether no task's loss was finite, as after an update with a gradient that wasn't finite.

        Returns:
            The error, with the numbers of the samples in its message.
        """
        samples = self._train.samples(place.epoch, place.batch)
        if self.path is not None:
            line = {
                "step": place.step,
                "epoch": place.epoch,
                "tasks": dict(nonfinite),
                "done": done,
                "samples": samples,
            }
            try:
                with open(self.path, "a", encoding="utf-8", opener=regular) as file:
                    file.write(json.dumps(line) + "\n")
            except OSError as error:
                self._report(f"error    {self.path} can't be written: {first_line(error)}")
        where = f" at step {place.step} (epoch {place.epoch}, samples {_shortened(samples)})"
        if all_at_once and place.batch > 0:  # the data of one batch seldom affect all tasks
            before = _shortened(self._train.samples(place.epoch, place.batch - 1))
            where += f"; maybe by the gradient of the step before, samples {before}"
        return NotFinite(nonfinite, where)

    def check(self, place: Place, result: StepResult) -> None:
        """Checks the result of a step, and reports whether the step was skipped or a task was left out.

        Raises:
            UserError: If there were too many such steps in succession.
        """
        self._in_a_row = self._in_a_row + 1 if result.nonfinite else 0
        self._overflows = self._overflows + 1 if result.losses and not result.taken else 0
        if self._overflows >= TOO_MANY_OVERFLOWS:
            raise UserError(
                f"precision: {self._overflows} steps in a row gave no finite gradient in fp16, whatever the scale (at "
                f"step {place.step}, epoch {place.epoch}); check the losses for infinite gradients, or use bf16"
            )
        if not result.nonfinite:
            return
        done = "left out of the step" if result.taken else "the step was skipped"
        error = self.note(place, result.nonfinite, done)
        if self._in_a_row >= TOO_MANY:
            raise UserError(f"{TOO_MANY} steps in a row: {error}")
        self._report(f"warning  {error.summary}; {done}")

    def state_dict(self) -> dict[str, Any]:
        """Returns the counters and the length of the file."""
        size = self.path.stat().st_size if self.path is not None and self.path.exists() else 0
        return {"size": size, "in_a_row": self._in_a_row, "overflows": self._overflows}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a state from `state_dict`, and removes later lines from the file."""
        self._in_a_row, self._overflows = state["in_a_row"], state["overflows"]
        if self.path is not None and self.path.exists():
            with open(self.path, "r+b", opener=regular) as file:
                file.truncate(min(state["size"], self.path.stat().st_size))


def _shortened(samples: Sequence[int] | Mapping[str, Sequence[int]]) -> str:
    if isinstance(samples, Mapping):
        return "; ".join(f"of {source}: {_shortened(numbers)}" for source, numbers in samples.items())
    shown = ", ".join(map(str, samples[:8]))
    return f"{shown} …" if len(samples) > 8 else shown
