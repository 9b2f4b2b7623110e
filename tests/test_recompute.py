"""Modules that compute their activations again in the backward pass."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import command, most_saved
from torch import nn

import mtl
from mtl.recompute import recompute


def problem(patterns: list[str]) -> tuple[mtl.MultiTaskModel, list[mtl.Task], list[dict[str, torch.Tensor]]]:
    torch.manual_seed(0)
    blocks = [
        nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8, momentum=momentum), nn.ReLU(), nn.Dropout(0.3))
        for momentum in (0.1, None)
    ]
    trunk = nn.Sequential(nn.Linear(3, 8), *blocks, nn.utils.parametrizations.spectral_norm(nn.Linear(8, 4)))
    heads = {name: nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.2), nn.Linear(4, 1)) for name in ("a", "b", "c")}
    tasks = [mtl.Task(name, head=head, loss=nn.MSELoss(), target=name) for name, head in heads.items()]
    model = mtl.MultiTaskModel(trunk, tasks, inputs=["x"])
    recompute(model, patterns)
    batches = [{"x": torch.randn(7, 3), **{name: torch.randn(7, 1) for name in heads}} for _ in range(4)]
    return model, tasks, batches


def trained(patterns: list[str], balancer: str, passes: str, source: str, **settings: Any) -> list[Any]:
    model, tasks, batches = problem(patterns)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    step = mtl.Step(
        model,
        tasks,
        optimizer,
        balancer=getattr(mtl.balancers, balancer)(),
        passes=passes,
        gradients=mtl.Gradients(source),
        **settings,
    )
    results = [step(batch, measure=number % 2 == 0) for number, batch in enumerate(batches)]
    figures = [value for result in results for value in (*result.losses.values(), *(result.grad_norms or {}).values())]
    return [*figures, *model.state_dict().values(), torch.random.get_rng_state()]


@pytest.mark.parametrize("settings", [{}, {"micro_batch_size": 4}], ids=["whole", "micro"])
@pytest.mark.parametrize(
    ("balancer", "passes", "source"),
    [
        *(("Equal", passes, "auto") for passes in ("joint", "sequential", "shared")),
        *(("MGDA", passes, "rows") for passes in ("joint", "sequential", "shared")),
        ("MGDA", "shared", "layerwise"),
        ("MGDA", "shared", "representation"),
        ("UW", "shared", "auto"),
        ("GradDrop", "sequential", "auto"),
    ],
)
def test_the_numbers_do_not_change(balancer: str, passes: str, source: str, settings: dict[str, int]) -> None:
    if settings and source in ("layerwise", "representation"):
        pytest.skip("needs the whole batch")
    plain = trained([], balancer, passes, source, **settings)
    again = trained(["trunk.[12]", "heads.*.0"], balancer, passes, source, **settings)
    assert all(torch.equal(one, other) for one, other in zip(plain, again, strict=True))


def test_less_is_stored() -> None:
    stored = {}
    for patterns in ([], ["trunk.[12]"]):
        model, _, batches = problem(patterns)
        stored[len(patterns)] = most_saved(lambda m=model, b=batches: sum(p.sum() for p in m(b[0]).values()).backward())
    assert stored[1] < 0.7 * stored[0]


def test_by_config(here: Path) -> None:
    fast = ["task=mnist_two_head", "trainer.max_epochs=1", "data.batch_size=1000", "model.trunk.dropout=0"]
    runs = [command("train", *fast, f"model.checkpoint={patterns}") for patterns in ("[]", "[trunk.conv1,trunk.conv2]")]
    assert [run.code for run in runs] == [0, 0]
    models = [torch.load(run.run / "checkpoints/last.pt", weights_only=True)["model"] for run in runs if run.run]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
    wrong = command("train", *fast, "model.checkpoint=[trunk.layer*]")
    assert wrong.code == 1
    assert "model.checkpoint: no module matches 'trunk.layer*'; the modules are: trunk, trunk.conv1" in wrong.err
