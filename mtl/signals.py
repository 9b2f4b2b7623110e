"""Ctrl-C and SIGTERM, which end a run after the step at hand."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

LOOKS = 0.3  # seconds from one look after another process to the next


class Stop:
    """Whether it was asked for.

    Attributes:
        signal: the number of the signal that did; 0 for none.
    """

    def __init__(self) -> None:
        self.signal = 0

    @contextmanager
    def listens(self) -> Iterator[None]:
        """Takes the first Ctrl-C or SIGTERM within for a wish to stop; the second one is Python's own."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def stop(number: int, *_: Any) -> None:
            self.signal = number
            signal.signal(number, before[number])

        before: dict[int, Any] = {n: signal.signal(n, stop) for n in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@contextmanager
def handed_to(stop: Callable[[], bool]) -> Iterator[list[int]]:
    """Hands the first Ctrl-C or SIGTERM within to `stop`.

    Where that says that it isn't for it, the signal is Python's own, and so is the second.

    Yields:
        The signals' numbers that it took.
    """
    taken: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield taken
        return

    def handle(number: int, *_: Any) -> None:
        if not taken and stop():
            taken.append(number)
        else:
            signal.signal(number, before[number])
            signal.raise_signal(number)

    before: dict[int, Any] = {n: signal.signal(n, handle) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield taken
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def working_for(parent: int, asked: Callable[[], bool]) -> Iterator[None]:
    """Ends what is within by SIGTERM when the parent, the process of that number, asks for it or is gone.

    Outside of `Stop.listens` SIGTERM raises SystemExit. Ctrl-C, which reaches both, is left to the parent.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    over = threading.Event()

    def watch() -> None:
        while not over.wait(LOOKS):
            if os.getppid() != parent or asked():
                os.kill(os.getpid(), signal.SIGTERM)
                return

    def leave(number: int, *_: Any) -> None:
        sys.exit(128 + number)

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # from now on: this process may wait for another job
    before = signal.signal(signal.SIGTERM, leave)
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        over.set()
        watcher.join()
        signal.signal(signal.SIGTERM, before)
        if os.getppid() != parent:
            os._exit(1)  # nobody waits for an answer, or has another job
