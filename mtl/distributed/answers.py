"""Finds out which processes of a training don't answer, and where in the code they are."""

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from types import FrameType

import torch
from torch._C._distributed_c10d import Store

from mtl.errors import FOREIGN, is_users

INTERVAL = 1.0  # seconds between two looks at the store
TORCH = os.path.dirname(torch.__file__)
WAITING = (os.path.dirname(__file__), os.path.join(TORCH, "distributed"))  # code that waits for other processes


@contextmanager
def answering(store: Store, rank: int) -> Iterator[None]:
    """Answers within the block, in a thread, when another process asks where this one is."""
    ended = threading.Event()

    def watch() -> None:
        with suppress(*FOREIGN):  # the store is gone if its process has ended
            while not ended.wait(INTERVAL):
                if store.check(["asked"]):
                    store.set(f"answer {rank}", _place(sys._current_frames().get(main)))
                    return

    main = threading.get_ident()
    thread = threading.Thread(target=watch, name="answers", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(INTERVAL)


def reason(store: Store, rank: int, count: int, within: timedelta, *, late: bool, when: str) -> str:
    """Returns why the processes can't continue, after this one has waited for another one in vain.

    All processes that ask return the same text: the message of a process that failed or, if there is none, which
    processes haven't answered.

    Args:
        store: The store of the training.
        rank: The rank of this process.
        count: The number of processes.
        within: The time for the others to answer.
        late: Whether the time of the wait is over; otherwise, a connection was closed.
        when: The step, for the message; empty, or beginning with a space.
    """
    store.set(f"answer {rank}", "")  # now, since the store is busy while this process waits
    store.set("asked", "")
    if late:
        store.set("late", "")  # gloo then closes the connections, which the others notice
    with suppress(*FOREIGN):
        store.wait(["error"], within)
        return str(store.get("error").decode())
    answers = {n: store.get(f"answer {n}").decode() for n in range(count) if store.check([f"answer {n}"])}
    return report(store, _described(answers, count, late=store.check(["late"]), when=when))


def report(store: Store, text: str) -> str:
    """Reports why the training ends; returns what another process has reported if it was the first."""
    if store.add("errors", 1) == 1:
        store.set("error", text)
    return str(store.get("error").decode())


def _described(answers: dict[int, str], count: int, *, late: bool, when: str) -> str:
    silent = [rank for rank in range(count) if rank not in answers]
    busy = {rank: place for rank, place in answers.items() if place}
    if silent and not late:
        return f"{_named(silent)} ended{when} without a message; it may have been killed"
    if silent:
        return f"{_named(silent)} does not answer{when}"
    if busy:
        where = ", ".join(dict.fromkeys(busy.values()))
        return f"{_named(list(busy))} does not answer{when}; it is at {where}"
    if late:
        return (
            f"the processes wait for each other{when}. Do callbacks, losses or metrics call torch.distributed in some "
            "of the processes only?"
        )
    return f"the connection between the processes broke{when}"


def _named(ranks: list[int]) -> str:
    return f"the process of rank {', '.join(map(str, ranks))}"


def _place(frame: FrameType | None) -> str:
    """Returns the line that a thread executes, the user's if possible; an empty text if it waits for others."""
    frames = []
    while frame is not None:
        frames.append((frame.f_code.co_filename, frame.f_lineno))
        frame = frame.f_back
    own = next((each for each in frames if not each[0].startswith(TORCH) or each[0].startswith(WAITING)), None)
    if own is None or own[0].startswith(WAITING):
        return ""
    name, line = next((each for each in frames if is_users(each[0])), own)
    return f"{os.path.basename(name)}, line {line}"
