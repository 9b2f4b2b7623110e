"""Measures the peak memory of a step."""

import os
from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")


def peak_within(run: Callable[[], T], device: torch.device) -> tuple[T, int | None]:
    """Calls `run`; returns the result, and the peak in bytes of memory on the device beyond the memory used before.

    On a CPU, PyTorch's profiler counts the allocations; on a GPU, the caching allocator does. The peak is None if
    another profiler is active already, and for other devices.
    """
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = run()
        return result, torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu" or torch._C._autograd._profiler_enabled():
        return run(), None
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # silences the profiler's output on the terminal
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        result = run()
    events = profile.kineto_results.events() if profile.kineto_results else []
    alive = peak = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return result, peak
