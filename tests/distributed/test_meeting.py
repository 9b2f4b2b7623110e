"""How the processes of a start find each other, and what they do if another node has a later state."""

import json
import os
import threading
from datetime import timedelta
from pathlib import Path

import pytest
from processes import processes
from torch.distributed import TCPStore

from mtl.cli.elsewhere import check_no_later_state
from mtl.distributed.meeting import meet
from mtl.errors import UserError


def test_processes_meet_though_the_store_has_those_of_an_earlier_start(monkeypatch: pytest.MonkeyPatch) -> None:
    server = TCPStore("localhost", 0, None, True, wait_for_workers=False, multi_tenant=True)
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", str(server.port))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    server.set("asks 1", "a process that was killed")
    found = {}

    def join(rank: int) -> None:
        found[rank] = meet(rank, 2, timedelta(seconds=20))

    for start in ("first", "second"):
        threads = [threading.Thread(target=join, args=(rank,)) for rank in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert not found[1].check(["address"])  # nothing is left of the start before
        found[0].set("address", start)
        assert found[1].get("address").decode() == start


def test_a_process_that_does_not_come_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    server = TCPStore("localhost", 0, None, True, wait_for_workers=False, multi_tenant=True)
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", str(server.port))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    with pytest.raises(TimeoutError, match="rank 1 has not started"):
        meet(0, 2, timedelta(seconds=0.3))


def look(node: str, resumed: str, is_resumed: bool) -> str:
    """Calls the check in a process, each of which works in a folder of its own; returns its message."""
    from mtl.distributed import rank

    before = Path.cwd()
    own = Path(node, str(rank()))
    about = {"RANK": str(rank()), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    os.environ |= about
    os.chdir(own)
    try:
        config = {"resume": "auto", "output_root": "outputs", "seed": 0, "threads": None, "vars": {}}
        check_no_later_state(config, Path(node, "0", "outputs", "task", resumed), is_resumed=is_resumed)
    except UserError as error:
        return str(error)
    finally:
        os.chdir(before)
        for name in about:
            del os.environ[name]
    return ""


def add(node: Path, name: str, checksums: list[str]) -> None:
    run = node / "outputs/task" / name
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text("output_root: outputs\nseed: 0\nthreads: null\nvars: {}\n")
    manifest = {"format": 7, "sha256": {"last.pt": checksums}}
    (run / "checkpoints/manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("ours", "theirs", "is_refused"),
    [
        ([], ["a"], True),  # only the other node has a state
        (["a"], ["a", "b"], True),  # it has gone on there
        (["a", "b"], ["a"], False),  # an older copy
        ([], [], False),
        (["a"], [], False),
    ],
)
def test_a_later_state_on_another_node_is_refused(
    tmp_path: Path, ours: list[str], theirs: list[str], is_refused: bool
) -> None:
    for rank, checksums in enumerate((ours, theirs)):
        (tmp_path / str(rank)).mkdir()
        if checksums:
            add(tmp_path / str(rank), "run", checksums)
    messages = processes(2)(look, str(tmp_path), "run", bool(ours))
    where = str(tmp_path / "1/outputs/task/run")
    assert [where in message and "resume=auto" in message for message in messages] == [is_refused] * 2, messages
