"""The user's variables: used in other values, saved with the run, compared when the run is resumed."""

from pathlib import Path

import pytest
from conftest import command, stopping
from omegaconf import OmegaConf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from mtl.runs import resume
from mtl.training import checkpoint

FAST = ["task=mnist_two_head", "trainer.max_epochs=1", "data.batch_size=1000", "scheduler=none"]


def hparams(run: Path) -> dict[str, float | str]:
    """Returns the options of the run that TensorBoard gets."""
    events = EventAccumulator(str(run))
    events.Reload()
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    found = HParamsPluginData.FromString(content).session_start_info.hparams
    return {name: value.number_value or value.string_value for name, value in found.items()}


def test_a_variable_is_kept_with_the_run_and_compared_when_it_goes_on(here: Path) -> None:
    typed = [*stopping(2), *FAST, "vars.fold=3", "vars.rate=1e-3", "seed=${vars.fold}", "optimizer.lr=${vars.rate}"]
    stopped = command("train", *typed)
    assert stopped.code == 143, stopped.err
    run = stopped.run
    kept = OmegaConf.to_container(OmegaConf.load(run / "config.yaml"))
    assert kept["vars"] == {"fold": 3, "rate": 1e-3}
    assert (kept["seed"], kept["optimizer"]["lr"]) == (3, 1e-3)
    assert checkpoint.load(run / "checkpoints/last.pt")["config"]["vars"] == {"fold": 3, "rate": 1e-3}
    assert hparams(run)["vars.fold"] == 3
    assert hparams(run)["vars.rate"] == pytest.approx(1e-3)

    other = command("train", *typed, "vars.fold=4", "seed=3", f"resume={run}")
    assert other.code == 1
    assert "vars.fold: was 3, is 4\nSet the same values, or allow it: 'resume_allow=[vars.fold]'" in other.err
    other = command("train", *typed[:-4], "seed=3", "optimizer.lr=1e-3", "vars.rate=null", f"resume={run}")
    assert "\n  vars.fold: was 3, is unset\n  vars.rate: was 0.001, is None\n" in other.err
    ended = command("train", *typed, "vars.fold=4", "seed=3", f"resume={run}", "resume_allow=[vars.fold]")
    assert ended.code == 0, ended.err
    assert OmegaConf.load(run / "config.yaml").vars.fold == 4
    assert command("evaluate", f"run={run}").code == 0


def test_a_run_that_is_older_than_variables_goes_on(here: Path) -> None:
    assert command("train", *stopping(2), *FAST).code == 143
    (config,) = here.glob("outputs/*/*/config.yaml")
    old = OmegaConf.to_container(OmegaConf.load(config))
    del old["vars"]
    assert resume.forbidden(old, {**old, "vars": {}}) == []
    assert resume.forbidden(old, {**old, "vars": {"fold": 1}}) == [("vars.fold", None, 1)]
    OmegaConf.save(OmegaConf.create(old), config)
    state = checkpoint.load(config.parent / "checkpoints/last.pt")
    for name in ("config", "composed"):
        del state[name]["vars"]
    checkpoint.save(config.parent / "checkpoints/last.pt", state)
    ended = command("train", "--config-dir", "code", *FAST, "resume=auto")
    assert ended.code == 0, ended.err
    assert "resume   from step 2" in ended.out


def test_a_sweep_over_a_variable(here: Path) -> None:
    ended = command("train", "-m", *FAST, "logger=[]", "vars.fold=0,1", "vars.note=é", "seed=${vars.fold}")
    assert ended.code == 0, ended.err
    runs = sorted(here.glob("outputs/multirun/*/*/config.yaml"))
    assert [run.parent.name for run in runs] == ["0_fold-0", "1_fold-1"]
    assert [OmegaConf.load(run).vars for run in runs] == [{"fold": fold, "note": "é"} for fold in (0, 1)]


@pytest.mark.parametrize(
    ("typed", "is_told"),
    [("vars.widht=3", True), ("vars.width=3", False), ("vars.fold=3", False), ("vars.widths=${vars.width}", True)],
)
def test_a_variable_that_is_misspelt_is_told_of(here: Path, typed: str, is_told: bool) -> None:
    (here / "mine/task").mkdir(parents=True)
    problem = "defaults: [mnist_two_head, _self_]\nvars: {width: 30}\nmodel: {trunk: {num_features: '${vars.width}'}}\n"
    (here / "mine/task/wide.yaml").write_text(f"# @package _global_\n{problem}")
    ended = command("train", "--config-dir", "mine", "task=wide", *FAST[1:], "logger=[]", typed)
    assert ended.code == 0, ended.err
    name = typed.split("=")[0]
    assert (f"note     nothing refers to {name}; did you mean vars.width?\n" in ended.out) == is_told
    assert ("nothing refers to" in ended.out) == is_told
    more = [typed, f"seed=${{{name}}}"] if name != "vars.widths" else [typed, "vars.also=${vars.widths}"]
    assert "nothing refers to" not in command("train", "--config-dir", "mine", "task=wide", *FAST[1:], *more).out


def test_graph_takes_variables(here: Path) -> None:
    ended = command("graph", *FAST, "vars.kind=joint", "passes=${vars.kind}")
    assert ended.code == 0, ended.err
