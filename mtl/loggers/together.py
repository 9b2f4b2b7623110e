"""What loggers are, and all of a run's at once."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Protocol

from mtl.errors import first_line
from mtl.process.seeding import kept_random_state
from mtl.process.signals import Ended


class Refusal(Exception):
    """A logger's store doesn't take some of what it was given, and never will; the rest is there."""


class Logger(Protocol):
    """What a run's figures are given to.

    Some have more: `picture(tag, step, picture)` and `histogram(tag, step, values)`, see `Loggers.show`; `state()` and
    `resume(state)`, so that a run that goes on logs nothing twice; `flush()`, which writes what was held back, before
    the state is taken; `begin(config, options, swept, finals)`, what the run is, and `end()` or `fail()`, that it is
    finished or has failed.
    """

    def log(self, step: int, epoch: int, scalars: Mapping[str, float]) -> None:
        """Takes scalars by tag, as of this optimizer step, in this epoch (both from 1)."""

    def close(self) -> None:
        """Writes out what was held back."""


class Loggers:
    """Gives each of the loggers what it takes; one that can't write is told of, and training goes on.

    What a logger draws from the random generators changes no draw of the training.

    Args:
        loggers: each of a class of its own.
        tell: is given the line.
    """

    def __init__(self, loggers: Sequence[Logger] = (), tell: Callable[[str], None] = print) -> None:
        self._loggers = loggers
        self._tell = tell
        self._told: set[int] = set()  # loggers that have failed

    def begin(self, config: str, options: Mapping[str, Any], swept: Sequence[str], finals: Sequence[str]) -> None:
        """What the run is: its config as text, its options, those that are swept over, and the tags of its results."""
        self._call("begin", config, options, swept, finals)

    def log(self, step: int, epoch: int, scalars: Mapping[str, float]) -> None:
        """Scalars by tag."""
        self._call("log", step, epoch, scalars)

    def takes(self, kind: str) -> bool:
        """Whether any takes pictures or histograms."""
        return any(hasattr(logger, kind) for logger in self._loggers)

    def show(self, kind: str, tag: str, step: int, value: Any) -> None:
        """A `picture` (H, W, 3), uint8, or the values of a `histogram`."""
        self._call(kind, tag, step, value)

    def end(self) -> None:
        """The run is finished."""
        self._call("end")

    def fail(self) -> None:
        """The run failed."""
        self._call("fail")

    def __enter__(self) -> "Loggers":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is not None and not isinstance(error, (Ended, KeyboardInterrupt)):
            self.fail()
        self.close()

    def close(self) -> None:
        """Closes all of them, whatever happens to one; the last one first."""
        with ExitStack() as open_ones:
            for logger in self._loggers:
                open_ones.callback(self._give, logger, "close")

    def state(self) -> dict[str, Any]:
        """How far each has come, by the name of its class, when it has written what it held back."""
        self._call("flush")
        return {name: state for name, state in self._call("state").items() if state is not None}

    def resume(self, states: Mapping[str, Any]) -> None:
        """The counterpart of `state`."""
        for logger in self._loggers:
            if type(logger).__name__ in states:
                with kept_random_state():
                    logger.resume(states[type(logger).__name__])  # type: ignore[attr-defined]

    def _call(self, method: str, *arguments: Any) -> dict[str, Any]:
        takers = [logger for logger in self._loggers if hasattr(logger, method)]
        return {type(logger).__name__: self._give(logger, method, *arguments) for logger in takers}

    def _give(self, logger: Logger, method: str, *arguments: Any) -> Any:
        try:
            with kept_random_state():
                return getattr(logger, method)(*arguments)
        except Refusal as refusal:
            self._tell(f"warning  {type(logger).__name__} leaves out {first_line(refusal)}")
        except OSError as error:
            if id(logger) not in self._told or method == "close":
                more = ", and some is lost" if method == "close" else ". Training goes on, and it is tried again"
                self._tell(f"error    {type(logger).__name__} can't write: {first_line(error)}{more}")
            self._told.add(id(logger))
        return None
