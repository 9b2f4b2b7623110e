"""The one exception that is meant for the person at the keyboard."""

import re
import site
import sysconfig
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from functools import cache
from os.path import abspath, basename, dirname, normcase, realpath, sep
from traceback import extract_tb

from mtl.text import plain

FOREIGN = (Exception, SystemExit)  # what others' code may end in: a call of sys.exit in it is no success
INSTALLED = re.compile(r"[/\\](python3[^/\\]*|lib)[/\\](site|dist)-packages[/\\]", re.I)  # by whichever Python


class UserError(ValueError):
    """A mistake that the user can mend. Its message says what is wrong, where, and what is possible instead.

    Args:
        message: it may quote anything; what a terminal would obey in it is written out.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(plain(str(message), keep="\n\t"))


class NotFinite(UserError):
    """A loss or a gradient that isn't finite.

    Args:
        found: from the task's name to what was found, such as `its loss is nan`.
        place: where, to be added to that.

    Attributes:
        found: as given.
        told: what was found where, without advice.
    """

    def __init__(self, found: Mapping[str, str], place: str = "") -> None:
        self.found = dict(found)
        self.told = "; ".join(f"task '{name}': {what}" for name, what in found.items()) + place
        super().__init__(
            f"{self.told}. Try a smaller optimizer.lr, trainer.clip_norm=1.0, on_nonfinite=skip_step or skip_task; "
            "or look for such values in the data, and for roots and divisions by zero"
        )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device's or the machine's memory ran out."""
    return type(error).__name__ in ("OutOfMemoryError", "MemoryError") or "can't allocate memory" in text_of(error)


def dead_worker(error: BaseException | None) -> str | None:
    """What torch says of a process that loads data and has died, which it says wherever the training happens to be."""
    while error is not None:
        if isinstance(error, RuntimeError) and first_line(error).startswith("DataLoader worker (pid"):
            return first_line(error)
        error = error.__cause__ or error.__context__
    return None


def is_elsewhere(error: BaseException) -> bool:
    """Whether it has nothing to do with the code that it comes out of."""
    return is_out_of_memory(error) or dead_worker(error) is not None


def is_of_backward(error: BaseException) -> bool:
    """Whether autograd raised it: a loss or a module has done what can't be differentiated."""
    frames = extract_tb(error.__traceback__)
    return not isinstance(error, UserError) and any(frame.name == "_engine_run_backward" for frame in frames)


def text_of(error: BaseException) -> str:
    """An exception's message, or that it has none that can be shown: its class may be anybody's."""
    try:
        return str(error)
    except Exception as mistake:
        return f"its message can't be shown, since its __str__ raises {type(mistake).__name__}"


def first_line(error: BaseException) -> str:
    """The first line of an exception's message."""
    return (text_of(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def told(error: BaseException) -> str:
    """An exception of somebody's code in one line: its type, its message, and the place in the code."""
    own = [frame for frame in extract_tb(error.__traceback__) if is_users(frame.filename)]
    place = f" ({basename(own[-1].filename)}, line {own[-1].lineno})" if own else ""
    text = first_line(error)
    return f"{type(error).__name__}: {text}{place}" if text != type(error).__name__ else f"{text}{place}"


def is_users(filename: str) -> bool:
    """Whether a file of code is the user's own: none of mtl's, of Python's, or of an installed package."""
    path = normcase(realpath(filename))
    if filename.startswith("<frozen ") or INSTALLED.search(path):
        return False
    return not any(path.startswith(folder + sep) for folder in _others())


@cache
def _others() -> list[str]:
    """The folders of code that isn't the user's, where they really are."""
    paths = sysconfig.get_paths()
    installed = [paths[kind] for kind in ("stdlib", "platstdlib", "purelib", "platlib")]
    folders = [dirname(abspath(__file__)), *installed, *site.getsitepackages(), site.getusersitepackages()]
    return [normcase(realpath(folder)) for folder in folders]


def suggest(word: str, possible: Iterable[str]) -> str:
    """The tail of a message about an unknown word: the nearest known one, if any, and all that is possible."""
    known = sorted(possible)
    near = get_close_matches(word, [each for each in known if each != word], n=1)
    hint = f"; did you mean '{near[0]}'?" if near else ""
    return f"{hint} (possible: {', '.join(known) or 'nothing'})"
