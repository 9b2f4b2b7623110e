"""Handles Ctrl-C and SIGTERM, which end a run after the current step."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from mtl.errors import UserError, describe_error

CHECK_INTERVAL = 0.3  # seconds between two checks of the parent process


class Ended(SystemExit):
    """Raised to exit after Ctrl-C or SIGTERM has ended a run as intended."""


class Stopped(Exception):
    """Raised after Ctrl-C or SIGTERM, when the step is finished and the state is saved.

    Attributes:
        signal: The number of the signal.
    """

    def __init__(self, signal: int) -> None:
        super().__init__(signal)
        self.signal = signal


@contextmanager
def no_exit() -> Iterator[None]:
    """Raises a UserError if the block calls sys.exit, which would otherwise be mistaken for the end of a run."""
    try:
        yield
    except Ended:
        raise
    except SystemExit as error:
        raise UserError(f"something called sys.exit: {describe_error(error)}") from error


class Stop:
    """Records a request to stop.

    Attributes:
        signal: The number of the signal that requested the stop; 0 if there was none.
    """

    def __init__(self) -> None:
        self.signal = 0

    @contextmanager
    def listens(self) -> Iterator[None]:
        """Treats the first Ctrl-C or SIGTERM within the block as a request to stop; Python handles the second one.

        In a worker process only SIGTERM is handled, and further signals are ignored. They are also ignored in processes
        that torchrun started, since torchrun passes a Ctrl-C on that they got already.
        """
        once = _worker or "TORCHELASTIC_RUN_ID" in os.environ
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def stop(number: int, *_: Any) -> None:
            self.signal = number
            for each in numbers if once else (number,):
                signal.signal(each, signal.SIG_IGN if once else before[each])

        numbers = (signal.SIGTERM,) if _worker else (signal.SIGINT, signal.SIGTERM)
        before: dict[int, Any] = {number: signal.signal(number, stop) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, signal.SIG_IGN if once and self.signal else handler)


@contextmanager
def handed_to(stop: Callable[[], bool], taken: list[int]) -> Iterator[None]:
    """Passes the first Ctrl-C or SIGTERM within the block to `stop`.

    If `stop` returns False, Python handles the signal; Python also handles the second signal.

    Args:
        stop: A function that returns whether it accepted the signal.
        taken: A list to which the number of the accepted signal is appended.
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
        if taken:  # the process is exiting; ignore a further Ctrl-C
            signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextmanager
def held() -> Iterator[None]:
    """Defers Ctrl-C and SIGTERM to the end of the block: some modules swallow them or abort during import."""
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
    """A process that runs jobs for a parent process and exits with it.

    Ctrl-C reaches both processes and is left to the parent. SIGTERM, from any source, ends a job; further signals after
    the first one are ignored.
    """

    def __init__(self) -> None:
        self._parent = os.getppid()
        self._asked: Callable[[], bool] | None = None  # the stop request of the current job
        self._signalled = False
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            time.sleep(CHECK_INTERVAL)
            asked = self._asked
            if asked is None:
                self._leave_if_alone()
            elif not self._signalled and (self._is_alone() or asked()):
                self._signalled = True
                os.kill(os.getpid(), signal.SIGTERM)

    def _is_alone(self) -> bool:
        return os.getppid() != self._parent

    def _leave_if_alone(self) -> None:
        if self._is_alone():
            os._exit(1)  # the parent is gone

    @contextmanager
    def job(self, asked: Callable[[], bool]) -> Iterator[None]:
        """Ends the block when `asked` returns True, through `Stop` if it listens and by KeyboardInterrupt if not."""

        def leave(*_: Any) -> None:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            raise KeyboardInterrupt

        self._leave_if_alone()
        before = signal.signal(signal.SIGTERM, leave)
        self._signalled, self._asked = False, asked
        try:
            yield
        finally:
            self._asked = None
            # With the default handler, SIGTERM would end this process while other jobs in it may be saving.
            signal.signal(signal.SIGTERM, signal.SIG_IGN if before == signal.SIG_DFL else before)
            self._leave_if_alone()


_worker: Worker | None = None


@contextmanager
def working(asked: Callable[[], bool]) -> Iterator[None]:
    """Runs the block as a job for the parent process; the job ends when `asked` returns True or the parent exits."""
    global _worker
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _worker = _worker or Worker()
    with _worker.job(asked):
        yield
