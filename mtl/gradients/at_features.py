"""The tasks' gradients where they meet: at the trunk's features, and from there through the trunk."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mtl.balancers._math.gramian import gramian
from mtl.gradients.layerwise import Layer, find
from mtl.gradients.rows import Rows, leaves, plus
from mtl.snapshots import Buffers


class AtFeatures(Rows):
    """Rows of `shared` passes: the heads' part comes out of `.grad`, the trunk's only when it is needed, and how.

    Until somebody asks for the Gramian a task's gradient has gone no further than the features. To give it, `rows` and
    `layerwise` take each task through the trunk, the latter with stand-ins for the rows of layers for which that pays;
    `representation` looks at the features alone. With weights from there, or from an earlier step, the combination
    needs one backward of the trunk in all.

    Args:
        model: whose trunk it is.
        source: `rows`, `layerwise` or `representation`.
        waits: whether gradients wait at the features. They can't where the next micro-batch has a graph of its own.
        tasks, scale: see `Rows`.
    """

    def __init__(
        self, model: nn.Module, tasks: Iterable[str], *, source: str, waits: bool = True, scale: float = 1.0
    ) -> None:
        super().__init__(dict(model.named_parameters()), tasks, scale=scale)
        self._model = model
        self._source = source
        self._waits = waits
        self._features: list[Tensor] = []
        self._at: dict[str, list[Tensor | None]] = {}  # by task, the gradient at each of the features
        self._deltas: list[tuple[Layer, list[Tensor]]] = []  # by layer that has stand-ins, the tasks' δ
        self._of_layers: Tensor | None = None  # these layers' share of the Gramian

    def take_at_features(self, features: Sequence[Tensor], gradients: Mapping[str, list[Tensor | None]]) -> None:
        """Takes the gradients at the trunk's features; those of the heads come by `take`.

        Args:
            features: with the trunk's graph.
            gradients: by task, one for each of the features, None where the task doesn't use it.
        """
        self._features = list(features)
        self._at = dict(gradients)
        if not self._waits:
            self._through()

    def gramian(self) -> Tensor:
        """As `Rows.gramian`; for `representation` that of the gradients at the features.

        The latter bounds the former: ‖g_t‖ is at most the norm of the trunk's Jacobian times that at the features.
        """
        if self._source == "representation" and self._one_trunk():
            return gramian(list(zip(*self._at.values(), strict=True))) / self._scale**2
        self._through()
        if self._gramian is None and self._of_layers is not None:
            self._gramian = super().gramian() + self._of_layers
        return super().gramian()

    def shared(self) -> list[nn.Parameter]:
        """As `Rows.shared`."""
        self._through()
        return super().shared()

    def reach(self) -> dict[str, tuple[str, ...]]:
        """As `Rows.reach`."""
        self._through()
        return super().reach()

    def norms(self) -> dict[str, Tensor]:
        """As `Rows.norms`."""
        self._through()
        found = super().norms()
        if self._of_layers is None:
            return found
        squares = self._of_layers.diagonal().clamp(min=0)
        return {task: (norm**2 + more).sqrt() for (task, norm), more in zip(found.items(), squares, strict=True)}

    def combine(self, weights: Sequence[float], alone: Sequence[float]) -> None:
        """As `Rows.combine`."""
        if self._one_trunk():
            features, at = self._features, list(self._at.values())
            self._at = {}
            super().combine(weights, alone)  # what belongs to the heads
            sums = [_weighted(gradients, weights) for gradients in zip(*at, strict=True)]
            pairs = [(f, total) for f, total in zip(features, sums, strict=True) if total is not None]
            torch.autograd.backward([f for f, _ in pairs], [total for _, total in pairs])
            return
        self._through()
        for row in self._gradients.values():
            for parameter in [p for p, gradient in row.items() if gradient.shape != p.shape]:
                del row[parameter]  # it was there to say that the task reaches the parameter
        super().combine(weights, alone)
        while self._deltas:  # each is given up as it is used
            layer, deltas = self._deltas.pop()
            total = _weighted(deltas, weights)
            del deltas
            assert total is not None
            for parameter, gradient in zip(layer.parameters, layer.gradients(total), strict=True):
                parameter.grad = _laid_out(gradient, parameter)

    def _behind(self) -> list[set[Tensor]]:
        """What each task reaches through the features."""
        found: dict[tuple[bool, ...], set[Tensor]] = {}
        used = [tuple(gradient is not None for gradient in at) for at in self._at.values()]
        for features in used:
            if features not in found:
                found[features] = set(leaves([f for f, there in zip(self._features, features, strict=True) if there]))
        return [found[features] for features in used]

    def _one_trunk(self) -> bool:
        """Whether all tasks reach the same parameters through the features, and no head reaches any of these."""
        behind = self._behind()
        return bool(behind and behind[0]) and all(
            reached == behind[0] and reached.isdisjoint(row)
            for reached, row in zip(behind, (self._gradients[task] for task in self._at), strict=True)
        )

    def _through(self) -> None:
        """Takes every task's gradient on from the features to the parameters, once."""
        if not self._at:
            return
        behind, at = self._behind(), self._at
        own = set(self._parameters.values())
        layers: list[Layer] = []
        if self._source == "layerwise" and all(reached == behind[0] for reached in behind):
            used = [f for f, *gradients in zip(self._features, *at.values(), strict=True) if _any(gradients)]
            of_heads = {parameter for row in self._gradients.values() for parameter in row}
            layers = [layer for layer in find(used, len(at)) if own - of_heads >= set(layer.parameters)]
        taken = {parameter for layer in layers for parameter in layer.parameters}
        deltas: list[list[Tensor | None]] = []
        buffers = Buffers(self._model) if len(at) > 1 else None
        for (task, gradients), reached in zip(at.items(), behind, strict=True):
            pairs = [(f, g) for f, g in zip(self._features, gradients, strict=True) if g is not None]
            slow = [parameter for parameter in self._parameters.values() if parameter in reached - taken]
            more = task != list(at)[-1]
            wanted: list[Any] = [*(layer.edge for layer in layers), *slow]
            found: Sequence[Tensor | None] = ()
            if pairs:
                outputs, starts = [f for f, _ in pairs], [g for _, g in pairs]
                found = torch.autograd.grad(outputs, wanted, starts, retain_graph=more, allow_unused=True)
            if more and buffers is not None:
                buffers.restore()
            deltas.append(list(found[: len(layers)]))
            row = self._gradients[task]
            there = {g.untyped_storage().data_ptr() for g in (*gradients, *deltas[-1]) if g is not None}
            for parameter, gradient in zip(slow, found[len(layers) :], strict=True):
                if gradient is not None:
                    total = plus(row[parameter], gradient) if parameter in row else gradient
                    row[parameter] = _laid_out(total, parameter, there)
            row |= {parameter: parameter.new_empty(0) for parameter in taken}  # there, with its products elsewhere
        self._at, self._features = {}, []
        for layer, of_tasks in zip(layers, zip(*deltas, strict=True), strict=True):
            some = next((delta for delta in of_tasks if delta is not None), None)
            if some is None:  # a function behind the layer gave no gradient
                continue
            whole = [torch.zeros_like(some) if delta is None else delta for delta in of_tasks]
            product = gramian([layer.compress(whole)]) / self._scale**2
            self._of_layers = product if self._of_layers is None else self._of_layers + product
            self._deltas.append((layer, whole))


def _any(gradients: Iterable[Tensor | None]) -> bool:
    return any(gradient is not None for gradient in gradients)


def _weighted(gradients: Sequence[Tensor | None], weights: Sequence[float]) -> Tensor | None:
    """Σ w_t g_t; None where all are."""
    total: Tensor | None = None
    for gradient, weight in zip(gradients, weights, strict=True):
        if gradient is not None:
            total = gradient * weight if total is None else total.add_(gradient, alpha=weight)
    return total


def _laid_out(gradient: Tensor, parameter: Tensor, there: set[int] | None = None) -> Tensor:
    """The gradient with the parameter's strides, which optimizers rely on, in memory that no tensor in `there` uses.

    In `.grad` autograd sees to both; what `autograd.grad` gives may be a view, or one tensor for two parameters.
    """
    if gradient.is_sparse:
        return gradient
    place = gradient.untyped_storage().data_ptr()
    if gradient.stride() != parameter.stride() or (there is not None and place in there):
        gradient = torch.empty_like(parameter).copy_(gradient)
        place = gradient.untyped_storage().data_ptr()
    if there is not None:
        there.add(place)
    return gradient
