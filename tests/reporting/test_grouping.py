"""Which runs form a method, which methods are compared, and which runs are baselines."""

import os
from pathlib import Path

from made_runs import run

from mtl.reporting.grouping import Section, sections
from mtl.reporting.reading import find


def of(folder: Path) -> list[Section]:
    return sections(find([folder]), None)


def labels(section: Section) -> list[str]:
    return [method.label for method in section.methods]


def test_seeds_are_one_method(tmp_path: Path) -> None:
    for seed in (2, 0, 1):
        run(tmp_path / f"e{seed}", seed=seed)
        run(tmp_path / f"u{seed}", seed=seed, balancer="UPGrad")
    (section,) = of(tmp_path)
    assert section.title == "made"
    assert [(method.label, list(method.runs)) for method in section.methods] == [
        ("UPGrad", [0, 1, 2]),
        ("equal", [0, 1, 2]),
    ]


def test_what_has_no_bearing_on_the_numbers_makes_no_method(tmp_path: Path) -> None:
    run(tmp_path / "a", config={"log.every": 10, "output_root": "x", "data.num_workers": 2, "data.root": "/a"})
    run(tmp_path / "b", seed=1, config={"log.every": 99, "output_root": "y", "data.num_workers": 0, "data.root": "/b"})
    (section,) = of(tmp_path)
    assert len(section.methods) == 1


def test_variables_of_ones_own_make_methods(tmp_path: Path) -> None:
    run(tmp_path / "a", config={"vars": {"fold": 0}})
    run(tmp_path / "b", seed=1, config={"vars": {"fold": 0}})
    run(tmp_path / "c", config={"vars": {"fold": 1}})
    (section,) = of(tmp_path)
    assert [(method.label, list(method.runs)) for method in section.methods] == [("fold=0", [0, 1]), ("fold=1", [0])]


def test_a_run_that_is_older_than_variables_is_one_without_any(tmp_path: Path) -> None:
    run(tmp_path / "old")
    run(tmp_path / "new", seed=1, config={"vars": {}})
    run(tmp_path / "other", config={"vars": {"fold": 1}})
    (section,) = of(tmp_path)
    assert [(method.label, list(method.runs)) for method in section.methods] == [
        ("fold=1", [0]),
        ("fold=not set", [0, 1]),
    ]


def test_one_is_one_however_it_is_written(tmp_path: Path) -> None:
    run(tmp_path / "a", config={"tasks.a.weight": 1})
    run(tmp_path / "b", seed=1, config={"tasks.a.weight": 1.0})
    (section,) = of(tmp_path)
    assert len(section.methods) == 1


def test_a_seed_that_follows_the_runs_makes_no_method(tmp_path: Path) -> None:
    for seed in range(3):
        run(tmp_path / f"e{seed}", seed=seed, config={"balancer.seed": seed, "data.seed": 0})
        run(tmp_path / f"u{seed}", seed=seed, balancer="UPGrad", config={"data.seed": 0})
    (section,) = of(tmp_path)
    assert [(method.label, list(method.runs)) for method in section.methods] == [
        ("UPGrad", [0, 1, 2]),
        ("equal", [0, 1, 2]),
    ]
    run(tmp_path / "other", seed=1, config={"balancer.seed": 5, "data.seed": 0})
    assert len(of(tmp_path)[0].methods) > 2  # now it doesn't follow


def test_problems_are_apart(tmp_path: Path) -> None:
    run(tmp_path / "a", problem="one")
    run(tmp_path / "b", problem="two")
    run(tmp_path / "c", problem=None, arguments=None)
    assert [section.title for section in of(tmp_path)] == ["a problem whose name isn't known", "one", "two"]


def test_other_data_are_apart_unless_they_are_measured_alike(tmp_path: Path) -> None:
    prints = {"train": "other", "val": "v", "test": "same"}
    run(tmp_path / "a", fingerprints={"test": "same"}, config={"data.source": "small"})
    run(tmp_path / "b", fingerprints=prints, config={"data.source": "large"})
    run(tmp_path / "c", fingerprints={"test": "third"}, config={"data.source": "third"})
    run(tmp_path / "d", fingerprints=None, config={"data.source": "fourth"})
    found = of(tmp_path)
    assert [labels(section) for section in found] == [["equal"], ["source=large", "source=small"], ["equal"]]
    assert [section.title for section in found] == [
        "made (source=fourth)",
        "made (source=small)",
        "made (source=third)",
    ]


def test_data_are_the_same_through_a_third(tmp_path: Path) -> None:
    """The first two have no split in common, but the third has one with each; the last has one with the first."""
    for seed, name in enumerate(("first", "second")):
        run(tmp_path / name, seed=seed, fingerprints={"test": name}, config={"data.source": name})
        run(tmp_path / f"third{seed}", seed=seed, fingerprints={"test": name}, config={"data.source": "third"})
    run(tmp_path / "first2", seed=2, fingerprints={"test": "more"}, config={"data.source": "first"})
    run(tmp_path / "w", fingerprints={"test": "more"}, config={"data.source": "w"})
    (section,) = of(tmp_path)
    assert labels(section) == ["source=first", "source=second", "source=third", "source=w"]


def test_the_same_data_are_the_same_whatever_the_seeds(tmp_path: Path) -> None:
    for seed in range(2):
        run(tmp_path / str(seed), seed=seed, config={"data.source": f"s{seed}"})
    assert [labels(section) for section in of(tmp_path)] == [["source=s0", "source=s1"]]


def test_batch_size_is_no_other_data(tmp_path: Path) -> None:
    run(tmp_path / "a", fingerprints=None, config={"data.batch_size": 32})
    run(tmp_path / "b", fingerprints=None)
    (section,) = of(tmp_path)
    assert labels(section) == ["batch_size=32", "batch_size=64"]


def test_single_tasks_are_baselines(tmp_path: Path) -> None:
    """However they were made: by `only`, or by taking the other task away, with any balancer."""
    run(tmp_path / "both")
    run(tmp_path / "a0", config={"only": "a"})
    run(tmp_path / "a1", seed=1, tasks=["a"], balancer="UPGrad", config={"trainer.monitor": {"a/accuracy": "max"}})
    (section,) = of(tmp_path)
    assert labels(section) == ["equal"]
    assert [(single.label, list(single.runs)) for single in section.singles["a"]] == [("a alone", [0, 1])]
    assert section.baseline(section.methods[0], "a") == (section.singles["a"][0], [])
    assert section.baseline(section.methods[0], "b") == (None, [])


def test_a_single_task_among_single_tasks_is_a_method(tmp_path: Path) -> None:
    run(tmp_path / "a", tasks=["a"], config={"optimizer.lr": 0.1})
    run(tmp_path / "b", tasks=["a"], config={"optimizer.lr": 0.2})
    (section,) = of(tmp_path)
    assert (labels(section), section.singles) == (["lr=0.1", "lr=0.2"], {})


def test_a_baseline_of_the_methods_own_settings_is_taken(tmp_path: Path) -> None:
    for lr in (0.1, 0.2):
        run(tmp_path / f"both{lr}", config={"optimizer.lr": lr})
        run(tmp_path / f"alone{lr}", tasks=["a"], config={"optimizer.lr": lr})
    run(tmp_path / "third", config={"optimizer.lr": 0.3})
    (section,) = of(tmp_path)
    assert [single.label for single in section.singles["a"]] == ["a alone, lr=0.1", "a alone, lr=0.2"]
    found = [section.baseline(method, "a") for method in section.methods]
    assert found == [(section.singles["a"][0], []), (section.singles["a"][1], []), (None, [])]


def test_the_only_baseline_is_taken_and_told_what_differs(tmp_path: Path) -> None:
    run(tmp_path / "both", config={"optimizer.lr": 0.1, "tasks.a.weight": 0.2})
    run(tmp_path / "alone", tasks=["a"], config={"optimizer.lr": 0.2})
    (section,) = of(tmp_path)
    assert section.baseline(section.methods[0], "a") == (section.singles["a"][0], ["optimizer.lr"])


def test_the_same_seed_twice_counts_once_and_the_newest(tmp_path: Path) -> None:
    """Two runs of one seed are no two samples."""
    for age, name in enumerate(("new", "old")):
        folder = run(tmp_path / name)
        os.utime(folder / "metrics.json", (1e9 - age, 1e9 - age))
    (section,) = of(tmp_path)
    (method,) = section.methods
    assert [run.folder.name for run in method.runs.values()] == ["new"]
    assert [run.folder.name for run in method.repeated] == ["old"]


def test_runs_that_were_lost_are_their_methods(tmp_path: Path) -> None:
    run(tmp_path / "good")
    run(tmp_path / "alone", tasks=["a"])
    run(tmp_path / "bad", seed=1, status="failed")
    run(tmp_path / "bad_alone", seed=1, tasks=["a"], status="stopped")
    run(tmp_path / "other", seed=1, balancer="UPGrad", status="failed")
    run(tmp_path / "repeated", seed=0, status="failed")  # good has its seed
    (section,) = of(tmp_path)
    assert [run.folder.name for run in section.methods[0].lost] == ["bad"]
    assert [run.folder.name for run in section.singles["a"][0].lost] == ["bad_alone"]


def test_the_split_is_each_problems_own(tmp_path: Path) -> None:
    run(tmp_path / "a", problem="one")
    run(tmp_path / "b", problem="two", test={}, val={"a": {"loss": 1.0}})
    assert [(section.title, section.split) for section in of(tmp_path)] == [("one", "test"), ("two", "val")]


def test_figures_that_are_no_numbers_are_left_out(tmp_path: Path) -> None:
    run(tmp_path / "a", test={"a": {"accuracy": float("nan")}})
    run(tmp_path / "b", seed=1, test={"a": {"accuracy": 0.5}})
    run(tmp_path / "c", seed=2, test={})
    (section,) = of(tmp_path)
    assert section.methods[0].values("test", "a", "accuracy") == {1: 0.5}
