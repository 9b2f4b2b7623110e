"""Errors of loading: those that arise in the worker processes of a DataLoader, and positions in other data."""

from typing import Any

from mtl.errors import UserError, describe_error, text_of


def ended_worker(batches: Any) -> RuntimeError | None:
    """Returns an error for a worker process that ended unexpectedly, or None; torch doesn't always detect it."""
    for worker in getattr(batches, "_workers", ()):
        worker.join(0.5)
        if not worker.is_alive():
            how = f"killed by signal {-worker.exitcode}" if worker.exitcode < 0 else f"exit code {worker.exitcode}"
            return RuntimeError(f"DataLoader worker (pid {worker.pid}) ended: {how}")
    return None


def in_process(error: BaseException) -> str:
    """Describes an error from this process, or from a worker process, which reports errors as formatted tracebacks."""
    text = text_of(error).strip()
    if text.startswith("Caught "):
        message = text.rpartition(f"\n{UserError.__module__}.{UserError.__qualname__}: ")[2]
        return message if message != text else text.splitlines()[-1]
    return text if isinstance(error, UserError) else describe_error(error)


def other_data(saved: Any, ours: Any) -> UserError:
    """Returns an error for a saved position that isn't one in these data."""
    return UserError(f"the training data aren't those of the run, whose position is {saved}, not {ours}")
