"""All figures as a run of MLflow."""

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
AT_ONCE = 1000  # metrics, and
PARAMETERS_AT_ONCE = 100  # that MLflow takes in one call
LONGEST = 6000  # letters of a parameter, and
LONGEST_NAME = 250  # of its name, or of a metric's
REFUSED = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")  # MLflow's codes for what it would never take


class MLflowLogger(Logger):
    """Writes figures as metrics, options as parameters and pictures as artifacts. MLflow has no histograms.

    In tags, what MLflow doesn't take becomes `-`: the learning rate of `*.bias` is `lr/-.bias`. Figures are handed over
    when the state that has them is saved, after each epoch and each `checkpoint.every_minutes`, so a process that was
    killed leaves none twice. Where an older state had to be taken up, those that are there with the same value aren't
    written again; MLflow takes none back, so what came out otherwise, such as the speed, then stands there twice.

    Args:
        folder: the run's, after which MLflow's is named.
        tasks: the tasks' names.
        tracking_uri: where MLflow keeps its runs: `sqlite:///outputs/mlflow.db`, or a server.
        experiment: of MLflow; made where it isn't there.

    Raises:
        UserError: without the packages.
    """

    def __init__(self, folder: Path, tasks: Sequence[str], *, tracking_uri: str, experiment: str = "mtl") -> None:
        needed = ["mlflow", *(["sqlalchemy", "alembic"] if tracking_uri.startswith(SQLITE) else [])]
        for package in needed:
            if find_spec(package) is None:
                raise UserError(f'logger.mlflow: the package {package} isn\'t there; pip install "mtl-train[mlflow]"')
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
        self._step = 0  # up to which figures had been handed over in the state that was taken up
        self._there: set[tuple[str, int, float]] = set()  # what is in the store beyond that
        self._held: list[Metric] = []
        self._names = Names(clean, longest=LONGEST_NAME, taken=["epoch"])
        self._problem: OSError | Refusal | None = None  # with what the run is
        self._ended = "KILLED"

    def begin(self, config: str, options: Mapping[str, Any], swept: Sequence[str], finals: Sequence[str]) -> None:
        """Takes the run's options."""
        self._options = options

    def log(self, step: int, epoch: int, scalars: Mapping[str, float]) -> None:
        """Takes a metric for each scalar, and the epoch."""
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
        """Writes an image (H, W, 3), uint8, as the artifact `{tag}/{step}.png`."""
        self._start()
        assert self._client is not None
        with _failing():
            self._client.log_image(self._run, picture, artifact_file=f"{self._names[tag]}/{step:08}.png")

    def state_dict(self) -> dict[str, Any]:
        """The run's id, the last step that it has figures of, and what is held still."""
        held = [[metric.key, metric.value, metric.timestamp, metric.step] for metric in self._held]
        more = {"held": held, "names": self._names.state_dict()}
        return {"run": self._run, "step": self._step, **{key: value for key, value in more.items() if value}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on with the run of that state."""
        self._run, self._step = state["run"], state["step"]
        self._names.load_state_dict(state.get("names", {}))
        if held := state.get("held"):
            from mlflow.entities import Metric

            self._held = [Metric(*figure) for figure in held]

    def end(self) -> None:
        """Notes that the run is finished."""
        self._ended = "FINISHED"

    def fail(self) -> None:
        """Notes that the run failed."""
        self._ended = "FAILED"

    def close(self) -> None:
        """Hands over what is held, and says how the run ended."""
        if self._client is None:
            return
        try:
            self.flush()
        finally:
            with _failing():
                self._client.set_terminated(self._run, self._ended)

    def flush(self) -> None:
        """Hands over what is held; where that fails, it is held for the next time.

        Raises:
            OSError: where it fails.
            Refusal: for figures that are left out.
        """
        refusals: list[str] = []
        while self._held and self._client is not None:
            batch = self._held[:AT_ONCE]
            new = [metric for metric in batch if (metric.key, metric.step, metric.value) not in self._there]
            refusals += self._give("metrics", new)
            self._step = max(self._step, *(metric.step for metric in batch))
            del self._held[: len(batch)]
        if refusals:
            raise Refusal("; ".join(refusals))

    def _give(self, kind: str, entries: "Sequence[Metric | Param]") -> list[str]:
        """Logs the entries, all at once, or where one is refused in halves; gives what was refused, and why.

        Args:
            kind: `metrics` or `params`.
            entries: of that kind.
        """
        assert self._client is not None
        if not entries:
            return []
        try:
            with _failing():
                given: dict[str, Any] = {kind: list(entries)}
                self._client.log_batch(self._run, **given)
        except Refusal as refusal:
            half = len(entries) // 2
            if half:
                return self._give(kind, entries[:half]) + self._give(kind, entries[half:])
            return [f"'{entries[0].key}': {refusal}"]
        return []

    def _start(self) -> None:
        if self._client is not None:
            return
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow import MlflowClient

        if "MLFLOW_LOGGING_LEVEL" not in os.environ:
            logging.getLogger("mlflow").setLevel(logging.WARNING)  # it tells of each table that it makes
            logging.getLogger("mlflow.store.db").setLevel(logging.CRITICAL)  # its tracebacks are raised too
        try:
            with _alone(self._database):
                client = MlflowClient(tracking_uri=self._uri)
                experiment = self._experiment_id(client)
            if new := not self._run:
                self._run = str(client.create_run(experiment, run_name=self._folder.name).info.run_id)
            else:
                client.update_run(self._run, status="RUNNING")
                self._there = set(self._beyond(client))
        except Exception as error:  # of whatever is below MLflow
            raise UserError(f"logger.mlflow: {self._uri}: {first_line(error)}") from error
        self._client = client  # from now on the run is ended, whatever happens
        if new:
            self._describe()

    def _describe(self) -> None:
        """Writes what the run is; what of it is refused is told with the first figures."""
        from mlflow.entities import Param

        assert self._client is not None
        names = Names(clean, longest=LONGEST_NAME)
        given = [Param(names[option], str(value)[:LONGEST]) for option, value in self._options.items()]
        refusals = []
        try:
            with _failing():
                self._client.set_tag(self._run, "folder", str(self._folder))
            for start in range(0, len(given), PARAMETERS_AT_ONCE):
                refusals += self._give("params", given[start : start + PARAMETERS_AT_ONCE])
        except (OSError, Refusal) as error:
            self._problem = error
        if refusals:
            self._problem = Refusal("; ".join(refusals))

    def _experiment_id(self, client: "MlflowClient") -> str:
        found = client.get_experiment_by_name(self._experiment)
        if found is not None:
            return str(found.experiment_id)
        # Artifacts go beside the database, and not to where one happens to be.
        place = None if self._database is None else self._database.with_suffix("").as_uri()
        return str(client.create_experiment(self._experiment, artifact_location=place))

    def _beyond(self, client: "MlflowClient") -> Iterator[tuple[str, int, float]]:
        """What the store has that the state hasn't."""
        for key in client.get_run(self._run).data.metrics:
            for metric in client.get_metric_history(self._run, key):
                if metric.step >= self._step:
                    yield key, metric.step, metric.value


@contextmanager
def _alone(database: Path | None) -> Iterator[None]:
    """Jobs of a multirun begin at once, and MLflow doesn't bear it when two make the tables of one database."""
    try:
        import fcntl
    except ImportError:  # not a Unix
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
    """A store that can't be written is a disk or a server that fails, and the training goes on.

    Raises:
        OSError: for that.
        Refusal: for what MLflow would never take.
    """
    from mlflow import MlflowException

    try:
        yield
    except MlflowException as error:
        kind = Refusal if error.error_code in REFUSED else OSError
        raise kind(first_line(error)) from error
    # Where runs are kept in files, one figure's name may be the folder that another one's is in.
    except (FileExistsError, IsADirectoryError, NotADirectoryError, TypeError, ValueError) as error:
        raise Refusal(first_line(error)) from error


def clean(tag: str) -> str:
    """The tag as MLflow takes it: of certain characters, and as the path of a file that is written in one way alone."""
    parts = re.sub(r"[^\w./ -]", "-", tag).split("/")
    return "/".join("-" * max(len(part), 1) if part in ("", ".", "..") else part for part in parts)
