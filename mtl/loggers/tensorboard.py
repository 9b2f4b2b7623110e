"""All figures as TensorBoard events."""

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtl import tags
from mtl.files import fill, temporary
from mtl.loggers import hparams
from mtl.loggers.events import summary_writer
from mtl.loggers.logger import Logger
from mtl.safety.regular import check_kind

if TYPE_CHECKING:
    from torch import Tensor
    from torch.utils.tensorboard import SummaryWriter


class TensorBoardLogger(Logger):
    """Writes scalars by tag, pictures and histograms; a layout with one chart each for all tasks' losses, metrics,
    gradient norms, weights and cosines; the config as text; and the options and final figures for the HParams tab.

    Args:
        folder: the run's, so that its name is what TensorBoard calls the run.
        tasks: the tasks' names.
    """

    def __init__(self, folder: Path, tasks: Sequence[str]) -> None:
        self._folder = folder
        self._tasks = tasks
        self._writer: SummaryWriter | None = None
        self._records = 0  # in the events files, from whichever process
        self._config = ""
        self._options: Mapping[str, hparams.Value] = {}
        self._swept: Sequence[str] = ()
        self._finals: Sequence[str] = ()

    def begin(
        self, config: str, options: Mapping[str, hparams.Value], swept: Sequence[str], finals: Sequence[str]
    ) -> None:
        """Takes what the run is, before anything is logged.

        Args:
            config: as YAML.
            options: by name, see `mtl.loggers.options`.
            swept: the names of those that a multirun sweeps over.
            finals: the tags of the figures that the finished run is to be known by.
        """
        self._config = config
        self._options = options
        self._swept = swept
        self._finals = finals

    def log(self, step: int, epoch: int, scalars: Mapping[str, float]) -> None:
        """Writes each scalar at this step."""
        writer = self._open()
        self._records += len(scalars)
        for tag, value in scalars.items():
            writer.add_scalar(tag, value, step)
        writer.flush()

    def picture(self, tag: str, step: int, picture: Any) -> None:
        """Writes an image (H, W, 3), uint8."""
        self._open().add_image(tag, picture, step, dataformats="HWC")
        self._records += 1

    def histogram(self, tag: str, step: int, values: "Tensor") -> None:
        """Writes the values' histogram."""
        self._open().add_histogram(tag, values, step)
        self._records += 1

    def end(self) -> None:
        """Notes that the run is finished."""
        if self._options:
            self._write([hparams.ending()])

    def _open(self) -> "SummaryWriter":
        if self._writer is None:
            new = not self._records
            self._writer = summary_writer(self._folder)  # torch's is imported when the first step has been taken
            self._records += 1  # a file begins with its version
            if new:
                self._writer.add_custom_scalars(layout(self._tasks, self._finals))
                self._records += 1
                if self._config:
                    self._writer.add_text("config", f"```yaml\n{self._config}\n```", 0)
                    self._records += 1
                if self._options:
                    self._write(hparams.beginning(self._options, self._swept, self._finals))
        return self._writer

    def _write(self, summaries: Sequence[Any]) -> None:
        writer = self._open()
        for summary in summaries:
            assert writer.file_writer is not None
            writer.file_writer.add_summary(summary)
            self._records += 1

    def flush(self) -> None:
        """Writes what was held back."""
        if self._writer is not None:
            self._writer.flush()

    def state_dict(self) -> int:
        """How many records there are."""
        return self._records

    def load_state_dict(self, state: int) -> None:
        """Keeps the first so many records of the run's event files, and forgets what was written after them."""
        from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
        from tensorboard.summary.writer.record_writer import RecordWriter

        files = sorted(self._folder.glob("events.out.tfevents.*"))
        kept: list[bytes] = []
        for path in files:
            check_kind(path)
            with suppress(MemoryError, OverflowError):  # a record that claims to be longer than there is memory
                for record in RawEventFileLoader(str(path)).Load():
                    if len(kept) < state:
                        kept.append(record)
        self._records = len(kept)
        if files:
            # TensorBoard reads files in the order of their names, whose first part is the second they were begun in.
            kept_in = self._folder / "events.out.tfevents.0000000000.kept"
            with temporary(self._folder / "whole.tmp") as whole:  # none of the events' names, should it stay there
                fill(whole, lambda file: _write_all(RecordWriter(file), kept))
                whole.replace(kept_in)
            for path in files:  # one that stays behind is cut off the next time: its records come after these
                if path != kept_in:
                    path.unlink()

    def close(self) -> None:
        """Writes out what the writer holds back."""
        if self._writer is not None and self._writer.file_writer is not None:
            self._writer.file_writer.close()  # the writer itself would leave it open on a full disk


def _write_all(writer: Any, records: Sequence[bytes]) -> None:
    for record in records:
        writer.write(record)


def layout(tasks: Sequence[str], finals: Sequence[str] = ()) -> dict[str, dict[str, list[object]]]:
    """TensorBoard's custom-scalar layout: charts by name, each with the regular expressions of its tags.

    They name no task, so that runs of other tasks beside this one have the same charts.

    Args:
        tasks: their names.
        finals: tags of final figures; a metric's tasks have a chart together, since they are of one unit.
    """

    def chart(wanted: str) -> list[object]:
        return ["Multiline", [f"^{wanted}$"]]

    charts = {f"loss ({split})": chart(tags.loss("[^/]+", split)) for split in ("train", "val")}
    for name in dict.fromkeys(tag.split("/")[2] for tag in finals if tags.is_of(tags.METRIC, tag)):
        charts[f"{name} (val)"] = chart(tags.metric("[^/]+", re.escape(name), "val"))
    charts["gradient norm"] = chart(tags.grad_norm("[^/]+"))
    charts["weight"] = chart(tags.weight("[^/]+"))
    if len(tasks) > 1:
        charts["cosine"] = chart(tags.cosine("[^/]+", "[^/]+"))
    charts["learning rate"] = chart(tags.learning_rate(".+"))
    charts["samples per second"] = chart(tags.SPEED)
    return {"tasks": charts}
