"""The AUC within groups: values by hand, by pairs, and with missing labels in a task."""

import math
from functools import partial

import pytest
import torch
from torch import nn

import mtl
from mtl.metrics import GroupAUROC
from mtl.training.metrics import TaskMetric


def test_by_hand() -> None:
    """User 7: 3 of 4 pairs, of 4 samples; user 2: a tie, of 2 samples; user 5 has one class only."""
    metric = GroupAUROC("user")
    metric.update(torch.tensor([0.9, 0.1]), torch.tensor([1, 1]), torch.tensor([7, 5]))
    metric.update(torch.tensor([0.4, 0.4, 0.2]), torch.tensor([1, 0, 1]), torch.tensor([2, 2, 7]))
    metric.update(torch.tensor([0.3, 0.1, 0.6]), torch.tensor([0, 0, 1]), torch.tensor([7, 7, 5]))
    assert float(metric.compute()) == pytest.approx((4 * 3 / 4 + 2 * 1 / 2) / 6, abs=1e-12)


def test_by_pairs() -> None:
    generator = torch.Generator().manual_seed(0)
    score = torch.randint(0, 8, (300,), generator=generator) / 8
    label, group = torch.randint(0, 2, (300,), generator=generator), torch.randint(0, 40, (300,), generator=generator)
    metric = GroupAUROC("user")
    metric.update(score, label.float(), group)
    total, weight = 0.0, 0
    for each in group.unique().tolist():
        yes, no = score[(group == each) & (label == 1)], score[(group == each) & (label == 0)]
        if len(yes) and len(no):
            won = (yes[:, None] > no).double() + 0.5 * (yes[:, None] == no)
            total, weight = total + float(won.mean()) * (len(yes) + len(no)), weight + len(yes) + len(no)
    assert float(metric.compute()) == pytest.approx(total / weight, abs=1e-12)


def test_without_a_group_of_two_classes() -> None:
    metric = GroupAUROC("user")
    metric.update(torch.tensor([0.9, 0.1]), torch.tensor([1, 0]), torch.tensor([1, 2]))
    assert math.isnan(float(metric.compute()))


def test_in_a_task_with_missing_labels() -> None:
    task = mtl.Task(
        "click",
        head=nn.Identity(),
        loss=nn.BCEWithLogitsLoss(),
        target="click",
        metrics={"gauc": partial(GroupAUROC, "user")},
    )
    metric = TaskMetric(task, "gauc", torch.device("cpu"))
    click = torch.tensor([1.0, 0.0, math.nan, 1.0, 0.0])
    batch = {"click": click, "user": torch.tensor([1, 1, 1, 2, 2])}
    metric.update(torch.tensor([2.0, 1.0, 9.0, -5.0, -4.0]), batch)
    assert metric.compute() == {"gauc": pytest.approx(0.5, abs=1e-12)}
    with pytest.raises(mtl.UserError, match="tasks.click.metrics.gauc.group: .*'user'"):
        metric.update(torch.zeros(5), {"click": click})


def test_scores_near_one_are_not_tied_and_nan_is_nan() -> None:
    task = mtl.Task("click", head=nn.Identity(), loss=nn.BCEWithLogitsLoss(), target="click")
    task.metrics = {"gauc": partial(GroupAUROC, "user")}
    metric = TaskMetric(task, "gauc", torch.device("cpu"))
    batch = {"click": torch.tensor([0.0, 1.0, 0.0, 1.0]), "user": torch.ones(4, dtype=torch.long)}
    metric.update(torch.tensor([18.0, 20.0, 25.0, 30.0]), batch)  # their probabilities are 1 in float32
    assert metric.compute() == {"gauc": pytest.approx(0.75, abs=1e-12)}
    metric.update(torch.tensor([1.0, torch.nan, 1.0, 2.0]), batch)
    assert math.isnan(metric.compute()["gauc"])
