"""All figures as TensorBoard events."""

import os
import re
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class TensorBoardLogger:
    """Writes scalars by their tags, and a layout with one chart each for all tasks' losses, gradient norms, weights
    and cosines.

    Args:
        folder: the run's; the events go to its subfolder `tensorboard`.
        tasks: the tasks' names.
    """

    def __init__(self, folder: Path, tasks: Sequence[str]) -> None:
        self._folder = folder / "tensorboard"
        self._tasks = tasks
        self._writer: SummaryWriter | None = None
        self._records = 0  # in the events files, from whichever process

    def log(self, step: int, epoch: int, scalars: Mapping[str, float]) -> None:
        """Writes each scalar at this step."""
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter  # imported when the first step has been taken

            self._writer = SummaryWriter(str(self._folder))
            self._writer.add_custom_scalars(layout(self._tasks))
            self._records += 2  # a file begins with its version
        self._records += len(scalars)
        for tag, value in scalars.items():
            self._writer.add_scalar(tag, value, step)

    def state(self) -> int:
        """How many records there are."""
        if self._writer is not None:
            self._writer.flush()
        return self._records

    def resume(self, state: int) -> None:
        """Keeps the first so many records of the run's event files, and forgets what was written after them."""
        from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
        from tensorboard.summary.writer.record_writer import RecordWriter

        whole = self._folder / "whole.tmp"  # none of the events' names, should the process be killed here
        whole.unlink(missing_ok=True)
        files = sorted(self._folder.glob("events.out.tfevents.*"))
        kept: list[bytes] = []
        for path in files:
            for record in RawEventFileLoader(str(path)).Load():
                if len(kept) < state:
                    kept.append(record)
        self._records = len(kept)
        if files:
            with whole.open("wb") as file:
                writer = RecordWriter(file)
                for record in kept:
                    writer.write(record)
                writer.flush()
                os.fsync(file.fileno())
            # TensorBoard reads files in the order of their names, whose first part is the second they were begun in.
            kept_in = self._folder / "events.out.tfevents.0000000000.kept"
            whole.replace(kept_in)
            for path in files:  # one that stays behind is cut off the next time: its records come after these
                if path != kept_in:
                    path.unlink()

    def close(self) -> None:
        """Writes out what the writer holds back."""
        if self._writer is not None:
            self._writer.close()


def layout(tasks: Sequence[str]) -> dict[str, dict[str, list[object]]]:
    """TensorBoard's custom-scalar layout: charts by name, each with the regular expressions of its tags."""

    def chart(*wanted: str) -> list[object]:
        return ["Multiline", [f"^{re.escape(tag)}$" for tag in wanted]]

    charts = {f"loss ({split})": chart(*(f"loss/{t}/{split}" for t in tasks)) for split in ("train", "val")}
    charts["gradient norm"] = chart(*(f"grad_norm/{t}" for t in tasks), "grad_norm/total")
    charts["weight"] = chart(*(f"weight/{t}" for t in tasks))
    if len(tasks) > 1:
        charts["cosine"] = chart(*(f"cosine/{a}~{b}" for a, b in combinations(tasks, 2)))
    return {"tasks": charts}
