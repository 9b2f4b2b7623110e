"""Saving of sharded tensors by all processes together, with PyTorch's distributed checkpoints (DCP).

The tensors are in files of a folder next to the checkpoint, and each process writes the parts that it has. The
checkpoint itself contains everything else, and an index of the files; it is saved when the folder is complete.
"""

import shutil
import weakref
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from mtl.distributed.collectives import rank, world_size
from mtl.distributed.sharding import is_sharded
from mtl.errors import UserError
from mtl.files import sync, why
from mtl.safety import archive
from mtl.safety.shards import KEY, SUFFIX

Tensors = dict[str, Tensor]


def walk(value: Any, change: Callable[[tuple[Any, ...], Any], Any], path: tuple[Any, ...] = ()) -> Any:
    """Returns nested dicts, lists and tuples with each value replaced by `change(path, value)`.

    Args:
        value: The outermost container.
        change: A function of the keys and positions that lead to a value, and of the value.
        path: The keys and positions that lead to the container.
    """
    if isinstance(value, dict):
        return {key: walk(each, change, (*path, key)) for key, each in value.items()}
    if type(value) in (list, tuple):
        return type(value)(walk(each, change, (*path, number)) for number, each in enumerate(value))
    return change(path, value)


def name_of(path: tuple[Any, ...]) -> str:
    """Returns the name of a tensor in a state, such as step/optimizer/state/3/exp_avg."""
    return "/".join(map(str, path))


def split(state: dict[str, Any]) -> tuple[dict[str, Any], Tensors]:
    """Returns a state with None for each sharded tensor, and these tensors by name."""
    tensors: Tensors = {}

    def take(path: tuple[Any, ...], value: Any) -> Any:
        if not isinstance(value, Tensor) or not is_sharded(value):
            return value
        assert name_of(path) not in tensors, f"two tensors have the name {name_of(path)}"
        tensors[name_of(path)] = value

    return walk(state, take), tensors


def copied(value: Any) -> Any:
    """Returns a value with copies of its tensors on the CPU."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: copied(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(copied(each) for each in value)
    return value


class Staged:
    """Copies of the parts of sharded tensors that this process has, which all processes write together once.

    Args:
        tensors: The copies, as sharded tensors on the CPU, by name.

    Attributes:
        index: The entry of the checkpoint that describes the files; None before they are written.
    """

    def __init__(self, tensors: Tensors) -> None:
        self._tensors = tensors
        self.index: dict[str, Any] | None = None

    def write(self, folder: Path, together: "Together") -> dict[str, Any]:
        """Writes the tensors into a new folder, unless that has been done; returns the index.

        Raises:
            UserError: In all processes, if one of them can't write.
        """
        if self.index is None:
            metadata = together.save(self._tensors, folder)
            files = [each for part in together(lambda: _digests(folder)) for each in part]
            self.index = _index(metadata, folder, files)
            self._tensors = {}
        return self.index


class Together:
    """Communication of the threads in which all processes write, on a process group of its own.

    All processes have to create it together.

    Args:
        timeout: The number of seconds after which a process that doesn't answer is an error.
    """

    def __init__(self, timeout: float | None = None) -> None:
        within = None if timeout is None else timedelta(seconds=timeout)
        # A reference would keep the connections open when another thread destroys the groups.
        self._reference = weakref.ref(dist.new_group(backend="gloo", timeout=within))

    @property
    def _group(self) -> dist.ProcessGroup:
        group = self._reference()
        if not isinstance(group, dist.ProcessGroup):
            raise UserError("the process group no longer exists")
        return group

    def __call__(self, action: Callable[[], Any]) -> list[Any]:
        """Calls a function in all processes, and returns the results of all of them.

        Raises:
            UserError: In all processes, if the function raises an exception in one of them.
        """
        result = problem = None
        try:
            result = action()
        except Exception as error:
            problem = why(error)
        answers: list[Any] = [None] * world_size()
        dist.all_gather_object(answers, (result, problem), group=self._group)
        for number, (_, text) in enumerate(answers):
            if text is not None:
                raise UserError(text if number == 0 else f"{text}, in the process of rank {number}")
        return [each for each, _ in answers]

    def in_first(self, action: Callable[[], Any]) -> Any:
        """Calls a function in the process of rank 0; returns its result in all processes.

        Raises:
            UserError: In all processes, if the function raises an exception.
        """
        return self(action if rank() == 0 else lambda: None)[0]

    def save(self, tensors: Tensors, folder: Path) -> Any:
        """Writes tensors into a folder by DCP; returns its metadata.

        Raises:
            UserError: In all processes, if one of them can't write.
        """
        from torch.distributed.checkpoint.api import CheckpointException
        from torch.distributed.checkpoint.state_dict_saver import save

        from mtl.training.shard_files import ShardFiles

        try:
            return save(dict(tensors), storage_writer=ShardFiles(folder), process_group=self._group)
        except CheckpointException as error:  # not an Exception
            number, (reason, _) = min(error.failures.items())
            raise UserError(f"{why(reason)}, in the process of rank {number}") from error


def new_folder(folder: Path, step: int) -> Path:
    """Creates the folder of a checkpoint's shards, with a name that no other one has."""
    folder.mkdir(exist_ok=True)
    for number in range(len(list(folder.iterdir())) + 1):
        path = folder / f"step-{step}{f'-{number}' if number else ''}{SUFFIX}"
        with suppress(FileExistsError):
            path.mkdir()
            return path
    raise AssertionError("there is always a free name")


class References:
    """The folders to which the checkpoints in a folder refer."""

    def __init__(self) -> None:
        # By identity of the file, since reading a checkpoint takes time.
        self._known: dict[tuple[int, int, int, int], str | None] = {}

    def prune(self, folder: Path) -> None:
        """Deletes the folders of shards to which no checkpoint in the folder refers.

        Nothing is deleted if a checkpoint can't be read.
        """
        unused = {path.name: path for path in folder.glob(f"*{SUFFIX}")}
        if not unused:
            return
        known = {}
        for path in folder.glob("*.pt"):
            try:
                status = path.stat()
                identity = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
                known[identity] = self._known[identity] if identity in self._known else _reference(path)
            except (OSError, ValueError):
                return
            unused.pop(str(known[identity]), None)
        self._known = known
        for path in unused.values():
            shutil.rmtree(path, ignore_errors=True)


def _reference(path: Path) -> str | None:
    """Returns the name of the folder to which a checkpoint refers, if any."""
    with path.open("rb") as file:
        state, _ = archive.skim(file, path.stat().st_size, untested=True)
    index = state.get(KEY) if isinstance(state, dict) else None
    return str(index.get("folder")) if isinstance(index, dict) else None


def _digests(folder: Path) -> list[tuple[str, int, str]]:
    """Returns names, sizes and digests of the files that this process has written."""
    if not (folder / ".metadata").is_file():
        raise UserError(
            f"{folder} isn't the same folder in all processes; all machines need the run's folder on a shared file "
            "system if parameters are sharded"
        )
    sync(folder)
    sync(folder.parent)
    files = []
    for path in sorted(folder.glob(f"__{rank()}_*.distcp")):
        with path.open("rb") as file:
            files.append((path.name, path.stat().st_size, archive.checksum(file)))
    return files


def _index(metadata: Any, folder: Path, files: list[tuple[str, int, str]]) -> dict[str, Any]:
    """Returns what the metadata of DCP say, as plain types; `mtl.safety.shards.parse` reads it."""
    tensors: dict[str, list[Any]] = {}
    sizes: dict[tuple[str, tuple[int, ...]], list[int]] = {}
    for name, about in metadata.state_dict_metadata.items():
        tensors[name] = [str(about.properties.dtype).removeprefix("torch."), list(about.size), []]
        sizes |= {(name, tuple(chunk.offsets)): list(chunk.sizes) for chunk in about.chunks if chunk.sizes.numel()}
    for entry, place in metadata.storage_data.items():
        of = sizes.get((entry.fqn, tuple(entry.offset)))
        if of is not None:  # an empty chunk is left out
            chunk = [list(entry.offset), of, place.relative_path, place.offset, place.length]
            tensors[entry.fqn][2].append(chunk)
    written = {name: [size, digest] for name, size, digest in files}
    return {"folder": folder.name, "files": written, "tensors": tensors}
