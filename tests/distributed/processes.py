"""Groups of processes that live through the tests, since starting one takes seconds."""

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


class Processes:
    """Processes that form a group with gloo, and call functions together.

    Args:
        count: The number of processes.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        context = multiprocessing.get_context("spawn")
        folder = tempfile.mkdtemp()
        self._pipes = []
        for rank in range(count):
            ours, theirs = context.Pipe()
            path = os.path.join(folder, "store")
            context.Process(target=_serve, args=(rank, count, path, theirs), daemon=True).start()
            self._pipes.append(ours)

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Calls a function of a module in all processes, and returns the results by rank.

        An exception in a process is raised here as a RuntimeError with its text.
        """
        for pipe in self._pipes:
            pipe.send((function, arguments))
        answers = []
        for rank, pipe in enumerate(self._pipes):
            assert pipe.poll(120), f"process {rank} does not answer"
            answers.append(pipe.recv())
        for is_right, value in answers:
            if not is_right:
                raise RuntimeError(value)
        return [value for _, value in answers]


@cache
def processes(count: int) -> Processes:
    """Returns the group of so many processes, which is started at first use."""
    return Processes(count)


def _serve(rank: int, count: int, store: str, pipe: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=Path(store).as_uri(), rank=rank, world_size=count)
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((True, function(*arguments)))
        except Exception:
            pipe.send((False, traceback.format_exc()))
