"""A run's options as one flat mapping."""

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from mtl import cli, schema
from mtl.options import options

CHOICES = {"balancer": "cagrad", "optimizer": "adamw", "data": "mnist", "model": "hard_sharing", "model/trunk": "lenet"}


def config_of(*overrides: str) -> dict:
    with initialize_config_dir(cli.CONFIG_DIR, version_base=None):
        return schema.check(OmegaConf.create(compose("train", ["task=mnist_two_head", *overrides])))


def test_runs_of_a_problem_have_the_same_names_whatever_their_balancer() -> None:
    found = [options(config_of(f"balancer={name}"), {**CHOICES, "balancer": name})[0] for name in ("cagrad", "mgda")]
    assert found[0].keys() == found[1].keys()
    assert found[0]["balancer"] == "cagrad (c=0.5, rescale=False)"
    assert found[0]["optimizer.lr"] == 0.005
    assert found[0]["trainer.clip_norm"] == "null"
    assert found[0]["tasks.parity.weight"] == 1.0
    assert found[0]["deterministic"] == "false"
    assert found[0]["model/trunk"] == "lenet"


def test_what_is_swept_comes_first() -> None:
    config = config_of("optimizer.weight_decay=0.25", "seed=3", "balancer=cagrad")
    found, swept = options(config, CHOICES, ["optimizer.weight_decay=0.25", "balancer=cagrad", "seed=3"])
    assert swept == list(found)[:3] == ["optimizer.weight_decay", "balancer", "seed"]
    assert [found[name] for name in swept] == [0.25, "cagrad (c=0.5, rescale=False)", 3]


def test_swept_weights_are_numbers() -> None:
    config = config_of("++tasks={digit:{weight:0.5},parity:{weight:1.5}}")
    found, swept = options(config, CHOICES, ["++tasks={digit:{weight:0.5},parity:{weight:1.5}}"])
    assert swept == ["tasks.digit.weight", "tasks.parity.weight"]
    assert [found[name] for name in swept] == [0.5, 1.5]
