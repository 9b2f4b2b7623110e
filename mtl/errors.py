"""Exceptions with messages for users, and helpers for error messages."""

import re
import site
import sysconfig
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from functools import cache
from os.path import abspath, basename, dirname, normcase, realpath, sep
from traceback import extract_tb

from mtl.text import plain

FOREIGN = (Exception, SystemExit)  # what foreign code may raise, including calls of sys.exit
INSTALLED = re.compile(r"[/\\](python3[^/\\]*|lib)[/\\](site|dist)-packages[/\\]", re.I)  # of any Python installation


class UserError(ValueError):
    """A mistake that the user can correct. The message says what is wrong, where, and what is possible instead.

    Args:
        message: The message, which may quote any text; control characters are escaped.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(plain(str(message), keep="\n\t"))


class NotFinite(UserError):
    """Raised if a loss or gradient isn't finite.

    Args:
        reasons: A description of the problem by task name, such as `its loss is nan`.
        place: The place, which is appended to the descriptions.

    Attributes:
        reasons: The argument `reasons`.
        summary: The descriptions and the place, without advice.
    """

    def __init__(self, reasons: Mapping[str, str], place: str = "") -> None:
        self.reasons = dict(reasons)
        self.summary = "; ".join(f"task '{name}': {what}" for name, what in reasons.items()) + place
        super().__init__(
            f"{self.summary}. Try a smaller optimizer.lr, trainer.clip_norm=1.0, on_nonfinite=skip_step or skip_task; "
            "or search for such values in the data, and for roots and divisions by zero"
        )


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether the memory of the device or of the machine is exhausted."""
    return type(error).__name__ in ("OutOfMemoryError", "MemoryError") or "can't allocate memory" in text_of(error)


def dead_worker(error: BaseException | None) -> str | None:
    """Returns torch's message about a dead data worker, which torch may raise anywhere, or None for other errors."""
    while error is not None:
        if isinstance(error, RuntimeError) and first_line(error).startswith("DataLoader worker (pid"):
            return first_line(error)
        error = error.__cause__ or error.__context__
    return None


def is_unrelated(error: BaseException) -> bool:
    """Returns whether the error is unrelated to the code that raised it."""
    return is_out_of_memory(error) or dead_worker(error) is not None


def is_of_backward(error: BaseException) -> bool:
    """Returns whether autograd raised the error, because a loss or module can't be differentiated."""
    frames = extract_tb(error.__traceback__)
    return not isinstance(error, UserError) and any(frame.name == "_engine_run_backward" for frame in frames)


def text_of(error: BaseException) -> str:
    """Returns an exception's message, or a note that it has none; the exception's class may be faulty."""
    try:
        return str(error)
    except Exception as mistake:
        return f"its message can't be shown, since its __str__ raises {type(mistake).__name__}"


def first_line(error: BaseException) -> str:
    """Returns the first line of an exception's message."""
    return (text_of(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def describe_error(error: BaseException) -> str:
    """Describes an exception of foreign code in one line: type, message, and the place in the user's code."""
    frames = [frame for frame in extract_tb(error.__traceback__) if is_users(frame.filename)]
    place = f" ({basename(frames[-1].filename)}, line {frames[-1].lineno})" if frames else ""
    text = first_line(error)
    return f"{type(error).__name__}: {text}{place}" if text != type(error).__name__ else f"{text}{place}"


def is_users(filename: str) -> bool:
    """Returns whether a code file is the user's, and not part of mtl, Python or an installed package."""
    path = normcase(realpath(filename))
    if filename.startswith("<frozen ") or INSTALLED.search(path):
        return False
    return not any(path.startswith(folder + sep) for folder in _others())


@cache
def _others() -> list[str]:
    """Returns the folders of code that isn't the user's, with symbolic links resolved."""
    paths = sysconfig.get_paths()
    installed = [paths[kind] for kind in ("stdlib", "platstdlib", "purelib", "platlib")]
    folders = [dirname(abspath(__file__)), *installed, *site.getsitepackages(), site.getusersitepackages()]
    return [normcase(realpath(folder)) for folder in folders]


def suggest(word: str, possible: Iterable[str]) -> str:
    """Returns the end of a message about an unknown word: the most similar known word, if any, and all known words."""
    names = sorted(possible)
    near = get_close_matches(word, [each for each in names if each != word], n=1)
    hint = f"; did you mean '{near[0]}'?" if near else ""
    return f"{hint} (possible: {', '.join(names) or 'nothing'})"
