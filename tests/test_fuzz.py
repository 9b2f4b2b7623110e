"""Configs that are wrong in any way end as a run or as a message, never as a traceback."""

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import command
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
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


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """Fails what takes longer: it hangs."""

    def hangs(*_: object) -> None:
        raise AssertionError(f"it took more than {seconds} seconds")

    before = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


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
    """A run that is there to go on."""
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
