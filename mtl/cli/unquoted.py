"""Adds the quotes that Hydra's grammar requires to typed values."""

import re

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, QuotedString
from hydra.errors import HydraException

from mtl.quoting import in_quotes

PATHS = (
    "run",
    "resume",
    "init_from",
    "output_root",
    "data.path",
    "data.root",
    "data.labels",
)  # keys whose values are texts
_BETWEEN = r"(\s*[,\[\]{}():=]\s*)"  # separators of values in lists, mappings and sweeps


def quoted(argument: str, *, multirun: bool) -> str:
    """Adds the quotes to an override that Hydra needs to read the value as the user meant it.

    Paths may contain any characters; in a multirun, commas separate several paths of a sweep. In other values,
    non-ASCII letters are quoted. Overrides that Hydra can read are left unchanged, except paths that Hydra would read
    as another value than the text.

    Args:
        argument: `key=value`, with or without pluses.
        multirun: Whether the value may be a sweep.
    """
    key, equals, value = argument.partition("=")
    name = key.lstrip("+")
    is_path = name in PATHS and not (name.startswith("data.") and value[:1] in ("{", "["))  # one file per split
    if not equals or not value or (not is_path and value.isascii()):
        return argument
    read = _read(argument)
    if read is not None and not (is_path and _is_misread(read, value, multirun=multirun)):
        return argument
    with_quotes = bool(set(value) & set("'\""))
    if is_path and not (multirun and "," in value):
        text = in_quotes(value)
    elif with_quotes:
        return argument  # it is unknown which quotes are part of the value
    elif is_path or not set(value) & set("[]{}()"):
        text = ",".join(map(_piece, value.split(",")))
    else:
        pieces = re.split(_BETWEEN, value)
        text = "".join(piece if index % 2 else _piece(piece) for index, piece in enumerate(pieces))
    return f"{key}={text}" if _read(f"{key}={text}") is not None else argument


def _piece(text: str) -> str:
    return text if text.isascii() and _read(f"x={text}") is not None else in_quotes(text)


def _is_misread(read: Override, value: str, *, multirun: bool) -> bool:
    """Returns whether Hydra reads a path as another value."""
    if read.is_sweep_override():
        return not multirun
    parsed = read.value()
    if parsed is None or isinstance(read._value, QuotedString) or "${" in value or "\\" in value:
        return False  # null, or written in Hydra's grammar on purpose
    return parsed != value


def _read(argument: str) -> Override | None:
    try:
        return OverridesParser.create().parse_override(argument)
    except HydraException:
        return None
