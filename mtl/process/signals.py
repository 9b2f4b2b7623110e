"""Ctrl-C and SIGTERM, which end a run after the step at hand."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from mtl.errors import UserError, told

LOOKS = 0.3  # seconds from one look after another process to the next


class Ended(SystemExit):
    """A run that Ctrl-C or SIGTERM ended, in the way that it should."""


class Stopped(Exception):
    """Ctrl-C or SIGTERM came; the step was finished and the state saved.

    Attributes:
        signal: the number of the signal.
    """

    def __init__(self, signal: int) -> None:
        super().__init__(signal)
        self.signal = signal


@contextmanager
def no_exit() -> Iterator[None]:
    """Raises a UserError where code within calls sys.exit, which would pass for the end of a run."""
    try:
        yield
    except Ended:
        raise
    except SystemExit as error:
        raise UserError(f"something called sys.exit: {told(error)}") from error


class Stop:
    """Whether it was asked for.

    Attributes:
        signal: the number of the signal that did; 0 for none.
    """

    def __init__(self) -> None:
        self.signal = 0

    @contextmanager
    def listens(self) -> Iterator[None]:
        """Takes the first Ctrl-C or SIGTERM within for a wish to stop; the second one is Python's own.

        In a worker it is SIGTERM alone, and what comes after the first is ignored.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def stop(number: int, *_: Any) -> None:
            self.signal = number
            signal.signal(number, signal.SIG_IGN if _worker else before[number])

        numbers = (signal.SIGTERM,) if _worker else (signal.SIGINT, signal.SIGTERM)
        before: dict[int, Any] = {number: signal.signal(number, stop) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, signal.SIG_IGN if _worker and self.signal else handler)


@contextmanager
def handed_to(stop: Callable[[], bool], taken: list[int]) -> Iterator[None]:
    """Hands the first Ctrl-C or SIGTERM within to `stop`.

    Where that says that it isn't for it, the signal is Python's own, and so is the second.

    Args:
        stop: gives whether it took the signal.
        taken: is given the number of the one that it took.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, *_: Any) -> None:
        if not taken and stop():
            taken.append(number)
        else:
            signal.signal(number, before[number])
            signal.raise_signal(number)

    before: dict[int, Any] = {n: signal.signal(n, handle) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if taken:  # the process ends, and one more Ctrl-C would only disturb it in that
            signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextmanager
def held() -> Iterator[None]:
    """Holds Ctrl-C and SIGTERM back: some modules swallow them while they are imported, or abort."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    taken: list[int] = []
    before: dict[int, Any] = {
        n: signal.signal(n, lambda number, _: taken.append(number)) for n in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if taken:
        signal.raise_signal(taken[0])


class Worker:
    """A process that runs jobs for another one, which it doesn't outlive.

    Ctrl-C, which reaches both, is left to the other. A job is ended by SIGTERM, from wherever it comes; after the first
    one it isn't disturbed again.
    """

    def __init__(self) -> None:
        self._parent = os.getppid()
        self._asked: Callable[[], bool] | None = None  # of the job at hand
        self._told = False
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            time.sleep(LOOKS)
            asked = self._asked
            if asked is None:
                self._leave_if_alone()
            elif not self._told and (self._is_alone() or asked()):
                self._told = True
                os.kill(os.getpid(), signal.SIGTERM)

    def _is_alone(self) -> bool:
        return os.getppid() != self._parent

    def _leave_if_alone(self) -> None:
        if self._is_alone():
            os._exit(1)  # nobody waits for an answer, or has another job

    @contextmanager
    def job(self, asked: Callable[[], bool]) -> Iterator[None]:
        """Ends what is within when it was asked to, by `Stop`, or elsewhere by KeyboardInterrupt."""

        def leave(*_: Any) -> None:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            raise KeyboardInterrupt

        self._leave_if_alone()
        before = signal.signal(signal.SIGTERM, leave)
        self._told, self._asked = False, asked
        try:
            yield
        finally:
            self._asked = None
            # Where nobody handles it, it would end this process, and with it others that are saving.
            signal.signal(signal.SIGTERM, signal.SIG_IGN if before == signal.SIG_DFL else before)
            self._leave_if_alone()


_worker: Worker | None = None


@contextmanager
def working(asked: Callable[[], bool]) -> Iterator[None]:
    """A job for the parent of this process, which ends when `asked` says so or the parent is gone."""
    global _worker
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _worker = _worker or Worker()
    with _worker.job(asked):
        yield
