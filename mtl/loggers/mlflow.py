"""Logs all metrics as an MLflow run."""

import logging
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtl.errors import UserError, first_line
from mtl.loggers.logger import Logger, Refusal
from mtl.loggers.names import Names

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param

SQLITE = "sqlite:///"
AT_ONCE = 1000  # the most metrics in one call of MLflow
PARAMETERS_AT_ONCE = 100  # the most parameters in one call
LONGEST = 6000  # the most characters in the value of a parameter
LONGEST_NAME = 250  # the most characters in the name of a parameter or metric
REFUSED = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")  # MLflow's error codes for values that it never accepts


class MLflowLogger(Logger):
    """Logs metrics, options as parameters, and pictures as artifacts. MLflow has no histograms.

    Characters that MLflow doesn't allow in tags become `-`: the learning rate of `*.bias` is `lr/-.bias`. Metrics are
    sent whenever a checkpoint with the logger's state is saved, after each epoch and each `checkpoint.every_minutes`,
    so that a killed process leaves no duplicates. If a run is resumed from an older state, metrics that are stored
    already with the same value aren't sent again. MLflow can't delete metrics, so values that differ after resuming,
    such as the speed, are stored twice.

    Args:
        folder: The folder of the run; the MLflow run has the same name.
        tasks: The names of the tasks.
        tracking_uri: Where MLflow stores runs: `sqlite:///outputs/mlflow.db`, or a server.
        experiment: The name of the MLflow experiment, which is created if it doesn't exist.

    Raises:
        UserError: If the required packages aren't installed.
    """

    def __init__(self, folder: Path, tasks: Sequence[str], *, tracking_uri: str, experiment: str = "mtl") -> None:
        needed = ["mlflow", *(["sqlalchemy", "alembic"] if tracking_uri.startswith(SQLITE) else [])]
        for package in needed:
            if find_spec(package) is None:
                raise UserError(f'logger.mlflow: {package} is not installed: pip install "mtl-train[mlflow]"')
        self._folder = folder
        self._uri = tracking_uri
        self._database: Path | None = None
        if tracking_uri.startswith(SQLITE):
            self._database = Path(tracking_uri.removeprefix(SQLITE)).resolve()
            self._uri = f"{SQLITE}{self._database}"
        self._experiment = experiment
        self._options: Mapping[str, Any] = {}
        self._client: MlflowClient | None = None
        self._run = ""
        self._step = 0  # the last step whose metrics had been sent when the loaded state was saved
        self._stored: set[tuple[str, int, float]] = set()  # the stored metrics of later steps
        self._held: list[Metric] = []
        self._names = Names(clean, longest=LONGEST_NAME, taken=["epoch"])
        self._problem: OSError | Refusal | None = None  # with the description of the run
        self._ended = "KILLED"

    def begin(self, config: str, options: Mapping[str, Any], swept: Sequence[str], finals: Sequence[str]) -> None:
        """Stores the options of the run, to be sent later."""
        self._options = options

    def log(self, step: int, epoch: int, scalars: Mapping[str, float]) -> None:
        """Adds one metric per scalar, and the epoch."""
        self._start()
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        named = {self._names[tag]: value for tag, value in scalars.items()}
        for name, value in {**named, "epoch": float(epoch)}.items():
            self._held.append(Metric(name, value, now, step))
        problem, self._problem = self._problem, None
        if problem is not None:
            raise problem

    def picture(self, tag: str, step: int, picture: Any) -> None:
        """Writes a uint8 image (H, W, 3) as the artifact `{tag}/{step}.png`."""
        self._start()
        assert self._client is not None
        with _failing():
            self._client.log_image(self._run, picture, artifact_file=f"{self._names[tag]}/{step:08}.png")

    def state_dict(self) -> dict[str, Any]:
        """Returns the id of the MLflow run, the last step with sent metrics, unsent metrics, and changed names."""
        held = [[metric.key, metric.value, metric.timestamp, metric.step] for metric in self._held]
        optional = {"held": held, "names": self._names.state_dict()}
        return {"run": self._run, "step": self._step, **{key: value for key, value in optional.items() if value}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues the MLflow run of the state."""
        self._run, self._step = state["run"], state["step"]
        self._names.load_state_dict(state.get("names", {}))
        if held := state.get("held"):
            from mlflow.entities import Metric

            self._held = [Metric(*figure) for figure in held]

    def end(self) -> None:
        """Records that the run has finished."""
        self._ended = "FINISHED"

    def fail(self) -> None:
        """Records that the run has failed."""
        self._ended = "FAILED"

    def close(self) -> None:
        """Sends buffered metrics, and sets the final status of the MLflow run."""
        if self._client is None:
            return
        try:
            self.flush()
        finally:
            with _failing():
                self._client.set_terminated(self._run, self._ended)

    def flush(self) -> None:
        """Sends buffered metrics; if that fails, they stay buffered.

        Raises:
            OSError: If the metrics can't be sent.
            Refusal: If MLflow rejects metrics, which are left out.
        """
        refusals: list[str] = []
        while self._held and self._client is not None:
            batch = self._held[:AT_ONCE]
            new = [metric for metric in batch if (metric.key, metric.step, metric.value) not in self._stored]
            refusals += self._send("metrics", new)
            self._step = max(self._step, *(metric.step for metric in batch))
            del self._held[: len(batch)]
        if refusals:
            raise Refusal("; ".join(refusals))

    def _send(self, kind: str, entries: "Sequence[Metric | Param]") -> list[str]:
        """Logs the entries, in one call or, if one is rejected, in halves; describes the rejected entries.

        Args:
            kind: `metrics` or `params`.
            entries: The entries of this kind.
        """
        assert self._client is not None
        if not entries:
            return []
        try:
            with _failing():
                arguments: dict[str, Any] = {kind: list(entries)}
                self._client.log_batch(self._run, **arguments)
        except Refusal as refusal:
            half = len(entries) // 2
            if half:
                return self._send(kind, entries[:half]) + self._send(kind, entries[half:])
            return [f"'{entries[0].key}': {refusal}"]
        return []

    def _start(self) -> None:
        if self._client is not None:
            return
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow import MlflowClient

        if "MLFLOW_LOGGING_LEVEL" not in os.environ:
            logging.getLogger("mlflow").setLevel(logging.WARNING)  # silences a message per created table
            logging.getLogger("mlflow.store.db").setLevel(logging.CRITICAL)  # its errors are also raised
        try:
            with _locked(self._database):
                client = MlflowClient(tracking_uri=self._uri)
                experiment = self._experiment_id(client)
            if new := not self._run:
                self._run = str(client.create_run(experiment, run_name=self._folder.name).info.run_id)
            else:
                client.update_run(self._run, status="RUNNING")
                self._stored = set(self._beyond(client))
        except Exception as error:  # MLflow's backends raise many types
            raise UserError(f"logger.mlflow: {self._uri}: {first_line(error)}") from error
        self._client = client  # from now on `close` ends the MLflow run
        if new:
            self._describe()

    def _describe(self) -> None:
        """Logs the description of the run; rejected entries are reported with the first metrics."""
        from mlflow.entities import Param

        assert self._client is not None
        names = Names(clean, longest=LONGEST_NAME)
        parameters = [Param(names[option], str(value)[:LONGEST]) for option, value in self._options.items()]
        refusals = []
        try:
            with _failing():
                self._client.set_tag(self._run, "folder", str(self._folder))
            for start in range(0, len(parameters), PARAMETERS_AT_ONCE):
                refusals += self._send("params", parameters[start : start + PARAMETERS_AT_ONCE])
        except (OSError, Refusal) as error:
            self._problem = error
        if refusals:
            self._problem = Refusal("; ".join(refusals))

    def _experiment_id(self, client: "MlflowClient") -> str:
        experiment = client.get_experiment_by_name(self._experiment)
        if experiment is not None:
            return str(experiment.experiment_id)
        # Store artifacts next to the database, not in the current folder.
        place = None if self._database is None else self._database.with_suffix("").as_uri()
        return str(client.create_experiment(self._experiment, artifact_location=place))

    def _beyond(self, client: "MlflowClient") -> Iterator[tuple[str, int, float]]:
        """Yields the stored metrics of steps after the loaded state."""
        for key in client.get_run(self._run).data.metrics:
            for metric in client.get_metric_history(self._run, key):
                if metric.step >= self._step:
                    yield key, metric.step, metric.value


@contextmanager
def _locked(database: Path | None) -> Iterator[None]:
    """Locks the database: MLflow fails if parallel jobs of a multirun create the database's tables together."""
    try:
        import fcntl
    except ImportError:  # not on Unix
        database = None
    if database is None:
        yield
        return
    database.parent.mkdir(parents=True, exist_ok=True)
    with database.with_suffix(".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def _failing() -> Iterator[None]:
    """Converts MLflow's errors to errors of a disk or server, after which the training goes on.

    Raises:
        OSError: If the backend fails.
        Refusal: If MLflow permanently rejects a value.
    """
    from mlflow import MlflowException

    try:
        yield
    except MlflowException as error:
        kind = Refusal if error.error_code in REFUSED else OSError
        raise kind(first_line(error)) from error
    # If runs are stored in files, the name of a metric may be the folder of another metric.
    except (FileExistsError, IsADirectoryError, NotADirectoryError, TypeError, ValueError) as error:
        raise Refusal(first_line(error)) from error


def clean(tag: str) -> str:
    """Returns the tag with the characters that MLflow accepts, as a normalised path."""
    parts = re.sub(r"[^\w./ -]", "-", tag).split("/")
    return "/".join("-" * max(len(part), 1) if part in ("", ".", "..") else part for part in parts)
