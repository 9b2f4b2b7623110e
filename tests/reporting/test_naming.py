"""Names for methods."""

from typing import Any

import pytest

from mtl.reporting.naming import differences, names, natural


def labels(configs: list[Any], choices: list[dict[str, str]]) -> list[str]:
    return [name.text for name in names(configs, choices)]


def config(balancer: str = "Equal", *, lr: float = 0.01, weights: tuple[Any, float] = (1, 1), **keys: Any) -> Any:
    tasks = {name: {"weight": weight} for name, weight in zip(("digit", "parity"), weights, strict=True)}
    of_balancer = {"_target_": f"mtl.balancers.{balancer}"} | keys.pop("of_balancer", {})
    return {"tasks": tasks, "balancer": of_balancer, "optimizer": {"_target_": "torch.optim.AdamW", "lr": lr}, **keys}


RAMP = {"_target_": "mtl.Schedule", "start": 0, "end": 1, "steps": 5}


@pytest.mark.parametrize(
    ("configs", "texts"),
    [
        ([config()], ["Equal"]),
        ([config(), config("UPGrad")], ["Equal", "UPGrad"]),
        ([config(lr=0.01), config(lr=0.001)], ["lr=0.01", "lr=0.001"]),
        ([config("UPGrad", lr=0.001), config(lr=0.01)], ["UPGrad, lr=0.001", "Equal, lr=0.01"]),
        (
            [config(weights=(0.2, 1.8)), config(weights=(1, 1))],
            ["weights digit 0.2 / parity 1.8", "equal weights"],
        ),
        # A class's own keys tell it from those of the same class alone.
        (
            [config("UW", of_balancer={"lr": 0.1}), config("UW", of_balancer={"lr": 0.2}), config("MGDA")],
            ["UW, balancer.lr=0.1", "UW, balancer.lr=0.2", "MGDA"],
        ),
        ([config("UW", of_balancer={"lr": 0.1}), config()], ["UW", "Equal"]),
        ([config(scheduler=None), config(scheduler={"_target_": "x.Cosine"})], ["scheduler=none", "scheduler=Cosine"]),
        ([config(a={"size": 1}, b={"size": 1}), config(a={"size": 2}, b={"size": 3})], ["a.size=1, b.size=1"] + ["a.size=2, b.size=3"]),
        # A number in one, a class in others.
        (
            [config(weights=(RAMP, 1)), config(), config(weights=(0.5, 2))],
            ["weights digit Schedule / parity 1", "equal weights", "weights digit 0.5 / parity 2"],
        ),
        (
            [config(weights=(RAMP, 1)), config(weights=(RAMP | {"steps": 9}, 1)), config(weights=(0.5, 1))],
            ["weights digit Schedule, weight.steps=5", "weights digit Schedule, weight.steps=9", "weights digit 0.5"],
        ),
        # Variables of the user's own, also one that another key repeats, or that some runs lack.
        ([config(vars={"fold": 0}), config(vars={"fold": 1})], ["fold=0", "fold=1"]),
        ([config(vars={"fold": 0}), config(vars={})], ["fold=0", "fold=not set"]),
        ([config(lr=0.1, vars={"rate": 0.1}), config(lr=0.2, vars={"rate": 0.2})], ["lr=0.1", "lr=0.2"]),
        ([config(lr=0.1, vars={"rate": 1}), config(lr=0.2, vars={"rate": 2})], ["lr=0.1, rate=1", "lr=0.2, rate=2"]),
        ([config(vars={"lr": 1}), config(vars={"lr": 2})], ["lr=1", "lr=2"]),
        ([config(passes="joint"), config()], ["passes=joint", "passes=not set"]),
        ([config(at="x" * 90 + "1"), config(at="x" * 90 + "2")], [f"at={'x' * 20}…{'x' * 18}{n}" for n in (1, 2)]),
        ([config(at="x" * 90), config(at="x" * 91)], ["Equal (#1)", "Equal (#2)"]),
    ],
)  # fmt: skip
def test_names_are_made_of_what_differs(configs: list[Any], texts: list[str]) -> None:
    assert labels(configs, [{}] * len(configs)) == texts


def test_a_variable_that_another_key_repeats_hides_nothing() -> None:
    found = names([config(lr=lr, vars={"rate": lr}) for lr in (0.1, 0.2)], [{}] * 2)
    assert [name.settings for name in found] == [{"optimizer.lr": lr, "vars.rate": lr} for lr in ("0.1", "0.2")]
    assert [name.left_out for name in found] == [[], []]


def test_the_option_is_named_rather_than_the_class() -> None:
    configs = [config("UPGrad"), config()]
    assert labels(configs, [{"balancer": "upgrad"}, {"balancer": "equal"}]) == ["upgrad", "equal"]
    assert labels(configs[:1], [{"balancer": "upgrad"}]) == ["upgrad"]


def test_an_option_known_of_some_only_makes_no_difference() -> None:
    assert labels([config(lr=0.1), config(lr=0.2)], [{"balancer": "equal"}, {}]) == ["lr=0.1", "lr=0.2"]


def test_other_tasks() -> None:
    one = config()
    other = {**config(), "tasks": {"digit": {"weight": 1}, "parity": {"weight": 1}, "sum": {"weight": 3}}}
    assert labels([one, other], [{}, {}]) == ["tasks digit+parity", "tasks digit+parity+sum"]


def test_long_names_hold_no_more_than_tells_them_apart() -> None:
    """The balancers tell one from the other two, whose weights tell them apart; what more differs is known too."""
    more = {"trainer": {"max_epochs": 40, "clip_norm": 1.0}, "precision": "bf16"}
    less = {"trainer": {"max_epochs": 10, "clip_norm": None}, "precision": "fp32"}
    found = names([config("UPGrad", **more), config(weights=(0.2, 1.8), **less), config(**less)], [{}] * 3)
    assert [name.text for name in found] == [
        "UPGrad",
        "Equal, weights digit 0.2 / parity 1.8",
        "Equal",
    ]
    assert found[0].settings["trainer.max_epochs"] == "40"
    hidden = {"precision", "trainer.clip_norm", "trainer.max_epochs"}
    assert [set(name.left_out) for name in found] == [
        hidden,
        hidden,
        hidden,
    ]  # weights of 1 are meant where none are told


def test_differences() -> None:
    assert differences([config(lr=0.1), config(lr=0.2)], [{}, {}]) == [{"optimizer.lr": "0.1"}, {"optimizer.lr": "0.2"}]
    assert differences([config(), config()], [{}, {}]) == [{}, {}]


def test_order_of_names() -> None:
    assert sorted(["lr=10", "lr=0.5", "b", "lr=2", "a"], key=natural) == ["a", "b", "lr=0.5", "lr=2", "lr=10"]
