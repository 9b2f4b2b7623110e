"""Files with the chunks of sharded tensors, as PyTorch's distributed checkpoints (DCP) write them.

Chunks are written by DCP's own writer. They are read without DCP's reader, which executes a pickle: the index of the
checkpoint says where the chunks are, DCP plans which of them are needed, and each of them is checked before it is read.
"""

import io
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)

from mtl.safety.archive import skim
from mtl.safety.regular import regular
from mtl.safety.shards import Index, Sharded

Offsets = tuple[int, ...]  # of a chunk in its tensor


class ShardFiles(FileSystemWriter):
    """DCP's writer, which reports the reason if the disk is full; PyTorch raises another error instead.

    Args:
        folder: The folder of the files.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.fs = self._disk = _Disk()

    def write_data(self, plan: Any, planner: Any) -> Any:
        """Writes the chunks of this process."""
        try:
            return super().write_data(plan, planner)
        except Exception as error:
            raise self._disk.error or error from error


class _Disk(FileSystem):
    error: OSError | None = None

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        with open(path, mode) as file:
            yield _Stream(file, self)


class _Stream:
    def __init__(self, file: Any, disk: _Disk) -> None:
        self._file = file
        self._disk = disk

    def write(self, data: Any) -> Any:
        try:
            return self._file.write(data)
        except OSError as error:
            self._disk.error = error
            raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def fill(targets: Mapping[str, Tensor], saved: Mapping[str, Sharded], chunk: Callable[[str, Offsets], Tensor]) -> None:
    """Fills tensors from chunks.

    Args:
        targets: The tensors to fill, by name, with the shapes and data types of the saved ones. Of a sharded tensor,
            this process's part is filled; otherwise, no process group is needed.
        saved: The shape and the chunks of each tensor, by name.
        chunk: Returns the chunk of a tensor with these offsets.
    """
    about: dict[str, Any] = {name: _metadata(each) for name, each in saved.items()}
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(dict(targets), Metadata(about), True)
    with torch.no_grad():
        for item in planner.create_local_plan().items:
            offsets = tuple(about[item.storage_index.fqn].chunks[item.storage_index.index].offsets)
            piece = chunk(item.storage_index.fqn, offsets)
            for dim, (start, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                piece = piece.narrow(dim, start, length)
            planner.resolve_tensor(item).detach().copy_(piece)


def _metadata(tensor: Sharded) -> TensorStorageMetadata:
    chunks = [ChunkStorageMetadata(torch.Size(each.offsets), torch.Size(each.sizes)) for each in tensor.chunks]
    return TensorStorageMetadata(TensorProperties(dtype_of(tensor)), torch.Size(tensor.shape), chunks)


def dtype_of(tensor: Sharded) -> torch.dtype:
    """Returns the data type of a saved tensor."""
    dtype: torch.dtype = getattr(torch, tensor.dtype)  # the index allows names of data types only
    return dtype


def whole(index: Index) -> dict[str, Tensor]:
    """Returns all sharded tensors of a checkpoint, whole, on the CPU.

    Raises:
        ValueError: If the files can't contain so many elements, or if a chunk isn't the tensor that the index says.
    """
    check_sizes(index)
    targets = {name: torch.zeros(each.shape, dtype=dtype_of(each)) for name, each in index.tensors.items()}
    fill(targets, index.tensors, lambda name, offsets: read_chunk(index, index.tensors[name], offsets))
    return targets


def check_sizes(index: Index) -> None:
    """Checks, before memory is allocated, that each chunk is at least as long as its elements.

    Raises:
        ValueError: If one isn't.
    """
    for name, tensor in index.tensors.items():
        for chunk in tensor.chunks:
            if torch.Size(chunk.sizes).numel() * dtype_of(tensor).itemsize > chunk.length:
                raise ValueError(f"{name} has more elements than its files have bytes")


def read_chunk(index: Index, tensor: Sharded, offsets: Offsets) -> Tensor:
    """Reads the chunk of a tensor with these offsets, without running any code in the file.

    Raises:
        ValueError: If the file has something else there than the chunk that the index describes.
    """
    about = next(each for each in tensor.chunks if each.offsets == offsets)
    with open(index.folder / about.file, "rb", opener=regular) as file:
        file.seek(about.start)
        content = io.BytesIO(file.read(about.length))
    skim(content, about.length, untested=True)  # the digest of the file has been checked
    content.seek(0)
    value: Tensor = torch.load(content, map_location="cpu", weights_only=True)
    is_plain = type(value) is Tensor and value.layout is torch.strided and not value.is_meta
    if not is_plain or (value.dtype, tuple(value.shape)) != (dtype_of(tensor), about.sizes):
        raise ValueError(f"a chunk in {about.file} isn't the tensor that was saved")
    return value.detach()
