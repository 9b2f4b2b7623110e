"""Counts the calls in one training step, and the calls from one file of `mtl` to another.

    python scripts/count_calls.py

The model is small, and the step is the fourth, in which nothing is set up any more. A crossing is a call of a function
whose nearest caller in `mtl` is in another file; functions of torch between the two are ignored.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn

import mtl

PACKAGE = str(Path(mtl.__file__).parent)
SETTINGS: dict[str, dict[str, Any]] = {
    "equal": {},
    "sequential": {"passes": "sequential"},
    "mgda": {"balancer": "MGDA"},
    "mgda, 4 micro-batches": {"balancer": "MGDA", "num_micro_batches": 4},
}


def make_step(balancer: str = "Equal", **settings: Any) -> Callable[[], Any]:
    """Returns a function that runs a step of two tasks on one batch."""
    torch.manual_seed(0)
    tasks = [
        mtl.Task(name, head=nn.Linear(20, classes), loss=nn.CrossEntropyLoss(), target=name)
        for name, classes in (("digit", 10), ("parity", 2))
    ]
    model = mtl.MultiTaskModel(nn.Sequential(nn.Linear(8, 20), nn.ReLU()), tasks, inputs=["x"])
    step = mtl.Step(
        model, tasks, torch.optim.AdamW(model.parameters()), balancer=getattr(mtl.balancers, balancer)(), **settings
    )
    batch = {"x": torch.randn(64, 8), "digit": torch.randint(10, (64,)), "parity": torch.randint(2, (64,))}
    return lambda: step(batch)


def count(call: Callable[[], Any]) -> tuple[int, int, int]:
    """Returns the numbers of calls of functions in `mtl`, of crossings and of files in one call."""
    calls = crossings = 0
    files = set()

    def watch(frame: FrameType, event: str, _: object) -> None:
        nonlocal calls, crossings
        file = frame.f_code.co_filename
        if event != "call" or not file.startswith(PACKAGE):
            return
        caller = frame.f_back
        while caller is not None and not caller.f_code.co_filename.startswith(PACKAGE):
            caller = caller.f_back
        calls += 1
        crossings += caller is not None and caller.f_code.co_filename != file
        files.add(file)

    sys.setprofile(watch)
    try:
        call()
    finally:
        sys.setprofile(None)
    return calls, crossings, len(files)


def main() -> None:
    """Prints a table of the counts."""
    print(f"{'':24}{'calls':>8}{'crossings':>12}{'files':>8}")
    for name, settings in SETTINGS.items():
        step = make_step(**settings)
        for _ in range(3):
            step()
        print(f"{name:24}" + "{:8}{:12}{:8}".format(*count(step)))


if __name__ == "__main__":
    main()
