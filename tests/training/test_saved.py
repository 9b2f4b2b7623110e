"""Checkpoints that don't fit the model or the config: every command ends with a message."""

import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ended, command
from torch import nn

import mtl
from mtl.training import checkpoint, saved

WIDE = """
import torch
class Trunk(torch.nn.Sequential):
    def __init__(self, num_features):
        super().__init__(
            torch.nn.Flatten(), torch.nn.Linear(784, {width}), torch.nn.ReLU(), torch.nn.Linear({width}, num_features)
        )
        {more}
"""
RUN = [
    *("--config-dir", "mine", "task=mnist_two_head", "trainer.max_epochs=1", "data.batch_size=1000"),
    *(
        "model/trunk=custom",
        "model.trunk._target_=wide.Trunk",
        "+model.trunk.num_features=8",
        "checkpoint.every_steps=2",
    ),
]


def code(width: int, more: str = "") -> None:
    Path("mine").mkdir(exist_ok=True)
    Path("mine/wide.py").write_text(WIDE.format(width=width, more=more))
    shutil.rmtree("mine/__pycache__", ignore_errors=True)  # Python tells files of one size and second not apart
    sys.modules.pop("wide", None)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Provides an unfinished run with such a trunk."""
    folder = tmp_path_factory.mktemp("written")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        code(4)
        ended = command("train", *RUN)
        assert ended.code == 0, ended.err
        (ended.run / "metrics.json").unlink()
        shutil.rmtree(folder / "mine")  # which the checkpoint names
        return ended.run.resolve()


@pytest.fixture
def run(written: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(written, here / "outputs/run")
    monkeypatch.syspath_prepend(str(here / "mine"))
    return here / "outputs/run"


def commands(run: Path) -> Iterator[tuple[str, Ended]]:
    yield "evaluate", command("evaluate", "--config-dir", "mine", "run=outputs/run")
    yield "resume", command("train", *RUN, "resume=outputs/run")
    yield "init_from", command("train", *RUN, "init_from=outputs/run")


def rewritten(run: Path, change: Any) -> None:
    """Changes the run's checkpoints."""
    (run / "checkpoints/manifest.json").unlink(missing_ok=True)
    for path in run.glob("checkpoints/*.pt"):
        state = torch.load(path, weights_only=True)
        change(state)
        torch.save(state, path)


def untouched(run: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != "train.log"}


@pytest.mark.parametrize(
    ("width", "more", "said"),
    [
        (
            5,
            "",
            "trunk.1.weight has shape (4, 784) in the checkpoint and (5, 784) in the model; trunk.1.bias has shape "
            "(4,) in the checkpoint and (5,) in the model; trunk.3.weight has shape (8, 4) in the checkpoint and "
            "(8, 5) in the model",
        ),
        (4, "self.extra = torch.nn.Parameter(torch.zeros(2))", "only in the model: trunk.extra"),
        (
            4,
            "del self[2]; self.append(torch.nn.Tanh())",
            "only in the checkpoint: trunk.3.weight, trunk.3.bias; only in the model: trunk.2.w",
        ),
        (
            4,
            "self[1].bias.data = self[1].bias.data.half()",
            "trunk.1.bias has type float32 in the checkpoint and float16 in the model",
        ),
    ],
)
def test_code_that_has_changed_since(run: Path, width: int, more: str, said: str) -> None:
    code(width, more)
    before = untouched(run)
    for name, ended in commands(run):
        if name == "init_from":  # takes what fits
            assert ended.code == 0 or "half" in more, ended.err
            continue
        assert ended.code == 1
        assert "Traceback" not in ended.err
        assert said in ended.err
        assert "doesn't fit this model: " in ended.err
        assert ". The model's code or config has changed since" in ended.err
    with pytest.raises(mtl.UserError) as error:
        mtl.load(run)
    assert said in str(error.value)
    assert f"the checkpoint 'best' of '{run}' doesn't fit this model" in str(error.value)
    assert untouched(run) == before


@pytest.mark.parametrize("value", ["a text", None, [1.0, 2.0], 3, {"a": 1}], ids=repr)
def test_something_else_in_a_tensor_s_place(run: Path, value: Any) -> None:
    code(4)
    rewritten(run, lambda state: state["model"].__setitem__("trunk.1.bias", value))
    for _, ended in commands(run):
        assert ended.code == 1
        assert "Traceback" not in ended.err
        assert "trunk.1.bias is a" in ended.err
        assert "not a tensor" in ended.err
    with pytest.raises(mtl.UserError, match=r"trunk\.1\.bias is a"):
        mtl.load(run)


def keys(state: Mapping[str, Any], depth: int, before: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in state.items():
        yield (*before, key)
        if isinstance(value, Mapping) and depth > 1:
            yield from keys(value, depth - 1, (*before, key))


def test_a_key_that_is_gone_or_something_else(run: Path) -> None:
    """Each top-level key and each below it: `mtl.load` gives the same model, or says in a sentence what is wrong."""
    code(4)
    whole = checkpoint.load(run / "checkpoints/best.pt")
    expected = mtl.load(run).state_dict()
    (run / "checkpoints/manifest.json").unlink()
    refused = []
    known = [each for each in keys(whole, 3) if each[0] != "format" and each[0] in saved.MODEL]
    sections = [(each,) for each in whole if each != "format"]
    for path in dict.fromkeys([*sections, *known]):
        for change in ("gone", "a text", None, [], 7):
            state = torch.load(written_again(run, whole), weights_only=True)
            inside = state
            for part in path[:-1]:
                inside = inside[part]
            if change == "gone":
                del inside[path[-1]]
            else:
                inside[path[-1]] = change
            torch.save(state, run / "checkpoints/best.pt")
            try:
                model = mtl.load(run)
            except mtl.UserError as error:
                refused.append(str(error))
            else:
                assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert len(refused) > 50
    beginnings = (f"the checkpoint {run}", "the checkpoint 'best' of", "the config of the run", "model", "tasks")
    assert not [line for line in refused if not line.startswith(beginnings)]


def written_again(run: Path, state: Any) -> Path:
    torch.save(state, run / "checkpoints/best.pt")
    return run / "checkpoints/best.pt"


MAY_BE_GONE = {("facts",), ("versions", "threads")}  # runs that are older than these have none


@pytest.mark.parametrize("change", ["gone", pytest.param("a text", marks=pytest.mark.slow)])
def test_a_run_whose_state_lacks_something_is_not_gone_on_with(written: Path, here: Path, change: str) -> None:
    """Each top-level key, and what the step's own state has."""
    code(4)
    whole = checkpoint.load(written / "checkpoints/last.pt")
    paths = [(key,) for key in whole if key != "format"]
    paths += [*(("step", key) for key in whole["step"]), ("step", "optimizer", "param_groups"), ("versions", "threads")]
    went_on = set()
    for path in paths:
        shutil.rmtree(here / "outputs/run", ignore_errors=True)
        shutil.copytree(written, here / "outputs/run")
        (here / "outputs/run/checkpoints/manifest.json").unlink()
        for older in (here / "outputs/run").glob("checkpoints/last-*.pt"):
            older.unlink()
        state = torch.load(here / "outputs/run/checkpoints/last.pt", weights_only=True)
        inside = state
        for part in path[:-1]:
            inside = inside[part]
        if change == "gone":
            del inside[path[-1]]
        else:
            inside[path[-1]] = change
        torch.save(state, here / "outputs/run/checkpoints/last.pt")
        ended = command("train", *RUN, "resume=outputs/run")
        assert "Traceback" not in ended.err, path
        if ended.code == 0:
            went_on.add(path)
        else:
            assert "error: " in ended.err
            assert not (here / "outputs/run/metrics.json").exists()  # it is left as it is
    assert went_on == (MAY_BE_GONE if change == "gone" else {("versions", "threads")})


def test_what_fits_is_taken(tmp_path: Path) -> None:
    ours = nn.Linear(3, 2)
    theirs = {name: tensor.half() for name, tensor in nn.Linear(3, 2).state_dict().items()}
    saved.load_into(ours, theirs, "this")  # all that float16 holds float32 does
    assert torch.equal(ours.weight, theirs["weight"].float())
    with pytest.raises(mtl.UserError, match="weight has type float64 in the checkpoint and float32 in the model"):
        saved.load_into(ours, {name: tensor.double() for name, tensor in theirs.items()}, "this")
    with pytest.raises(mtl.UserError, match="weight has type int64 in the checkpoint and float32 in the model"):
        saved.load_into(ours, {**theirs, "weight": torch.zeros(2, 3, dtype=torch.int64)}, "this")
    many = nn.ModuleList(nn.Linear(1, 1) for _ in range(20))
    with pytest.raises(mtl.UserError, match="only in the model: 0.weight, .*, and 32 more"):
        saved.load_into(many, {}, "this")


def test_a_module_s_extra_state_may_be_anything() -> None:
    class Extra(nn.Linear):
        def get_extra_state(self) -> Any:
            return {"names": ["a"]}

        def set_extra_state(self, state: Any) -> None:
            self.names = state["names"]

    model = Extra(1, 1)
    saved.load_into(model, {**model.state_dict(), "_extra_state": {"names": ["b"]}}, "this")
    assert model.names == ["b"]
