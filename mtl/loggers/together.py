"""All loggers of a run."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from mtl.errors import UserError, first_line
from mtl.loggers.logger import Logger, Refusal
from mtl.process.seeding import kept_random_state
from mtl.process.signals import Ended


class Loggers:
    """Calls each of a run's loggers. One that can't write is reported, and the training goes on.

    What a logger draws from the random generators changes no draw of the training.

    Args:
        loggers: each of a class of its own, since their states are saved by the names of their classes.
        report: is given a line for what couldn't be logged.

    Raises:
        UserError: for what is no logger.
    """

    def __init__(self, loggers: Sequence[Logger] = (), report: Callable[[str], None] = print) -> None:
        for logger in loggers:
            if not isinstance(logger, Logger):
                name = type(logger).__name__
                raise UserError(f"logger: {name} is not a subclass of mtl.loggers.Logger, whose methods do nothing")
        self._loggers = loggers
        self.report = report
        self._failed: set[int] = set()

    def begin(self, config: str, options: Mapping[str, Any], swept: Sequence[str], finals: Sequence[str]) -> None:
        """What the run is: its config as text, its options, those that are swept over, and the tags of its results."""
        self._call("begin", config, options, swept, finals)

    def log(self, step: int, epoch: int, scalars: Mapping[str, float]) -> None:
        """Scalars by tag."""
        self._call("log", step, epoch, scalars)

    def takes(self, kind: str) -> bool:
        """Whether any takes pictures or histograms."""
        return any(getattr(type(logger), kind) is not getattr(Logger, kind) for logger in self._loggers)

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

    def state_dict(self) -> dict[str, Any]:
        """How far each has come, by the name of its class, when it has written what it held back."""
        self._call("flush")
        return {name: state for name, state in self._call("state_dict").items() if state is not None}

    def load_state_dict(self, states: Mapping[str, Any]) -> None:
        """The counterpart of `state_dict`."""
        for logger in self._loggers:
            if type(logger).__name__ in states:
                with kept_random_state():
                    logger.load_state_dict(states[type(logger).__name__])

    def _call(self, method: str, *arguments: Any) -> dict[str, Any]:
        return {type(logger).__name__: self._give(logger, method, *arguments) for logger in self._loggers}

    def _give(self, logger: Logger, method: str, *arguments: Any) -> Any:
        try:
            with kept_random_state():
                return getattr(logger, method)(*arguments)
        except Refusal as refusal:
            self.report(f"warning  {type(logger).__name__} leaves out {first_line(refusal)}")
        except OSError as error:
            if id(logger) not in self._failed or method == "close":
                more = ", and some is lost" if method == "close" else ". Training goes on, and it is tried again"
                self.report(f"error    {type(logger).__name__} can't write: {first_line(error)}{more}")
            self._failed.add(id(logger))
        return None
