"""Configs that are wrong in any way end as a run or with a message, never with a traceback."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import command
from hostile import at_most
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from test_readme import HANGS

from mtl import schema

BASE = ["trainer.max_epochs=1", "data.batch_size=2000", "data.eval_batch_size=500", "logger=[]"]
KEYS = [
    *schema.SCHEMA,
    *(
        f"tasks.digit.{key}"
        for key in (*schema.TASK, "num_outputs", "head.in_features", "metrics.accuracy.num_classes")
    ),
    *("optimizer.lr", "optimizer.weight_decay", "optimizer._target_", "scheduler._target_", "scheduler.T_max"),
    *("model.trunk._target_", "model.trunk.num_features", "model.trunk.dropout", "model._target_", "data._target_"),
    *("data.source", "data.root", "balancer._target_", "balancer.alpha", "balancer.seed", "tasks.parity", "tasks.new"),
    *("tasks.digit.head._target_", "tasks.digit.loss._target_", "tasks.digit.loss.weight", "model.trunk.output"),
    *("tasks.digit.metrics.accuracy._target_", "scheduler.interval", "tasks.digit.head", "tasks.digit.loss"),
    *("log.every", "trainer", "checkpoint", "gradients", "nothing", "tasks.digit.nothing", "callbacks.x._target_"),
]
VALUES = [
    *("null", "true", "-1", "0", "1", "3", "0.5", "1e400", "-1e400", "nan", "1e-300", "99999999999999999999999"),
    *("''", "' '", "abc", "'ü☃'", "'a b'", "'../x'", "[]", "[1,2]", "['digit']", "{}", "{a: 1}", "{_target_: 3}"),
    *(
        "{_target_: os.getcwd}",
        "{_target_: torch.nn.Linear}",
        "torch.nn.Nothing",
        "nothing.at.all",
        "'${seed}'",
        "'???'",
    ),
    *(
        "torch.nn.Sequential",
        "torch.nn.LazyLinear",
        "torch.nn.GRU",
        "torch.nn.BatchNorm1d",
        "torch.nn.BCEWithLogitsLoss",
    ),
    *("torchmetrics.classification.BinaryF1Score", "[2,2,0.5]", "{_target_: torch.nn.Linear, _args_: [20, 10]}"),
    *("torch.optim.lr_scheduler.StepLR", "1.-1", "'0[:, -1]'"),
    *("'${nowhere}'", "auto", "digit", "bf16", "sequential", "mtl.balancers.MGDA", "torch.optim.SGD", "'{'", "9" * 400),
]
GROUPS = {
    "balancer": [path.stem for path in (Path(__file__).parents[1] / "configs/balancer").glob("*.yaml")]
    + ["nope", "null"],
    "optimizer": ["sgd", "adamw", "nope", "null"],
    "scheduler": ["none", "cosine", "null", "[cosine]"],
    "data": ["mnist", "multi_mnist", "datasets", "null", "nope"],
    "model": ["separate", "hard_sharing", "null"],
    "model/trunk": ["custom", "lenet", "null"],
    "logger": ["[]", "csv", "[csv,csv]", "nope", "null"],
    "trainer": ["default", "null"],
    "task": ["nope", "null", "[]", "''"],
}
overrides = st.one_of(
    st.builds(
        "{}{}={}".format, st.sampled_from(["", "", "", "+", "++"]), st.sampled_from(KEYS), st.sampled_from(VALUES)
    ),
    st.builds("~{}".format, st.sampled_from(KEYS)),
    st.sampled_from(sorted(GROUPS)).flatmap(lambda group: st.sampled_from([f"{group}={o}" for o in GROUPS[group]])),
    st.text(alphabet="=~+.{}[]'$ aü1_/-", min_size=1, max_size=8).filter(lambda text: not text.startswith("-")),
)


@settings(
    max_examples=int(os.environ.get("MTL_FUZZ", "30")),
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(st.lists(overrides, min_size=1, max_size=3))
@pytest.mark.filterwarnings("ignore")
def test_any_config_is_a_run_or_a_message(here: Path, given_overrides: list[str]) -> None:
    with at_most(HANGS):
        ended = command("train", "task=mnist_two_head", *BASE, *given_overrides)
    assert "Traceback" not in ended.err, (given_overrides, ended.err[-2000:])
    if ended.code == 0:
        if ended.run is not None:
            assert json.loads((ended.run / "metrics.json").read_text())["status"] == "finished", given_overrides
    else:
        assert ended.err.startswith("error: "), (given_overrides, ended.err[-500:])
        assert len(ended.err.splitlines()[0]) > len("error: ") + 5, ended.err
        for metrics in Path().glob("outputs/**/metrics.json"):
            if ended.run is not None and metrics.parent == ended.run:
                assert json.loads(metrics.read_text())["status"] != "finished"


@pytest.fixture
def stopped(here: Path) -> Path:
    """Provides a run that can be resumed."""
    ended = command("train", "task=mnist_two_head", *BASE, "scheduler=none")
    assert ended.code == 0, ended.err
    return ended.run


@settings(
    max_examples=int(os.environ.get("MTL_FUZZ", "30")) // 5,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(st.lists(overrides, min_size=1, max_size=3), st.sampled_from(["auto", "run"]), st.booleans())
@pytest.mark.filterwarnings("ignore")
def test_any_config_that_is_to_go_on_is_a_run_or_a_message(
    stopped: Path, given_overrides: list[str], which: str, longer: bool
) -> None:
    resume = [f"resume={which if which == 'auto' else stopped}", *(["trainer.max_epochs=2"] if longer else [])]
    before = json.loads((stopped / "metrics.json").read_text())
    with at_most(HANGS):
        ended = command("train", "task=mnist_two_head", *BASE, "scheduler=none", *resume, *given_overrides)
    assert "Traceback" not in ended.err, (resume, given_overrides, ended.err[-2000:])
    if ended.code and which == "run":
        assert json.loads((stopped / "metrics.json").read_text()) == before, (resume, given_overrides)


# What follows is composed and shown, not trained, which is quick.

BARE = """# @package _global_
defaults:
  - _self_
  - override /data: mnist
  - override /model: hard_sharing
  - override /model/trunk: lenet
model: {inputs: [image]}
tasks:
  a:
    target: digit
    head: {_target_: torch.nn.Linear, in_features: 20, out_features: 10}
    loss: {_target_: torch.nn.CrossEntropyLoss}
"""
quick = settings(
    max_examples=int(os.environ.get("MTL_FUZZ", "30")) // 2,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
words = st.text("abcdefghijklmnopqrstuvwxyz_", min_size=1, max_size=8).filter(lambda word: word.strip("_"))
NODES = [  # of mnist_two_head, at every level
    *(
        "",
        "tasks",
        "tasks.digit",
        "tasks.digit.head",
        "tasks.digit.loss",
        "tasks.digit.metrics",
        "model",
        "model.trunk",
    ),
    *(
        "optimizer",
        "balancer",
        "data",
        "trainer",
        "log",
        "logger",
        "logger.csv",
        "callbacks",
        "checkpoint",
        "gradients",
    ),
    *("seed", "scheduler", "trainer.monitor", "model.freeze", "hydra", "hydra.job", "hydra.job.env_set", "tasks.zz"),
    *("tasks.digit.metrics.accuracy", "vars.deep.deeper"),
]
NAMES = ["lr", "weight", "target", "max_epochs", "seed", "digit", "csv", "_target_", "interval", "num_features", "vars"]
typos = st.builds(  # of a name that there is
    lambda name, at, new: name[:at] + new + name[at + 1 :],
    st.sampled_from(NAMES),
    st.integers(0, 10),
    st.sampled_from(["", "x", "_"]),
)
unknown_keys = st.builds(
    lambda node, name, deeper: ".".join(part for part in (node, name, deeper) if part),
    st.sampled_from(NODES),
    st.one_of(words, typos.filter(lambda name: name.strip("_")), st.sampled_from(NAMES)),
    st.sampled_from(["", "", "", "x", "lr"]),
)


def shown(*typed: str) -> tuple[int, str, str]:
    """Composes the config and prints it."""
    with at_most(HANGS):
        ended = command("train", *typed, "--cfg", "job")
    assert "Traceback" not in ended.err, (typed, ended.err[-2000:])
    if ended.code:
        assert ended.err.startswith("error: "), (typed, ended.err)
    return ended.code, ended.out, ended.err


@quick
@given(unknown_keys, st.sampled_from(["3", "null", "{a: 1}", "x"]), st.sampled_from(["", "~"]))
@pytest.mark.filterwarnings("ignore")
def test_any_key_is_known_or_explained(here: Path, key: str, value: str, prefix: str) -> None:
    code, out, err = shown("task=mnist_two_head", f"~{key}" if prefix else f"{key}={value}")
    if code == 0:
        assert prefix or OmegaConf.select(OmegaConf.create(out), key) is not None or value == "null" or "hydra" in key
        return
    assert "Could not" not in err, (key, err)
    for suggested in re.findall(r"did you mean '([^']+)'", err):
        assert suggested != key, (key, err)
    assert key in err or re.match(r"error: there is no (task|group) '", err), (key, err)


@quick
@given(st.sampled_from([*(k for k in schema.SCHEMA if "." in k), *(f"tasks.a.{k}" for k in schema.TASK)]))
@pytest.mark.filterwarnings("ignore")
def test_any_key_of_the_schema_is_taken_without_a_plus(here: Path, key: str) -> None:
    Path("mine/task").mkdir(parents=True, exist_ok=True)
    Path("mine/task/bare.yaml").write_text(BARE)
    base = ["scheduler=cosine"] if key.startswith("scheduler.") else []
    code, out, err = shown("--config-dir=mine", "task=bare", *base, f"{key}=from_a_fuzz")
    assert code == 0, (key, err)
    assert OmegaConf.select(OmegaConf.create(out), key) == "from_a_fuzz"


@quick
@given(words, st.one_of(st.integers(), words, st.booleans()), st.sampled_from(["seed", "optimizer.lr", "vars.other"]))
@pytest.mark.filterwarnings("ignore")
def test_any_variable_can_be_named_in_other_values(here: Path, name: str, value: object, key: str) -> None:
    code, out, err = shown("task=mnist_two_head", f"vars.{name}={value}", f"{key}=${{vars.{name}}}", "--resolve")
    assert code == 0, (name, value, err)
    config = OmegaConf.create(out)
    expected = OmegaConf.create(f"x: {value}").x  # a word such as `null` or `on` is what it is in Hydra's grammar
    assert str(config.vars[name]).lower() == str(OmegaConf.select(config, key)).lower() == str(expected).lower()


characters = st.one_of(
    st.sampled_from(",=[](){}'\"#~$:;\\*?!& -\n\ta.é日1@|^`<>"),
    st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="/"),
)
folders = (
    st.lists(characters, min_size=1, max_size=6)
    .map("".join)
    .filter(lambda name: name.strip(". \n\t") and "${" not in name)
)


@settings(quick, max_examples=max(int(os.environ.get("MTL_FUZZ", "30")) // 30, 1))
@given(folders)
@pytest.mark.filterwarnings("ignore")
def test_any_folder_gives_commands_that_run(here: Path, name: str) -> None:
    Path(name).mkdir(exist_ok=True)
    Path(name, "noticed.py").write_text("def each(trainer, result): pass\n")
    seen = "callbacks={x: {_target_: noticed.each, _partial_: true}}"
    with at_most(HANGS):
        ended = command("train", f"--config-dir={name}", "task=mnist_two_head", *BASE, f"+{seen}", "output_root=runs")
    assert ended.code == 0, (name, ended.err)
    (run,) = Path("runs/mnist_two_head").glob("*")
    moved = Path(name, run.name)
    shutil.move(run, moved)
    with at_most(HANGS):
        as_it_is = command("evaluate", f"run={moved}")
    again = command("train", "task=mnist_two_head", *BASE, f"output_root={moved}")
    shell = 'python() { printf "%s\\0" "$@"; }; '
    lines = re.findall(r"^(?:evaluate|digit alone) +(.+)$", again.out, re.M)
    assert again.code == 0, (name, again.err)
    assert len(lines) == 2, again.out
    for line in [*lines, re.search(r"^digit alone +(.+)$", ended.out, re.M)[1]]:
        typed = subprocess.run(["bash", "-c", shell + line], capture_output=True, text=True).stdout.split("\0")[:-1]
        with at_most(HANGS):
            done = command(typed[1].removeprefix("mtl."), *typed[2:])
        assert done.code == 0, (name, line, done.err)
    for folder in ("runs", name):
        shutil.rmtree(folder)
    assert as_it_is.code == 0 or name.startswith(("'", '"')) or "\\" in name, (name, as_it_is.err)
