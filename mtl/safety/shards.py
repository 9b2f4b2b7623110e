"""Checks what a checkpoint says about the files that hold its sharded tensors, which several processes wrote."""

import hashlib
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mtl.errors import UserError
from mtl.safety.regular import check_kind, regular
from mtl.safety.skimming import DTYPES

KEY = "shards"  # the key of the state that contains the index
SUFFIX = ".shards"  # of the folders with the files
_NAME = re.compile(r"[A-Za-z0-9_]+(?:[.-][A-Za-z0-9_]+)*", re.ASCII)


class Chunk(NamedTuple):
    """A part of a tensor, and where in the files it is."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int


class Sharded(NamedTuple):
    """A tensor whose chunks are in files; the name of the data type, and the whole shape."""

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


class Index(NamedTuple):
    """The files of a checkpoint, each with size and SHA-256 digest, and the tensors in them by name."""

    folder: Path
    files: dict[str, tuple[int, str]]
    tensors: dict[str, Sharded]


def parse(value: Any, checkpoint: Path) -> Index:
    """Returns the index that a checkpoint contains, after checks that it describes tensors in files.

    Each tensor consists of its chunks, each chunk is in a file, and the files are as large as all chunks together.

    Args:
        value: The entry of the checkpoint.
        checkpoint: The file of the checkpoint. The folder with the other files is next to it.

    Raises:
        ValueError: If the index is malformed.
    """
    if not isinstance(value, dict) or not all(isinstance(value.get(key), dict) for key in ("files", "tensors")):
        raise ValueError("its list of further files is malformed")
    folder = str(value.get("folder"))
    if not folder.endswith(SUFFIX) or not _NAME.fullmatch(folder):
        raise ValueError("the name of the folder of its further files is malformed")
    files = {}
    for name, about in dict.items(value["files"]):
        if not (isinstance(name, str) and _NAME.fullmatch(name) and isinstance(about, list) and len(about) == 2):
            raise ValueError("its list of further files is malformed")
        files[name] = (_numbers(about[:1])[0], str(about[1]))
    tensors = {str(name): _sharded(each, files) for name, each in dict.items(value["tensors"])}
    if sum(c.length for t in tensors.values() for c in t.chunks) > sum(size for size, _ in files.values()):
        raise ValueError("its tensors take more bytes than its further files have")
    return Index(checkpoint.parent / folder, files, tensors)


def check(index: Index, where: str) -> None:
    """Checks that the files exist and have the sizes and digests of the index.

    Raises:
        UserError: If one of the files is missing or damaged.
    """
    check_kind(index.folder)
    for name, (size, digest) in index.files.items():
        shown = f"{index.folder.name}/{name}"
        try:
            with open(index.folder / name, "rb", opener=regular) as file:
                is_whole = os.fstat(file.fileno()).st_size == size
                if not is_whole or hashlib.file_digest(file, "sha256").hexdigest() != digest:
                    raise UserError(f"{where} is damaged: the checksum of its file {shown} is wrong")
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(f"{where} is damaged: its file {shown} is missing") from None


def _sharded(value: Any, files: Mapping[str, Any]) -> Sharded:
    if not isinstance(value, list) or len(value) != 3 or value[0] not in DTYPES or not isinstance(value[2], list):
        raise ValueError("its list of sharded tensors is malformed")
    shape = _numbers(value[1])
    chunks = tuple(_chunk(each, shape, files) for each in value[2])
    if sum(math.prod(chunk.sizes) for chunk in chunks) != math.prod(shape):
        raise ValueError("the chunks of a sharded tensor aren't as many numbers as the tensor")
    return Sharded(str(value[0]), shape, chunks)


def _chunk(value: Any, shape: tuple[int, ...], files: Mapping[str, tuple[int, str]]) -> Chunk:
    if not isinstance(value, list) or len(value) != 5 or not isinstance(value[2], str) or value[2] not in files:
        raise ValueError("a chunk of a sharded tensor is malformed")
    chunk = Chunk(_numbers(value[0]), _numbers(value[1]), value[2], *_numbers(value[3:]))
    inside = [offset + size <= of for offset, size, of in zip(chunk.offsets, chunk.sizes, shape, strict=True)]
    if not all(inside) or chunk.start + chunk.length > files[chunk.file][0]:
        raise ValueError("a chunk of a sharded tensor reaches beyond the tensor or its file")
    return chunk


def _numbers(values: Any) -> tuple[int, ...]:
    if not isinstance(values, list) or not all(type(each) is int and 0 <= each < 2**63 for each in values):
        raise ValueError("an entry of its list of sharded tensors is not a natural number")
    return tuple(values)
