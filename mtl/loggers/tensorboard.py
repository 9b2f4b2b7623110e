"""Logs all metrics as TensorBoard events."""

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
    """Logs scalars, pictures, histograms, the config as text, and options and results for the HParams tab.

    A custom layout has one chart each for all tasks' losses, metrics, gradient norms, weights and cosines.

    Args:
        folder: The folder of the run, whose name TensorBoard shows as the name of the run.
        tasks: The names of the tasks.
    """

    def __init__(self, folder: Path, tasks: Sequence[str]) -> None:
        self._folder = folder
        self._tasks = tasks
        self._writer: SummaryWriter | None = None
        self._records = 0  # the number of records in the event files, from all processes
        self._config = ""
        self._options: Mapping[str, hparams.Value] = {}
        self._swept: Sequence[str] = ()
        self._finals: Sequence[str] = ()

    def begin(
        self, config: str, options: Mapping[str, hparams.Value], swept: Sequence[str], finals: Sequence[str]
    ) -> None:
        """Logs the description of the run, before anything else is logged.

        Args:
            config: The config as YAML.
            options: The options by name, see `mtl.loggers.options`.
            swept: The names of the options that a multirun sweeps over.
            finals: The tags of the metrics that summarise the finished run.
        """
        self._config = config
        self._options = options
        self._swept = swept
        self._finals = finals

    def log(self, step: int, epoch: int, scalars: Mapping[str, float]) -> None:
        """Writes the scalars at this step."""
        writer = self._open()
        self._records += len(scalars)
        for tag, value in scalars.items():
            writer.add_scalar(tag, value, step)
        writer.flush()

    def picture(self, tag: str, step: int, picture: Any) -> None:
        """Writes a uint8 image (H, W, 3)."""
        self._open().add_image(tag, picture, step, dataformats="HWC")
        self._records += 1

    def histogram(self, tag: str, step: int, values: "Tensor") -> None:
        """Writes the histogram of the values."""
        self._open().add_histogram(tag, values, step)
        self._records += 1

    def end(self) -> None:
        """Records that the run has finished."""
        if self._options:
            self._write([hparams.ending()])

    def _open(self) -> "SummaryWriter":
        if self._writer is None:
            new = not self._records
            self._writer = summary_writer(self._folder)  # at the first step, since the import is slow
            self._records += 1  # the first record of a file is the version
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
        """Writes buffered events."""
        if self._writer is not None:
            self._writer.flush()

    def state_dict(self) -> int:
        """Returns the number of records."""
        return self._records

    def load_state_dict(self, state: int) -> None:
        """Keeps this number of records in the event files of the run, and removes all later ones."""
        from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
        from tensorboard.summary.writer.record_writer import RecordWriter

        files = sorted(self._folder.glob("events.out.tfevents.*"))
        records: list[bytes] = []
        for path in files:
            check_kind(path)
            with suppress(MemoryError, OverflowError):  # a damaged record whose length exceeds the memory
                for record in RawEventFileLoader(str(path)).Load():
                    if len(records) < state:
                        records.append(record)
        self._records = len(records)
        if files:
            # TensorBoard reads the files in the order of their names, which begin with the start time in seconds.
            first_file = self._folder / "events.out.tfevents.0000000000.kept"
            with temporary(self._folder / "whole.tmp") as whole:  # not named like an event file
                fill(whole, lambda file: _write_all(RecordWriter(file), records))
                whole.replace(first_file)
            for path in files:  # a remaining file is removed the next time, since its records come later
                if path != first_file:
                    path.unlink()

    def close(self) -> None:
        """Writes buffered events and closes the file."""
        if self._writer is not None and self._writer.file_writer is not None:
            self._writer.file_writer.close()  # the writer itself would leave the file open on a full disk


def _write_all(writer: Any, records: Sequence[bytes]) -> None:
    for record in records:
        writer.write(record)


def layout(tasks: Sequence[str], finals: Sequence[str] = ()) -> dict[str, dict[str, list[object]]]:
    """Returns TensorBoard's custom-scalar layout: charts by name, each with regular expressions for its tags.

    The expressions name no task, so that runs with other tasks have the same charts.

    Args:
        tasks: The names of the tasks.
        finals: The tags of the final metrics; all tasks' values of a metric share a chart, because they share a unit.
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
