"""The peak of a step's memory against tensors counted by hand."""

import torch

from mtl.memory import peak_within

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
