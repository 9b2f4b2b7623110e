"""The file of a checkpoint, judged before PyTorch reads it: it may come from anybody."""

import hashlib
import io
import math
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO
from zipfile import ZIP_STORED, ZipFile

from mtl.errors import UserError, first_line
from mtl.safety.bounded import LARGEST, leaves, read_json
from mtl.safety.regular import regular

FORMAT = 7
MANIFEST = "manifest.json"
PLAIN = 8 * LARGEST  # bytes of what isn't numbers of tensors; in memory it may take sixty times as many
ROOM, LEAST_ROOM = 16, 2**28  # bytes of all tensors, for each byte of the file and besides; they may share storages
SAVED_AS = "saved_as"  # the key of the state for the name under which it was saved

# What PyTorch's own reader takes of a pickle's instructions and functions, without those that set memory aside for as
# much as the file says, or that make a tensor of anything but one of the file's storages.
OPCODES = "().]}NKMJGUXqrhjtaesuRQbc\x80\x81\x85\x86\x87\x88\x89\x8a"
FUNCTIONS = {
    *("collections.OrderedDict", "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3"),
    *("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"),
    *("torch._utils._rebuild_sparse_tensor", "torch.serialization._get_layout", "torch.Size", "torch.device"),
    *("_codecs.encode", "builtins.set", "builtins.complex"),
}
DTYPES = {
    *("uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64", "bool", "float16", "bfloat16"),
    *("float32", "float64", "complex64", "complex128", "float8_e4m3fn", "float8_e5m2", "complex32"),
}
SIZES = {  # bytes of a storage's elements, by the name of its class
    **dict.fromkeys(["ByteStorage", "CharStorage", "BoolStorage", "UntypedStorage"], 1),
    **dict.fromkeys(["ShortStorage", "HalfStorage", "BFloat16Storage"], 2),
    **dict.fromkeys(["IntStorage", "FloatStorage"], 4),
    **dict.fromkeys(["LongStorage", "DoubleStorage", "ComplexFloatStorage"], 8),
    "ComplexDoubleStorage": 16,
}


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """The checkpoint's file, known to be whole, to have its own name, and to take no more memory than it has bytes.

    Raises:
        UserError: where there is no such file, or it isn't like that; also for whatever reading it raises.
    """
    try:
        with open(path, "rb", opener=regular) as file:
            _check(file, path)
            file.seek(0)
            yield file
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise UserError(f"there is no checkpoint {path}") from None
    except UserError:
        raise
    except Exception as error:  # damaged files fail in many ways
        raise UserError(f"the checkpoint {path} can't be read: {first_line(error)}") from error


def check_newest(folder: Path) -> None:
    """Looks whether there is a state in the folder from which training can go on, where there is any.

    Raises:
        UserError: for the newest, where none can be read.
    """
    problems: list[UserError] = []
    for path in sorted(folder.glob("last*.pt"), key=lambda path: (len(path.name), path.name)):
        try:
            with opened(path):
                return
        except UserError as error:
            problems.append(error)
    if problems:
        raise problems[0]


def checksum(file: BinaryIO) -> str:
    """What tells the file's content from any other."""
    return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


def manifest(folder: Path) -> dict[str, list[str]]:
    """The checksums of the newest files under each name; none where there is no manifest, or it can't be read."""
    try:
        return {name: list(values) for name, values in read_json(folder / MANIFEST)["sha256"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}  # a file is then judged by itself


def name_of(path: Path) -> str:
    """The name under which a file was saved: `last` of last.pt and of last-1.pt, which has been last.pt before."""
    stem, _, number = path.stem.rpartition("-")
    return stem if stem and number.isdecimal() else path.stem


def room(size: int) -> int:
    """The bytes that the tensors may take of a file of that size."""
    return ROOM * size + LEAST_ROOM


def _check(file: BinaryIO, path: Path) -> None:
    size = os.fstat(file.fileno()).st_size
    if size > _memory():
        raise UserError(f"the checkpoint {path} is of {size:,} bytes, more than this machine's memory")
    known = manifest(path.parent)
    if known:
        found = checksum(file)
        names = [name_of(Path(name)) for name, checksums in known.items() if found in checksums]
        if not names:
            raise UserError(f"the checkpoint {path} is damaged: its checksum is not in {MANIFEST}")
        _check_name(path, *names)
    try:
        with ZipFile(file) as archive:
            members = _members(archive, size)
            if not known and (name := archive.testzip()) is not None:  # the file's own checksums, of its members
                raise UserError(f"the checkpoint {path} is damaged: the checksum of {name} in it is wrong")
            root = archive.namelist()[0].split("/")[0]
            if members[f"{root}/data.pkl"] > PLAIN:
                raise ValueError(f"it holds more than {PLAIN:,} bytes beside the numbers of its tensors")
            skimmed = _Skimmed(archive.read(f"{root}/data.pkl"), root, members)
            state = skimmed.load()
    except KeyError as error:  # a part of the archive, or an instruction of the pickle
        raise ValueError(f"there is no {error.args[0]} in it, or none is known") from error
    found_format = state.get("format") if isinstance(state, dict) else None
    if found_format != FORMAT:
        raise UserError(f"the checkpoint {path} has format {found_format}; this version of mtl reads format {FORMAT}")
    for _ in leaves(state, f"the checkpoint {path}", most=size):  # each takes a byte at least
        pass
    if skimmed.taken > room(size):
        raise UserError(f"the checkpoint {path} holds tensors of far more numbers than it has bytes")
    if isinstance(name := state.get(SAVED_AS), str):
        _check_name(path, name)


def _check_name(path: Path, *names: str) -> None:
    if name_of(path) not in names:
        raise UserError(
            f"the checkpoint {path} was saved as {names[0]}.pt: files were exchanged, or one was renamed or copied; "
            f"give it that name, in another folder if this one has a {names[0]}.pt"
        )


def _memory() -> float:
    """Of this machine, in bytes, where that is known."""
    with suppress(AttributeError, ValueError, OSError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return float("inf")


def _members(archive: ZipFile, size: int) -> dict[str, int]:
    """The sizes of what is in the archive, which PyTorch never compresses."""
    sizes: dict[str, int] = {}
    for member in archive.infolist():
        if member.compress_type != ZIP_STORED or member.file_size != member.compress_size:
            raise ValueError(f"{member.filename} in it is compressed, which mtl never does")
        if member.filename in sizes:
            raise ValueError(f"{member.filename} is in it twice")
        sizes[member.filename] = member.file_size
    if not sizes:
        raise ValueError("there is nothing in it")
    if archive.comment or sum(sizes.values()) > size:
        raise ValueError("its parts take more bytes than it has")
    return sizes


class _Skimmed(pickle._Unpickler):
    """Goes through a pickle as PyTorch would, and makes nothing of it but dicts, lists and plain values.

    Args:
        content: of the pickle.
        root: the folder in the archive.
        members: the sizes of what is in the archive.
    """

    dispatch = {ord(op): pickle._Unpickler.dispatch[ord(op)] for op in OPCODES}

    def __init__(self, content: bytes, root: str, members: dict[str, int]) -> None:
        super().__init__(io.BytesIO(content))
        self._root = root
        self._members = members
        self.taken = 0  # bytes that the tensors would take, if each had its own

    def find_class(self, module: str, name: str) -> Any:
        """What stands for the function or class of that name."""
        if module.startswith("torch") and name in SIZES:
            return _Storage(SIZES[name])
        module = module.replace("__builtin__", "builtins")  # its name in the protocol that PyTorch writes
        if f"{module}.{name}" not in FUNCTIONS and not (module == "torch" and name in DTYPES):
            raise ValueError(f"it asks for {module}.{name}, which no checkpoint of mtl needs")
        return self._tensor if name.startswith("_rebuild_tensor_") else _Anything

    def _tensor(self, storage: Any, _: Any, shape: Any, *more: Any) -> Any:
        if not isinstance(storage, _Storage) or not all(type(each) is int and each >= 0 for each in shape):
            raise ValueError("a tensor in it has no storage, or no shape")
        self.taken += math.prod(shape) * storage
        return _Anything()

    def persistent_load(self, pid: Any) -> Any:
        """What stands for a storage: PyTorch would believe the size that is told here, and read beyond the memory."""
        kind, storage, key, _, count = pid
        own = self._members[f"{self._root}/data/{key}"]
        if kind != "storage" or not isinstance(storage, _Storage) or type(count) is not int:
            raise ValueError("a tensor in it has no storage")
        if not 0 <= count * storage <= own:
            raise ValueError(f"a tensor in it is of {count * storage:,} bytes, of which there are {own:,}")
        return storage


class _Storage(int):
    """A kind of storage: the bytes of its elements, which no instruction can change."""


class _Anything(dict[Any, Any]):
    """The result of any call, which may be a mapping."""

    def __init__(self, *_: Any) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        """Takes whatever it is given."""
