"""Values that were typed without the quotes that Hydra's grammar asks for."""

import re

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, QuotedString
from hydra.errors import HydraException

from mtl.quoting import in_quotes

PATHS = ("run", "resume", "init_from", "output_root", "data.path", "data.root", "data.labels")  # whose values are texts
_BETWEEN = r"(\s*[,\[\]{}():=]\s*)"  # what stands between the values of a list, a mapping or a sweep


def quoted(argument: str, *, multirun: bool) -> str:
    """The override with the quotes that it needs to mean what it seems to.

    A path may hold whatever a path can; in a multirun, commas between several paths are a sweep. Elsewhere letters
    that aren't ASCII get quotes. What Hydra reads already isn't touched, unless it is a path and would be read as
    something else than that text.

    Args:
        argument: `key=value`, with or without pluses.
        multirun: whether sweeps are possible.
    """
    key, equals, value = argument.partition("=")
    name = key.lstrip("+")
    is_path = name in PATHS and not (name.startswith("data.") and value[:1] in ("{", "["))  # a file for each split
    if not equals or not value or (not is_path and value.isascii()):
        return argument
    read = _read(argument)
    if read is not None and not (is_path and _is_misread(read, value, multirun=multirun)):
        return argument
    with_quotes = bool(set(value) & set("'\""))
    if is_path and not (multirun and "," in value):
        found = in_quotes(value)
    elif with_quotes:
        return argument  # which of them mean themselves isn't known
    elif is_path or not set(value) & set("[]{}()"):
        found = ",".join(map(_piece, value.split(",")))
    else:
        pieces = re.split(_BETWEEN, value)
        found = "".join(piece if index % 2 else _piece(piece) for index, piece in enumerate(pieces))
    return f"{key}={found}" if _read(f"{key}={found}") is not None else argument


def _piece(text: str) -> str:
    return text if text.isascii() and _read(f"x={text}") is not None else in_quotes(text)


def _is_misread(read: Override, value: str, *, multirun: bool) -> bool:
    """Whether Hydra takes a path for something else."""
    if read.is_sweep_override():
        return not multirun
    found = read.value()
    if found is None or isinstance(read._value, QuotedString) or "${" in value or "\\" in value:
        return False  # null, or written in Hydra's grammar on purpose
    return found != value


def _read(argument: str) -> Override | None:
    try:
        return OverridesParser.create().parse_override(argument)
    except HydraException:
        return None
