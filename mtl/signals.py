"""Ctrl-C and SIGTERM, which end a run after the step at hand."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
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


@cache
def end_with(parent: int) -> None:
    """Sends SIGTERM to this process when its parent, of that number, ends: nobody would wait for it any more."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(LOOKS)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
