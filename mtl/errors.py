"""The one exception that is meant for the person at the keyboard."""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from os.path import basename
from traceback import extract_tb

from mtl.text import plain

FOREIGN = (Exception, SystemExit)  # what others' code may end in: a call of sys.exit in it is no success


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
    frames = extract_tb(error.__traceback__)
    own = [frame for frame in frames if "site-packages" not in frame.filename and "/mtl/" not in frame.filename]
    place = f" ({basename(own[-1].filename)}, line {own[-1].lineno})" if own else ""
    text = first_line(error)
    return f"{type(error).__name__}: {text}{place}" if text != type(error).__name__ else f"{text}{place}"


def suggest(word: str, possible: Iterable[str]) -> str:
    """The tail of a message about an unknown word: the nearest known one, if any, and all that is possible."""
    known = sorted(possible)
    near = get_close_matches(word, known, n=1)
    hint = f"; did you mean '{near[0]}'?" if near else ""
    return f"{hint} (possible: {', '.join(known) or 'nothing'})"
