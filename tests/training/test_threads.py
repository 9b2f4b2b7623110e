"""The number of threads is that of the run, not that of the process."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import command
from omegaconf import OmegaConf
from torch.utils.data import Dataset

import mtl
from mtl.data import Loader
from mtl.process.seeding import num_threads
from mtl.training import checkpoint

SMALL = ["task=mnist_two_head", "trainer.max_epochs=1", "data.batch_size=500", "logger=[csv]", "log.every=2"]


@pytest.fixture(autouse=True)
def another_number() -> Iterator[None]:
    """Sets a number of threads that no run here uses, and checks that it doesn't change."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    assert torch.get_num_threads() == 3
    torch.set_num_threads(before)


def noted(folder: Path) -> tuple[list[str], list[int]]:
    """Writes a callback that records the numbers of threads; returns the arguments for it, and the record so far."""
    (folder / "notes.py").write_text(
        "import torch\nfrom pathlib import Path\n\nclass Notes:\n    def __call__(self, trainer, result):\n"
        "        with Path('threads').open('a') as file: print(torch.get_num_threads(), file=file)\n"
    )
    path = folder / "threads"
    seen = [int(line) for line in path.read_text().split()] if path.exists() else []
    return ["+callbacks.notes._target_=notes.Notes"], seen


def test_a_run_computes_with_its_own_number_and_evaluation_with_the_runs(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = command("train", *SMALL, "threads=2", *noted(here)[0])
    assert ended.code == 0, ended.err
    assert noted(here)[1] == [2] * 8
    assert "cpu with 2 threads" in ended.out
    assert ended.metrics["versions"]["threads"] == 2
    assert checkpoint.load(ended.run / "checkpoints/last.pt")["composed"]["threads"] == 2
    seen: list[int] = []
    from mtl.training.validation import Validation

    original = Validation.__call__
    monkeypatch.setattr(Validation, "__call__", lambda *a: (seen.append(torch.get_num_threads()), original(*a))[1])
    assert command("evaluate", f"run={ended.run}").code == 0
    assert seen == [2]
    default = command("train", *SMALL, *noted(here)[0])
    assert noted(here)[1][8:] == [1] * 8
    assert "cpu with 1 thread," in default.out


def test_another_number_is_refused_when_a_run_goes_on_unless_it_is_allowed(here: Path) -> None:
    run = command("train", *SMALL, "threads=2", "scheduler=none").run
    more = [*SMALL[:1], *SMALL[2:], "scheduler=none", "trainer.max_epochs=2", f"resume={run}"]
    refused = command("train", *more)
    assert refused.code == 1
    assert "threads: was 2, is 1" in refused.err
    assert command("train", *more, "resume_allow=[threads]").code == 0


def test_a_run_that_is_older_than_the_key_has_the_number_it_was_made_with(here: Path) -> None:
    run = command("train", *SMALL, "threads=2", "scheduler=none").run
    for path in run.glob("checkpoints/*.pt"):
        state = checkpoint.load(path)
        del state["config"]["threads"], state["composed"]["threads"]
        checkpoint.save(path, state)
    config = OmegaConf.load(run / "config.yaml")
    del config["threads"]
    OmegaConf.save(config, run / "config.yaml")
    assert command("evaluate", f"run={run}").code == 0
    more = [*SMALL[:1], *SMALL[2:], "scheduler=none", "trainer.max_epochs=2"]
    refused = command("train", *more, f"resume={run}")
    assert refused.code == 1
    assert "threads: was 2, is 1" in refused.err
    metrics = json.loads((run / "metrics.json").read_text())
    (run / "metrics.json").write_text(json.dumps({**metrics, "status": "stopped"}))
    assert command("train", *more, "threads=2", "resume=auto").run is None  # no other run was made
    assert json.loads((run / "metrics.json").read_text())["epochs"] == 2


@pytest.mark.parametrize("number", ["0", "-1", "1.5", "null", "auto", "4096"])
def test_numbers_that_are_none(here: Path, number: str) -> None:
    ended = command("train", *SMALL, f"threads={number}")
    assert ended.code == 1
    assert "it must be a whole number from 1 to 1024" in ended.err


@pytest.mark.parametrize(("name", "value"), [("OMP_THREAD_LIMIT", "1"), ("OMP_DYNAMIC", "TRUE")])
def test_an_environment_that_may_have_it_otherwise(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    with num_threads(1):
        assert torch.get_num_threads() == 1
    with pytest.raises(mtl.UserError, match=f"threads is 2.*{name}"), num_threads(2):
        pass


class Counting(Dataset):
    """Samples that contain the number of threads with which they were made."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, int]:
        return {"threads": torch.get_num_threads()}


@pytest.mark.parametrize("workers", [0, 1])
def test_samples_are_made_with_one_thread_in_whatever_process(workers: int) -> None:
    (batch,) = Loader(Counting(), batch_size=4, num_workers=workers).batches(1)
    assert batch["threads"].tolist() == [1, 1, 1, 1]
