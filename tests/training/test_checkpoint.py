"""Checkpoint files are complete or don't exist."""

import random
import shutil
from pathlib import Path

import pytest
import torch
from conftest import command
from test_resume import assert_same

import mtl
from mtl.training import checkpoint


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "checkpoints" / "last.pt"
    state = {"model": {"w": torch.arange(3)}, "config": {"a": [1, None, "x"]}, "best": 0.1 + 0.2}
    checkpoint.save(path, state)
    loaded = checkpoint.load(path)
    assert torch.equal(loaded.pop("model")["w"], torch.arange(3))
    assert loaded == {"format": checkpoint.FORMAT, "config": {"a": [1, None, "x"]}, "best": 0.1 + 0.2}
    assert {p.name for p in path.parent.iterdir()} == {path.name, "manifest.json"}  # nothing temporary is left


def test_save_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "last.pt"
    checkpoint.save(path, {"value": 1})

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mtl.training.checkpoint.os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        checkpoint.save(path, {"value": 2})
    assert checkpoint.load(path)["value"] == 1


class Bomb:
    def __reduce__(self) -> tuple:
        return Path.touch, (Path("exploded"),)


def test_files_that_cannot_be_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "last.pt"
    with pytest.raises(mtl.UserError, match=r"there is no checkpoint .*last\.pt"):
        checkpoint.load(path)
    checkpoint.save(path, {"value": torch.arange(1000)})
    whole = path.read_bytes()
    for content in (b"", b"x", whole[:1], whole[: len(whole) // 2], whole[:-1]):
        path.write_bytes(content)
        with pytest.raises(mtl.UserError, match=r"the checkpoint .*last\.pt is damaged: its checksum"):
            checkpoint.load(path)
    (tmp_path / "manifest.json").unlink()  # without it the file is judged by itself
    for content in (b"", b"x", whole[:1], whole[: len(whole) // 2], whole[:-1]):
        path.write_bytes(content)
        with pytest.raises(mtl.UserError, match=r"the checkpoint .*last\.pt can't be read"):
            checkpoint.load(path)
    torch.save({"format": checkpoint.FORMAT, "bomb": Bomb()}, path)
    with pytest.raises(mtl.UserError, match="can't be read"):
        checkpoint.load(path)
    assert not Path("exploded").exists()
    path.unlink()
    path.mkdir()
    with pytest.raises(mtl.UserError, match=r"there is no checkpoint .*last\.pt"):
        checkpoint.load(path)
    path.rmdir()
    torch.save({"format": 99}, path)
    with pytest.raises(mtl.UserError, match=f"has format 99; this version of mtl reads format {checkpoint.FORMAT}"):
        checkpoint.load(path)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Provides an unfinished run with one checkpoint."""
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run = command("train", *SMALL)
        assert run.code == 0, run.err
        (run.run / "metrics.json").unlink()
        for name in ("best.pt", "last-1.pt"):
            (run.run / "checkpoints" / name).unlink(missing_ok=True)
        return run.run.resolve()


SMALL = ["task=mnist_two_head", "trainer.max_epochs=1", "data.batch_size=1000"]


@pytest.mark.parametrize("manifest", ["whole", "gone", "damaged"])
def test_every_kind_of_damage_is_a_sentence(
    stopped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, manifest: str
) -> None:
    """Cut at every kilobyte, a bit flipped in every kilobyte: read it is an error, or what was written."""
    path = tmp_path / "checkpoints" / "last.pt"
    path.parent.mkdir()
    whole = (stopped / "checkpoints/last.pt").read_bytes()
    if manifest != "gone":
        known = (stopped / "checkpoints/manifest.json").read_text()
        path.with_name("manifest.json").write_text(known if manifest == "whole" else known[:-30])
    path.write_bytes(whole)
    state = checkpoint.load(path)
    draws = random.Random(0)
    caught = 0
    damages = [whole[:cut] for cut in range(0, len(whole), 1024)]
    for start in range(0, len(whole), 1024):
        flipped = bytearray(whole)
        flipped[min(start + draws.randrange(1024), len(whole) - 1)] ^= 1 << draws.randrange(8)
        damages.append(bytes(flipped))
    for damaged in damages:
        path.write_bytes(damaged)
        try:
            found = checkpoint.load(path)
        except mtl.UserError:
            caught += 1
        else:  # without its checksum a flipped bit in the padding between tensors is no damage
            assert manifest != "whole"
            assert_same(found, state)
    assert caught >= (len(damages) if manifest == "whole" else 0.9 * len(damages))


@pytest.mark.parametrize("damage", ["cut", "bit", "empty", "folder", "bomb", "another format", "not ours"])
def test_commands_that_meet_a_damaged_checkpoint_say_so(
    stopped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(stopped, tmp_path / "run")
    path = tmp_path / "run/checkpoints/last.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 4
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage in ("cut", "bit", "empty"):
        path.write_bytes({"cut": content[:-5000], "bit": content, "empty": b""}[damage])
    else:
        (tmp_path / "run/checkpoints/manifest.json").unlink()
        odd = {
            "bomb": {"format": checkpoint.FORMAT, "model": Bomb()},
            "another format": {"format": 1},
            "not ours": [1, 2],
        }[damage]
        torch.save(odd, path)
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file() and p.name != "train.log"}
    for module, arguments in (
        ("train", [*SMALL, "resume=run"]),
        ("train", [*SMALL, "init_from=run"]),
        ("evaluate", ["run=run", "checkpoint=last"]),
    ):
        ended = command(module, *arguments)
        assert ended.code == 1, (module, arguments)
        assert "Traceback" not in ended.err
        assert ended.err.startswith("error: ")
    assert not Path("exploded").exists()
    after = {p: p.read_bytes() for p in before}
    assert after == before  # nor does it look finished
    assert not Path("outputs").exists() or not list(Path("outputs").rglob("*.pt"))
