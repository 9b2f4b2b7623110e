"""`model.compile`: modules compiled in training, by config."""

from pathlib import Path

import pytest
import torch
from conftest import command, stopping

import mtl
from mtl.step import compiling

FAST = ["task=mnist_two_head", "trainer.max_epochs=2", "data.batch_size=1500", "balancer=upgrad", "model.compile=true"]


def parameters(run: Path | None) -> dict[str, torch.Tensor]:
    assert run is not None
    return torch.load(run / "checkpoints/last.pt", weights_only=True)["model"]


@pytest.fixture
def compiled_shapes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Compiles without Inductor, and returns a list that gets an entry for each compiled graph."""
    from torch._dynamo.backends.debugging import aot_eager

    compiled: list[int] = []

    def backend(graph, inputs, **options):
        compiled.append(1)
        return aot_eager(graph, inputs)

    monkeypatch.setattr(compiling, "BACKEND", backend)
    torch.compiler.reset()
    return compiled


@pytest.mark.slow
def test_compiled_runs_are_resumed_exactly_and_loaded_eagerly(here: Path, compiled_shapes: list[int]) -> None:
    whole = command("train", *FAST)
    assert whole.code == 0, whole.err
    assert compiled_shapes
    assert "gradients.source=layerwise has no effect in trunk, heads.digit, heads.parity" in whole.out
    stopped = command("train", *FAST, *stopping(4))
    assert stopped.code == 143
    torch.compiler.reset()
    resumed = command("train", *FAST, f"resume={stopped.run}")
    assert resumed.code == 0, resumed.err
    ours, theirs = parameters(stopped.run), parameters(whole.run)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    eager = command("train", *FAST, "model.compile=false")
    torch.testing.assert_close(parameters(eager.run), dict(theirs), rtol=1e-3, atol=1e-5)

    count = len(compiled_shapes)
    assert command("evaluate", f"run={whole.run}").code == 0
    model = mtl.load(whole.run)
    assert model({"image": torch.zeros(2, 1, 28, 28)})["digit"].shape == (2, 10)
    assert command("graph", *FAST).code == 0
    assert len(compiled_shapes) == count

    refused = command("train", *FAST, f"resume={stopped.run}", "model.compile=false")
    assert refused.code == 1
    assert "model.compile" in refused.err


def test_wrong_values(here: Path) -> None:
    wrong = command("train", *FAST[:-1], "model.compile=[trunk.layer*]")
    assert wrong.code == 1
    assert "model.compile: no module matches 'trunk.layer*'; the modules are: trunk, trunk.conv1" in wrong.err
    wrong = command("train", *FAST[:-1], "model.compile=trunk")
    assert "model.compile is 'trunk'; it must be true, false or a list of names" in wrong.err
