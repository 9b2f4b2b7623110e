"""Readings of the results of steps."""

import torch

from mtl.step import StepResult
from mtl.training.faults import Faults, Place
from mtl.training.readings import Readings


def readings() -> Readings:
    return Readings(["p"], Faults(None, None, print))  # type: ignore[arg-type]


def measured(losses: dict[str, float], cosines: dict[tuple[str, str], float]) -> StepResult:
    return StepResult(
        {name: torch.tensor(loss) for name, loss in losses.items()},
        dict.fromkeys(losses, torch.tensor(0.5)),
        {name: torch.tensor(2.0) for name in losses},
        {pair: torch.tensor(value) for pair, value in cosines.items()},
        torch.tensor(3.0),
        {"p": tuple(losses)},
    )


def test_losses_are_means_over_the_steps_that_had_the_task() -> None:
    found = readings()
    for step, losses in enumerate(({"a": 1.0, "b": 4.0}, {"a": 2.0}, {"a": 6.0}), start=1):
        found.add(Place(step, 1, step - 1), StepResult({n: torch.tensor(x) for n, x in losses.items()}, {}))
    found.read()  # as before a checkpoint is saved; the log has them all the same
    assert found.take(None, 1) == {"loss/a/train": 3.0, "loss/b/train": 4.0}
    assert found.take(None, 1) == {}
    found.add(Place(4, 1, 3), StepResult({"a": torch.tensor(11.0)}, {}))
    assert found.take(None, 1)["loss/a/train"] == 11.0
    assert found.epoch_losses == {"a": 5.0, "b": 4.0}
    found.begin_epoch()
    assert found.epoch_losses == {}


def test_cosines_leave_out_what_was_not_measured_and_earlier_epochs() -> None:
    found, nan = readings(), float("nan")
    for epoch, cosines in enumerate(
        ({("a", "b"): 0.5}, {("a", "b"): nan, ("a", "c"): 0.25}, {("a", "b"): -1.0, ("a", "c"): nan}), start=1
    ):
        result = measured({"a": 1.0, "b": 1.0, "c": 1.0}, cosines)
        found.add(Place(epoch, epoch, 0), result)
        found.take(result, epoch)
    assert found.cosines() == {("a", "b"): [0.5, -1.0], ("a", "c"): [0.25]}
    assert found.cosines(since=1) == {("a", "b"): [-1.0], ("a", "c"): [0.25]}
    assert readings().cosines() == {}


def test_what_was_read_goes_on_elsewhere() -> None:
    first, second = readings(), readings()
    result = measured({"a": 1.0}, {})
    first.add(Place(1, 1, 0), result)
    figures = first.take(result, 1)
    assert figures == {"loss/a/train": 1.0, "weight/a": 0.5, "grad_norm/a": 2.0, "grad_norm/total": 3.0}
    first.add(Place(2, 1, 1), StepResult({"a": torch.tensor(3.0)}, {}))
    first.read()
    second.load_state_dict(first.state_dict())
    assert (second.reach, second.weights) == ({"p": {"a"}}, {"weight/a": 0.5})
    assert second.take(None, 1)["loss/a/train"] == 3.0
    assert second.epoch_losses == {"a": 2.0}
