"""Writing on a disk that is full, in one file after the other."""

import io
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import mtl
from mtl.errors import UserError
from mtl.files import Appended, Folder, LogFile, Screen, fill, temporary, write_whole
from mtl.training import checkpoint

FULL = OSError(28, "No space left on device")


def full(*_: object, **__: object) -> None:
    raise FULL


def test_a_file_that_cannot_be_written_leaves_the_old_one_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.json"
    write_whole(path, "before")
    for place in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, place, full)
            with pytest.raises(OSError, match="No space left"):
                write_whole(path, "a text that is longer than the one before")
        assert [each.name for each in tmp_path.iterdir()] == ["a.json"]
        assert path.read_text() == "before"
    write_whole(path, "after\n", room=10)
    assert path.read_text() == "after\n" + 10 * " "


def test_a_text_for_which_there_is_room_takes_its_place_on_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.json"
    write_whole(path, json.dumps({"status": "running"}), room=100)
    size = path.stat().st_size
    monkeypatch.setattr("mtl.files.fill", full)
    write_whole(path, json.dumps({"status": "failed", "error": "the disk is full"}))
    assert json.loads(path.read_text()) == {"status": "failed", "error": "the disk is full"}
    assert path.stat().st_size == size  # no more of the disk is needed
    with pytest.raises(OSError, match="No space left"):
        write_whole(path, "x" * (size + 1))
    with pytest.raises(OSError, match="No space left"):
        write_whole(tmp_path / "new", "x")
    link = tmp_path / "link"
    link.symlink_to(path)
    with pytest.raises(UserError, match="symbolic link"):  # nothing is written through a link
        write_whole(link, "x")


def test_what_a_killed_process_left_is_not_written_into(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_text("somebody's")
    (tmp_path / "last.tmp").symlink_to(other)
    (tmp_path / "manifest.json.tmp").symlink_to(other)
    checkpoint.save(tmp_path / "last.pt", {"epoch": 1})
    assert other.read_text() == "somebody's"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.pt", "manifest.json", "other"]


class Small(io.BytesIO):
    """A file on a disk with room for this number of bytes."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room

    def write(self, data: Any) -> int:
        taken = min(self.room - self.tell(), len(data))
        if taken <= 0:
            raise OSError(28, "No space left on device")
        return super().write(bytes(data)[:taken])


def test_what_torch_makes_of_a_full_disk_is_told_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Path.open

    def small(self: Path, mode: str = "r", **options: Any) -> Any:
        file = opened(self, mode, **options)
        if self.name == "last.tmp":
            written = 0
            write = file.write

            class Full:
                def write(self, data: bytes) -> int:
                    nonlocal written
                    written += len(data)
                    if written > 3000:
                        raise OSError(28, "No space left on device")
                    return write(data)

                def __getattr__(self, name: str) -> Any:
                    return getattr(file, name)

                def __enter__(self) -> Any:
                    return self

                def __exit__(self, *_: object) -> None:
                    file.close()

            return Full()
        return file

    monkeypatch.setattr(Path, "open", small)
    with pytest.raises(OSError, match="No space left on device"):
        checkpoint.save(tmp_path / "last.pt", {"value": torch.arange(10000)})
    assert not list(tmp_path.iterdir())


def test_fill_keeps_the_errors_of_whoever_writes(tmp_path: Path) -> None:
    def wrong(file: Any) -> None:
        raise ValueError("not a state")

    with pytest.raises(ValueError, match="not a state"), temporary(tmp_path / "a.tmp") as path:
        fill(path, wrong)
    assert not list(tmp_path.iterdir())


def test_what_is_appended_waits_until_there_is_room(tmp_path: Path) -> None:
    appended = Appended(tmp_path / "log")
    file = appended._file
    small = Small(5)
    appended._file = small  # type: ignore[assignment]
    with pytest.raises(OSError, match="No space left"):
        appended.write(b"abcdefgh")
    with pytest.raises(OSError, match="No space left"):
        appended.write(b"ij")
    small.room = 7
    with pytest.raises(OSError, match="No space left"):
        appended.flush()
    small.room = 100
    appended.write(b"k")
    assert small.getvalue() == b"abcdefghijk"  # each byte once, and in order
    appended._file = file
    appended.hold(b"123")
    assert len(appended) == 3
    assert not (tmp_path / "log").read_bytes()
    appended.close()
    assert (tmp_path / "log").read_bytes() == b"123"
    again = Appended(tmp_path / "log")
    again.shorten(100)
    assert len(again) == 3  # it is never made longer
    again.shorten(1)
    again.write(b"b")
    again.close()
    assert (tmp_path / "log").read_bytes() == b"1b"


def test_a_log_on_a_full_disk_says_so_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    handler = LogFile(str(tmp_path / "train.log"))
    log = logging.Logger("mtl.test")
    log.addHandler(handler)
    log.info("%s", "é")
    file, handler._lines._file = handler._lines._file, Small(0)  # type: ignore[assignment]
    for number in range(5):
        log.info("line %s", number)
    assert capsys.readouterr().err == (
        f"error    {tmp_path}/train.log can't be written: [Errno 28] No space left on device\n"
    )
    handler._lines._file = file
    log.info("last")
    handler.add("as it is\n")
    handler.close()
    expected = ["é", *(f"line {number}" for number in range(5)), "last", "as it is"]
    assert (tmp_path / "train.log").read_text(encoding="utf-8").splitlines() == expected
    assert capsys.readouterr().err == ""


def test_logging_knows_of_no_log_that_could_not_be_opened(tmp_path: Path) -> None:
    """`logging` closes all handlers that it knows, and is called by the next run in the same process."""
    (tmp_path / "train.log").symlink_to("elsewhere")
    known = list(logging._handlerList)  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="symbolic link") as kept:  # the traceback keeps the handler alive
        LogFile(str(tmp_path / "train.log"))
    assert logging._handlerList == known  # type: ignore[attr-defined]
    del kept


def test_a_folder_is_known_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run"
    path.mkdir()
    monkeypatch.chdir(tmp_path)
    folder = Folder(Path("run"))
    folder.check()
    monkeypatch.chdir("/")
    folder.check()
    path.rename(tmp_path / "elsewhere")
    with pytest.raises(mtl.UserError, match=r"run no longer exists: it was deleted or moved while the run trained"):
        folder.check()
    path.mkdir()
    with pytest.raises(mtl.UserError, match=r"run is no longer the run's folder, which was deleted or moved"):
        folder.check()
    path.rmdir()
    (tmp_path / "elsewhere").rename(path)
    folder.check()  # it is back
    for _ in range(20):  # a number that a deleted folder had isn't taken for it
        folder = Folder(path)
        shutil.rmtree(path)
        path.mkdir()
        with pytest.raises(mtl.UserError, match="no longer"):
            folder.check()


def test_a_screen_that_is_full_or_gone(capsys: pytest.CaptureFixture[str]) -> None:
    class Stream(io.StringIO):
        error: OSError | None = None

        def write(self, text: str) -> int:
            if self.error:
                raise self.error
            return super().write(text)

    stream = Stream()
    screen = Screen(stream)
    screen.write("a")
    assert screen.complete()
    stream.error = OSError(32, "Broken pipe")
    screen.write("b")
    screen.flush()
    assert not screen.complete()
    assert stream.getvalue() == "a"
    assert capsys.readouterr().err == "error: some output could not be printed: [Errno 32] Broken pipe\n"
