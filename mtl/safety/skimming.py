"""The pickle in a checkpoint, gone through without making any object that it asks for."""

import io
import math
import pickle
from collections.abc import Callable, Iterable
from types import NoneType
from typing import Any, ClassVar

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


class Skimmed(pickle._Unpickler):
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

    def _tensor(self, storage: Any, offset: Any, shape: Any, strides: Any, *more: Any) -> Any:
        numbers = (offset, *shape, *strides)
        if not isinstance(storage, _Numbers) or not all(type(each) is int and each >= 0 for each in numbers):
            raise ValueError("a tensor in it has no storage, or no shape")
        self._spend(sum(map(_size, (shape, strides, *more))))
        last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        if math.prod(shape) and last >= storage.count:
            raise ValueError("a tensor in it reaches beyond its storage")
        self.taken += math.prod(shape) * storage.size
        return _Anything()

    def persistent_load(self, pid: Any) -> Any:
        """What stands for a storage: PyTorch would believe the size that is told here, and read beyond the memory."""
        kind, storage, key, _, count = pid
        own = self._members[f"{self._root}/data/{key}"]
        if kind != "storage" or not isinstance(storage, _Storage) or type(count) is not int:
            raise ValueError("a tensor in it has no storage")
        if not 0 <= count * storage <= own:
            raise ValueError(f"a tensor in it is of {count * storage:,} bytes, of which there are {own:,}")
        return _Numbers(storage, count)

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


class _Numbers:
    """A storage: the bytes of an element, and the number of elements, which no instruction can change."""

    __slots__ = ("count", "size")

    def __init__(self, size: int, count: int) -> None:
        self.size = size
        self.count = count

    def __setstate__(self, state: Any) -> None:
        """Takes whatever it is given, and changes nothing."""


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
