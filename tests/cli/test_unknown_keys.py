"""Keys that the config doesn't have: which are added, and the messages about the others."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import command, slow_but
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from test_fuzz import BARE

from mtl import cli, schema
from mtl.cli.overrides import for_hydra
from mtl.cli.unknown import _possible, why_not, with_plus
from mtl.errors import suggest

TASK = f"""{BARE}\
  b:
    target: digit
    head: {{_target_: torch.nn.Linear, in_features: 20, out_features: 10}}
    loss: {{_target_: torch.nn.CrossEntropyLoss}}
"""


@pytest.fixture
def bare(here: Path) -> list[str]:
    """Tasks without an objective's file, so that many of their keys are absent."""
    (here / "mine/task").mkdir(parents=True)
    (here / "mine/task/bare.yaml").write_text(TASK)
    (here / "mine/task/nohead.yaml").write_text(TASK.removeprefix("# @package _global_\n"))
    for name, other in {"trunk": "  - override /model: hard_sharing\n", "modl": ""}.items():
        text = TASK.replace("  - override /model: hard_sharing\n", "  - override /modl: x\n" if not other else "")
        (here / f"mine/task/{name}.yaml").write_text(text)
    return ["--config-dir", "mine", "task=bare"]


def composed(typed: list[str]) -> tuple[dict, list[str]]:
    """Returns the config of a command line, as `launch` composes it, and the overrides."""
    given = for_hydra(typed)
    for _ in range(5):
        try:
            with initialize_config_dir(cli.CONFIG_DIR, version_base="1.3"):
                words = [word for word in given if not word.startswith("-") and word != "mine"]
                search = [f"hydra.searchpath=[file://{Path('mine').resolve()}]"]
                return OmegaConf.to_container(compose("train", words + search), resolve=True), words
        except HydraException as error:
            again = with_plus(given, error, "train")
            if again is None:
                raise
            given = again
    raise AssertionError(given)


VALUES = {"data.collate": "null", "trainer.monitor": "{a/loss: min}", "scheduler.interval": "epoch"}


KEYS = [*(key for key in schema.SCHEMA if "." in key), *(f"tasks.a.{key}" for key in schema.TASK)]


@pytest.mark.parametrize(
    "key", slow_but(["tasks.a.weight", "model.freeze", "scheduler.interval", "data.collate"], KEYS)
)
def test_a_key_of_the_schema_needs_no_plus(bare: list[str], key: str) -> None:
    """Also where it is absent, whatever its value."""
    base = ["scheduler=cosine"] if key.startswith("scheduler") else []
    config, _ = composed([*bare, *base, f"{key}={VALUES.get(key, 'x')}"])
    node = config
    for part in key.split("."):
        node = node[part]
    assert node == {"data.collate": None, "trainer.monitor": {"a/loss": "min"}}.get(key, VALUES.get(key, "x"))


def test_what_is_added_reaches_the_training(bare: list[str]) -> None:
    fast = ["trainer.max_epochs=1", "data.batch_size=2000", "logger=[]"]
    typed = ["tasks.a.weight=3", "model.freeze=[trunk.conv1]", "optimizer.groups={trunk: {lr: 1e-4}}", "vars.fold=7"]
    ended = command("train", *bare, *fast, *typed, "tasks.a.head={bias: false}", "vars={more: [1, a]}")
    assert ended.code == 0, ended.err
    config = OmegaConf.load(ended.run / "config.yaml")
    assert config.tasks.a.weight == 3
    assert config.tasks.a.head.bias is False
    assert config.tasks.a.head.in_features == 20  # a mapping that was typed is merged, as ever
    assert config.vars == {"fold": 7, "more": [1, "a"]}
    assert config.optimizer.groups == {"trunk": {"lr": 1e-4}}
    assert "tasks.a.weight=3" in ended.metrics["arguments"]  # and is told as it was typed
    assert "vars.fold=7" in ended.metrics["arguments"]
    swept = command("train", "-m", *bare, *fast, "tasks.b.weight=0.5,2")
    assert swept.code == 0, swept.err
    weights = [OmegaConf.load(path).tasks.b.weight for path in sorted(Path("outputs").glob("multirun/*/*/config.yaml"))]
    assert weights == [0.5, 2]


SAID = [
    ("tasks.zz.weight=3", "there is no task 'zz' (possible: a, b)"),
    ("tasks.zz={weight: 3}", "there is no task 'zz' (possible: a, b)"),
    ("~tasks.zz", "there is no task 'zz' (possible: a, b)"),
    ("tasks.a.waight=3", "there is no key 'tasks.a.waight'; did you mean 'tasks.a.weight'? (possible in tasks.a: count,"),
    ("balancer.lr=1", "there is no key 'balancer.lr': balancer is mtl.balancers.Equal (possible in balancer: nothing)"),
    ("balancer=uw balancer.lrr=1", "balancer is mtl.balancers.UW; did you mean 'balancer.lr'? (possible in balancer: init, lr, optimizer"),
    ("balancer=upgrad balancer.lr=1", "balancer is mtl.balancers.UPGrad (possible in balancer: over)"),
    ("optimizer.momentum=0.9", "there is no key 'optimizer.momentum': optimizer is torch.optim.AdamW (possible in optimizer: amsgrad, betas,"),
    ("optimizer.beta=0.9", "did you mean 'optimizer.betas'?"),
    ("optimizer.betas=[0.9,0.9]", "'optimizer.betas' isn't in the config yet, though torch.optim.AdamW can have it; add it with a plus: '+optimizer.betas=[0.9,0.9]'"),
    ("optimizer=sgd optimizer.nestrov=true", "optimizer is torch.optim.SGD; did you mean 'optimizer.nesterov'?"),
    ("model.trunk.widht=3", "model.trunk is mtl.trunks.LeNet (possible in model.trunk: dropout, num_features)"),
    ("model.frezee=[x]", "model is mtl.MultiTaskModel; did you mean 'model.freeze'? (possible in model: freeze, freeze_until, inputs, trunk)"),
    ("data.sorce=x", "data is mtl.data.mnist; did you mean 'data.source'? (possible in data: batch_size, collate, disjoint,"),
    ("scheduler=cosine scheduler.T_mx=3", "did you mean 'scheduler.T_max'?"),
    ("tasks.a.head.bias=false", "'tasks.a.head.bias' isn't in the config yet, though torch.nn.Linear can have it; add it with a plus: +tasks.a.head.bias=false"),
    ("tasks.a.head.nope=1", "tasks.a.head is torch.nn.Linear (possible in tasks.a.head: bias, device, dtype, in_features, out_features)"),
    ("tasks.a.loss.reduktion=sum", "tasks.a.loss is torch.nn.CrossEntropyLoss; did you mean 'tasks.a.loss.reduction'?"),
    ("task=mnist_two_head tasks.digit.metrics.accuracy.topk=3", "did you mean 'tasks.digit.metrics.accuracy.top_k'?"),
    ("logger.csv.pat=1", "logger.csv is mtl.loggers.CsvLogger (possible in logger.csv: nothing)"),
    ("logger.csw.x=1", "did you mean 'logger.csv'? (possible in logger: csv, tensorboard); others are added with a plus: +logger.csw.x=1"),
    ("callbacks.x._target_=a.B", "there is no key 'callbacks.x._target_' (possible in callbacks: nothing); others are added with a plus: +callbacks.x._target_=a.B"),
    ("trainer.max_epoch=1", "there is no key 'trainer.max_epoch'; did you mean 'trainer.max_epochs'? (possible in trainer: clip_norm,"),
    ("trainer.max_epochs.x=1", "there is no key 'trainer.max_epochs.x': trainer.max_epochs is 10, which has no keys; change it with trainer.max_epochs=…"),
    ("trainer.monitor.x=max", "there is no key 'trainer.monitor.x', since trainer.monitor is null: set the whole mapping, 'trainer.monitor={…}', or +trainer.monitor.x=…"),
    ("scheduler.interval=epoch", "there is no key 'scheduler.interval', since scheduler is null: first choose one with scheduler=…"),
    ("model.freeze=[a] model.freeze.x=3", "there is no key 'model.freeze.x': model.freeze is ['a'], which has no keys; change it with model.freeze=…"),
    ("model.inputs.7=x", "Error merging override model.inputs.7=x: list index out of range"),
    ("+model.inputs.x=x", "Error merging override +model.inputs.x=x: Index 'x' (str) is not an int"),
    ("fold=0", "; your own variables belong below vars: vars.fold=0"),
    ("sed=0", "there is no key 'sed'; did you mean 'seed'?"),
    ("~fold", "there is no key 'fold' to remove (possible: balancer,"),
    ("model/trnk=lenet", "there is no group 'model/trnk'; did you mean 'model/trunk'?"),
    ("trainer@x=default", "Did you mean to override trainer?\nTo append to your default list use +trainer@x=default"),
    ("objective=binary", "objective: a task's objective is chosen for a task: +objective@tasks.NAME=binary"),
    ("task=trunk", "task/trunk: override /model/trunk: the config has no option of this group yet; add one without `override`: /model/trunk: …, or choose an option of model that has one"),
    ("task=modl", "task/modl: override /modl: there is no group 'modl'; did you mean 'model'?"),
    ("+balancer=equal", "balancer: the config has an option of this group; replace it without a plus: balancer=…"),
    ("++balancer=equal", "++balancer=equal: an option of a group is chosen without pluses: balancer=equal"),
    ("model=null", "model=null: choose an option of a group by its name, or no option with ~ before the group"),
    ("=3", "'=3' can't be read: there is no key before the ="),
    ("hydra.job.env_set.FOO=1", "there is no key 'hydra.job.env_set.FOO' (possible in hydra.job.env_set: nothing); others are added with a plus: +hydra.job.env_set.FOO=1"),
    ("hydra.job.env_set=1", "Error merging override hydra.job.env_set=1: Cannot assign int to Dict[str, str]"),
    ("hydra.nope=1", "there is no key 'hydra.nope' (possible in hydra: callbacks, env,"),
    ("hydra.verbose=3", "Hydra fails on the command line: AssertionError in utils.py"),
    ("größe=3", "'größe=3' can't be read: use only the letters a to z in keys; set other keys in a file"),
    ("model={größe: 1}", "can't be read: quote values that aren't ASCII, as in 'model.inputs=[\"größe\"]'; set mappings with such keys"),
    ("-m seed=interval(0,1)", "interval(…) needs a sweeper that searches, such as Optuna: +sweep=optuna; or list the values"),
    ("-m optimizer.lr=glob(*)", "optimizer.lr=glob(*): glob(…) selects options of a group, and optimizer.lr is not a group: the sweep has no job"),
    ("-m balancer=glob(nope*)", "balancer=glob(nope*): no option of the group matches: the sweep has no job"),
    ("-m seed=range(3,3)", "seed=range(3,3): no number is in this range: the sweep has no job"),
    ("-m hydra/launcher=joblib seed=range(3,3)", "seed=range(3,3): no number is in this range: the sweep has no job"),
]  # fmt: skip


@pytest.mark.parametrize(("typed", "message"), slow_but(SAID[::2], SAID), ids=[typed for typed, _ in SAID])
def test_what_is_said_of_other_keys(bare: list[str], typed: str, message: str) -> None:
    words = re.findall(r"(?:\{[^}]*\}|\S)+", typed)  # no spaces but in mappings
    ended = command("train", *bare, *words)
    assert ended.code == 1
    assert ended.err.startswith("error: ")
    assert message in ended.err
    assert "Traceback" not in ended.err
    suggested = re.search(r"did you mean '([^']+)'", ended.err)
    assert suggested is None or suggested[1] != words[-1].split("=")[0]
    assert not [path for path in Path("outputs").rglob("*") if path.is_file()]


def test_glob_of_a_group_is_hydras(bare: list[str]) -> None:
    fast = ["trainer.max_epochs=1", "data.batch_size=2000", "logger=[]"]
    ended = command("train", "-m", *bare, *fast, "optimizer=glob(ada*,exclude=adag*)")
    assert ended.code == 0, ended.err
    assert sorted(path.name for path in Path("outputs").glob("multirun/*/*/")) == [
        "0_optimizer-adam",
        "1_optimizer-adamw",
    ]


@pytest.mark.parametrize(
    ("typed", "said", "key", "value"),
    [
        ("optimizer.betas=[0.9, 0.9]", "add it with a plus", "optimizer.betas", [0.9, 0.9]),
        ("tasks.a.head.bias=false", "add it with a plus", "tasks.a.head.bias", False),
        ("callbacks.x={_target_: \"it's\", a: '$HOME'}", "others are added with a plus", "callbacks.x.a", "$HOME"),
        ("note=a  b", "your own variables belong below vars", "vars.note", "a  b"),
    ],
)
def test_what_is_to_be_added_is_written_for_a_shell(
    bare: list[str], typed: str, said: str, key: str, value: object
) -> None:
    told = command("train", *bare, typed)
    assert told.code == 1
    word = re.search(rf"{said}: (.+)$", told.err, re.M)[1]
    done = subprocess.run(["bash", "-c", rf"printf '%s\0' {word}"], capture_output=True, text=True, check=True)
    (again,) = done.stdout.split("\0")[:-1]
    shown = command("train", *bare, again, "--cfg", "job")
    assert shown.code == 0, shown.err
    assert OmegaConf.select(OmegaConf.create(shown.out), key) == value


@settings(max_examples=30)
@given(st.text(max_size=9), st.lists(st.text(max_size=9), max_size=5))
def test_nothing_is_suggested_that_was_typed(word: str, others: list[str]) -> None:
    """Even where it is among what is possible, and wrong for another reason."""
    for text in (suggest(word, [word, *others]), _possible(word, "a", [word, *others])):
        assert f"did you mean '{word}'" not in text
        assert f"did you mean 'a.{word}'" not in text


@pytest.mark.parametrize("module", ["graph", "evaluate"])
def test_other_commands(bare: list[str], module: str) -> None:
    typed = [*bare, "tasks.zz.weight=3"] if module == "graph" else ["run=x", "split.x=3"]
    said = {
        "graph": "there is no task 'zz' (possible: a, b)",
        "evaluate": "there is no key 'split.x': split is 'test', which has no keys; change it with split=…",
    }
    assert f"error: {said[module]}\n" in command(module, *typed).err
    if module == "evaluate":
        assert command(module, "-m", "run=glob(*)").code == 1


def test_code_of_ones_own_is_asked_what_it_takes(bare: list[str]) -> None:
    Path("mine/heads.py").write_text(
        "import torch\nclass Head(torch.nn.Linear):\n    def __init__(self, width, depth): super().__init__(20, 10)\n"
        "class Any(torch.nn.Linear):\n    def __init__(self, **more): super().__init__(20, 10)\n"
    )
    head = "tasks.a.head._target_=heads"
    assert (
        "; did you mean 'tasks.a.head.width'? (possible in tasks.a.head: depth, in_features, out_features, width)"
        in (why_not("tasks.a.head.widht", [*bare, f"{head}.Head", "tasks.a.head.widht=3"], "train"))
    )
    assert (
        ": tasks.a.head is heads.Any (possible in tasks.a.head: in_features, out_features); others are added with a plus: +tasks.a.head.x=3"
        in (why_not("tasks.a.head.x", [*bare, f"{head}.Any", "tasks.a.head.x=3"], "train"))
    )
    gone = why_not("tasks.a.head.x", [*bare, f"{head}.Gone", "tasks.a.head.x=3", "seed=1,2", "no.key=1"], "train")
    assert gone == (
        "there is no key 'tasks.a.head.x': tasks.a.head is heads.Gone (possible in tasks.a.head: in_features, out_features)"
    )


def test_an_explanation_that_needs_no_class_comes_without_torch(bare: list[str]) -> None:
    code = (
        "import sys\nfrom mtl import cli, train\nsys.argv = ['mtl.train', 'task=mnist_two_head', 'trainer.max_epoch=1']\n"
        "try: cli.launch(train.train, 'train')\nfinally: print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "did you mean 'trainer.max_epochs'?" in done.stderr
    assert done.stdout.splitlines()[-1] == "False"
