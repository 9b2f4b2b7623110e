"""Saving and restoring of state that a pass changes: random state, buffers, and the state of other objects."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy


class Buffers:
    """The values of all buffers of a module, such as the running statistics of batch norm.

    Args:
        module: The module whose buffers are copied.
    """

    def __init__(self, module: nn.Module) -> None:
        # By module and name, since a forward pass may replace a buffer by another tensor.
        owned = [(m, name, b) for m in module.modules() for name, b in m._buffers.items() if b is not None]
        self._copies = [(m, name, buffer, distinct(buffer).clone()) for m, name, buffer in owned if not is_lazy(buffer)]

    def restore(self) -> None:
        """Copies the values back, into the tensors that held them."""
        for module, name, buffer, value in self._copies:
            distinct(buffer.data).copy_(value)  # .data, since a graph may have saved the buffer for the backward pass
            module._buffers[name] = buffer


def distinct(tensor: Tensor) -> Tensor:
    """Returns a view without the repetitions of a tensor from `expand`, which can't be written to."""
    if tensor.layout == torch.strided:
        for dim, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
            if size > 1 and not stride:
                tensor = tensor.narrow(dim, 0, 1)
    return tensor


class Snapshot:
    """Random state, buffers, and the state of other objects.

    Args:
        model: The model. The random generators of its device are saved.
        module: The module whose buffers are saved; by default the whole model.
        others: Other objects with `state_dict` and `load_state_dict`, whose state is saved.
    """

    def __init__(self, model: nn.Module, module: nn.Module | None = None, *, others: Sequence[Any] = ()) -> None:
        self._model = model
        self._generators = generators_of(model)
        self._random_states = [generator.get_state() for generator in self._generators]
        self._buffers = Buffers(model if module is None else module)
        self._others = [(other, copy.deepcopy(other.state_dict())) for other in others]

    def restore(self) -> None:
        """Restores everything that was saved."""
        self.restore_random_state()
        self._buffers.restore()
        for other, state in self._others:
            other.load_state_dict(copy.deepcopy(state))

    def restore_random_state(self) -> None:
        """Restores the states of the random generators alone."""
        set_states(self._generators, self._random_states)

    def repeat(self, function: Callable[..., Any], *args: Any) -> Any:
        """Calls a function with the random state and the buffers that were saved.

        The random generators then go on from where they were before the call.
        """
        with preserved_random_state(self._model):
            self.restore_random_state()
            self._buffers.restore()
            return function(*args)


@contextmanager
def preserved_buffers(model: nn.Module) -> Iterator[None]:
    """Restores the model's buffers at the end of the context.

    Backward passes may change buffers too, since activation checkpointing runs forward passes in them.
    """
    buffers = Buffers(model)
    yield
    buffers.restore()


@contextmanager
def preserved_random_state(model: nn.Module) -> Iterator[None]:
    """Restores the states of the random generators at the end of the context, even if the code in it fails."""
    generators = generators_of(model)
    states = [generator.get_state() for generator in generators]
    try:
        yield
    finally:
        set_states(generators, states)


def generators_of(model: nn.Module) -> list[torch.Generator]:
    """Returns the random generators that a forward pass of the model uses."""
    generators = [torch.default_generator]
    device = next(model.parameters()).device
    if device.type == "cuda":
        generators.append(torch.cuda.default_generators[device.index or 0])
    return generators


def set_states(generators: Sequence[torch.Generator], states: Sequence[Tensor]) -> None:
    """Sets the state of each generator."""
    for generator, state in zip(generators, states, strict=True):
        generator.set_state(state)
