"""Checkpoints of sharded models: saved in one layout, read in any other, and never half written."""

import json
import os
import pickle
import shutil
import threading
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import processes
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import mtl
from mtl.data import Fields, Loader
from mtl.process.seeding import seed_process
from mtl.safety import archive, shards
from mtl.safety.archive import check_newest
from mtl.training import checkpoint
from mtl.training.hooks import Hooks
from mtl.training.layouts import fitted
from mtl.training.options import Checkpoints
from mtl.training.shards import new_folder
from mtl.training.trainer import Trainer
from mtl.training.writer import Writer


def built(how: str, seed: int) -> tuple[nn.Module, torch.optim.Adam]:
    """Returns a model and its optimizer; no size is divisible by all numbers of processes, and one is 1."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Linear(7, 1))
    if how in ("fsdp", "hsdp"):
        from torch.distributed.fsdp import fully_shard

        count = dist.get_world_size()
        mesh = (
            init_device_mesh("cpu", (count,), mesh_dim_names=("shard",))
            if how == "fsdp"
            else init_device_mesh("cpu", (2, count // 2), mesh_dim_names=("replicate", "shard"))
        )
        for layer in (model[0], model[1], model[3]):
            fully_shard(layer, mesh=mesh)
    return model, torch.optim.Adam(model.parameters(), lr=0.1)


def train(model: nn.Module, optimizer: torch.optim.Adam, steps: range) -> None:
    """Takes steps with the same batches in all processes, whose mean gradient is that of each of them."""
    for number in steps:
        batch = torch.randn(6, 5, generator=torch.Generator().manual_seed(number))
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()


def state_of(model: nn.Module, optimizer: torch.optim.Adam, step: int) -> dict[str, Any]:
    about = {"epoch": step, "global_step": step, "position": None, "value": float(step), "more": {"a": [1, (2, "x")]}}
    return {**about, "model": model.state_dict(), "step": {"optimizer": optimizer.state_dict()}}


def whole(value: Any) -> Any:
    """Returns the state with whole tensors."""
    if isinstance(value, dict):
        return {key: whole(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(whole(each) for each in value)
    value = value.full_tensor() if hasattr(value, "full_tensor") else value
    return value.detach().clone() if isinstance(value, Tensor) else value


def assert_same(ours: Any, theirs: Any) -> None:
    """Checks that two states are equal, tensors bit by bit, and that dicts have the same order."""
    assert type(ours) is type(theirs) or isinstance(ours, dict)
    if isinstance(ours, dict):
        assert list(ours) == list(theirs)
        for key in ours:
            assert_same(ours[key], theirs[key])
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs)
        for mine, other in zip(ours, theirs, strict=True):
            assert_same(mine, other)
    elif isinstance(ours, Tensor):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)
    else:
        assert ours == theirs


def saves(folder: Path, how: str, steps: tuple[int, ...] = (3,), **options: Any) -> dict[str, Any]:
    """Trains and saves after each of the steps; returns the last state as a whole."""
    model, optimizer = built(how, seed=0)
    writer = Writer(folder, keep=options.pop("keep", 2), report=pytest.fail, **options)
    for first, last in zip((0, *steps), steps, strict=False):
        train(model, optimizer, range(first, last))
        writer.save("last", state_of(model, optimizer, last))
    writer.complete()
    return whole(state_of(model, optimizer, steps[-1]))


def resumes(folder: Path, how: str) -> tuple[dict[str, Any], list[int]]:
    """Loads the state into another model; returns the state as a whole, and the numbers of elements of this process."""
    model, optimizer = built(how, seed=1)
    state = checkpoint.newest(folder, pytest.fail, whole=False)
    state = fitted(state, model, {"optimizer": list(model.parameters())})
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["step"]["optimizer"])
    sizes = [v.to_local().numel() for v in state["model"].values() if hasattr(v, "to_local")]
    return whole({**state, **state_of(model, optimizer, state["epoch"])}), sizes


def goes_on(folder: Path, how: str) -> dict[str, Any]:
    """Loads the state, takes further steps, and returns the parameters."""
    model, optimizer = built(how, seed=1)
    state = fitted(checkpoint.load(folder / "last.pt", whole=False), model, {"optimizer": list(model.parameters())})
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["step"]["optimizer"])
    train(model, optimizer, range(3, 6))
    return whole(model.state_dict())


LAYOUTS = [(2, "fsdp", 1, "one"), (2, "fsdp", 2, "fsdp"), (1, "one", 3, "fsdp"), (2, "fsdp", 3, "fsdp")]
HYBRID = pytest.param(4, "hsdp", 2, "fsdp", marks=pytest.mark.slow)


@pytest.mark.parametrize(("before", "how", "after", "then"), [*LAYOUTS, (2, "ddp", 2, "fsdp"), HYBRID])
def test_saved_in_one_layout_and_resumed_in_another(
    tmp_path: Path, before: int, how: str, after: int, then: str
) -> None:
    folder = tmp_path / "checkpoints"
    original = processes(before)(saves, folder, how)[0] if before > 1 else saves(folder, how)
    expected = {"format": checkpoint.FORMAT, **original}
    assert_same(checkpoint.load(folder / "last.pt"), expected)  # without a process group
    results = processes(after)(resumes, folder, then) if after > 1 else [resumes(folder, then)]
    for state, _ in results:
        assert_same(state, expected)
    if then == "fsdp":  # each process has its own part only
        count = sum(
            value.numel() for name, value in original["model"].items() if name.split(".")[1] in ("weight", "bias")
        )
        assert sum(sum(sizes) for _, sizes in results) == count
        undisturbed, optimizer = built("one", seed=0)
        train(undisturbed, optimizer, range(6))
        for parameters in processes(after)(goes_on, folder, then):
            torch.testing.assert_close(parameters, dict(undisturbed.state_dict()), rtol=1e-5, atol=1e-6)


def several(folder: Path, keep: int, best: int) -> list[list[str]]:
    """Saves last.pt each time and best.pt if it is better; returns the folders after each time, from rank 0."""
    model, optimizer = built("fsdp", seed=0)
    writer = Writer(folder, keep=keep, best=best, report=pytest.fail)
    listed = []
    for step, value in enumerate([0.3, 0.5, 0.1, 0.4], start=1):
        train(model, optimizer, range(step - 1, step))
        state = {**state_of(model, optimizer, step), "value": value}
        better = bool(value >= 0.4)  # the same in all processes, as the trainer makes sure
        if better:
            writer.save("best", state, (lambda ours, theirs: ours > theirs) if best > 1 else None)
        writer.save("last", state)
        writer.complete()
        dist.barrier()
        listed.append(sorted(path.name for path in folder.iterdir() if path.suffix != ".json"))
    return listed


def test_the_newest_and_the_best_are_kept_and_no_others(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    listed, _ = processes(2)(several, folder, 2, 2)
    assert listed == [
        ["last.pt", "step-1.shards"],
        ["best.pt", "last-1.pt", "last.pt", "step-1.shards", "step-2.shards"],  # best and last share their shards
        ["best.pt", "last-1.pt", "last.pt", "step-2.shards", "step-3.shards"],
        ["best-1.pt", "best.pt", "last-1.pt", "last.pt", "step-2.shards", "step-3.shards", "step-4.shards"],
    ]
    steps = {path.name: checkpoint.load(path)["global_step"] for path in folder.glob("*.pt")}
    assert steps == {"best.pt": 2, "best-1.pt": 4, "last.pt": 4, "last-1.pt": 3}


@pytest.fixture(scope="module")
def twice(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Provides the checkpoints of two processes after steps 2 and 3."""
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    processes(2)(saves, folder, "fsdp", (2, 3))
    return folder


def cut_off(folder: Path) -> None:
    path = folder / "step-3.shards/__1_0.distcp"
    path.write_bytes(path.read_bytes()[:-1])


def changed(folder: Path) -> None:
    path = folder / "step-3.shards/__0_0.distcp"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def gone(folder: Path) -> None:
    shutil.rmtree(folder / "step-3.shards")


def linked(folder: Path) -> None:
    path = folder / "step-3.shards/__0_0.distcp"
    path.rename(folder / "elsewhere")
    path.symlink_to(folder / "elsewhere")


def of_the_index(folder: Path) -> None:
    content = bytearray((folder / "last.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "last.pt").write_bytes(content)


DAMAGE = {
    cut_off: "is damaged: the checksum of its file step-3.shards/__1_0.distcp is wrong",
    changed: "is damaged: the checksum of its file step-3.shards/__0_0.distcp is wrong",
    gone: "is damaged: its file step-3.shards/__0_0.distcp is missing",
    linked: "__0_0.distcp is a symbolic link",
    of_the_index: "is damaged: its checksum is not in manifest.json",
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_damage_is_reported_and_the_checkpoint_before_is_used(
    tmp_path: Path, twice: Path, damage: Callable[[Path], None]
) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(twice, folder)
    damage(folder)
    with pytest.raises(mtl.UserError, match=DAMAGE[damage]):
        checkpoint.load(folder / "last.pt")
    warned: list[str] = []
    assert checkpoint.newest(folder, warned.append)["global_step"] == 2
    assert len(warned) == 1
    check_newest(folder)
    shutil.rmtree(folder / "step-2.shards")
    with pytest.raises(mtl.UserError, match=DAMAGE[damage]):
        check_newest(folder)


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("exploded"),)


def rewritten(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes the index of last.pt, with the right digests."""
    state = torch.load(folder / "last.pt", weights_only=True)
    change(state[shards.KEY])
    for name, about in state[shards.KEY]["files"].items():
        path = folder / state[shards.KEY]["folder"] / name
        with path.open("rb") as file:
            about[:] = [path.stat().st_size, archive.checksum(file)]
    checkpoint.save(folder / "last.pt", {k: v for k, v in state.items() if k not in ("format", archive.SAVED_AS)})


def bomb_for_chunk(folder: Path, index: dict[str, Any]) -> None:
    chunk = index["tensors"]["model/0.weight"][2][0]
    torch.save(Bomb(), folder / "bomb")
    content = (folder / "bomb").read_bytes()
    (folder / "step-3.shards/bomb.distcp").write_bytes(content)
    index["files"]["bomb.distcp"] = [0, ""]
    chunk[2:] = ["bomb.distcp", 0, len(content)]


def too_many(folder: Path, index: dict[str, Any]) -> None:
    index["tensors"]["model/0.weight"] = ["float32", [2**40], [[[0], [2**40], "__0_0.distcp", 0, 1000]]]


def same_bytes(folder: Path, index: dict[str, Any]) -> None:
    first = index["tensors"]["model/0.weight"]
    index["tensors"] |= {f"other/{number}": first for number in range(100)}


def outside(folder: Path, index: dict[str, Any]) -> None:
    index["folder"] = "../checkpoints/step-3.shards"


def another_shape(folder: Path, index: dict[str, Any]) -> None:
    index["tensors"]["model/0.weight"][2][0][0] = [4, 0]


def beyond_the_file(folder: Path, index: dict[str, Any]) -> None:
    index["tensors"]["model/0.weight"][2][0][4] = 10**6


def another_chunk(folder: Path, index: dict[str, Any]) -> None:
    index["tensors"]["model/0.weight"][2][0][2:] = index["tensors"]["model/3.weight"][2][0][2:]


HOSTILE = {
    bomb_for_chunk: "its pickle names",
    too_many: "more elements than its files have bytes",
    same_bytes: "more bytes than its further files have",
    outside: "the folder of its further files is malformed",
    another_shape: "reaches beyond the tensor or its file",
    beyond_the_file: "reaches beyond the tensor or its file",
    another_chunk: "isn't the tensor that was saved|more elements than",
}


@pytest.mark.parametrize("change", HOSTILE, ids=lambda change: change.__name__)
def test_an_index_that_lies_is_refused_before_memory_is_taken(
    tmp_path: Path, twice: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path, dict[str, Any]], None]
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "checkpoints"
    shutil.copytree(twice, folder)
    rewritten(folder, partial(change, folder))
    with pytest.raises(mtl.UserError, match=HOSTILE[change]):
        checkpoint.load(folder / "last.pt")
    assert not Path("exploded").exists()


def test_the_pickle_of_dcp_is_not_read(tmp_path: Path, twice: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "checkpoints"
    shutil.copytree(twice, folder)
    (folder / "step-3.shards/.metadata").write_bytes(pickle.dumps(Bomb()))
    assert_same(checkpoint.load(folder / "last.pt"), checkpoint.load(twice / "last.pt"))
    assert not Path("exploded").exists()


def test_pytorch_reads_the_shards_as_well(tmp_path: Path, twice: Path) -> None:
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no process group
        dcp_to_torch_save(twice / "step-3.shards", tmp_path / "whole.pt")
    theirs = torch.load(tmp_path / "whole.pt", weights_only=True)
    ours = checkpoint.load(twice / "last.pt")
    assert torch.equal(theirs["model/0.weight"], ours["model"]["0.weight"])
    assert torch.equal(theirs["step/optimizer/state/0/exp_avg"], ours["step"]["optimizer"]["state"][0]["exp_avg"])


def test_what_a_killed_process_leaves_is_not_used_and_removed(tmp_path: Path, twice: Path) -> None:
    """Killed between the shards and last.pt, so that a folder to which nothing refers is there."""
    folder = tmp_path / "checkpoints"
    shutil.copytree(twice, folder)
    (folder / "step-4.shards").mkdir()
    shutil.copy(folder / "step-3.shards/__0_0.distcp", folder / "step-4.shards/__0_0.distcp")
    assert checkpoint.newest(folder, pytest.fail)["global_step"] == 3
    processes(2)(saves, folder, "fsdp", (4,))
    assert sorted(path.name for path in folder.glob("*.shards")) == ["step-3.shards", "step-4-1.shards"]
    assert [checkpoint.load(path)["global_step"] for path, _ in checkpoint.numbered(folder / "last.pt")] == [4, 3]


def fails(folder: Path, rank: int, where: str) -> tuple[str, str]:
    """Saves, lets the second save fail in one process, and returns the messages of the third save and of the end."""
    model, optimizer = built("fsdp", seed=0)
    writer = Writer(folder, keep=2, report=pytest.fail)
    writer.save("last", state_of(model, optimizer, 1))
    writer.complete()
    messages = []
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == rank:
            patch.setattr(where, full)
        writer.save("last", state_of(model, optimizer, 2))
        for again in (lambda: writer.save("last", state_of(model, optimizer, 3)), writer.complete):
            with pytest.raises(mtl.UserError) as raised:
                again()
            messages.append(str(raised.value))
    return messages[0], messages[1]


def full(*_: Any, **__: Any) -> Any:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    ("rank", "where"),
    [
        (1, "mtl.training.shard_files._Stream.write"),
        (0, "mtl.training.shard_files._Stream.write"),
        (0, "mtl.training.checkpoint.save"),
        (0, "mtl.training.writer.new_folder"),
        (1, "mtl.training.shards.archive.checksum"),
    ],
)
def test_a_failure_in_one_process_ends_all_with_one_sentence(tmp_path: Path, rank: int, where: str) -> None:
    folder = tmp_path / "checkpoints"
    answers = processes(2)(fails, folder, rank, where)
    place = f", in the process of rank {rank}" if rank or "Stream" in where else ""
    message = (
        f"the checkpoint {folder / 'last.pt'} could not be written: [Errno 28] No space left on device{place}; earlier "
        "ones are unchanged"
    )
    assert answers == [(message, message)] * 2
    assert checkpoint.load(folder / "last.pt")["global_step"] == 1
    assert [path.name for path in folder.glob("*.shards")] == ["step-1.shards"]


def ends_after(folder: Path) -> tuple[str, int]:
    """Trains until a write of rank 1 fails that begins after step 6; returns the message, and the last step."""
    trainer = trainer_of(folder, "fsdp", 5, seed=0)

    def fills(trainer: Trainer, _: object) -> None:
        if trainer.global_step == 5:
            trainer.writer.wait()
            if dist.get_rank() == 1:
                patch.setattr("mtl.training.shard_files._Stream.write", full)
        if trainer.global_step == 7:
            trainer.writer.wait()

    trainer.hooks = Hooks([fills])
    with pytest.MonkeyPatch.context() as patch, pytest.raises(mtl.UserError) as raised:
        trainer.fit()
    return str(raised.value), trainer.global_step


def test_a_training_ends_in_all_processes_after_the_step_in_which_the_failure_is_known(tmp_path: Path) -> None:
    """And not when the next checkpoint is due, after step 8."""
    answers = processes(2)(ends_after, tmp_path)
    assert answers[0] == answers[1]
    assert "[Errno 28] No space left on device, in the process of rank 1; earlier ones are unchanged" in answers[0][0]
    assert answers[0][1] == 7
    assert checkpoint.load(tmp_path / "checkpoints/last.pt")["global_step"] == 4


def checks_first(folder: Path) -> bool:
    """Saves in the background; returns whether the files were complete when last.pt was about to be saved."""
    model, optimizer = built("fsdp", seed=0)
    writer = Writer(folder, keep=2, report=pytest.fail)
    save, complete, trained = checkpoint.save, [], threading.Event()

    def checked(path: Path, state: dict[str, Any], **options: Any) -> None:
        shards.check(shards.parse(state[shards.KEY], path), "it")
        complete.append(not path.exists())
        save(path, state, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mtl.training.checkpoint.save", checked)
        patch.setattr("mtl.training.writer.new_folder", lambda *given: (trained.wait(60), new_folder(*given))[1])
        before = whole(state_of(model, optimizer, 1)["model"])
        writer.save("last", state_of(model, optimizer, 1))
        train(model, optimizer, range(3))  # changes the tensors before they are written
        dist.barrier()
        trained.set()
        writer.complete()
    dist.barrier()
    assert_same(checkpoint.load(folder / "last.pt")["model"], dict(before))
    return complete == ([True] if dist.get_rank() == 0 else [])


def test_the_shards_are_complete_before_the_checkpoint_refers_to_them(tmp_path: Path) -> None:
    assert all(processes(2)(checks_first, tmp_path / "checkpoints"))


def test_an_index_without_files_is_refused() -> None:
    for value in (None, {}, {"folder": "a.shards", "files": {"a": [1]}, "tensors": {}}, json.loads('{"files": 1}')):
        with pytest.raises(ValueError, match="malformed"):
            shards.parse(value, Path(os.devnull))


def trainer_of(folder: Path, how: str, epochs: int, seed: int) -> Trainer:
    """Builds a trainer whose balancer, optimizer, dropout and data all have a state."""
    torch.manual_seed(seed)
    x = torch.randn(30, 6, generator=torch.Generator().manual_seed(9))
    fields = {"x": x, "a": (x[:, 0] > 0).long(), "b": (x[:, 1] > 0).long()}
    tasks = [mtl.Task(name, head=nn.Linear(7, 2), loss=nn.CrossEntropyLoss(), target=name) for name in "ab"]
    trunk = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Dropout(0.2), nn.Linear(7, 7))
    model = mtl.MultiTaskModel(trunk, tasks, inputs=["x"])
    if how != "one":
        mtl.distributed.prepare(model, how)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    step = mtl.Step(model, tasks, optimizer, balancer=mtl.balancers.MoCo())
    seed_process(0)
    return Trainer(
        step,
        Loader(Fields(fields), batch_size=8, shuffle=True),
        Loader(Fields(fields), batch_size=30),
        max_epochs=epochs,
        checkpoints=Checkpoints(folder / "checkpoints", every_steps=3),
    )


def fits(folder: Path, how: str, epochs: int, resumed: bool) -> tuple[dict[str, Any], int]:
    """Trains, from the last checkpoint if it is resumed; returns the parameters, and the number of the last step."""
    trainer = trainer_of(folder, how, epochs, seed=int(resumed))
    if resumed:
        state = checkpoint.newest(folder / "checkpoints", pytest.fail, whole=False)
        trainer.load_state_dict(fitted(state, trainer.step.model, trainer.step.descent.parameters()))
    trainer.fit()
    return whole(trainer.step.model.state_dict()), trainer.global_step


@pytest.mark.parametrize(("how", "then"), [("fsdp", "fsdp"), ("fsdp", "ddp"), ("ddp", "fsdp")])
def test_a_training_goes_on_in_another_layout_as_if_it_had_not_been_stopped(
    tmp_path: Path, how: str, then: str
) -> None:
    calm, calm_step = processes(2)(fits, tmp_path / "calm", how, 3, False)[0]
    processes(2)(fits, tmp_path / "run", how, 1, False)
    results = processes(2)(fits, tmp_path / "run", then, 3, True)
    for parameters, step in results:
        assert step == calm_step
        if how == then:
            assert_same(parameters, dict(calm))
        else:
            torch.testing.assert_close(parameters, dict(calm), rtol=1e-4, atol=1e-5)
    state = checkpoint.load(tmp_path / "run" / "checkpoints" / "last.pt")
    assert_same(state["model"], dict(results[0][0]))
    assert state["step"]["balancing"]["balancer"]["averages"]


def test_one_process_evaluates_and_goes_on(tmp_path: Path) -> None:
    processes(2)(fits, tmp_path, "fsdp", 1, False)
    trainer = trainer_of(tmp_path, "one", 2, seed=1)
    state = checkpoint.newest(tmp_path / "checkpoints", pytest.fail)
    trainer.load_state_dict(state)
    assert_same(dict(trainer.step.model.state_dict()), state["model"])
    trainer.fit()
    assert "shards" not in torch.load(tmp_path / "checkpoints" / "last.pt", weights_only=True)
    for path in (tmp_path / "checkpoints").glob("*.pt"):
        checkpoint.load(path)
    trainer = trainer_of(tmp_path, "one", 4, seed=1)
    trainer.load_state_dict(checkpoint.newest(tmp_path / "checkpoints", pytest.fail))
    trainer.fit()
    referred = {
        torch.load(path, weights_only=True).get(shards.KEY, {}).get("folder")
        for path in (tmp_path / "checkpoints").glob("*.pt")
    }
    assert {path.name for path in (tmp_path / "checkpoints").glob("*.shards")} == referred - {None}
