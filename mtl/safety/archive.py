"""The file of a checkpoint, judged before PyTorch reads it: it may come from anybody."""

import hashlib
import io
import math
import os
import pickle
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import NoneType
from typing import Any, BinaryIO, ClassVar
from zipfile import ZIP_STORED, ZipFile

from mtl.errors import UserError, first_line
from mtl.safety.bounded import LARGEST, leaves, read_json
from mtl.safety.regular import regular

FORMAT = 7
MANIFEST = "manifest.json"
_END, _LOCATOR, _END_OF_64 = 22, 20, 56  # bytes of what ends an archive
PLAIN = 8 * LARGEST  # bytes of what isn't numbers of tensors; in memory it may take sixty times as many
ROOM, LEAST_ROOM = 16, 2**28  # bytes of all tensors, for each byte of the file and besides; they may share storages
SAVED_AS = "saved_as"  # the key of the state for the name under which it was saved

# What PyTorch's own reader takes of a pickle's instructions and functions, without those that set memory aside for as
# much as the file says, or that make a tensor of anything but one of the file's storages.
OPCODES = "().]}NKMJGUXqrhjtaesuRQbc\x80\x85\x86\x87\x88\x89\x8a"
ENCODE = "_codecs.encode"  # how bytes are written
FUNCTIONS = {
    *("collections.OrderedDict", "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3"),
    *("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"),
    *("torch._utils._rebuild_sparse_tensor", "torch.serialization._get_layout", "torch.Size", "torch.device"),
    *(ENCODE, "builtins.set", "builtins.complex"),
}
DTYPES = {
    *("uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64", "bool", "float16", "bfloat16"),
    *("float32", "float64", "complex64", "complex128", "float8_e4m3fn", "float8_e5m2", "complex32"),
}
KEYS = (str, int, float, bool, NoneType)  # hashing a tuple can take without end, as it may hold itself many times
LARGEST_KEY = 2**61 - 2  # what is larger has the hash of a smaller number, and equal hashes make a dict slow
COLLECTIONS = ("collections.OrderedDict", "builtins.set", "torch.Size")
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
            _check_layout(archive, file, size)
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


def _check_layout(archive: ZipFile, file: BinaryIO, size: int) -> None:
    """Raises a ValueError for an archive in which PyTorch's reader might see other parts than Python's.

    Python's takes what lies before an archive for no part of it, and looks for the list of parts right before the end;
    PyTorch's looks at the file's beginning for what kind of file it is, looks for the list where the end says that it
    is, and takes names for the same that differ in case.
    """
    names = [member.orig_filename for member in archive.infolist()]
    if not all(name.isascii() and name.isprintable() for name in names) or len({n.lower() for n in names}) < len(names):
        raise ValueError("names of its parts could be taken for each other")
    file.seek(0)
    begin = file.read(4)
    file.seek(max(0, size - _END - _LOCATOR - _END_OF_64))
    tail = file.read()
    end, locator, end_of_64 = tail[-_END:], tail[-_END - _LOCATOR : -_END], tail[: -_END - _LOCATOR]
    list_at, list_end = int.from_bytes(end[16:20], "little"), size - _END
    if locator[:4] == b"PK\6\7":
        list_end -= _LOCATOR + _END_OF_64
        list_at = int.from_bytes(end_of_64[48:56], "little")
        is_there = end_of_64[:4] == b"PK\6\6" and int.from_bytes(locator[8:16], "little") == list_end
    else:
        is_there = True
    first = min(member.header_offset for member in archive.infolist())
    is_whole = begin == b"PK\3\4" and end[:4] == b"PK\5\6" and is_there and first == 0
    if not is_whole or list_at != archive.start_dir:
        raise ValueError("there is more in it than an archive")


class _Skimmed(pickle._Unpickler):
    """Goes through a pickle as PyTorch would, and makes nothing of it but dicts, lists and plain values.

    Args:
        content: of the pickle.
        root: the folder in the archive.
        members: the sizes of what is in the archive.
    """

    stack: list[Any]
    dispatch: ClassVar[Any] = {ord(op): pickle._Unpickler.dispatch[ord(op)] for op in OPCODES}

    def __init__(self, content: bytes, root: str, members: dict[str, int]) -> None:
        super().__init__(io.BytesIO(content))
        self._root = root
        self._members = members
        self.taken = 0  # bytes that the tensors would take, if each had its own
        self._left = len(content)

    def find_class(self, module: str, name: str) -> Any:
        """What stands for the function or class of that name."""
        if module.startswith("torch") and name in SIZES:
            return _Storage(SIZES[name])
        module = module.replace("__builtin__", "builtins")  # its name in the protocol that PyTorch writes
        if f"{module}.{name}" not in FUNCTIONS and not (module == "torch" and name in DTYPES):
            raise ValueError(f"it asks for {module}.{name}, which no checkpoint of mtl needs")
        if name.startswith("_rebuild_tensor_"):
            return self._tensor
        return _Function(f"{module}.{name}", self._spend)

    def _tensor(self, storage: Any, _: Any, shape: Any, *more: Any) -> Any:
        if not isinstance(storage, _Storage) or not all(type(each) is int and each >= 0 for each in shape):
            raise ValueError("a tensor in it has no storage, or no shape")
        self._spend(sum(map(_size, (shape, *more))))
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

    def _spend(self, size: int) -> None:
        """Counts what is copied: by calls with what is there once, a small file can stand for billions of values."""
        self._left -= size
        if self._left < 0:
            raise ValueError("what it copies takes more bytes than it has")

    def _build(self) -> None:
        self._spend(_size(self.stack[-1]))
        super().load_build()  # type: ignore[misc]

    def _set_item(self) -> None:
        _check_keys(self.stack[-2:-1])
        super().load_setitem()  # type: ignore[misc]

    def _set_items(self) -> None:
        _check_keys(self.stack[::2])  # what has been put there since the mark
        super().load_setitems()  # type: ignore[misc]

    dispatch |= {ord("b"): _build, ord("s"): _set_item, ord("u"): _set_items}


def _check_keys(keys: Iterable[Any]) -> None:
    for key in keys:
        if type(key) not in KEYS or (type(key) is int and abs(key) > LARGEST_KEY):
            raise ValueError(f"a dict in it has a {type(key).__name__} for a key, which no checkpoint of mtl needs")


def _size(value: Any) -> int:
    return len(value) if isinstance(value, str | list | tuple | dict) else 0


class _Storage(int):
    """A kind of storage: the bytes of its elements, which no instruction can change."""


class _Anything(dict[Any, Any]):
    """The result of any call, which may be a mapping."""

    def __setstate__(self, state: Any) -> None:
        """Takes whatever it is given."""


class _Function:
    """Stands for a function or class, and gives `_Anything` for what it is called with.

    Args:
        name: of the function.
        spend: is told how much it copies.
    """

    def __init__(self, name: str, spend: Callable[[int], None]) -> None:
        self._name = name
        self._spend = spend

    def __call__(self, *given: Any) -> _Anything:
        self._spend(sum(map(_size, given)))
        if self._name == ENCODE and (len(given) != 2 or type(given[0]) is not str or given[1] != "latin1"):
            raise ValueError(
                "it asks for another encoding than that of bytes"
            )  # some write far more than they are given
        if self._name in COLLECTIONS:
            for items in given:
                if type(items) not in (list, tuple):  # a tensor may have billions of values
                    raise ValueError(f"it makes a {self._name} of something else than a list")
                pairs = self._name == "collections.OrderedDict"
                _check_keys(each[0] if pairs and type(each) in (list, tuple) and each else each for each in items)
        return _Anything()
