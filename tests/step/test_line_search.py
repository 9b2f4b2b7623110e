"""L-BFGS after another optimizer: against the same steps by hand, and cases in which it is refused."""

from typing import Any

import pytest
import torch
from conftest import batches, command
from test_nonfinite import everything
from test_own_batches import plain
from test_resume import assert_same
from torch.nn import functional as F

import mtl
from mtl.choices import PASSES


def built(kind: str = "auto", *, balancer: Any = None, after: int = 2, **options: Any) -> mtl.Step:
    model, tasks = plain(2, t1=0.5)
    adam = torch.optim.Adam(model.parameters(), lr=1e-2)
    lbfgs = torch.optim.LBFGS(model.parameters(), max_iter=4, line_search_fn="strong_wolfe")
    return mtl.Step(
        model, tasks, adam, update=mtl.Update(then=(after, lbfgs)), balancer=balancer, passes=kind, **options
    )


@pytest.mark.parametrize("how", [{}, {"micro_batch_size": 3}])
@pytest.mark.parametrize("kind", list(PASSES))
def test_as_by_hand(kind: str, how: dict[str, int]) -> None:
    step = built(kind, **how)
    other, _ = plain(2)
    adam = torch.optim.Adam(other.parameters(), lr=1e-2)
    lbfgs = torch.optim.LBFGS(other.parameters(), max_iter=4, line_search_fn="strong_wolfe")
    given = batches(2, 2)
    for batch in [*given, given[0], given[0]]:
        step(batch)
    for number, batch in enumerate([*given, given[0], given[0]]):

        def closure(batch: dict[str, torch.Tensor] = batch) -> torch.Tensor:
            other.zero_grad()
            predictions = other(batch)
            loss = F.cross_entropy(predictions["t0"], batch["y0"]) + 0.5 * F.cross_entropy(
                predictions["t1"], batch["y1"]
            )
            loss.backward()
            return loss

        if number < 2:
            closure()
            adam.step()
        else:
            lbfgs.step(closure)
    assert step.num_taken == 4
    for mine, its in zip(step.model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, its, rtol=0, atol=1e-9)


def test_a_balancers_weights_stay_within_a_search() -> None:
    """Asked once a step, at its beginning; the search is along the loss with these weights."""
    asked = []

    class Counted(mtl.balancers.MGDA):
        def weights(self, losses: torch.Tensor, gramian: torch.Tensor | None) -> torch.Tensor:
            asked.append(super().weights(losses, gramian))
            return asked[-1]

    step = built(balancer=Counted(), after=1)
    batch = batches(1, 2)[0]
    step(batch)
    for _ in range(3):
        before = {n: float(x) for n, x in step.backward(batch).losses.items()}
        result = step(batch)
        weights = {n: float(w) for n, w in result.weights.items()}
        after = {n: float(x) for n, x in step.backward(batch).losses.items()}
        assert sum(w * after[n] for n, w in weights.items()) < sum(w * before[n] for n, w in weights.items())
    assert len(asked) == 1 + 3 * 3


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_goes_on_after_a_reload(stop: int) -> None:
    given = batches(5, 2)
    whole, first, second = (built(balancer=mtl.balancers.UW()) for _ in range(3))
    for step, its in ((whole, given), (first, given[:stop])):
        torch.manual_seed(0)
        for batch in its:
            step(batch)
    state = everything(first)
    second.model.load_state_dict(state["model"])
    second.load_state_dict(state["step"])
    for batch in given[stop:]:
        second(batch)
    assert_same(everything(second), everything(whole))


def test_where_there_is_no_loss_to_search_along() -> None:
    with pytest.raises(
        mtl.UserError, match="uses the weighted loss in its line search, and the balancer GradDrop works on"
    ):
        built(balancer=mtl.balancers.GradDrop())
    with pytest.raises(mtl.UserError, match="fp16 scales gradients"):
        built(precision="fp16")


def test_from_the_config(here: Any) -> None:
    then = "optimizer.then={_target_: torch.optim.LBFGS, after: 20, max_iter: 5, line_search_fn: strong_wolfe}"
    small = [
        "task=burgers",
        "data.epoch=15",
        "trainer.max_epochs=2",
        "data.batch_size={interior: 50, boundary: 10, initial: 10}",
    ]
    ended = command("train", *small, then, "log.every=1")
    assert ended.code == 0, ended.err
    assert ended.metrics["steps"] == 30
    lines = [line.split(",") for line in (ended.run / "metrics.csv").read_text().splitlines()]
    rates = [float(value) for _, _, tag, value in lines if tag == "lr/default"]
    assert all(rate < 0.1 for rate in rates[:20])
    assert rates[20:] == [1.0] * 10
    late = command("train", *small, then.replace("20", "99"))
    assert "warning  optimizer.then takes over after 99 steps, but the run has 30" in late.out
    wrong = command("train", *small, "optimizer.then={_target_: torch.optim.LBFGS}")
    assert (
        "optimizer.then is {'_target_': 'torch.optim.LBFGS'}; it must be a mapping with a _target_ and `after`"
        in wrong.err
    )
