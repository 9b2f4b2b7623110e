"""Which task reaches which parameter, and the tasks' gradients: norms and cosines."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from mtl.balancers._math.gramian import gramian
from mtl.errors import UserError
from mtl.gradients.compiled import check_reusable


def leaves(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The leaf tensors that a backward pass from `tensors` would give a gradient.

    Raises:
        UserError: where re-entrant checkpointing hides what lies behind it, and where a compiled module's backward
            pass can be made only once.
    """
    found: dict[Tensor, None] = {}
    stack = []
    for tensor in tensors:
        if tensor.grad_fn is not None:
            stack.append(tensor.grad_fn)
        elif tensor.requires_grad:
            found[tensor] = None
    seen = set(stack)
    while stack:
        node = stack.pop()
        if hasattr(node, "variable"):
            found[node.variable] = None
        elif node.name() == "CheckpointFunctionBackward":
            raise UserError(
                "re-entrant activation checkpointing hides the parameters behind it; "
                "call torch.utils.checkpoint.checkpoint(..., use_reentrant=False)"
            )
        elif node.name() == "CompiledFunctionBackward":
            check_reusable(node)
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                stack.append(following)
    return list(found)


def total_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The norm, 0-dim, of all the gradients that are there."""
    parameters = list(parameters)
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return torch.zeros((), device=parameters[0].device)
    return get_total_norm([g.coalesce().values() if g.is_sparse else g for g in gradients])


class Rows:
    """The tasks' gradients in one step: which task reaches which parameter, norms, cosines, Gramian, combination.

    A row is kept as the tensors that autograd made, by parameter; they are never copied into one.

    Args:
        parameters: all of the model's, by name.
        tasks: their names, in the order of the rows.
        scale: the factor on the gradients that keeps half precision from underflowing. It is taken out of norms and
            Gramian, and left in the combination.

    Attributes:
        shares: of the micro-batch at hand in each task's loss, 1 where nothing is said.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], tasks: Iterable[str], *, scale: float = 1.0) -> None:
        self._parameters = parameters
        self._scale = scale
        self.shares: dict[str, float] = {}
        self._gradients: dict[str, dict[Tensor, Tensor]] = {task: {} for task in tasks}
        self._gramian: Tensor | None = None  # of the rows there are, once it has been asked for

    def add(self, task: str, loss: Tensor, cuts: Mapping[Tensor, Tensor] | None = None) -> None:
        """Takes one task's row by `torch.autograd.grad`, beside the training's own backward passes.

        These find graph, `.grad` and random state as they would have without it.

        Args:
            task: its name.
            loss: its unweighted loss.
            cuts: where the graph was cut at the features: from each detached tensor to the one it stands for.
        """
        gradients = self._gradients[task]
        self._gramian = None
        features, at_features = [], []
        for leaf, gradient in _gradients_at([loss], [torch.full_like(loss, self.shares.get(task, 1.0) * self._scale)]):
            if cuts and leaf in cuts:
                features.append(cuts[leaf])
                at_features.append(gradient)
            else:
                gradients[leaf] = plus(gradients.get(leaf), gradient)
        for leaf, gradient in _gradients_at(features, at_features):
            gradients[leaf] = plus(gradients.get(leaf), gradient)

    def take(self, task: str) -> None:
        """Takes what is in `.grad` as one task's row, or adds it to that, and leaves `.grad` empty for the next."""
        row = self._gradients[task]
        self._gramian = None
        for parameter in self._parameters.values():
            if parameter.grad is not None:
                row[parameter] = plus(row.get(parameter), parameter.grad)
                parameter.grad = None

    def shared(self) -> list[nn.Parameter]:
        """The parameters that at least two tasks reach, in the model's order."""
        return self._shared()

    def _shared(self) -> list[nn.Parameter]:
        rows = self._gradients.values()
        return [p for p in self._parameters.values() if sum(p in row for row in rows) > 1]

    def gramian(self) -> Tensor:
        """G Gᵀ over the shared parameters, (T, T), float64.

        Raises:
            UserError: where no parameter is shared.
        """
        if self._gramian is None:
            pieces = [[row.get(p) for row in self._gradients.values()] for p in self._to_balance()]
            self._gramian = gramian(pieces) / self._scale**2
        return self._gramian

    def gramian_of_all(self) -> Tensor:
        """G Gᵀ over all parameters, (T, T), float64: what one task alone reaches counts on the diagonal.

        Raises:
            UserError: where no parameter is shared.
        """
        products = self.gramian()
        shared = set(self.shared())
        alone = [
            self._norm([gradient for parameter, gradient in row.items() if parameter not in shared])
            for row in self._gradients.values()
        ]
        return products + (torch.stack(alone) / self._scale).square().diag()

    def finite(self) -> Tensor:
        """Whether each task's gradient, as far as it has been taken, is finite in all that the task reaches, (T,)."""
        return torch.stack(list(Rows.norms(self).values())).isfinite()

    def stacked(self, own: Sequence[float]) -> dict[str, Tensor]:
        """The shared columns of G, by parameter: (T, *shape) each, a row a task, times the tasks' own weights.

        The rows are given up to it, so that there are never two copies of more than one parameter's columns.
        """
        names = {parameter: name for name, parameter in self._parameters.items()}
        matrices = {}
        for parameter in self._to_balance():
            rows = [row.pop(parameter, None) for row in self._gradients.values()]
            if any(row is not None and row.is_sparse for row in rows):
                raise UserError(
                    f"'{names[parameter]}' has sparse gradients, which this balancer can't combine element by element; "
                    "use sparse=False, or a balancer that needs the Gramian only"
                )
            matrix = torch.zeros(len(rows), *parameter.shape, dtype=parameter.dtype, device=parameter.device)
            for to, row, weight in zip(matrix, rows, own, strict=True):
                if row is not None:
                    to.add_(row, alpha=weight / self._scale)
            matrices[names[parameter]] = matrix
            del rows
        return matrices

    def place(self, direction: Mapping[str, Tensor], alone: Sequence[float]) -> None:
        """Leaves a direction, by parameter, in `.grad`, beside what each task alone reaches, times `alone`."""
        self.combine([0.0] * len(alone), alone)  # what is shared has been taken out
        for name, gradient in direction.items():
            self._parameters[name].grad = gradient.mul_(self._scale) if self._scale != 1 else gradient

    def combine(self, weights: Sequence[float], alone: Sequence[float]) -> None:
        """Leaves the weighted sum of the rows in `.grad`, and gives up the rows.

        Args:
            weights: one a task, for the shared parameters.
            alone: one a task, for the parameters that it alone reaches.
        """
        shared = set(self._shared())
        for row, weight, other in zip(self._gradients.values(), weights, alone, strict=True):
            for parameter, gradient in row.items():
                factor = weight if parameter in shared else other
                if parameter.grad is None:
                    parameter.grad = gradient.mul_(factor)
                elif parameter.grad.is_sparse and not gradient.is_sparse:
                    parameter.grad = gradient.mul_(factor).add_(parameter.grad)
                else:
                    parameter.grad.add_(gradient, alpha=factor)
            row.clear()

    def reach(self) -> dict[str, tuple[str, ...]]:
        """From each parameter's name, in the model's order, to the tasks whose losses reach it."""
        return {
            name: tuple(task for task, gradients in self._gradients.items() if parameter in gradients)
            for name, parameter in self._parameters.items()
        }

    def norms(self) -> dict[str, Tensor]:
        """Each task's gradient norm over all the parameters it reaches, 0-dim float64."""
        return {
            task: self._norm([gradients[p] for p in self._parameters.values() if p in gradients]) / self._scale
            for task, gradients in self._gradients.items()
        }

    def cosines(self) -> dict[tuple[str, str], Tensor]:
        """The cosine between two tasks' gradients over the shared parameters, 0-dim float64, by pair of names.

        A parameter is shared if at least two tasks reach it. A pair that has none in common has no cosine; one of
        which a gradient is zero has NaN.
        """
        reached = {task: set(gradients) for task, gradients in self._gradients.items()}
        shared = self.shared()
        if not shared:
            return {}
        products = self.gramian()
        norms = products.diagonal().sqrt()
        return {
            (a, b): products[i, j] / (norms[i] * norms[j])
            for (i, a), (j, b) in combinations(enumerate(reached), 2)
            if any(p in reached[a] and p in reached[b] for p in shared)
        }

    def _to_balance(self) -> list[nn.Parameter]:
        shared = self._shared()
        if not shared:
            raise UserError(
                "the tasks share no parameter, so there is nothing to balance; take balancer=equal, or one that looks "
                "at the losses alone, such as uw"
            )
        return shared

    def _norm(self, tensors: list[Tensor]) -> Tensor:
        if not tensors:
            return torch.zeros((), dtype=torch.float64, device=next(iter(self._parameters.values())).device)
        each = [torch.linalg.vector_norm(_dense(tensor), dtype=torch.float64) for tensor in tensors]
        norm: Tensor = torch.linalg.vector_norm(torch.stack(each))
        return norm


def _gradients_at(outputs: list[Tensor], gradients: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Every leaf that `outputs` reach, with its gradient."""
    reached = leaves(outputs)
    if not reached:
        return []
    found = torch.autograd.grad(outputs, reached, gradients, retain_graph=True, allow_unused=True)
    return [(leaf, g) for leaf, g in zip(reached, found, strict=True) if g is not None]


def plus(gradient: Tensor | None, more: Tensor) -> Tensor:
    """Their sum; a sparse one stays sparse as long as both are."""
    if gradient is None:
        return more
    return more + gradient if gradient.is_sparse else gradient + more  # torch has no sparse + dense


def _dense(gradient: Tensor) -> Tensor:
    """All the numbers in a gradient that may not be zero, real and imaginary parts apart."""
    gradient = gradient.coalesce().values() if gradient.is_sparse else gradient
    return torch.view_as_real(gradient) if gradient.is_complex() else gradient
