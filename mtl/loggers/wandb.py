"""All figures as a run of Weights & Biases."""

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

BINS = 64  # of a histogram
LONGEST = 1000  # letters of a name
FLUSHED = 0.1  # seconds between W&B's writes to its file; what it holds is lost with a process that is killed


class WandbLogger(Logger):
    """Writes figures, pictures and histograms, a row for each time that there are any, against the column `step`.

    Rows are handed over when the state that has them is saved, after each epoch and each `checkpoint.every_minutes`, so
    a process that was killed leaves none twice. Offline each process writes a folder of its own, all of one run id, of
    which `wandb sync` makes one run.

    What W&B doesn't allow: to take a row back, so where an older state had to be taken up, rows come again under
    numbers that were there before; and to be told to write, so a process that is killed within a tenth of a second
    after a checkpoint may leave rows out.

    Args:
        folder: the run's; the files go to its subfolder `wandb`.
        tasks: the tasks' names.
        project: of W&B.
        mode: `offline` for files alone, `online`, or whatever else `wandb.init` takes.

    Raises:
        UserError: without the package.
    """

    def __init__(self, folder: Path, tasks: Sequence[str], *, project: str = "mtl", mode: str = "offline") -> None:
        if find_spec("wandb") is None:
            raise UserError('logger.wandb: the package wandb isn\'t there; pip install "mtl-train[wandb]"')
        self._folder = folder
        self._project = project
        self._mode = mode
        self._options: Mapping[str, Any] = {}
        self._group: str | None = None
        self._id = token_hex(4)
        self._resumed = False
        self._run: Run | None = None
        self._held: list[dict[str, Any]] = []
        self._rows = 0  # handed over, by whichever process
        self._names = Names(str, longest=LONGEST, taken=("step", "epoch", "_step", "_runtime", "_timestamp", "_wandb"))
        self._finished = False

    def begin(self, config: str, options: Mapping[str, Any], swept: Sequence[str], finals: Sequence[str]) -> None:
        """Takes the run's options; runs of a multirun are a group."""
        self._options = options
        self._group = self._folder.parent.name if swept else None

    def log(self, step: int, epoch: int, scalars: Mapping[str, float]) -> None:
        """Takes a row."""
        self._start()
        self._held.append({"step": step, "epoch": epoch} | {self._names[tag]: value for tag, value in scalars.items()})

    def picture(self, tag: str, step: int, picture: Any) -> None:
        """Takes an image (H, W, 3), uint8."""
        import wandb

        self._start()
        self._held.append({"step": step, self._names[tag]: wandb.Image(picture)})

    def histogram(self, tag: str, step: int, values: "Tensor") -> None:
        """Takes the values' histogram, those that aren't finite left out."""
        import numpy as np
        import wandb

        self._start()
        finite = values.detach().float().cpu().numpy()
        counts, edges = np.histogram(finite[np.isfinite(finite)], bins=BINS)
        histogram = wandb.Histogram(np_histogram=(counts.tolist(), edges.tolist()))
        self._held.append({"step": step, self._names[tag]: histogram})

    def state_dict(self) -> dict[str, Any]:
        """The run's id, and how many rows it has."""
        return {"id": self._id, "rows": self._rows}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on with the run of that state."""
        self._id, self._rows, self._resumed = state["id"], state["rows"], True

    def end(self) -> None:
        """Notes that the run is finished."""
        self._finished = True

    def close(self) -> None:
        """Hands over what is held, and ends this process's part of the run."""
        if self._run is None:
            return
        try:
            self.flush()
        finally:
            with _failing():
                self._run.finish(exit_code=0 if self._finished else 1)

    def flush(self) -> None:
        """Hands over what is held; where that fails, it is held for the next time.

        Raises:
            OSError: where it fails.
            Refusal: for figures that are left out.
        """
        refusals: list[str] = []
        while self._held:
            refusals += self._give(self._held[0])
            del self._held[0]
            self._rows += 1
        if refusals:
            raise Refusal("; ".join(refusals))

    def _give(self, row: dict[str, Any]) -> list[str]:
        """Logs the row, whole, or where something in it is refused piece by piece; gives what was refused, and why."""
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
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # or its process looks for a host all the same
        import wandb

        logging.getLogger("wandb").propagate = False  # it has files of its own
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
                reinit="create_new",  # a multirun's jobs may be in one process
                settings=wandb.Settings(
                    silent=True,
                    console="off",
                    x_disable_stats=True,  # of the machine
                    x_transaction_log_flush_interval=FLUSHED,
                ),
            )
        except (wandb.Error, ValueError) as error:
            raise UserError(f"logger.wandb: {first_line(error)}; logger.wandb.mode=offline needs no account") from error
        self._run.define_metric("*", step_metric="step")


@contextmanager
def _failing() -> Iterator[None]:
    """A process or a server of W&B's that fails ends no training.

    Raises:
        OSError: for that.
        Refusal: for what W&B would never take.
    """
    import wandb

    try:
        yield
    except wandb.Error as error:
        raise OSError(first_line(error)) from error
    except (TypeError, ValueError) as error:
        raise Refusal(first_line(error)) from error
