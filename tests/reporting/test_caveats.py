"""The caveats name each limit of a comparison; a comparison without limits has none."""

from pathlib import Path
from typing import Any

import pytest
from made_runs import accuracies, run

from mtl.reporting.caveats import caveats
from mtl.reporting.comparison import Comparison
from mtl.reporting.curves import Curves
from mtl.reporting.grouping import sections
from mtl.reporting.reading import find


def said(folder: Path, split: str | None = None) -> list[str]:
    found: list[str] = []
    for section in sections(find([folder]), split):
        comparison = Comparison(section)
        found += caveats(comparison, Curves(comparison.methods))
    return found


def make(folder: Path, methods: dict[str, dict[str, Any]] | None = None, *, seeds: int = 6) -> None:
    """Writes runs of two methods, by default with six seeds, which have no caveats except for the methods' values."""
    for name, more in (methods or {"equal": {}, "X": {}}).items():
        for seed in range(seeds):
            figures = accuracies(a=0.5 + 0.01 * seed, b=0.6 - 0.01 * seed)
            values: dict[str, Any] = {"test": figures, "curves": {"loss/a/val": {1: 1.0}}} | more
            run(folder / f"{name}-{seed}", balancer=name, seed=seed, **values)


def test_nothing_is_wrong(tmp_path: Path) -> None:
    make(tmp_path)
    assert said(tmp_path) == []


@pytest.mark.parametrize(("low", "told"), [(0.2, True), (0.21, False)])
def test_a_baseline_that_is_nearly_nothing_in_one_seed(tmp_path: Path, low: float, told: bool) -> None:
    make(tmp_path)
    for seed in range(6):
        figures = {"a": {"accuracy": low if seed == 3 else 0.62, "loss": 1.0}}
        run(tmp_path / f"alone{seed}", seed=seed, tasks=["a"], test=figures)
    found = [line for line in said(tmp_path) if "dominate Δm" in line]
    assert bool(found) == told
    assert not told or "a accuracy of a alone goes from 0.2 to 0.62 over seeds" in found[0]


def test_one_seed_only(tmp_path: Path) -> None:
    make(tmp_path, seeds=1)
    assert any(line.startswith("One seed only: there are no intervals") for line in said(tmp_path))


@pytest.mark.parametrize(("seeds", "p"), [(2, "0.5"), (3, "0.25"), (5, "0.0625")])
def test_few_seeds(tmp_path: Path, seeds: int, p: str) -> None:
    make(tmp_path, seeds=seeds)
    (line,) = said(tmp_path)
    assert f"can't get below p = {p} with {seeds}" in line


def test_few_seeds_of_some(tmp_path: Path) -> None:
    """X has three seeds, Y six, of which two are the reference's: its differences are of two."""
    make(tmp_path, {"equal": {}})
    make(tmp_path, {"X": {}}, seeds=3)
    assert any("With 3 seeds (X) the intervals" in line for line in said(tmp_path))
    for seed in range(4, 10):
        run(tmp_path / f"y{seed}", balancer="Y", seed=seed, test=accuracies(a=0.5 + 0.01 * seed, b=0.6))
    assert any("With 2 seeds (Y) the intervals" in line for line in said(tmp_path))


def test_few_numbers_of_many_seeds(tmp_path: Path) -> None:
    for seed in range(8):
        figures = accuracies(a=float("nan") if seed < 5 else 0.1 * seed, b=0.1 * seed)
        run(tmp_path / f"{seed}", seed=seed, test=figures)
    lines = said(tmp_path)
    assert any("With 3 seeds the intervals" in line for line in lines)
    assert any(
        "is nan" in line and "the mean of the other runs is biased in the method's favour" in line for line in lines
    )


def test_one_method_with_one_seed_and_seeds_that_are_missing(tmp_path: Path) -> None:
    make(tmp_path)
    run(tmp_path / "lone", balancer="Y", seed=3, curves={"loss/a/val": {1: 1.0}})
    lines = said(tmp_path)
    assert "One seed only of Y: no intervals and no tests of these." in lines
    assert any("Y lacks 0, 1, 2, 4 and 5" in line for line in lines)
    for number in range(9):
        run(tmp_path / f"m{number}", balancer=f"M{number}", seed=5)
    (line,) = [line for line in said(tmp_path) if line.startswith("Not every method")]
    assert "4 more" in line


def test_lists_of_methods_whose_names_hold_commas_can_be_read(tmp_path: Path) -> None:
    make(tmp_path)
    for number in range(2):
        more = {"optimizer.lr": 0.1 * (number + 1), "optimizer.eps": float(number)}
        run(tmp_path / f"o{number}", balancer="X", seed=0, config=more)
    assert any("One seed only of X, lr=0.1, eps=0; X, lr=0.2, eps=1: no" in line for line in said(tmp_path))


@pytest.mark.parametrize(
    ("more", "start", "within"),
    [
        ({"steps": 60, "epochs": 6}, "Different budgets", "steps 60 (X); 30 (equal), epochs 6 (X); 3 (equal)"),
        ({"config": {"data.batch_size": 32}}, "Different budgets", "batch size 32 (X, batch_size=32); 64"),
        (
            {"versions": {"torch": "2.9", "device": "x86_64", "threads": 1}},
            "Different versions of torch",
            "2.9 (X)",
        ),
        *[
            (
                {"versions": {"torch": "2.14.1", "device": "x86_64", "threads": 1} | {name: "9.9"}},
                f"Different {what}: ",
                "9.9 (X)",
            )
            for name, what in {
                **{"mtl": "versions of mtl", "numpy": "versions of numpy", "python": "versions of python"},
                "device": "devices",
            }.items()
        ],
        (
            {"fingerprints": {"train": "t" * 8, "val": "q" * 9, "test": "e" * 8}},
            "Different data: the val split",
            "qqqqqqqq (X)",
        ),
        (
            {"versions": {"torch": "2.14.1", "device": "x86_64", "threads": 8}},
            "Different numbers of threads",
            "8 (X)",
        ),
        ({"launcher": "joblib"}, "Jobs ran side by side (hydra/launcher=joblib)", "they aren't compared"),
        ({"monitor": "a/loss (max)"}, "The best epochs were chosen by different figures", "a/loss (max)"),
        (
            {"fingerprints": {"train": "q" * 9, "val": "v" * 8, "test": "e" * 8}},
            "Different data: the train split",
            "qqqqqqqq (X)",
        ),
        ({"fingerprints": None}, "Whether all had the same data isn't known", "X"),
        ({"curves": None}, "No curves of X", "metrics.csv"),
        (
            {"test": {"a": {"accuracy": float("nan"), "loss": 1.0}, "b": {"accuracy": 0.5, "loss": 1.0}}},
            "Left out, since there is no number",
            "X, seed 0: a accuracy is nan",
        ),
        ({"test": accuracies(a=0.5, b=0.5)}, "All seeds of X have the same figures", "no effect"),
    ],
)
def test_a_difference_is_told(tmp_path: Path, more: dict[str, Any], start: str, within: str) -> None:
    make(tmp_path, {"equal": {}, "X": more})
    found = [line for line in said(tmp_path) if line.startswith(start)]
    assert len(found) == 1, said(tmp_path)
    assert within in found[0]


@pytest.mark.parametrize(
    ("more", "start", "within"),
    [
        ({"steps": 60}, "Different budgets: steps", "60 (a alone)"),
        ({"fingerprints": {"train": "q" * 8, "val": "v", "test": "e" * 8}}, "Different data: the train", "(a alone)"),
        ({"launcher": "joblib"}, "Jobs ran side by side (hydra/launcher=joblib)", ""),
        ({"versions": {"torch": "1"}}, "Different versions of torch", "1 (a alone)"),
    ],
)
def test_single_tasks_differ_too(tmp_path: Path, more: dict[str, Any], start: str, within: str) -> None:
    make(tmp_path)
    for seed in range(6):
        run(tmp_path / f"a{seed}", tasks=["a"], seed=seed, test=accuracies(a=0.5 + 0.01 * seed), **more)
    assert any(line.startswith(start) and within in line for line in said(tmp_path)), said(tmp_path)


def test_runs_that_were_ended_early(tmp_path: Path) -> None:
    make(tmp_path, {"equal": {}, "X": {"steps": 20}})
    assert not any("trainer.patience" in line for line in said(tmp_path))
    make(tmp_path / "2", {"equal": {"config": {"trainer.patience": 3}}, "X": {"config": {"trainer.patience": 3}}})
    run(tmp_path / "2" / "late", seed=6, steps=60, config={"trainer.patience": 3})
    assert any("trainer.patience ends runs early." in line for line in said(tmp_path / "2"))


def prints(train: str) -> dict[str, str]:
    return {"train": train, "val": "v" * 8, "test": "e" * 8}


def test_data_that_changed_between_seeds(tmp_path: Path) -> None:
    for seed in range(6):
        for name in ("equal", "X"):
            figures = accuracies(a=0.5 + 0.01 * seed, b=0.6 - 0.01 * seed)
            told = {"test": figures, "curves": {"loss/a/val": {1: 1.0}}}
            changed, drawn = prints("old" if seed < 3 else "new"), prints(f"drawn{seed}")
            run(tmp_path / "changed" / f"{name}{seed}", balancer=name, seed=seed, fingerprints=changed, **told)
            run(tmp_path / "drawn" / f"{name}{seed}", balancer=name, seed=seed, fingerprints=drawn, **told)
    (line,) = said(tmp_path / "changed")
    assert line == (
        "Different data: the train split isn't the same for all seeds: old (seeds 0, 1 and 2); new (seeds 3, 4 and 5)."
    )
    assert said(tmp_path / "drawn") == []  # by the runs' own seeds


def test_the_test_split_was_used_for_choosing(tmp_path: Path) -> None:
    same = {"fingerprints": {"train": "t", "val": "same", "test": "same"}}
    make(tmp_path, {"equal": same, "X": same})
    assert said(tmp_path)[0].startswith("The test split was used for choosing")


def test_no_validation_and_validation_alone(tmp_path: Path) -> None:
    make(tmp_path, {"equal": {"val": {}}, "X": {"val": {}}})
    assert said(tmp_path)[0].startswith("There is no validation")
    make(tmp_path / "2")
    assert said(tmp_path / "2", "val")[0].startswith("These are figures of the validation split")


def test_some_without_validation(tmp_path: Path) -> None:
    none = {"val": {}, "best": None, "monitor": "None", "mode": None}
    make(tmp_path, {"equal": {}, "X": none})
    (line,) = said(tmp_path)
    assert line.startswith("There is no validation of X: choosing a method")
    run(tmp_path / "more", seed=6, **none)
    assert said(tmp_path)[0].startswith("There is no validation: choosing a method")
    make(tmp_path / "all", {"equal": none, "X": none})
    (line,) = said(tmp_path / "all")
    assert line.startswith("There is no validation: choosing a method")


def test_methods_with_other_tasks(tmp_path: Path) -> None:
    make(tmp_path)
    for seed in range(6):
        figures = accuracies(a=0.5 + 0.01 * seed, b=0.6, c=0.5)
        run(tmp_path / f"c{seed}", balancer="Y", seed=seed, tasks=["a", "b", "c"], test=figures)
        for task in "abc":
            alone = accuracies(**{task: 0.5 + 0.01 * seed})
            run(tmp_path / f"alone-{task}{seed}", seed=seed, tasks=[task], test=alone)
    (line,) = [line for line in said(tmp_path) if line.startswith("Δm is the mean over each")]
    assert line.endswith(
        "between methods with different tasks: a, b (X, tasks a+b; equal, tasks a+b); a, b, c (Y, tasks a+b+c)."
    )


def test_lost_and_repeated_runs(tmp_path: Path) -> None:
    make(tmp_path)
    run(tmp_path / "failed", seed=9, status="failed")
    run(tmp_path / "twice", seed=0, test=accuracies(a=0.5, b=0.6), curves={"loss/a/val": {1: 1.0}})
    lines = said(tmp_path)
    assert any(line.startswith("equal: 1 of 7 runs didn't finish (failed)") for line in lines)
    assert any(line.startswith("Run more than once") for line in lines)


def test_directions_that_arent_known(tmp_path: Path) -> None:
    make(tmp_path, {"equal": {"kinds": {}}, "X": {"kinds": {}}})
    (line,) = said(tmp_path)
    assert line.startswith("Whether higher or lower is better isn't known for a accuracy and b accuracy")


def test_methods_that_differ_in_more_than_they_are_called(tmp_path: Path) -> None:
    more = {f"optimizer.{name}": 1 for name in ("momentum", "dampening", "weight_decay", "nesterov")}
    make(tmp_path, {"equal": {}, "X": {"config": more}})
    (line,) = said(tmp_path)
    assert line.startswith("The methods differ in more than their names say: optimizer.dampening, optimizer.momentum, ")


def test_tasks_without_figures(tmp_path: Path) -> None:
    make(tmp_path, {"equal": {"config": {"tasks.c": {"weight": 1.0}}}, "X": {"config": {"tasks.c": {"weight": 1.0}}}})
    assert said(tmp_path) == ["There are no figures of c on test, so this section shows nothing about these tasks."]


def test_baselines_of_other_settings(tmp_path: Path) -> None:
    make(tmp_path)
    for seed in range(6):
        figures = accuracies(a=0.5 + 0.01 * seed)
        run(tmp_path / f"a{seed}", tasks=["a"], seed=seed, test=figures, config={"optimizer.lr": 0.5})
    line = "Δm of X and equal compares with single-task runs of other settings: a alone differs in optimizer.lr."
    assert line in said(tmp_path)
