"""Combines all loggers of a run."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from mtl.errors import UserError, first_line
from mtl.loggers.logger import Logger, Refusal
from mtl.process.seeding import preserved_generators
from mtl.process.signals import Ended


class Loggers:
    """Calls all loggers of a run. If a logger can't write, the error is reported, and the training goes on.

    Random numbers that a logger draws don't affect the training.

    Args:
        loggers: The loggers, each of a different class, because their states are saved by class name.
        report: A function that receives a line about what couldn't be logged.

    Raises:
        UserError: If an item of `loggers` isn't a logger.
    """

    def __init__(self, loggers: Sequence[Logger] = (), report: Callable[[str], None] = print) -> None:
        for logger in loggers:
            if not isinstance(logger, Logger):
                name = type(logger).__name__
                raise UserError(f"logger: {name} is not a subclass of mtl.loggers.Logger")
        self._loggers = loggers
        self.report = report
        self._failed: set[int] = set()

    def begin(self, config: str, options: Mapping[str, Any], swept: Sequence[str], finals: Sequence[str]) -> None:
        """Logs the run's description: config as text, options, names of swept options, and tags of results."""
        self._call("begin", config, options, swept, finals)

    def log(self, step: int, epoch: int, scalars: Mapping[str, float]) -> None:
        """Logs scalars by tag."""
        self._call("log", step, epoch, scalars)

    def takes(self, kind: str) -> bool:
        """Returns whether any logger logs pictures or histograms."""
        return any(getattr(type(logger), kind) is not getattr(Logger, kind) for logger in self._loggers)

    def show(self, kind: str, tag: str, step: int, value: Any) -> None:
        """Logs a `picture`, a uint8 array (H, W, 3), or the values of a `histogram`."""
        self._call(kind, tag, step, value)

    def end(self) -> None:
        """Called when the run has finished."""
        self._call("end")

    def fail(self) -> None:
        """Called when the run has failed."""
        self._call("fail")

    def __enter__(self) -> "Loggers":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is not None and not isinstance(error, (Ended, KeyboardInterrupt)):
            self.fail()
        self.close()

    def close(self) -> None:
        """Closes all loggers in reverse order, even if some of them fail."""
        with ExitStack() as stack:
            for logger in self._loggers:
                stack.callback(self._call_one, logger, "close")

    def state_dict(self) -> dict[str, Any]:
        """Flushes the loggers, and returns the state of each logger by class name."""
        self._call("flush")
        return {name: state for name, state in self._call("state_dict").items() if state is not None}

    def load_state_dict(self, states: Mapping[str, Any]) -> None:
        """Loads the states that `state_dict` returned."""
        for logger in self._loggers:
            if type(logger).__name__ in states:
                with preserved_generators():
                    logger.load_state_dict(states[type(logger).__name__])

    def _call(self, method: str, *arguments: Any) -> dict[str, Any]:
        return {type(logger).__name__: self._call_one(logger, method, *arguments) for logger in self._loggers}

    def _call_one(self, logger: Logger, method: str, *arguments: Any) -> Any:
        try:
            with preserved_generators():
                return getattr(logger, method)(*arguments)
        except Refusal as refusal:
            self.report(f"warning  {type(logger).__name__} can't log {first_line(refusal)}")
        except OSError as error:
            if id(logger) not in self._failed or method == "close":
                consequence = "; some values are lost" if method == "close" else ". Training goes on; it will try again"
                self.report(f"error    {type(logger).__name__} can't write: {first_line(error)}{consequence}")
            self._failed.add(id(logger))
        return None
