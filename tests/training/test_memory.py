"""The peak memory of a step, against tensors counted by hand."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mtl.process.memory import peak_within

CPU = torch.device("cpu")
MB = 2**20


def test_what_is_alive_at_once() -> None:
    def run() -> torch.Tensor:
        a = torch.ones(MB // 4)  # 1 MB
        b = torch.ones(MB // 2)  # 2 MB: 3 alive
        del a
        c = torch.ones(MB // 4)  # 3 alive
        del b, c
        return torch.ones(MB // 2)

    result, peak = peak_within(run, CPU)
    assert result.shape == (MB // 2,)
    assert peak is not None
    assert 3 * MB <= peak < 3 * MB + 4096


def test_a_linear_layers_step() -> None:
    """Forward: the output, 64 kB; backward: the gradient at it and that of the weight, 4 MB."""
    layer = torch.nn.Linear(1024, 1024, bias=False)
    x = torch.randn(16, 1024)
    _, peak = peak_within(lambda: layer(x).sum().backward(), CPU)
    assert peak is not None
    assert 4 * MB + 65536 <= peak <= 4 * MB + 4 * 65536


def test_a_profiler_that_is_at_work_is_left_alone() -> None:
    with torch.profiler.profile() as outer:
        result, peak = peak_within(lambda: torch.ones(3), CPU)
    assert peak is None
    assert result.sum() == 3
    assert any(event.key == "aten::ones" for event in outer.key_averages())


def test_events_count_in_the_order_of_their_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """5 bytes come, go, and 3 come, as told by a profiler that lists one thread after the other."""

    class Profile:
        def __init__(self, **_: Any) -> None:
            told = [(1, "[memory]", 5), (3, "[memory]", 3), (2, "[memory]", -5), (1, "aten::ones", 7)]
            events = [
                SimpleNamespace(start_ns=lambda t=t: t, name=lambda n=n: n, nbytes=lambda b=b: b) for t, n, b in told
            ]
            self.kineto_results = SimpleNamespace(events=lambda: events)

        def __enter__(self) -> "Profile":
            return self

        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr(torch.autograd.profiler, "profile", Profile)
    assert peak_within(lambda: "result", CPU) == ("result", 5)
