"""A run's options as one flat mapping."""

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from mtl import cli, schema
from mtl.loggers.options import options

CHOICES = {"balancer": "cagrad", "optimizer": "adamw", "data": "mnist", "model": "hard_sharing", "model/trunk": "lenet"}


def config_of(*overrides: str) -> dict:
    with initialize_config_dir(cli.CONFIG_DIR, version_base=None):
        return schema.check(OmegaConf.create(compose("train", ["task=mnist_two_head", *overrides])))


def test_runs_of_a_problem_have_the_same_names_whatever_their_balancer() -> None:
    found = [options(config_of(f"balancer={name}"), {**CHOICES, "balancer": name})[0] for name in ("cagrad", "mgda")]
    assert found[0].keys() == found[1].keys()
    assert found[0]["balancer"] == "cagrad (c=0.5, rescale=False, over=shared)"
    assert found[0]["optimizer.lr"] == 0.005
    assert found[0]["trainer.clip_norm"] == "null"
    assert found[0]["tasks.parity.weight"] == 1.0
    assert found[0]["deterministic"] == "false"
    assert found[0]["model/trunk"] == "lenet"


@pytest.mark.parametrize(
    ("balancer", "shown"),
    [
        ("equal", "equal"),
        ("famo", "famo (lr=0.025, weight_decay=0.001, init=0.0)"),
        ("uw", "uw (lr=0.01, init=0.0, optimizer=own)"),
        ("imtl_l", "imtl_l (lr=0.01, init=0.0, optimizer=own)"),
    ],
)
def test_a_balancer_s_learning_rate_is_its_own(balancer: str, shown: str) -> None:
    assert options(config_of(f"balancer={balancer}"), {**CHOICES, "balancer": balancer})[0]["balancer"] == shown


def test_an_optimizer_is_shown_without_what_is_no_value_or_has_a_column() -> None:
    more = ["+optimizer.groups={trunk:{lr:1e-4}}", "+optimizer.then={after:5,_target_:mtl.optimizers.LBFGS}"]
    found, _ = options(config_of(*more, "optimizer.weight_decay=0.25", "optimizer.lr=0.5"), CHOICES)
    assert found["optimizer"] == "adamw (weight_decay=0.25)"
    plain, _ = options(config_of("optimizer.weight_decay=null"), CHOICES)
    assert plain["optimizer"] == "adamw"
    assert found["optimizer.lr"] == 0.5


def test_variables_of_ones_own_are_options() -> None:
    found, swept = options(config_of("+vars.fold=3", "+vars.deep={a: x}"), CHOICES, ["++vars.fold=3"])
    assert swept == ["vars.fold"]
    assert found["vars.fold"] == 3
    assert found["vars.deep"] == "{'a': 'x'}"
    assert not [name for name in options(config_of(), CHOICES)[0] if name.startswith("vars")]


def test_what_is_swept_comes_first() -> None:
    config = config_of("optimizer.weight_decay=0.25", "seed=3", "balancer=cagrad")
    found, swept = options(config, CHOICES, ["optimizer.weight_decay=0.25", "balancer=cagrad", "seed=3"])
    assert swept == list(found)[:3] == ["optimizer.weight_decay", "balancer", "seed"]
    assert [found[name] for name in swept] == [0.25, "cagrad (c=0.5, rescale=False, over=shared)", 3]


def test_swept_weights_are_numbers() -> None:
    config = config_of("++tasks={digit:{weight:0.5},parity:{weight:1.5}}")
    found, swept = options(config, CHOICES, ["++tasks={digit:{weight:0.5},parity:{weight:1.5}}"])
    assert swept == ["tasks.digit.weight", "tasks.parity.weight"]
    assert [found[name] for name in swept] == [0.5, 1.5]
