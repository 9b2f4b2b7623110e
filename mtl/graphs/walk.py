"""Traverses what autograd built for one batch: leaves, operations, and modules without a graph."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten_with_path, tree_leaves

from mtl.gradients.leaves import leaves
from mtl.graphs.life import living_anyway, storages
from mtl.graphs.watched import Watcher
from mtl.model import MultiTaskModel


@dataclass
class Leaf:
    """A tensor at which gradients end, or would end if it weren't frozen.

    Attributes:
        name: The name of the parameter, the buffer, or the field of the batch that the tensor belongs to.
        kind: `parameter`, `buffer`, `input` or `other`.
        shape: The shape of the tensor.
        requires_grad: Whether the tensor requires a gradient.
        tasks: The tasks whose losses reach the tensor, in the order of the tasks.
        also: Further names of a tied parameter.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    requires_grad: bool
    tasks: list[str] = field(default_factory=list)
    also: list[str] = field(default_factory=list)

    @property
    def count(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def shared(self) -> bool:
        """Whether at least two tasks reach the tensor."""
        return len(self.tasks) > 1


@dataclass
class Operation:
    """A node of the graph.

    Attributes:
        name: Autograd's name, such as `AddmmBackward0`.
        inputs: The targets of the node's gradients: numbers of operations, and names of leaves.
        tasks: The tasks whose losses depend on the operation, in the order of the tasks.
        ends: The tasks whose losses are the operation's output.
    """

    name: str
    inputs: list[int | str]
    tasks: list[str] = field(default_factory=list)
    ends: list[str] = field(default_factory=list)


@dataclass
class Visit:
    """What a module did in the forward passes.

    Attributes:
        called: Whether the module was called.
        walked: Whether a graph goes through the module, because an output requires gradients.
        saved: The number of bytes saved within the module for the backward pass, without parameters, buffers and the
            batch.
    """

    called: bool = False
    walked: bool = False
    saved: int = 0


class Walk(Watcher):
    """Collects leaves, operations and modules from the graphs of a step while the graphs are alive.

    Args:
        model: The model of the step.
        names: The names of the tasks, in order.
        batch: The batch of the step.
        draw: A function that is called once per task with the task's name and loss, while the task's graph is alive.

    Attributes:
        leaves: The model's parameters and all other leaves, by name.
        operations: The operations, by number. Tasks with batches of their own have separate graphs.
        modules: What each module did, by name.
        without_graph: The tasks whose losses require no gradient.
    """

    def __init__(
        self,
        model: MultiTaskModel,
        names: Sequence[str],
        batch: Any,
        draw: Callable[[str, Tensor], None] = lambda name, loss: None,
    ) -> None:
        self._model = model
        self.names = list(names)
        self._draw = draw
        self._first = {parameter: name for name, parameter in model.named_parameters()}
        self._buffers = {buffer: name for name, buffer in model.named_buffers()}
        self._fields = _fields(batch)
        self._others: dict[Tensor, str] = {}
        self.leaves = {
            name: Leaf(name, "parameter", tuple(p.shape), p.requires_grad) for p, name in self._first.items()
        }
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if name != self._first[parameter]:
                self.leaves[self._first[parameter]].also.append(name)
        self.operations: dict[int, Operation] = {}
        self.modules = {name: Visit() for name, _ in model.named_modules() if name}
        self.without_graph: list[str] = []
        self._anyway = {place for tensor in living_anyway(model, batch) for place, _ in storages(tensor)}
        self._within: list[str] = []
        self._counted: set[tuple[str, int]] = set()

    @property
    def seen(self) -> list[str]:
        """Returns the tasks that took part in the step, in order."""
        present = {task for operation in self.operations.values() for task in operation.ends}
        present |= {task for leaf in self.leaves.values() for task in leaf.tasks}
        return [name for name in self.names if name in present or name in self.without_graph]

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Records within the block what the modules of the model do."""
        with ExitStack() as stack:
            for name, module in self._model.named_modules():
                if name and not isinstance(module, torch.jit.ScriptModule):
                    stack.callback(module.register_forward_pre_hook(partial(self._enter, name)).remove)
                    stack.callback(module.register_forward_hook(partial(self._leave, name), always_call=True).remove)
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(self._saved, lambda saved: saved))
            yield

    def _enter(self, name: str, *_: Any) -> None:
        self._within.append(name)

    def _leave(self, name: str, _: nn.Module, __: Any, output: Any) -> None:
        self._within.pop()
        visit = self.modules[name]
        visit.called = True
        visit.walked |= any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in tree_leaves(output))

    def _saved(self, tensor: Tensor) -> Tensor:
        for place, size in storages(tensor):
            for name in self._within if place not in self._anyway else ():
                if (name, place) not in self._counted:
                    self._counted.add((name, place))
                    self.modules[name].saved += size
        return tensor.detach()  # a tensor with a graph would keep the graph alive

    def see(self, names: Sequence[str], losses: Sequence[Tensor]) -> None:
        """Traverses the graphs of these losses."""
        numbers: dict[Any, int] = {}  # nodes keep their identity as long as they are referenced
        for name, loss in zip(names, losses, strict=True):
            new = name not in self.seen
            for tensor in leaves([loss]):
                leaf = self._leaf(tensor)
                if name not in leaf.tasks:
                    leaf.tasks = [each for each in self.names if each in leaf.tasks or each == name]
            if not loss.requires_grad:
                self.without_graph.append(name)
            elif new:  # micro-batches repeat the same graph
                self._draw(name, loss)
                if loss.grad_fn is not None:
                    self._traverse(name, loss.grad_fn, numbers)

    def _traverse(self, task: str, end: Any, numbers: dict[Any, int]) -> None:
        """Records all operations that can be reached from the node."""
        stack, seen = [end], {end}
        while stack:
            node = stack.pop()
            number = self._number(node, numbers)
            operation = self.operations[number]
            operation.tasks = [each for each in self.names if each in operation.tasks or each == task]
            if node is end:
                operation.ends.append(task)
            new = not operation.inputs
            for following, _ in node.next_functions:
                if following is None:
                    continue
                if hasattr(following, "variable"):
                    if new:
                        operation.inputs.append(self._leaf(following.variable).name)
                    continue
                if new:
                    operation.inputs.append(self._number(following, numbers))
                if following not in seen:
                    seen.add(following)
                    stack.append(following)

    def _number(self, node: Any, numbers: dict[Any, int]) -> int:
        if node not in numbers:
            numbers[node] = len(self.operations)
            self.operations[numbers[node]] = Operation(node.name(), [])
        return numbers[node]

    def _leaf(self, tensor: Tensor) -> Leaf:
        if tensor in self._first:
            return self.leaves[self._first[tensor]]  # type: ignore[index]
        kind, name = "other", self._others.setdefault(tensor, f"leaf {len(self._others) + 1}")
        places = [place for place, _ in storages(tensor)]
        if tensor in self._buffers:
            kind, name = "buffer", self._buffers[tensor]
        elif places[0] in self._fields:
            kind, name = "input", self._fields[places[0]]
        return self.leaves.setdefault(name, Leaf(name, kind, tuple(tensor.shape), True))

    def named(self) -> dict[str, Tensor]:
        """Returns the parameters by name, for drawing."""
        return {name: parameter for parameter, name in self._first.items()}

    def unreached(self) -> list[str]:
        """Returns the trainable parameters that no task reached."""
        return [leaf.name for leaf in self.leaves.values() if leaf.requires_grad and not leaf.tasks]

    def frozen(self) -> dict[str, tuple[list[Leaf], Visit]]:
        """Returns the frozen leaves by outermost frozen module or by parameter, each with what the module did.

        For a module that is never called itself, the record of the enclosing module is used.
        """
        frozen: dict[str, tuple[list[Leaf], Visit]] = {}
        for leaf in self.leaves.values():
            if leaf.kind == "parameter" and not leaf.requires_grad:
                around = [name for name in _around(leaf.name) if self._is_frozen(name)]
                name = around[0] if around else leaf.name
                frozen.setdefault(name, ([], self._visit(name)))[0].append(leaf)
        return frozen

    def _is_frozen(self, module: str) -> bool:
        """Returns whether all parameters of the module are frozen."""
        inside = [leaf for leaf in self.leaves.values() if leaf.name.startswith(f"{module}.")]
        return not any(leaf.requires_grad for leaf in inside)

    def _visit(self, name: str) -> Visit:
        for each in [name, *reversed(_around(name))]:
            if each in self.modules and self.modules[each].called:
                return self.modules[each]
        return Visit()

    def saved_nothing(self) -> list[str]:
        """Returns the outermost modules that were called and saved nothing for the backward pass."""
        nothing = {name for name, visit in self.modules.items() if visit.called and not visit.saved}
        return [name for name in self.modules if name in nothing and not nothing & set(_around(name))]


def _around(name: str) -> list[str]:
    """Returns the modules that contain the parameter or module with this name, the outermost first."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


def _fields(batch: Any) -> Mapping[int, str]:
    """Maps the batch's memory to the names of the fields; a field of several tasks has the first task's name."""
    names: dict[int, str] = {}
    pairs = [
        pair for each in (batch if isinstance(batch, list) else [batch]) for pair in tree_flatten_with_path(each)[0]
    ]
    for path, value in pairs:
        if isinstance(value, Tensor):
            for place, _ in storages(value):
                names.setdefault(place, ".".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path))
    return names
