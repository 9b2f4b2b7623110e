"""The numbers of a comparison, on runs with known figures."""

import math
from pathlib import Path

import pytest
from made_runs import accuracies, comparison, run

from mtl.errors import UserError
from mtl.reporting.comparison import conflict, cost, hardest, pairs_of
from mtl.reporting.figures import check_names
from mtl.reporting.grouping import sections
from mtl.reporting.reading import find

FIGURES = {  # (a, b) by method and seed
    "equal": [(0.50, 0.60), (0.52, 0.60), (0.54, 0.60)],
    "X": [(0.51, 0.50), (0.54, 0.50), (0.57, 0.50)],
    "Y": [(0.50, 0.61), (0.52, 0.63), (0.54, 0.65)],
}


@pytest.fixture
def three(tmp_path: Path) -> Path:
    for name, figures in FIGURES.items():
        for seed, (a, b) in enumerate(figures):
            best = {"equal": 0.8, "X": 0.7, "Y": 0.9}[name] + 0.01 * seed
            run(tmp_path / f"{name}-{seed}", balancer=name, seed=seed, test=accuracies(a=a, b=b), best=best)
    for seed, (a, b) in enumerate([(0.5, 0.5), (0.5, 0.6), (0.6, 0.6)]):
        run(tmp_path / f"a-{seed}", seed=seed, tasks=["a"], test=accuracies(a=a))
        run(tmp_path / f"b-{seed}", seed=seed, tasks=["b"], test=accuracies(b=b))
    return tmp_path


def test_figures_and_their_main_ones(three: Path) -> None:
    found = comparison(three)
    assert [(str(figure), figure.mode, figure.main) for figure in found.figures] == [
        ("a accuracy", "max", True),
        ("a loss", "min", False),
        ("b accuracy", "max", True),
        ("b loss", "min", False),
    ]


def test_the_loss_is_no_main_figure_where_there_is_another(tmp_path: Path) -> None:
    run(tmp_path / "one", test={"a": {"loss": 1.0, "accuracy": 0.5}, "b": {"loss": 1.0}})
    assert [str(figure) for figure in comparison(tmp_path).mains] == ["a accuracy", "b loss"]


def test_means_and_intervals(three: Path) -> None:
    found = comparison(three)
    told = found.estimate(found.reference, found.mains[0])
    assert told is not None
    t = 0.95 / math.sqrt(2 * 0.975 * 0.025)  # Student's, two degrees of freedom
    assert (told.mean, told.half, told.n) == (pytest.approx(0.52), pytest.approx(t * 0.02 / math.sqrt(3)), 3)


def test_methods_are_in_the_order_of_validation_whatever_they_reach_on_test(three: Path, tmp_path: Path) -> None:
    assert [method.label for method in comparison(three).methods] == ["Y", "equal", "X"]
    better = tmp_path / "better"
    for name, best in {"equal": 0.8, "X": 0.7, "Y": 0.9}.items():
        run(better / name, balancer=name, test=accuracies(a=1 - best, b=1 - best), best=best)
    assert [method.label for method in comparison(better).methods] == ["Y", "equal", "X"]


def test_less_may_be_better_on_validation(tmp_path: Path) -> None:
    for name, best in {"equal": 0.8, "X": 0.7}.items():
        run(tmp_path / name, balancer=name, best=best, mode="min")
    assert [method.label for method in comparison(tmp_path).choice.order] == ["X", "equal"]


def test_delta_is_seed_by_seed(three: Path) -> None:
    """equal: a by 0, 4, -10 %, b by 20, 0, 0 %."""
    found = comparison(three)
    told = found.delta(found.reference).estimate
    assert told is not None
    assert told.mean == pytest.approx(((0 + 20) / 2 + (4 + 0) / 2 + (-10 + 0) / 2) / 3)


def test_delta_without_baselines_isnt_defined(tmp_path: Path) -> None:
    run(tmp_path / "one")
    found = comparison(tmp_path)
    assert (found.delta(found.reference).estimate, found.delta(found.reference).why) == (None, "no run of a alone")


def test_delta_without_a_direction_isnt_defined(tmp_path: Path) -> None:
    for tasks in (["a", "b"], ["a"], ["b"]):
        run(tmp_path / "-".join(tasks), tasks=tasks, kinds={"a/accuracy": "max"})
    found = comparison(tmp_path)
    told = found.delta(found.reference)
    assert (told.estimate, told.why) == (None, "it isn't known whether higher or lower b accuracy is better")


def test_a_task_alone_is_one_number_where_its_runs_have_one_setting(three: Path) -> None:
    found = comparison(three)
    assert found.alone(found.mains[0]).mean == pytest.approx(1.6 / 3)  # type: ignore[union-attr]
    run(three / "other", tasks=["a"], config={"optimizer.lr": 0.5})
    found = comparison(three)
    assert found.alone(found.mains[0]) is None


def test_ranks_by_hand(three: Path) -> None:
    """In a, X is first in every seed, and equal and Y share the rest; in b the order is Y, equal, X."""
    found = comparison(three)
    assert found.ranks is not None
    ranks, columns = found.ranks
    assert columns == 6
    by_label = dict(zip([method.label for method in found.methods], ranks, strict=True))
    assert by_label == {"X": (1 + 3) / 2, "equal": (2.5 + 2) / 2, "Y": (2.5 + 1) / 2}


def test_tests_against_the_reference(three: Path) -> None:
    """X in a: 0.01, 0.02, 0.03 ahead, t = 2 √3. X in b: 0.1 behind in every seed. Y in a: the same. Y in b as X in a."""
    found = {(test.method.label, test.figure.task): test for test in comparison(three).tests}
    p = 1 - 2 * math.sqrt(3) / math.sqrt(2 + 12)
    assert found["X", "a"].difference.p == pytest.approx(p)
    assert found["X", "b"].difference.why == "the same difference in every seed"
    assert found["Y", "a"].difference.why == "no difference in any seed"
    by = [0.01, 0.03, 0.05]
    t = 0.03 / (0.02 / math.sqrt(3))
    assert found["Y", "b"].difference.p == pytest.approx(1 - t / math.sqrt(2 + t * t))
    assert sum(by) / 3 == pytest.approx(found["Y", "b"].difference.estimate.mean)  # type: ignore[union-attr]
    small, large = sorted([found["X", "a"], found["Y", "b"]], key=lambda test: test.difference.p or 0)
    assert small.holm == pytest.approx(2 * (small.difference.p or 0))  # two tests could be made
    assert large.holm == pytest.approx(max(small.holm or 0, large.difference.p or 0))
    assert comparison(three).num_tests == 2


def test_the_reference_can_be_chosen(three: Path) -> None:
    assert comparison(three).reference.label == "equal"
    assert comparison(three, "X").reference.label == "X"
    assert {test.method.label for test in comparison(three, "X").tests} == {"Y", "equal"}


def test_the_reference_is_the_plain_sum(tmp_path: Path) -> None:
    """Neither the first by name nor what validation likes best."""
    for number, (weights, best) in enumerate({(0.2, 1.8): 0.9, (1, 1): 0.5, (1.8, 0.2): 0.7}.items()):
        named = {f"tasks.{task}.weight": weight for task, weight in zip("ab", weights, strict=True)}
        run(tmp_path / f"w{number}", config=named, best=best)
    run(tmp_path / "u", balancer="Aligned", best=0.8)
    found = comparison(tmp_path)
    assert found.reference.label == "equal"
    assert {m.label for m in found.methods} == {
        *("equal", "Aligned", "equal, weights a 0.2 / b 1.8", "equal, weights a 1.8 / b 0.2")
    }


def test_of_several_plain_sums_that_which_validation_likes_best(tmp_path: Path) -> None:
    for lr, best in {0.1: 0.5, 0.2: 0.7, 0.3: 0.6}.items():
        run(tmp_path / str(lr), config={"optimizer.lr": lr}, best=best)
    assert comparison(tmp_path).reference.label == "lr=0.2"
    assert comparison(tmp_path, "lr=0.3").reference.label == "lr=0.3"


def test_why_there_is_no_difference(tmp_path: Path) -> None:
    """No seed in common, no number in a common seed, and a task that the reference doesn't have."""
    nan = float("nan")
    for seed in range(2):
        run(tmp_path / f"e{seed}", seed=seed)
        run(tmp_path / f"s{seed}", seed=seed + 5, balancer="Seeds")
        run(tmp_path / f"n{seed}", seed=seed, balancer="Nan", test=accuracies(a=nan, b=0.5))
        run(tmp_path / f"t{seed}", seed=seed, balancer="Tasks", tasks=["a", "b", "c"], test=accuracies(a=0.1, c=0.5))
    found = comparison(tmp_path)
    why = {(test.method.runs[min(test.method.runs)].folder.name[0], test.figure.task): test for test in found.tests}
    assert why["s", "a"].difference.why == "no seed in common"
    assert why["n", "a"].difference.why == "no common seed in which both have a number"
    assert why["t", "c"].difference.why == "the reference doesn't have this task"
    assert ("s", "c") not in why


def test_costs_and_conflict_are_means_over_seeds(tmp_path: Path) -> None:
    for seed, (seconds, cosine) in enumerate([(0.1, 0.5), (0.3, -0.1)]):
        told = {"a~b": {"mean": cosine, "below_zero": 0.5 - cosine, "steps": 9}}
        run(tmp_path / str(seed), seed=seed, seconds_per_step=seconds, memory_per_step=None, cosine=told)
    (method,) = comparison(tmp_path).methods
    assert cost(method, "seconds_per_step").mean == pytest.approx(0.2)  # type: ignore[union-attr]
    assert cost(method, "memory_per_step") is None
    run(tmp_path / "2", seed=2, seconds_per_step=0.0, memory_per_step=0)
    (method,) = comparison(tmp_path).methods
    assert (cost(method, "seconds_per_step").n, cost(method, "memory_per_step").mean) == (3, 0)  # type: ignore[union-attr]
    assert pairs_of([method]) == ["a~b"]
    assert conflict(method, "a~b", "mean").mean == pytest.approx(0.2)  # type: ignore[union-attr]
    assert conflict(method, "a~b", "below_zero").mean == pytest.approx(0.3)  # type: ignore[union-attr]


def test_of_many_pairs_those_that_conflict_most(tmp_path: Path) -> None:
    told = {f"a~{n}": {"mean": 0.1 * n * (-1) ** n, "below_zero": 0.0, "steps": 9} for n in range(6)}
    run(tmp_path / "one", cosine=told)
    methods = comparison(tmp_path).methods
    assert hardest(methods, 6) == list(told)
    assert hardest(methods, 3) == ["a~5", "a~3", "a~1"]


def test_names_on_the_command_line(three: Path) -> None:
    found = sections(find([three]), None)
    check_names(found, "X", [["a", "b"]])
    with pytest.raises(UserError, match="no method 'x'.*possible: X; Y; equal"):
        check_names(found, "x", [])
    with pytest.raises(UserError, match="no task 'c'.*possible: a, b"):
        check_names(found, None, [["a", "c"]])
    with pytest.raises(UserError, match="'a' twice"):
        check_names(found, None, [["a", "a"]])


def test_methods_are_ordered_by_the_seeds_that_all_have(tmp_path: Path) -> None:
    """X has more seeds, and these are easy ones: it has the higher mean, and is behind in every common seed."""
    for seed in range(6):
        run(tmp_path / f"x{seed}", seed=seed, balancer="X", best=0.5 + 0.1 * seed)
    for seed in range(3):
        run(tmp_path / f"e{seed}", seed=seed, best=0.52 + 0.1 * seed)
    choice = comparison(tmp_path).choice
    assert [method.label for method in choice.order] == ["equal", "X"]
    assert choice.values[0] == pytest.approx({0: 0.52, 1: 0.62, 2: 0.72})
    assert choice.values[1] == pytest.approx({0: 0.5, 1: 0.6, 2: 0.7})


def test_a_run_that_monitors_something_else_doesnt_take_the_choice_from_the_others(tmp_path: Path) -> None:
    for name, best in (("A", 0.4), ("B", 0.6), ("C", 0.5)):
        run(tmp_path / name, balancer=name, best=best)
    run(tmp_path / "D", balancer="D", best=0.9, monitor="a/accuracy (max)")
    found = comparison(tmp_path)
    assert [method.label for method in found.choice.order] == ["B", "C", "A"]
    assert [method.label for method in found.methods] == ["B", "C", "A", "D"]


def test_runs_that_failed_here_and_there_dont_take_the_choice_from_the_others(tmp_path: Path) -> None:
    """Each of A, B and C lacks another seed; they have no place, and D and E, F and G are ordered by all three."""
    for name, best in zip("ABCDEFG", (0.9, 0.9, 0.9, 0.4, 0.6, 0.5, 0.3), strict=True):
        for seed in range(3):
            if "ABC"[seed] != name:
                run(tmp_path / f"{name}{seed}", seed=seed, balancer=name, best=best + 0.01 * seed)
    found = comparison(tmp_path)
    assert [method.label for method in found.choice.order] == ["E", "F", "D", "G"]
    assert found.choice.values[0] == pytest.approx({0: 0.6, 1: 0.61, 2: 0.62})
    assert [method.label for method in found.methods] == ["E", "F", "D", "G", "A", "B", "C"]


def test_where_all_lack_a_seed_those_that_all_have_decide(tmp_path: Path) -> None:
    for name, seeds, best in (("A", (0, 1), 0.5), ("B", (1, 2), 0.6), ("C", (1, 3), 0.4)):
        for seed in seeds:
            run(tmp_path / f"{name}{seed}", seed=seed, balancer=name, best=best)
    choice = comparison(tmp_path).choice
    assert [method.label for method in choice.order] == ["B", "A", "C"]
    assert choice.values == [{1: 0.6}, {1: 0.5}, {1: 0.4}]


def test_without_common_seeds_there_is_no_choice(tmp_path: Path) -> None:
    run(tmp_path / "a", seed=0)
    run(tmp_path / "b", seed=1, balancer="X")
    choice = comparison(tmp_path).choice
    assert (choice.order, choice.why[:35]) == ([], "no seed is common to all methods, a")


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"best": None}, "not every run has a monitored value"),
        ({"best": float("nan")}, "not every run has a monitored value"),
        ({"val": {}, "best": None}, "not every run has a monitored value"),
        ({"monitor": "a/loss (min)"}, "different things: a/loss (min); mean of a/accuracy"),
        ({"fingerprints": {"val": "x", "test": "x"}}, "validation and test are the same data"),
    ],
)
def test_when_validation_cant_choose(tmp_path: Path, more: dict[str, object], why: str) -> None:
    run(tmp_path / "a")
    run(tmp_path / "b", balancer="X", **more)  # type: ignore[arg-type]
    choice = comparison(tmp_path).choice
    assert choice.order == []
    assert why in choice.why


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"mode": None}, "it isn't known whether higher or lower monitored values are better"),
        ({"val": {}, "best": None, "monitor": "None", "mode": None}, "there is no validation"),
    ],
)
def test_when_no_run_can_be_chosen_by(tmp_path: Path, more: dict[str, object], why: str) -> None:
    run(tmp_path / "a", **more)  # type: ignore[arg-type]
    run(tmp_path / "b", balancer="X", **more)  # type: ignore[arg-type]
    choice = comparison(tmp_path).choice
    assert (choice.order, choice.why) == ([], why)
