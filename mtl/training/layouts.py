"""Saved states in the layout of a model: each process gets the parts of the tensors that it has of the parameters."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mtl.distributed.sharding import is_sharded
from mtl.errors import UserError, first_line
from mtl.safety.shards import KEY, Chunk, Sharded
from mtl.training.shards import name_of, walk


def fitted(
    state: Mapping[str, Any], model: nn.Module, optimizers: Mapping[str, Sequence[Tensor]] | None = None
) -> dict[str, Any]:
    """Returns a state whose tensors are sharded as the parameters of a model are.

    Each process reads its own parts of the tensors to which the state refers; if the model isn't sharded, it reads them
    as a whole.

    Args:
        state: The state of a run in any layout, from `mtl.training.checkpoint.load` with `whole=False`.
        model: The model, on its device.
        optimizers: The parameters of the optimizers, in order, by the optimizer's name in the state of the step.

    Raises:
        UserError: If the tensors can't be read.
    """
    state = {key: value for key, value in state.items() if key != "evaluated"}
    index = state.pop(KEY, None)
    likes = _Likes(model, optimizers or {})
    if index is None and not likes:
        return state
    from mtl.training import shard_files  # takes a second to import

    stored = index.tensors if index is not None else {}
    saved: dict[str, Sharded] = {}
    targets: dict[str, Tensor] = {}
    wholes: dict[str, Tensor] = {}  # tensors that are in the state, and are sharded in the model

    def place(path: tuple[Any, ...], value: Any) -> Any:
        name = name_of(path)
        if value is None and name in stored:
            saved[name] = stored[name]
            like = likes(path, saved[name].shape)
        elif isinstance(value, Tensor) and (like := likes(path, value.shape)) is not None:
            wholes[name] = value
            saved[name] = _whole(value)
        else:
            return value
        dtype = shard_files.dtype_of(saved[name])
        shape = saved[name].shape
        targets[name] = torch.zeros(shape, dtype=dtype) if like is None else torch.zeros_like(like, dtype=dtype)
        return targets[name]

    def chunk(name: str, offsets: tuple[int, ...]) -> Tensor:
        return wholes[name] if name in wholes else shard_files.read_chunk(index, saved[name], offsets)

    try:
        if index is not None:
            shard_files.check_sizes(index)
        new: dict[str, Any] = walk(state, place)
        shard_files.fill(targets, saved, chunk)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"the sharded tensors of the checkpoint can't be read: {first_line(error)}") from error
    return new


class _Likes:
    """The parameters of a model that are sharded, which say how the tensors of a state are."""

    def __init__(self, model: nn.Module, optimizers: Mapping[str, Sequence[Tensor]]) -> None:
        self._model = {name: value.detach() for name, value in model.state_dict().items() if is_sharded(value)}
        self._optimizers = optimizers

    def __bool__(self) -> bool:
        return bool(self._model)

    def __call__(self, path: tuple[Any, ...], shape: tuple[int, ...]) -> Tensor | None:
        """Returns a sharded tensor as whose parts those of the tensor at this path are needed; None for a whole one."""
        like: Tensor | None = None
        match path:
            case ("model", name):
                like = self._model.get(name)
            case ("step", optimizer, "state", int(number), _):
                parameters = self._optimizers.get(optimizer, ())
                like = parameters[number].detach() if 0 <= number < len(parameters) else None
        return like if like is not None and is_sharded(like) and like.shape == shape else None


def _whole(tensor: Tensor) -> Sharded:
    """Describes a tensor that consists of one chunk."""
    shape = tuple(tensor.shape)
    return Sharded(str(tensor.dtype).removeprefix("torch."), shape, (Chunk((0,) * len(shape), shape, "", 0, 0),))
