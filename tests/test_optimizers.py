"""L-BFGS for changing batches: the pairs of gradients from which curvature is estimated."""

from typing import Any

import torch

import mtl

HESSIANS = [
    torch.diag(torch.tensor(values, dtype=torch.float64)) for values in ([1.0, 3.0, 10.0, 40.0], [7.0, 1.0, 5.0, 2.0])
]
CENTRES = [torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64) * factor for factor in (1.0, -2.0)]


def descend(kind: type[torch.optim.LBFGS], batches: list[int]) -> tuple[torch.Tensor, dict[str, Any]]:
    """Runs steps of three iterations each on one of two quadratic losses; returns parameters and optimizer state."""
    x = torch.nn.Parameter(torch.zeros(4, dtype=torch.float64))
    optimizer = kind([x], max_iter=3, max_eval=50, line_search_fn="strong_wolfe")
    for batch in batches:

        def closure(batch: int = batch) -> torch.Tensor:
            optimizer.zero_grad()
            away = x - CENTRES[batch]
            loss = away @ HESSIANS[batch] @ away / 2
            loss.backward()
            return loss

        optimizer.step(closure)
    return x.detach(), optimizer.state[x]


def of_one_batch(state: dict[str, Any]) -> list[bool]:
    """Returns whether each pair of the history has the curvature of one of the two losses."""
    return [
        any(torch.allclose(y, hessian @ s, rtol=1e-8) for hessian in HESSIANS)
        for y, s in zip(state["old_dirs"], state["old_stps"], strict=True)
    ]


def test_no_pair_is_of_two_batches() -> None:
    _, state = descend(mtl.optimizers.LBFGS, [0, 1, 0])
    assert of_one_batch(state) == [True] * 6  # two pairs a step
    _, state = descend(torch.optim.LBFGS, [0, 1])
    assert not all(of_one_batch(state))


def test_on_one_batch_it_is_as_good() -> None:
    for kind in (mtl.optimizers.LBFGS, torch.optim.LBFGS):
        x, _ = descend(kind, [0] * 10)
        torch.testing.assert_close(x, CENTRES[0], rtol=1e-5, atol=0)
    assert torch.equal(descend(mtl.optimizers.LBFGS, [0])[0], descend(torch.optim.LBFGS, [0])[0])
