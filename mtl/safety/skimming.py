"""Checks the pickle in a checkpoint without creating any object that the pickle names."""

import io
import math
import pickle
from collections.abc import Callable, Iterable
from types import NoneType
from typing import Any, ClassVar

# The pickle instructions and functions that PyTorch's own reader accepts, without those that allocate as much memory as
# the file says, and those that create a tensor from anything but a storage of the file.
OPCODES = "().]}NKMJGUXqrhjtaesuRQbc\x80\x85\x86\x87\x88\x89\x8a"
ENCODE = "_codecs.encode"  # represents bytes
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
KEYS = (str, int, float, bool, NoneType)  # hashing a tuple may never end, because it can contain itself many times
LARGEST_KEY = 2**61 - 2  # larger integers have the hashes of smaller ones, and equal hashes make a dict slow
COLLECTIONS = ("collections.OrderedDict", "builtins.set", "torch.Size")
SIZES = {  # bytes per element of a storage, by the name of its class
    **dict.fromkeys(["ByteStorage", "CharStorage", "BoolStorage", "UntypedStorage"], 1),
    **dict.fromkeys(["ShortStorage", "HalfStorage", "BFloat16Storage"], 2),
    **dict.fromkeys(["IntStorage", "FloatStorage"], 4),
    **dict.fromkeys(["LongStorage", "DoubleStorage", "ComplexFloatStorage"], 8),
    "ComplexDoubleStorage": 16,
}


class Skimmed(pickle._Unpickler):
    """An unpickler that follows the instructions as PyTorch does, but creates only dicts, lists and plain values.

    Args:
        content: The content of the pickle.
        root: The folder in the archive.
        members: The sizes of the archive's members.

    Attributes:
        taken: The bytes that all tensors would take if none of them shared a storage.
    """

    stack: list[Any]
    dispatch: ClassVar[Any] = {ord(op): pickle._Unpickler.dispatch[ord(op)] for op in OPCODES}

    def __init__(self, content: bytes, root: str, members: dict[str, int]) -> None:
        super().__init__(io.BytesIO(content))
        self._root = root
        self._members = members
        self.taken = 0
        self._left = len(content)

    def find_class(self, module: str, name: str) -> Any:
        """Returns a substitute for the function or class of that name."""
        if module.startswith("torch") and name in SIZES:
            return _Storage(SIZES[name])
        module = module.replace("__builtin__", "builtins")  # the name in the pickle protocol of PyTorch
        if f"{module}.{name}" not in FUNCTIONS and not (module == "torch" and name in DTYPES):
            raise ValueError(f"its pickle names {module}.{name}, which no checkpoint of mtl needs")
        if name.startswith("_rebuild_tensor_"):
            return self._tensor
        return _Function(f"{module}.{name}", self._spend)

    def _tensor(self, storage: Any, offset: Any, shape: Any, strides: Any, *more: Any) -> Any:
        numbers = (offset, *shape, *strides)
        if not isinstance(storage, _Numbers) or not all(type(each) is int and each >= 0 for each in numbers):
            raise ValueError("a tensor has no storage, or no shape")
        self._spend(sum(map(_size, (shape, strides, *more))))
        last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        if math.prod(shape) and last >= storage.count:
            raise ValueError("a tensor reaches beyond its storage")
        self.taken += math.prod(shape) * storage.size
        return _Result()

    def persistent_load(self, pid: Any) -> Any:
        """Returns a substitute for a storage. PyTorch trusts the pickle's size, and might read beyond the memory."""
        kind, storage, key, _, count = pid
        size = self._members[f"{self._root}/data/{key}"]
        if kind != "storage" or not isinstance(storage, _Storage) or type(count) is not int:
            raise ValueError("a tensor has no storage")
        if not 0 <= count * storage <= size:
            raise ValueError(f"a tensor's storage takes {count * storage:,} bytes, but the archive has {size:,} of it")
        return _Numbers(storage, count)

    def _spend(self, size: int) -> None:
        """Counts copied values; calls that copy the same value many times could stand for billions of values."""
        self._left -= size
        if self._left < 0:
            raise ValueError("the copies in its pickle take more bytes than the pickle")

    def _build(self) -> None:
        self._spend(_size(self.stack[-1]))
        super().load_build()  # type: ignore[misc]

    def _set_item(self) -> None:
        _check_keys(self.stack[-2:-1])
        super().load_setitem()  # type: ignore[misc]

    def _set_items(self) -> None:
        _check_keys(self.stack[::2])  # the items since the mark
        super().load_setitems()  # type: ignore[misc]

    dispatch |= {ord("b"): _build, ord("s"): _set_item, ord("u"): _set_items}


def _check_keys(keys: Iterable[Any]) -> None:
    for key in keys:
        if type(key) not in KEYS or (type(key) is int and abs(key) > LARGEST_KEY):
            raise ValueError(f"a dict has a key of type {type(key).__name__}, which no checkpoint of mtl needs")


def _size(value: Any) -> int:
    return len(value) if isinstance(value, str | list | tuple | dict) else 0


class _Storage(int):
    """A class of storages: the bytes per element, which no instruction can change."""


class _Numbers:
    """A storage: the bytes per element and the number of elements, which no instruction can change."""

    __slots__ = ("count", "size")

    def __init__(self, size: int, count: int) -> None:
        self.size = size
        self.count = count

    def __setstate__(self, state: Any) -> None:
        """Ignores the state."""


class _Result(dict[Any, Any]):
    """A substitute for the result of any call, which may be a mapping."""

    def __setstate__(self, state: Any) -> None:
        """Ignores the state."""


class _Function:
    """A substitute for a function or class.

    Args:
        name: The name of the function.
        spend: A function that receives the number of copied values of each call.
    """

    def __init__(self, name: str, spend: Callable[[int], None]) -> None:
        self._name = name
        self._spend = spend

    def __call__(self, *arguments: Any) -> _Result:
        self._spend(sum(map(_size, arguments)))
        is_latin1 = len(arguments) == 2 and type(arguments[0]) is str and arguments[1] == "latin1"
        if self._name == ENCODE and not is_latin1:  # the result of other encodings can be far longer
            raise ValueError("its pickle names another encoding than latin1")
        if self._name in COLLECTIONS:
            for items in arguments:
                if type(items) not in (list, tuple):  # a tensor may have billions of values
                    raise ValueError(f"its pickle creates a {self._name} from something else than a list")
                pairs = self._name == "collections.OrderedDict"
                _check_keys(each[0] if pairs and type(each) in (list, tuple) and each else each for each in items)
        return _Result()
