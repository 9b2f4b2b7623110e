"""The tasks' gradients at the features of a shared trunk, and their backward passes through the trunk."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mtl.balancers._math.gramian import gramian
from mtl.distributed.collectives import sum_numbers, sum_over_processes
from mtl.gradients.backward import sharded_gradients_at
from mtl.gradients.gathered import choose, gather
from mtl.gradients.layerwise import Layer, Product, find
from mtl.gradients.leaves import leaves
from mtl.gradients.rows import Rows, plus
from mtl.gradients.sums import sum_gradients
from mtl.snapshots import Buffers


class AtFeatures(Rows):
    """The tasks' gradients in `shared` passes, which run backward through the trunk only when that is needed.

    The gradients of the heads' parameters are taken out of `.grad`. The gradients at the features wait until the
    Gramian is needed. With the sources `rows` and `layerwise`, each task then runs backward through the trunk;
    `layerwise` replaces the rows of some layers by smaller tensors with the same inner products, see layerwise.py. With
    `representation`, the Gramian is that of the gradients at the features. If the weights come from there, or from an
    earlier step, the combination needs one backward pass of the trunk for all tasks.

    Args:
        model: The model.
        source: `rows`, `layerwise` or `representation`.
        waits: Whether the gradients wait at the features; they can't if there are several micro-batches, each with a
            graph of its own.
        tasks, scale, processes, whole: See `Rows`.
    """

    def __init__(
        self,
        model: nn.Module,
        tasks: Iterable[str],
        *,
        source: str,
        waits: bool = True,
        scale: float = 1.0,
        processes: int = 1,
        whole: bool = False,
    ) -> None:
        super().__init__(dict(model.named_parameters()), tasks, scale=scale, processes=processes, whole=whole)
        self._model = model
        self._source = source
        self._waits = waits
        self._is_through = False  # whether the tasks have run their backward passes through the trunk
        self._features: list[Tensor] = []
        self._at: dict[str, list[Tensor | None]] = {}  # by task, the gradient at each tensor of the features
        self._deltas: list[tuple[Layer, list[Tensor]]] = []  # layers without rows, and the tasks' gradients δ at them
        self._of_layers: Tensor | None = None  # the sum of these layers' Gramians

    def take_at_features(self, features: Sequence[Tensor], gradients: Mapping[str, list[Tensor | None]]) -> None:
        """Records the gradients at the trunk's features; `take` records those of the heads' parameters.

        Args:
            features: The tensors of the features, with the graph of the trunk.
            gradients: By task name, the gradient at each tensor; None if the task doesn't use the tensor.
        """
        self._features = list(features)
        self._at = dict(gradients)
        if not self._waits:
            self._through()

    def gramian(self) -> Tensor:
        """Computes the Gramian as `Rows.gramian` does; with `representation`, of the gradients at the features.

        The gradient norm of a task is at most the norm of the trunk's Jacobian times the norm at the features. Since
        gradients at different tensors can't conflict, rows are used if the tasks don't all use the same ones.
        """
        if self._source == "representation" and self._one_trunk(alike=True):
            local = self._at_features()
            return (local if self._processes == 1 else sum_over_processes(local)) / self._scale**2
        self._through()
        if self._gramian is None and self._of_layers is not None:
            self._gramian = super().gramian() + self._of_layers
        return super().gramian()

    def _at_features(self) -> Tensor:
        """Returns the Gramian of the gradients at the features of this process, without the scale."""
        absent: list[Tensor | None] = [None] * len(self._features)
        pieces = [p for p in zip(*(self._at.get(task, absent) for task in self._gradients), strict=True) if _any(p)]
        if pieces:
            return gramian(pieces)
        count, like = len(self._gradients), next(iter(self._parameters.values()))
        return torch.zeros(count, count, dtype=torch.float64, device=like.device)

    def shared(self) -> list[nn.Parameter]:
        """Returns the shared parameters, see `Rows.shared`."""
        self._through()
        return super().shared()

    def reach(self) -> dict[str, tuple[str, ...]]:
        """Returns the tasks that reach each parameter, see `Rows.reach`."""
        self._through()
        return super().reach()

    def norms(self) -> dict[str, Tensor]:
        """Computes the gradient norm of each task, see `Rows.norms`."""
        self._through()
        norms = super().norms()
        if self._of_layers is None:
            return norms
        squares = self._of_layers.diagonal().clamp(min=0)
        return {task: (norm**2 + square).sqrt() for (task, norm), square in zip(norms.items(), squares, strict=True)}

    def combine(self, weights: Sequence[float], alone: Sequence[float]) -> None:
        """Leaves the weighted sum of the rows in `.grad`, see `Rows.combine`."""
        if self._one_trunk():
            features, at = self._features, list(self._at.values())
            of_task = dict(zip(self._gradients, weights, strict=True))
            own = [of_task[task] for task in self._at]
            self._at = {}
            self._combine(weights, alone)  # the heads' parameters
            sums = [_weighted(gradients, own) for gradients in zip(*at, strict=True)]
            pairs = [(f, total) for f, total in zip(features, sums, strict=True) if total is not None]
            if pairs:
                torch.autograd.backward([f for f, _ in pairs], [total for _, total in pairs])
            if self._processes > 1 and not self._sharded:
                sum_gradients(self._parameters.values())
            return
        self._through()
        for row in self._gradients.values():
            for parameter in [p for p, gradient in row.items() if not gradient.numel() and p.numel()]:
                del row[parameter]  # an empty tensor, which marked that the task reaches the parameter
        super().combine(weights, alone)
        while self._deltas:  # each entry is freed after use
            layer, deltas = self._deltas.pop()
            total = _weighted(deltas, weights)
            del deltas
            assert total is not None
            for parameter, gradient in zip(layer.parameters, layer.gradients(total), strict=True):
                parameter.grad = _laid_out(gradient, parameter)

    def _used(self) -> list[tuple[bool, ...]]:
        """Returns, for each task, whether it uses each tensor of the features."""
        return [tuple(gradient is not None for gradient in at) for at in self._at.values()]

    def _behind(self) -> list[set[Tensor]]:
        """Returns, for each task, the parameters that the task reaches through the features."""
        reached: dict[tuple[bool, ...], set[Tensor]] = {}
        used = self._used()
        for flags in used:
            if flags not in reached:
                reached[flags] = set(leaves([f for f, is_used in zip(self._features, flags, strict=True) if is_used]))
        return [reached[flags] for flags in used]

    def _one_trunk(self, *, alike: bool = False) -> bool:
        """Returns whether all tasks reach the same parameters through the features, and no head reaches any of them.

        Args:
            alike: Whether they have to use the same tensors of the features as well.
        """
        behind = self._behind()
        one = bool(behind and behind[0]) and not (alike and len(set(self._used())) > 1)
        one = one and all(
            reached == behind[0] and reached.isdisjoint(row)
            for reached, row in zip(behind, (self._gradients[task] for task in self._at), strict=True)
        )
        if self._processes == 1:
            return one
        several = self._is_through or (bool(self._at) and not one)  # a process may have no samples, and no features
        ones, severals = sum_numbers([one, several])
        return ones > 0 and severals == 0

    def _through(self) -> None:
        """Runs each task's backward pass from the features to the parameters, unless that has been done."""
        is_first = not self._is_through
        self._is_through = True
        if not self._at and not (is_first and self._gathers):
            return
        behind, at = self._behind(), self._at
        parameters = set(self._parameters.values())
        layers: list[Layer] = []
        common = set.intersection(*behind) & parameters if behind else set()
        if self._source == "layerwise" and common:
            used = [f for f, *gradients in zip(self._features, *at.values(), strict=True) if _any(gradients)]
            of_heads = {parameter for row in self._gradients.values() for parameter in row}
            found = find(used, None if self._gathers else len(at))
            layers = [layer for layer in found if common - of_heads >= set(layer.parameters)]
        if self._gathers:
            everything = list(self._parameters.values())
            chosen = choose(layers, everything, len(self._gradients), is_empty=not at)
            layers = [layer for layer in chosen if layer.edge is not None]
            self._apart = {parameter for layer in chosen for parameter in layer.parameters}
        taken = {parameter for layer in layers for parameter in layer.parameters}
        deltas: list[list[Tensor | None]] = []
        buffers = Buffers(self._model) if len(at) > 1 else None
        for (task, gradients), reached in zip(at.items(), behind, strict=True):
            pairs = [(f, g) for f, g in zip(self._features, gradients, strict=True) if g is not None]
            slow = [parameter for parameter in self._parameters.values() if parameter in reached - taken]
            retain_graph = task != list(at)[-1]
            wanted: list[Any] = [*(layer.edge for layer in layers), *slow]
            results: Sequence[Tensor | None] = ()
            outputs, starts = [f for f, _ in pairs], [g for _, g in pairs]
            if self._sharded and pairs:
                found_at = dict(sharded_gradients_at(slow, outputs, starts, retain_graph=retain_graph))
                results = [found_at.get(parameter) for parameter in slow]
            elif pairs:
                results = torch.autograd.grad(outputs, wanted, starts, retain_graph=retain_graph, allow_unused=True)
            if retain_graph and buffers is not None:
                buffers.restore()
            deltas.append(list(results[: len(layers)]))
            row = self._gradients[task]
            storages = {g.untyped_storage().data_ptr() for g in (*gradients, *deltas[-1]) if g is not None}
            for parameter, gradient in zip(slow, results[len(layers) :], strict=True):
                if gradient is not None:
                    total = plus(row[parameter], gradient) if parameter in row else gradient
                    row[parameter] = total if self._sharded else _laid_out(total, parameter, storages)
            row |= {parameter: parameter.new_empty(0) for parameter in taken}  # marks that the task reaches it
        self._at, self._features = {}, []
        if self._gathers:
            self._gather(chosen, dict(zip(at, deltas, strict=True)))
            return
        for layer, of_tasks in zip(layers, zip(*deltas, strict=True), strict=True):
            some = next((delta for delta in of_tasks if delta is not None), None)
            if some is None:  # no gradient arrived at the layer's outputs
                continue
            whole = [torch.zeros_like(some) if delta is None else delta for delta in of_tasks]
            self._note(layer, whole)

    def _gather(self, layers: Sequence[Product], deltas: Mapping[str, Sequence[Tensor | None]]) -> None:
        """Gathers layers from all processes; the gradients at the layers' outputs are given by task name."""
        for number, layer in enumerate(layers):
            self._note(*gather(layer, [deltas[task][number] if task in deltas else None for task in self._gradients]))

    def _note(self, layer: Layer, deltas: list[Tensor]) -> None:
        """Records a layer without rows, and the tasks' gradients at its outputs."""
        product = gramian([layer.compress(deltas)]) / self._scale**2
        self._of_layers = product if self._of_layers is None else self._of_layers + product
        self._deltas.append((layer, deltas))

    @property
    def _gathers(self) -> bool:
        """Whether layers are gathered from all processes."""
        return self._source == "layerwise" and self._processes > 1


def _any(gradients: Iterable[Tensor | None]) -> bool:
    return any(gradient is not None for gradient in gradients)


def _weighted(gradients: Sequence[Tensor | None], weights: Sequence[float]) -> Tensor | None:
    """Returns Σ w_t g_t, without the gradients that are None; None if all are."""
    total: Tensor | None = None
    for gradient, weight in zip(gradients, weights, strict=True):
        if gradient is not None:
            total = gradient * weight if total is None else total.add_(gradient, alpha=weight)
    return total


def _laid_out(gradient: Tensor, parameter: Tensor, storages: set[int] | None = None) -> Tensor:
    """Returns the gradient with the parameter's strides, on which optimizers rely, and with a storage of its own.

    Autograd ensures both in `.grad`, but `torch.autograd.grad` may return a view, or one tensor for two parameters.

    Args:
        gradient: The gradient; it is copied only if necessary.
        parameter: The parameter.
        storages: The addresses of storages in use, to which that of the result is added. None skips this check.
    """
    if gradient.is_sparse:
        return gradient
    address = gradient.untyped_storage().data_ptr()
    if gradient.stride() != parameter.stride() or (storages is not None and address in storages):
        gradient = torch.empty_like(parameter).copy_(gradient)
        address = gradient.untyped_storage().data_ptr()
    if storages is not None:
        storages.add(address)
    return gradient
