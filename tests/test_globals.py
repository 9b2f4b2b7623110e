"""A training doesn't change process-wide settings of torch; and compiled modules."""

import logging
import os
import random
import shutil
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo.config
import torch._functorch.config
import torch._inductor.config
from conftest import Ended
from torch import nn

import mtl
import mtl.loggers
from mtl.training.options import Checkpoints
from mtl.training.trainer import Trainer

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler")
CONFIGS = [torch._functorch.config, torch._dynamo.config, torch._inductor.config]
BACKENDS = {
    "cudnn": (torch.backends.cudnn, ("enabled", "benchmark", "deterministic", "allow_tf32")),
    "cuda": (torch.backends.cuda.matmul, ("allow_tf32", "allow_fp16_reduced_precision_reduction")),
    "mkldnn": (torch.backends.mkldnn, ("enabled",)),
}
CALLS = [
    *(torch.get_num_threads, torch.get_num_interop_threads, torch.get_default_dtype, torch.get_default_device),
    *(torch.are_deterministic_algorithms_enabled, torch.is_deterministic_algorithms_warn_only_enabled),
    *(
        torch.get_float32_matmul_precision,
        torch.is_grad_enabled,
        torch.is_anomaly_enabled,
        torch.is_inference_mode_enabled,
    ),
    *(torch.is_autocast_enabled, torch.is_autocast_cache_enabled, torch.autograd._profiler_enabled),
    *(torch.multiprocessing.get_sharing_strategy, torch.multiprocessing.get_start_method),
    *(torch.nn.modules.module._global_forward_hooks.copy, torch.nn.modules.module._global_backward_hooks.copy),
]


def settings() -> dict[str, Any]:
    """Returns all process-wide settings of torch, and other state that a process has only once."""
    return {
        **{call.__qualname__: call() for call in CALLS},
        **{f"{name}.{n}": getattr(backend, n) for name, (backend, names) in BACKENDS.items() for n in names},
        **{config.__name__: config.get_config_copy() for config in CONFIGS},
        "environment": dict(os.environ),
        "warnings": list(warnings.filters),
        "signals": {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)},
    }


def built(*, compiled: str | None = None) -> tuple[mtl.MultiTaskModel, list[mtl.Task], dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    trunk = nn.Sequential(*[module for _ in range(3) for module in (nn.Linear(16, 16), nn.Tanh(), nn.LayerNorm(16))])
    tasks = [mtl.Task(f"t{i}", head=nn.Linear(16, 3), loss=nn.CrossEntropyLoss(), target="y") for i in range(3)]
    model = mtl.MultiTaskModel(trunk, tasks, inputs=["x"])
    batch = {"x": torch.randn(8, 16), "y": torch.randint(0, 3, (8,))}
    if compiled:
        torch.compiler.reset()
        trunk.compile(backend=compiled)
    return model, tasks, batch


@pytest.mark.parametrize("compiled", [None, "aot_eager"])
def test_a_step_changes_no_setting_of_torch(compiled: str | None) -> None:
    model, tasks, batch = built(compiled=compiled)
    optimizer = torch.optim.SGD(model.parameters())
    before, draws = settings(), torch.get_rng_state()
    step = mtl.Step(model, tasks, optimizer, balancer=mtl.balancers.FAMO(), passes="joint")
    assert settings() == before
    for measure in (False, True):
        step(batch, measure=measure)
        assert settings() == before
    with pytest.raises(mtl.UserError):
        step({"x": batch["x"]})
    assert settings() == before
    assert torch.equal(torch.get_rng_state(), draws)


def test_constructing_objects_changes_no_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the process, random states and the path of modules included."""

    def state() -> dict[str, Any]:
        seen = {
            **settings(),
            "path": list(sys.path),
            "python": random.getstate(),
            "torch": torch.get_rng_state().tolist(),
        }
        seen["numpy"] = [part.tolist() if hasattr(part, "tolist") else part for part in np.random.get_state()]
        return seen | {"handlers": list(logging.getLogger().handlers), "level": logging.getLogger().level}

    monkeypatch.chdir(tmp_path)
    model, tasks, batch = built()
    optimizer = torch.optim.SGD(model.parameters())
    data = mtl.data.Fields(batch)
    before = state()
    kinds = [getattr(mtl.balancers, name) for name in mtl.balancers.__all__]
    for kind in [kind for kind in kinds if kind not in (mtl.balancers.Balancer, mtl.balancers.TorchJD)]:
        mtl.Step(model, tasks, optimizer, balancer=kind())
        assert state() == before, kind
    loader = mtl.data.Loader(data, batch_size=4, shuffle=True)
    loggers = [kind(tmp_path, ["a"]) for kind in (mtl.loggers.CsvLogger, mtl.loggers.TensorBoardLogger)]
    Trainer(mtl.Step(model, tasks, optimizer), loader, max_epochs=1, checkpoints=Checkpoints(tmp_path / "checkpoints"))
    assert state() == before
    for logger in loggers:
        logger.close()


def test_loading_a_model_changes_no_setting_of_torch(trained: Ended) -> None:
    before, draws = settings(), torch.get_rng_state()
    mtl.load(trained.run)
    assert settings() == before
    assert torch.equal(torch.get_rng_state(), draws)


def outcome(model: mtl.MultiTaskModel, step: mtl.Step, batch: dict[str, torch.Tensor]) -> Any:
    result = step.backward(batch, measure=True)
    return list(result.grad_norms.values()), [parameter.grad for parameter in model.parameters()]


def elsewhere(call: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the function in a thread with default settings, like the threads of backward passes on a GPU."""

    def called(*args: Any, **options: Any) -> Any:
        found: list[Any] = []
        thread = threading.Thread(target=lambda: found.append(call(*args, **options)))
        thread.start()
        thread.join()
        return found[0]

    return called


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("threaded", [False, True])
def test_a_compiled_trunk_goes_backward_several_times(monkeypatch: pytest.MonkeyPatch, threaded: bool) -> None:
    """After steps that need its graph once, too: their backward passes decide what later ones find."""
    model, tasks, batch = built()
    expected = outcome(model, mtl.Step(model, tasks, balancer=mtl.balancers.MGDA(), passes="joint"), batch)
    model, tasks, batch = built(compiled="inductor")
    if threaded:
        monkeypatch.setattr(torch.autograd, "grad", elsewhere(torch.autograd.grad))
        monkeypatch.setattr(torch.autograd, "backward", elsewhere(torch.autograd.backward))
    mtl.Step(model, tasks).backward(batch)
    found = outcome(model, mtl.Step(model, tasks, balancer=mtl.balancers.MGDA(), passes="joint"), batch)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("balancer", ["Equal", "MGDA"])
def test_a_trunk_that_was_compiled_for_one_backward_is_refused(
    balancer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its second backward pass would take what the first one wrote into its memory for what was saved.

    Compiled anew, it must not be taken from Inductor's cache, which here has only the code for one backward pass.
    """
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model, tasks, batch = built()
    expected = outcome(
        model, mtl.Step(model, tasks, balancer=getattr(mtl.balancers, balancer)(), passes="joint"), batch
    )
    model, tasks, batch = built(compiled="inductor")
    model(batch)["t0"].sum().backward()
    step = mtl.Step(model, tasks, balancer=getattr(mtl.balancers, balancer)(), passes="joint")
    with pytest.raises(mtl.UserError, match=r"gradients can be taken only once.*torch.compiler.reset\(\)"):
        step.backward(batch, measure=balancer == "Equal")
    torch.compiler.reset()
    torch.testing.assert_close(outcome(model, step, batch), expected, rtol=1e-4, atol=1e-6)
