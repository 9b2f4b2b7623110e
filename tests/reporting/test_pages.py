"""The texts before the tables of a comparison."""

from pathlib import Path

import pytest
from made_runs import accuracies, comparison, run

from mtl.reporting import pages


def make(folder: Path, *, mode: str = "max", **best: tuple[float, ...]) -> None:
    for name, values in best.items():
        for seed, value in enumerate(values):
            figures = accuracies(a=0.5, b=0.25)
            run(folder / f"{name}{seed}", balancer=name, seed=seed, best=value, mode=mode, test=figures)


@pytest.mark.parametrize(("mode", "sign", "first"), [("max", 1, "X"), ("min", -1, "equal")])
def test_a_difference_beyond_the_spread(tmp_path: Path, mode: str, sign: int, first: str) -> None:
    """0.10, 0.11 and 0.12 between them: 0.11 ± 4.3027 · 0.01 / √3."""
    make(tmp_path, mode=mode, equal=(0.5, 0.5, 0.5), X=(0.6, 0.61, 0.62))
    text = pages._which(comparison(tmp_path))
    assert text.startswith(f"By validation one would choose {first}: ")
    told = {1: "+0.110 [+0.085, +0.135]", -1: "−0.110 [−0.135, −0.085]"}[sign]
    assert f"over 3 common seeds is {told}, which is more than the spread over seeds explains." in text
    assert text.endswith("Its figures on test: a accuracy 0.5 ± 0 and b accuracy 0.25 ± 0.")


def test_a_difference_within_the_spread(tmp_path: Path) -> None:
    make(tmp_path, equal=(0.5, 0.6, 0.7), X=(0.6, 0.61, 0.62))
    assert "which may be chance. Its figures" in pages._which(comparison(tmp_path))


def test_the_best_of_many_are_told_to_be_that(tmp_path: Path) -> None:
    make(tmp_path, equal=(0.5, 0.5, 0.5), X=(0.6, 0.61, 0.62), Y=(0.1, 0.1, 0.1))
    text = pages._which(comparison(tmp_path))
    assert "more than the spread over seeds explains, though these two are the first of 3." in text


def test_what_validation_says_is_of_common_seeds(tmp_path: Path) -> None:
    make(tmp_path, equal=(0.52, 0.62, 0.73), X=(0.5, 0.6, 0.7, 0.8, 0.9, 1.0))
    text = pages._which(comparison(tmp_path))
    assert "choose equal: 0.62 ± 0.26 in" in text
    assert "before X with 0.60 ± 0.25, over the seeds 0, 1 and 2." in text
    assert "over 3 common seeds is +0.023" in text


def test_what_is_compared(tmp_path: Path) -> None:
    make(tmp_path, equal=(0.5, 0.5), X=(0.6, 0.6))
    run(tmp_path / "a", tasks=["a"])
    assert pages._what(comparison(tmp_path)) == (
        "4 runs of 2 methods, and 1 of single tasks. Seeds 0 and 1. Figures of the test split of 50 samples. Methods "
        "are ordered by validation, the best first. Other methods are tested against equal, which has equal weights."
    )


def test_why_it_is_the_reference(tmp_path: Path) -> None:
    make(tmp_path, X=(0.5,), Y=(0.6,))
    assert "X, an arbitrary choice, since no method has equal weights; --ref" in pages._what(comparison(tmp_path))
    assert pages._what(comparison(tmp_path, "Y")).endswith("against Y, as requested.")
    for lr, best in {0.1: 0.5, 0.2: 0.7}.items():
        run(tmp_path / str(lr), config={"optimizer.lr": lr}, best=best)
    told = "equal, lr=0.2, the best on validation of the 2 methods with equal weights."
    assert pages._what(comparison(tmp_path)).endswith(told)
    run(tmp_path / "none", balancer="Z", best=None)
    told = "equal, lr=0.1, the first by name of the 2 methods with equal weights."
    assert pages._what(comparison(tmp_path)).endswith(told)
