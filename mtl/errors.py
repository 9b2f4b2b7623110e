"""The one exception that is meant for the person at the keyboard."""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """A mistake that the user can mend. Its message says what is wrong, where, and what is possible instead."""


def first_line(error: BaseException) -> str:
    """The first line of an exception's message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def suggest(word: str, possible: Iterable[str]) -> str:
    """The tail of a message about an unknown word: the nearest known one, if any, and all that is possible."""
    known = sorted(possible)
    near = get_close_matches(word, known, n=1)
    hint = f"; did you mean '{near[0]}'?" if near else ""
    return f"{hint} (possible: {', '.join(known) or 'nothing'})"
