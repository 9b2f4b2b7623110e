"""The monitored value."""

import math

import pytest

import mtl
from mtl.training.figures import Kind
from mtl.training.monitor import Monitor

KINDS = {
    "digit/accuracy": Kind("max", "MulticlassAccuracy"),
    "digit/loss": Kind("min", "CrossEntropyLoss"),
    "parity/accuracy": Kind("max", "MulticlassAccuracy"),
    "parity/loss": Kind("min", "CrossEntropyLoss"),
    "depth/error": Kind("min", "MeanSquaredError"),
    "depth/loss": Kind("min", "L1Loss"),
}
FIGURES = {
    "digit": {"accuracy": 0.8, "loss": 2.0},
    "parity": {"accuracy": 0.6, "loss": 1.0},
    "depth": {"error": 5.0, "loss": 3.0},
}
TWO = {name: kind for name, kind in KINDS.items() if not name.startswith("depth")}


def test_default_is_the_mean_of_the_main_metrics() -> None:
    monitor = Monitor(None, TWO)
    assert monitor(FIGURES) == pytest.approx(0.7)
    assert str(monitor) == "mean of digit/accuracy, parity/accuracy (max)"
    with pytest.raises(
        mtl.UserError, match=r"trainer\.monitor is null.*digit/accuracy, parity/accuracy, depth/error have unlike units"
    ):
        Monitor(None, KINDS)


def test_terms() -> None:
    assert Monitor({"digit/accuracy": "max", "parity/accuracy": "max"}, KINDS)(FIGURES) == pytest.approx(0.7)
    lower = Monitor({"digit/loss": "min"}, KINDS)
    assert (lower(FIGURES), lower.mode) == (2.0, "min")
    terms = {"digit/accuracy": {"mode": "max", "scale": 0.1}, "depth/error": {"mode": "min", "scale": 2}}
    scaled = Monitor(terms, KINDS)
    assert (scaled(FIGURES), scaled.mode) == (pytest.approx((0.8 / 0.1 - 5.0 / 2) / 2), "max")


def test_what_a_value_with_scales_is_made_of() -> None:
    terms = {"digit/accuracy": {"mode": "max", "scale": 0.1}, "depth/error": {"mode": "min", "scale": 2}}
    monitor = Monitor(terms, KINDS)
    assert str(monitor) == "mean of digit/accuracy / 0.1, -depth/error / 2 (max)"
    assert monitor.terms(FIGURES) == "(0.8 / 0.1 - 5 / 2) / 2"
    assert eval(monitor.terms(FIGURES)) == pytest.approx(monitor(FIGURES))  # noqa: S307
    first = Monitor(
        {"depth/error": {"mode": "min", "scale": 2}, "digit/accuracy": {"mode": "max", "scale": 0.1}}, KINDS
    )
    assert first.terms(FIGURES) == "(-5 / 2 + 0.8 / 0.1) / 2"
    one = Monitor({"depth/error": {"mode": "min", "scale": 2}}, KINDS)
    assert (one(FIGURES), one.terms(FIGURES), str(one)) == (-2.5, "-5 / 2", "-depth/error / 2 (max)")
    assert Monitor(None, TWO).terms(FIGURES) == ""


def test_better() -> None:
    up, down = Monitor({"digit/accuracy": "max"}, KINDS), Monitor({"digit/loss": "min"}, KINDS)
    assert (up.better(2.0, 1.0), up.better(1.0, 1.0), up.better(1.0, None)) == (True, False, True)
    assert (down.better(2.0, 1.0), down.better(0.5, 1.0)) == (False, True)
    assert not up.better(math.nan, None)
    assert up.better(0.1, math.nan)


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ({"digit/acuracy": "max"}, "there is no figure 'digit/acuracy'; did you mean 'digit/accuracy'?"),
        ({"digit/accuracy": "up"}, "'digit/accuracy' needs a mode, max or min; it has 'up'"),
        ({"digit/accuracy": {"scale": 1}}, "needs a mode"),
        ({"digit/accuracy": "max", "depth/error": "min"}, "unlike units"),
        ({"digit/loss": "min", "depth/loss": "min"}, "unlike units"),
        ({"digit/accuracy": {"mode": "max", "scale": 1}, "parity/accuracy": "max"}, "unlike units"),
        (
            {"digit/accuracy": {"mode": "max", "scale": 0}},
            "the scale of 'digit/accuracy' is 0; it must be a number above 0",
        ),
        ({}, "name at least one of digit/accuracy"),
    ],
)
def test_terms_that_are_refused(terms: dict, message: str) -> None:
    with pytest.raises(mtl.UserError) as error:
        Monitor(terms, KINDS)
    assert message in str(error.value)
