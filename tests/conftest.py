"""Helpers of the tests: small problems, and the command line in this process."""

import io
import json
import logging
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # processes side by side, each with all cores' threads, would fight for these
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # those that wait for one another beside a busy process let it work

import torch
from default_parameters import DEFAULT
from hypothesis import HealthCheck, settings
from torch import nn

import mtl
from mtl import cli
from mtl.cli.folders import run_id

ROOT = Path(__file__).parents[1]
settings.register_profile("any speed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any speed")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--screenshots", help="a folder that tests of pages put their pictures into")


@pytest.fixture(autouse=True)
def same_path() -> Iterator[None]:
    """Removes folders that mtl.load added to the import path, so that the next test doesn't search them."""
    path = list(sys.path)
    yield
    sys.path[:] = path


MUST_BE_THERE = re.compile("chromium|playwright|graphviz|torchviz", re.IGNORECASE)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Lets skipped tests fail if MTL_TEST_ALL is set and a browser or the program that draws graphs is missing."""
    report = yield
    if os.environ.get("MTL_TEST_ALL") and report.skipped and MUST_BE_THERE.search(str(report.longrepr)):
        report.outcome = "failed"
        report.longrepr = f"skipped, and with MTL_TEST_ALL it must not be: {report.longrepr}"
    return report


# Tests of these files, and all that train from the command line, are left out by -m fast, which takes a minute or two.
NOT_FAST = {
    *(
        "test_balancing.py",
        "test_checkpoint.py",
        "test_compiled.py",
        "test_docs.py",
        "test_evaluate.py",
        "test_features.py",
    ),
    *("test_gramian.py", "test_mlflow.py", "test_mnist.py", "test_nonfinite.py", "test_objectives.py"),
    *("test_page.py", "test_presence.py", "test_process.py", "test_resume.py", "test_schema.py", "test_sparse.py"),
    *("test_loader.py", "test_own_loop.py", "test_refused.py", "test_same_numbers.py", "test_torchrun.py"),
    "test_same_numbers_sharded.py",
    *("test_sweep.py", "test_tensorboard_page.py", "test_torchvision.py", "test_toy.py", "test_trust.py"),
}
COMMAND_LINE = {"here", "trained", "wheel"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the slow tests and the fast ones."""
    names = [f"{item.path.stem}::{getattr(item, 'originalname', item.name)}" for item in items]
    total, seen = Counter(names), Counter[str]()
    for item, name in zip(items, names, strict=True):
        by_default = DEFAULT.get(name, total[name])
        if seen[name] * by_default % total[name] >= by_default:  # spreads them evenly, from the first one on
            item.add_marker(pytest.mark.slow)
        seen[name] += 1
        uses = set(getattr(item, "fixturenames", ()))
        if not (item.get_closest_marker("slow") or COMMAND_LINE & uses or item.path.name in NOT_FAST):
            item.add_marker(pytest.mark.fast)


def slow_but(quick: Sequence[Any], values: Iterable[Any]) -> list[Any]:
    """Returns the values of a parameter; all except the quick ones are marked as slow."""
    several = [(value, value if isinstance(value, tuple) else (value,)) for value in values]
    return [pytest.param(*each, marks=() if value in quick else pytest.mark.slow) for value, each in several]


@dataclass
class Ended:
    """The end of a command: exit code, printed text, and the run's folder if it made one."""

    code: int
    out: str
    err: str
    run: Path | None

    @property
    def metrics(self) -> dict[str, Any]:
        assert self.run is not None, self.err
        return json.loads((self.run / "metrics.json").read_text())


def command(module: str, *arguments: str) -> Ended:
    """Runs `python -m mtl.<module> <arguments>` in this process, as if from the shell."""
    from mtl import evaluate, graph, train

    jobs = {"train": train.train, "evaluate": evaluate.evaluate, "graph": graph.graph}
    marker = "outputs/graph/**/leaves.csv" if module == "graph" else "outputs/**/train.log"
    before = set(Path.cwd().glob(marker))
    for name, loaded in list(sys.modules.items()):  # another test has another module of that name
        known = getattr(loaded, "__dict__", {})
        place = str(known.get("__path__") or known.get("__file__") or "")
        if f"{os.sep}pytest-of-" in place and str(Path.cwd()) not in place:
            del sys.modules[name]
    argv, path = sys.argv, list(sys.path)
    sys.argv = [f"mtl.{module}", *arguments]
    run_id.cache_clear()
    out, err = io.StringIO(), io.StringIO()
    try:
        with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as ended:
            cli.launch(jobs[module], module)
    finally:
        sys.argv, sys.path[:] = argv, path
        for handler in list(logging.getLogger().handlers):
            if isinstance(handler, logging.FileHandler):
                logging.getLogger().removeHandler(handler)
                handler.close()
    new = set(Path.cwd().glob(marker)) - before
    return Ended(int(ended.value.code or 0), out.getvalue(), err.getvalue(), max(new).parent if new else None)


def stopping(at: int) -> list[str]:
    """Returns arguments for a run that SIGTERM stops at this step, and writes a file into the current folder for it."""
    Path("code").mkdir(exist_ok=True)
    Path("code/stops.py").write_text(
        "import os, signal\n"
        "class At:\n"
        "    def __init__(self, step): self.step = step\n"
        "    def __call__(self, trainer, result):\n"
        "        if trainer.global_step == self.step: os.kill(os.getpid(), signal.SIGTERM)\n"
    )
    return ["--config-dir", "code", "+callbacks.stop._target_=stops.At", f"+callbacks.stop.step={at}"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Provides an empty current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    return tmp_path


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """Provides one short run of mnist_two_head, in a separate folder."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        ended = command("train", "task=mnist_two_head", "trainer.max_epochs=2", "log.every=20")
        if ended.run is not None:
            ended.run = ended.run.resolve()
    assert ended.code == 0, ended.err
    return ended


def most_saved(run: Callable[[], object]) -> int:
    """Returns the largest number of elements that autograd held for backward at any one time."""
    alive = peak = 0

    class Saved:
        def __init__(self, tensor: torch.Tensor) -> None:
            nonlocal alive, peak
            self.tensor = tensor
            alive += tensor.numel()
            peak = max(peak, alive)

        def __del__(self) -> None:
            nonlocal alive
            alive -= self.tensor.numel()

    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
        run()
    return peak


class Trunk(nn.Module):
    """A trunk with everything that draws or has a state: batch norm, dropout, spectral norm, a replaced buffer."""

    def __init__(self, *, momentum: float | None = 0.1, dropout: float = 0.3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4, momentum=momentum)
        self.dropout = nn.Dropout2d(dropout)
        self.linear = nn.utils.parametrizations.spectral_norm(nn.Linear(4 * 36, 16))
        self.register_buffer("average", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.average = 0.9 * self.average + 0.1 * x.detach().mean()  # a new tensor, not a change of the old one
        return torch.tanh(self.linear(self.dropout(torch.relu(self.norm(self.conv(x)))).flatten(1)))


def problem(
    num_tasks: int = 3,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    weights: list[float] | None = None,
    **trunk: Any,
) -> tuple[mtl.MultiTaskModel, list[mtl.Task]]:
    """Returns a model of several classification tasks over `Trunk`, with heads that draw random numbers too."""
    torch.manual_seed(seed)
    weights = weights or [1.0] * num_tasks
    tasks = [
        mtl.Task(
            f"t{index}",
            head=nn.Sequential(nn.Dropout(0.2), nn.Linear(16, 5)),
            loss=nn.CrossEntropyLoss(),
            target=f"y{index}",
            weight=weight,
        )
        for index, weight in enumerate(weights)
    ]
    return mtl.MultiTaskModel(Trunk(**trunk), tasks, inputs=["x"]).to(dtype), tasks


def batches(
    count: int, num_tasks: int = 3, *, size: int = 8, dtype: torch.dtype = torch.float64
) -> list[dict[str, torch.Tensor]]:
    """Returns batches for `problem`, which are always the same."""
    generator = torch.Generator().manual_seed(1)
    return [
        {"x": torch.randn(size, 1, 8, 8, generator=generator, dtype=dtype)}
        | {f"y{index}": torch.randint(0, 5, (size,), generator=generator) for index in range(num_tasks)}
        for _ in range(count)
    ]
