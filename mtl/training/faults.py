"""Losses and gradients that aren't finite: in which batch they were, and whether anything else still happens."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mtl.data import Loader, Mix
from mtl.errors import NotFinite, UserError, first_line
from mtl.safety.regular import regular
from mtl.step import StepResult

TOO_MANY = 10  # steps in a row in which something isn't finite: it won't get better by itself
TOO_MANY_OVERFLOWS = 60  # halving the scale so often makes 1 of 2^60


class Place(NamedTuple):
    """A step: its number, the epoch, and the number of its batch in that."""

    step: int
    epoch: int
    batch: int


class Faults:
    """Writes down and reports what wasn't finite.

    Args:
        path: of the file that has a line of JSON for each case; None for no file.
        train: whose batches they are.
        report: is given a line for each step that was skipped, as a whole or in a part.
    """

    def __init__(self, path: Path | None, train: Loader | Mix, report: Callable[[str], None]) -> None:
        self.path = path
        self._train = train
        self._report = report
        self._in_a_row = 0  # steps with something that wasn't finite
        self._overflows = 0  # steps that fp16 overflow kept from being taken

    def note(self, place: Place, found: Mapping[str, str], done: str, *, all_at_once: bool = False) -> NotFinite:
        """Writes down in which batch something wasn't finite; gives the error that says so.

        Args:
            place: the step.
            found: from the tasks' names to what was found.
            done: what is done about it.
            all_at_once: whether no task's loss was finite, as after a gradient that wasn't.
        """
        samples = self._train.samples(place.epoch, place.batch)
        if self.path is not None:
            line = {"step": place.step, "epoch": place.epoch, "tasks": dict(found), "done": done, "samples": samples}
            try:
                with open(self.path, "a", encoding="utf-8", opener=regular) as file:
                    file.write(json.dumps(line) + "\n")
            except OSError as error:
                self._report(f"error    {self.path} can't be written: {first_line(error)}")
        where = f" at step {place.step} (epoch {place.epoch}, samples {_shortened(samples)})"
        if all_at_once and place.batch > 0:  # one batch's data seldom spoil all tasks
            before = _shortened(self._train.samples(place.epoch, place.batch - 1))
            where += f"; maybe by the gradient of the step before, samples {before}"
        return NotFinite(found, where)

    def look(self, place: Place, result: StepResult) -> None:
        """Tells what was skipped in the step.

        Raises:
            UserError: for too many such steps in a row.
        """
        self._in_a_row = self._in_a_row + 1 if result.nonfinite else 0
        self._overflows = self._overflows + 1 if result.losses and not result.taken else 0
        if self._overflows >= TOO_MANY_OVERFLOWS:
            raise UserError(
                f"precision: {self._overflows} steps in a row gave no finite gradient in fp16, whatever the scale (at "
                f"step {place.step}, epoch {place.epoch}); look for infinite slopes in the losses, or take bf16"
            )
        if not result.nonfinite:
            return
        done = "left out of the step" if result.taken else "the step was skipped"
        error = self.note(place, result.nonfinite, done)
        if self._in_a_row >= TOO_MANY:
            raise UserError(f"{TOO_MANY} steps in a row: {error}")
        self._report(f"warning  {error.told}; {done}")

    def state_dict(self) -> dict[str, Any]:
        """How far it has come, the length of the file included."""
        size = self.path.stat().st_size if self.path is not None and self.path.exists() else 0
        return {"size": size, "in_a_row": self._in_a_row, "overflows": self._overflows}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Forgets what was written after that state."""
        self._in_a_row, self._overflows = state["in_a_row"], state["overflows"]
        if self.path is not None and self.path.exists():
            with open(self.path, "r+b", opener=regular) as file:
                file.truncate(min(state["size"], self.path.stat().st_size))


def _shortened(samples: Sequence[int] | Mapping[str, Sequence[int]]) -> str:
    if isinstance(samples, Mapping):
        return "; ".join(f"of {source}: {_shortened(its)}" for source, its in samples.items())
    shown = ", ".join(map(str, samples[:8]))
    return f"{shown} …" if len(samples) > 8 else shown
