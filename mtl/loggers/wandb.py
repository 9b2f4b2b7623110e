"""Logs all metrics as a run of Weights & Biases."""

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from secrets import token_hex
from typing import TYPE_CHECKING, Any

from mtl.errors import UserError, first_line
from mtl.loggers.logger import Logger, Refusal
from mtl.loggers.names import Names

if TYPE_CHECKING:
    from torch import Tensor
    from wandb import Run

BINS = 64  # the number of bins in a histogram
LONGEST = 1000  # the most characters in a name
FLUSHED = 0.1  # seconds between W&B's writes to its file; a killed process loses unwritten rows


class WandbLogger(Logger):
    """Logs metrics, pictures and histograms as rows over the column `step`.

    Rows are sent whenever a checkpoint with the logger's state is saved, after each epoch and each
    `checkpoint.every_minutes`, so that a killed process leaves no duplicates. Offline, each process writes a folder of
    its own with a common run id; `wandb sync` joins them to one run.

    W&B has two limitations. It can't delete rows: if a run is resumed from an older state, rows are logged again under
    the same step. It can't be asked to write: a process that is killed within a tenth of a second after a checkpoint
    may lose rows.

    Args:
        folder: The folder of the run; files are written to the subfolder `wandb`.
        tasks: The names of the tasks.
        project: The W&B project.
        mode: `offline` (files only), `online`, or another mode of `wandb.init`.

    Raises:
        UserError: If the package isn't installed.
    """

    def __init__(self, folder: Path, tasks: Sequence[str], *, project: str = "mtl", mode: str = "offline") -> None:
        if find_spec("wandb") is None:
            raise UserError('logger.wandb: wandb is not installed: pip install "mtl-train[wandb]"')
        self._folder = folder
        self._project = project
        self._mode = mode
        self._options: Mapping[str, Any] = {}
        self._group: str | None = None
        self._id = token_hex(4)
        self._resumed = False
        self._run: Run | None = None
        self._held: list[dict[str, Any]] = []
        self._rows = 0  # the number of sent rows, from all processes
        self._names = Names(str, longest=LONGEST, taken=("step", "epoch", "_step", "_runtime", "_timestamp", "_wandb"))
        self._finished = False

    def begin(self, config: str, options: Mapping[str, Any], swept: Sequence[str], finals: Sequence[str]) -> None:
        """Stores the options of the run; the runs of a multirun form a group."""
        self._options = options
        self._group = self._folder.parent.name if swept else None

    def log(self, step: int, epoch: int, scalars: Mapping[str, float]) -> None:
        """Adds a row."""
        self._start()
        self._held.append({"step": step, "epoch": epoch} | {self._names[tag]: value for tag, value in scalars.items()})

    def picture(self, tag: str, step: int, picture: Any) -> None:
        """Adds a uint8 image (H, W, 3)."""
        import wandb

        self._start()
        self._held.append({"step": step, self._names[tag]: wandb.Image(picture)})

    def histogram(self, tag: str, step: int, values: "Tensor") -> None:
        """Adds the histogram of the finite values."""
        import numpy as np
        import wandb

        self._start()
        finite = values.detach().float().cpu().numpy()
        counts, edges = np.histogram(finite[np.isfinite(finite)], bins=BINS)
        histogram = wandb.Histogram(np_histogram=(counts.tolist(), edges.tolist()))
        self._held.append({"step": step, self._names[tag]: histogram})

    def state_dict(self) -> dict[str, Any]:
        """Returns the id of the W&B run, and the number of rows."""
        return {"id": self._id, "rows": self._rows}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues the W&B run of the state."""
        self._id, self._rows, self._resumed = state["id"], state["rows"], True

    def end(self) -> None:
        """Records that the run has finished."""
        self._finished = True

    def close(self) -> None:
        """Sends buffered rows, and ends this process's part of the W&B run."""
        if self._run is None:
            return
        try:
            self.flush()
        finally:
            with _failing():
                self._run.finish(exit_code=0 if self._finished else 1)

    def flush(self) -> None:
        """Sends buffered rows; if that fails, they stay buffered.

        Raises:
            OSError: If rows can't be sent.
            Refusal: If W&B rejects values, which are left out.
        """
        refusals: list[str] = []
        while self._held:
            refusals += self._send(self._held[0])
            del self._held[0]
            self._rows += 1
        if refusals:
            raise Refusal("; ".join(refusals))

    def _send(self, row: dict[str, Any]) -> list[str]:
        """Logs the row, whole or, if W&B rejects it, value by value; returns descriptions of the rejected values."""
        assert self._run is not None
        refusals = []
        try:
            with _failing():
                self._run.log(row, step=self._rows, commit=True)
        except Refusal:
            for name, value in row.items():
                try:
                    with _failing():
                        self._run.log({name: value}, step=self._rows, commit=False)
                except Refusal as refusal:
                    refusals.append(f"'{name}': {refusal}")
            with _failing():
                self._run.log({"step": row["step"]}, step=self._rows, commit=True)
        return refusals

    def _start(self) -> None:
        if self._run is not None:
            return
        if self._mode == "offline":
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # otherwise W&B's process tries to reach a host
        import wandb

        logging.getLogger("wandb").propagate = False  # W&B has its own log files
        try:
            self._run = wandb.init(
                project=self._project,
                dir=str(self._folder),
                mode=self._mode,  # type: ignore[arg-type]
                id=self._id,
                name=self._folder.name,
                group=self._group,
                config=dict(self._options),
                resume="allow" if self._resumed and self._mode == "online" else None,
                reinit="create_new",  # jobs of a multirun may share a process
                settings=wandb.Settings(
                    silent=True,
                    console="off",
                    x_disable_stats=True,  # no statistics of the machine
                    x_transaction_log_flush_interval=FLUSHED,
                ),
            )
        except (wandb.Error, ValueError) as error:
            raise UserError(f"logger.wandb: {first_line(error)}; logger.wandb.mode=offline needs no account") from error
        self._run.define_metric("*", step_metric="step")


@contextmanager
def _failing() -> Iterator[None]:
    """Converts errors of W&B's process or server to errors after which the training goes on.

    Raises:
        OSError: If the process or server fails.
        Refusal: If W&B permanently rejects a value.
    """
    import wandb

    try:
        yield
    except wandb.Error as error:
        raise OSError(first_line(error)) from error
    except (TypeError, ValueError) as error:
        raise Refusal(first_line(error)) from error
