"""Files that may come from anybody, read so that neither their size nor their nesting can exhaust the machine."""

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

LARGEST = 32 * 2**20  # bytes of a text that is read as a whole
DEEPEST = 100  # levels of lists and mappings within each other
MOST = 1_000_000  # values in a file, and
MOST_IN_YAML = 200_000  # in one whose reading takes ten times as long
LONGEST = 2**16  # characters of a value in YAML
LONGEST_WHOLE = 20  # of a whole number of 64 bits
LONGEST_NUMBER = 24  # of a number: what PyYAML makes of longer ones takes minutes, and so does a dict of such keys
_parse: Any = yaml.parse
_load: Any = yaml.load
_Resolver: Any = yaml.resolver.Resolver


def read_text(path: Path, largest: int = LARGEST) -> str:
    """The file's text, of at most so many bytes.

    Raises:
        UserError: where it is larger, isn't text in UTF-8, or isn't a regular file.
        OSError: where there is no such file, or it can't be read.
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
    """The file's lines with their ends, those left out that are longer than so many bytes.

    Raises:
        UserError: where the file is larger than so many bytes, or isn't a regular one.
        OSError: where there is no such file, or it can't be read.
    """
    with open(path, "rb", opener=regular) as file:
        if os.fstat(file.fileno()).st_size > largest:
            raise UserError(f"{plain(str(path))} is larger than {largest / 2**20:g} MB")
        whole = True  # whether what was read before was the end of a line
        while line := file.readline(longest):
            if whole and (line.endswith(b"\n") or len(line) < longest):
                yield line.decode("utf-8", errors="replace")
            whole = line.endswith(b"\n")


def read_json(path: Path) -> Any:
    """What the file of JSON holds.

    Raises:
        UserError: where it isn't JSON, holds a number that no float or 64-bit integer holds, or is nested too deep.
        OSError: where there is no such file, or it can't be read.
    """
    return parse_json(read_text(path), plain(str(path)))


def parse_json(text: str, where: str) -> Any:
    """The same of a text.

    Args:
        text: JSON.
        where: it comes from, for messages.

    Raises:
        UserError: as `read_json`.
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
    """What the file of YAML holds: plain mappings, lists and values.

    Raises:
        UserError: where it isn't YAML, or holds anything else, or an alias, by which a few lines can stand for billions
            of values.
        OSError: where there is no such file, or it can't be read.
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
    except Exception as error:  # PyYAML fails in many ways
        raise UserError(f"{where} can't be read: {first_line(error)}") from error
    _check_plain(value, where)
    return value


def leaves(value: Any, where: str, most: int = MOST) -> Iterator[Any]:
    """All that is in lists, tuples and mappings within each other, the mappings' keys included.

    Args:
        value: to be walked through.
        where: it comes from, for messages.
        most: that there may be.

    Raises:
        UserError: where there are so many or they are nested so deep that they aren't worth walking through. By
            containers that are there several times, a small file can stand for billions.
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
            deeper += (
                dict.values(each) if isinstance(each, dict) else ()
            )  # an OrderedDict may bring a method of its own
        if not deeper:
            return
        level = deeper
    raise UserError(f"{where} is nested more than {DEEPEST} levels deep")


def _is_long_number(text: str) -> bool:
    """Whether it is a number, by YAML's rules, that no run writes: 64 bits and repr(float) have so many digits."""
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
