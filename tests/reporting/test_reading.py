"""Reading of runs in every state."""

import json
from pathlib import Path

import pytest
from made_runs import run

from mtl.errors import UserError
from mtl.reporting.reading import find
from mtl.runs.resume import locked


def test_all_runs_below_are_found_once(tmp_path: Path) -> None:
    run(tmp_path / "one" / "2026")
    run(tmp_path / "multirun" / "x" / "0_seed-0")
    run(tmp_path / "multirun" / "x" / "1_seed-1", seed=1)
    (tmp_path / "multirun" / "x" / "multirun.yaml").write_text("hydra: {}")
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "config.yaml").write_text("a: 1")  # of something else
    (tmp_path / "else" / "metrics.json").write_text("{}")
    found = find([tmp_path, tmp_path / "multirun", tmp_path / "one" / ".." / "one"])
    assert [run.folder.name for run in found] == ["0_seed-0", "1_seed-1", "2026"]
    assert [run.seed for run in found] == [0, 1, 0]


def test_what_lies_in_a_runs_folder_is_no_run_of_its_own(tmp_path: Path) -> None:
    run(tmp_path / "one")
    run(tmp_path / "one" / "copied")
    assert [found.folder.name for found in find([tmp_path])] == ["one"]


def test_states(tmp_path: Path) -> None:
    for status in ("finished", "failed", "stopped", "running"):
        run(tmp_path / status, status=status, error="boom\nmore" if status == "failed" else None)
    (run(tmp_path / "silent") / "metrics.json").unlink()  # of before it wrote one
    (run(tmp_path / "cut") / "metrics.json").write_text('{"status": "fini')
    (tmp_path / "never").mkdir()  # a sweep's job whose config was refused
    (tmp_path / "never" / "metrics.json").write_text(json.dumps({"status": "failed", "error": "no such lr"}))
    (run(tmp_path / "list") / "metrics.json").write_text("[]")
    (run(tmp_path / "gone") / "config.yaml").unlink()
    (run(tmp_path / "other", config={"only": "z"}) / "metrics.json").touch()
    found = {run.folder.name: run for run in find([tmp_path])}
    assert {name: run.status for name, run in found.items()} == {
        **{"finished": "finished", "failed": "failed", "stopped": "stopped", "running": "unfinished"},
        **{"silent": "unfinished", "cut": "can't be read", "never": "failed"},
        **dict.fromkeys(["list", "gone", "other"], "can't be read"),
    }
    assert {name: found[name].error for name in ("list", "gone", "other")} == {
        "list": "metrics.json holds no mapping",
        "gone": "its config.yaml is missing, or isn't that of a run",
        "other": "only: there is no task 'z' (possible: a, b)",
    }
    assert found["gone"].problem == "made"
    assert (found["failed"].error, found["never"].error, found["stopped"].error) == ("boom", "no such lr", "–")


def test_a_run_that_somebody_works_on_is_running(tmp_path: Path) -> None:
    folder = run(tmp_path / "one", status="running")
    with locked(folder) as free:
        assert free
        (found,) = find([tmp_path])
    assert found.status == "running"


def test_what_older_runs_lack_is_not_known(tmp_path: Path) -> None:
    run(tmp_path / "old", problem=None, choices=None, fingerprints=None, arguments=["task=mine", "seed=3"])
    run(tmp_path / "older", problem=None, arguments=None)
    old, older = find([tmp_path])
    assert (old.problem, old.choices, old.fingerprint("test")) == ("mine", {}, None)
    assert older.problem is None


@pytest.mark.parametrize("only", ["a", ["a"]])
def test_tasks_that_are_left_out(tmp_path: Path, only: str | list[str]) -> None:
    run(tmp_path / "one", config={"only": only})
    (found,) = find([tmp_path])
    assert found.tasks == ["a"]


def test_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no run in"):
        find([tmp_path])
    with pytest.raises(UserError, match="'nowhere' is not a folder"):
        find([Path("nowhere")])
