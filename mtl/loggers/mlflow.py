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

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

SQLITE = "sqlite:///"
AT_ONCE = 1000  # metrics, and
PARAMETERS_AT_ONCE = 100  # that MLflow takes in one call
LONGEST = 6000  # letters of a parameter


class MLflowLogger:
    """Writes figures as metrics, options as parameters and pictures as artifacts. MLflow has no histograms.

    In tags `~` becomes `-`, since MLflow takes no other. Figures are handed over when the state that has them is saved,
    after each epoch and each `checkpoint.every_minutes`, so a process that was killed leaves none twice. Where an older
    state had to be taken up, those that are there with the same value aren't written again; MLflow takes none back, so
    what came out otherwise, such as the speed, then stands there twice.

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
        self._finished = False

    def begin(self, config: str, options: Mapping[str, Any], swept: Sequence[str], finals: Sequence[str]) -> None:
        """Takes the run's options."""
        self._options = options

    def log(self, step: int, epoch: int, scalars: Mapping[str, float]) -> None:
        """Takes a metric for each scalar, and the epoch."""
        self._start()
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        for tag, value in {**scalars, "epoch": float(epoch)}.items():
            self._held.append(Metric(tag.replace("~", "-"), value, now, step))

    def picture(self, tag: str, step: int, picture: Any) -> None:
        """Writes an image (H, W, 3), uint8, as the artifact `{tag}/{step}.png`."""
        self._start()
        assert self._client is not None
        with _failing():
            self._client.log_image(self._run, picture, artifact_file=f"{tag.replace('~', '-')}/{step:08}.png")

    def state(self) -> dict[str, Any]:
        """Hands over what is held; gives the run's id and the last step that it has figures of."""
        self._hand_over()
        return {"run": self._run, "step": self._step}

    def resume(self, state: Mapping[str, Any]) -> None:
        """Goes on with the run of that state."""
        self._run, self._step = state["run"], state["step"]

    def end(self) -> None:
        """Notes that the run is finished."""
        self._finished = True

    def close(self) -> None:
        """Hands over what is held, and says how the run ended."""
        self._hand_over()
        if self._client is not None:
            with _failing():
                self._client.set_terminated(self._run, "FINISHED" if self._finished else "KILLED")

    def _hand_over(self) -> None:
        held, self._held = self._held, []
        new = [metric for metric in held if (metric.key, metric.step, metric.value) not in self._there]
        for start in range(0, len(new), AT_ONCE):
            assert self._client is not None
            with _failing():
                self._client.log_batch(self._run, metrics=new[start : start + AT_ONCE])
        self._step = max([self._step, *(metric.step for metric in held)])

    def _start(self) -> None:
        if self._client is not None:
            return
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow import MlflowClient

        if "MLFLOW_LOGGING_LEVEL" not in os.environ:
            logging.getLogger("mlflow").setLevel(logging.WARNING)  # it tells of each table that it makes
        try:
            with _alone(self._database):
                client = MlflowClient(tracking_uri=self._uri)
                experiment = self._experiment_id(client)
            if self._run:
                client.update_run(self._run, status="RUNNING")
                self._there = set(self._beyond(client))
            else:
                self._run = self._new_run(client, experiment)
        except Exception as error:  # of whatever is below MLflow
            raise UserError(f"logger.mlflow: {self._uri}: {first_line(error)}") from error
        self._client = client

    def _new_run(self, client: "MlflowClient", experiment: str) -> str:
        from mlflow.entities import Param

        run = str(client.create_run(experiment, run_name=self._folder.name).info.run_id)
        client.set_tag(run, "folder", str(self._folder))
        given = [Param(re.sub(r"[^\w./ -]", "-", k), str(v)[:LONGEST]) for k, v in self._options.items()]
        for start in range(0, len(given), PARAMETERS_AT_ONCE):
            client.log_batch(run, params=given[start : start + PARAMETERS_AT_ONCE])
        return run

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
    """A store that can't be written is a disk or a server that fails; the training goes on."""
    from mlflow import MlflowException

    try:
        yield
    except MlflowException as error:
        raise OSError(first_line(error)) from error
