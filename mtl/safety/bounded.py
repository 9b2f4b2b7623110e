"""Reads text, JSON and YAML files of unknown origin, with limits on their size and nesting."""

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from mtl.errors import UserError, first_line
from mtl.safety.regular import regular
from mtl.text import plain

LARGEST = 32 * 2**20  # the most bytes of a file that is read as a whole
DEEPEST = 100  # the most levels of nested lists and mappings
MOST = 1_000_000  # the most values in a file
MOST_IN_YAML = 200_000  # the same for YAML, which is ten times slower to read
LONGEST = 2**16  # the most characters of a value in YAML
LONGEST_WHOLE = 20  # the most characters of a 64-bit integer
LONGEST_NUMBER = 24  # the most characters of any number; longer ones can take minutes, in PyYAML and as keys of a dict
MOST_ROWS = 100  # the most rows of a matrix in metrics.json
MOST_IN_MATRICES = 200_000  # the most values of all matrices there
_parse: Any = yaml.parse
_load: Any = yaml.load
_Resolver: Any = yaml.resolver.Resolver


def read_text(path: Path, largest: int = LARGEST) -> str:
    """Reads a text file of at most `largest` bytes.

    Raises:
        UserError: If the file is larger, isn't text in UTF-8, or isn't a regular file.
        OSError: If there is no such file, or if it can't be read.
    """
    with open(path, "rb", opener=regular) as file:
        content = file.read(largest + 1)
    if len(content) > largest:
        raise UserError(f"{plain(str(path))} is larger than {largest / 2**20:g} MB")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{plain(str(path))} isn't text in UTF-8: {error}") from error


def read_lines(path: Path, largest: int, longest: int) -> Iterator[str]:
    """Yields the lines of a file with their line ends, except lines of more than `longest` bytes.

    Raises:
        UserError: If the file has more than `largest` bytes, or isn't a regular file.
        OSError: If there is no such file, or if it can't be read.
    """
    with open(path, "rb", opener=regular) as file:
        if os.fstat(file.fileno()).st_size > largest:
            raise UserError(f"{plain(str(path))} is larger than {largest / 2**20:g} MB")
        whole = True  # whether the previous read ended with a complete line
        while line := file.readline(longest):
            if whole and (line.endswith(b"\n") or len(line) < longest):
                yield line.decode("utf-8", errors="replace")
            whole = line.endswith(b"\n")


def read_json(path: Path) -> Any:
    """Reads a JSON file.

    Raises:
        UserError: If the file isn't JSON, is nested too deeply, or contains a number beyond float or 64-bit integers.
        OSError: If there is no such file, or if it can't be read.
    """
    return parse_json(read_text(path), plain(str(path)))


def parse_json(text: str, where: str) -> Any:
    """Parses JSON text.

    Args:
        text: The text.
        where: The origin of the text, for error messages.

    Raises:
        UserError: See `read_json`.
    """
    try:
        value = json.loads(text, parse_float=_float, parse_int=_int)
    except RecursionError:
        raise UserError(f"{where} is nested more than {DEEPEST} levels deep") from None
    except ValueError as error:
        raise UserError(f"{where} can't be read: {first_line(error)}") from error
    _check_plain(value, where)
    return value


def read_yaml(path: Path) -> Any:
    """Reads a YAML file of plain mappings, lists and values.

    Raises:
        UserError: If the file isn't YAML, contains other types, or contains an alias, with which a few lines can stand
            for billions of values.
        OSError: If there is no such file, or if it can't be read.
    """
    text, where = read_text(path), plain(str(path))
    if any(line.startswith("%") for line in text.splitlines()):
        raise UserError(f"{where} holds a line that begins with %, which mtl never writes")
    loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # much faster than OmegaConf
    try:
        depth = 0
        for count, event in enumerate(_parse(text, Loader=loader)):
            if isinstance(event, yaml.AliasEvent):
                raise UserError(f"{where} holds an alias, *{event.anchor}, which mtl never writes")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > DEEPEST:
                raise UserError(f"{where} is nested more than {DEEPEST} levels deep")
            if count > MOST_IN_YAML:
                raise UserError(f"{where} holds more than {MOST_IN_YAML:,} values")
            if getattr(event, "tag", None) is not None:
                raise UserError(f"{where} holds a tag, {event.tag}, which mtl never writes")
            if isinstance(event, yaml.ScalarEvent) and len(event.value) > LONGEST:
                raise UserError(f"{where} holds a value of more than {LONGEST} characters")
            if isinstance(event, yaml.ScalarEvent) and event.implicit[0] and _is_long_number(event.value):
                raise UserError(
                    f"{where} holds a number of {len(event.value)} characters: {event.value[:LONGEST_NUMBER]}…"
                )
        value = _load(text, Loader=loader)
    except UserError:
        raise
    except Exception as error:  # PyYAML raises many kinds of errors
        raise UserError(f"{where} can't be read: {first_line(error)}") from error
    _check_plain(value, where)
    return value


def leaves(value: Any, where: str, most: int = MOST) -> Iterator[Any]:
    """Yields all values in nested lists, tuples and mappings, including the keys of mappings.

    Args:
        value: The outermost container, or a single value.
        where: The origin of the value, for error messages.
        most: The most values.

    Raises:
        UserError: If there are more values, or if they are nested too deeply. A small file that contains the same
            containers several times can stand for billions of values.
    """
    count = 0
    level = [value]
    for _ in range(DEEPEST + 1):
        deeper: list[Any] = []
        for each in level:
            if not isinstance(each, dict | list | tuple):
                yield each
                continue
            count += len(each)
            if count > most:
                raise UserError(f"{where} holds more than {most:,} values")
            deeper += each
            deeper += dict.values(each) if isinstance(each, dict) else ()  # an OrderedDict may have a method of its own
        if not deeper:
            return
        level = deeper
    raise UserError(f"{where} is nested more than {DEEPEST} levels deep")


def _is_long_number(text: str) -> bool:
    """Returns whether YAML reads the text as a number that is longer than a 64-bit integer or the repr of a float."""
    if len(text) <= LONGEST_WHOLE:
        return False
    kind = _Resolver().resolve(yaml.ScalarNode, text, (True, False)).rpartition(":")[2]
    return kind == "int" or (kind == "float" and len(text) > LONGEST_NUMBER)


def _check_plain(value: Any, where: str) -> None:
    for each in leaves(value, where):
        if type(each) is int and not -(2**63) <= each < 2**63:
            raise UserError(f"{where} holds a whole number that isn't of 64 bits")
        if type(each) not in (str, int, float, bool, type(None)):
            raise UserError(f"{where} holds a {type(each).__name__}, which mtl never writes")


def _float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"a number that no float holds: {text[:40]}")
    return value


def _int(text: str) -> int:
    if len(text) > LONGEST_WHOLE:
        raise ValueError(f"a whole number that isn't of 64 bits: {text[:40]}…")
    return int(text)
