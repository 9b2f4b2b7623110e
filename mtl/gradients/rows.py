"""The gradients of the tasks in one step: rows of the gradient matrix, and norms, cosines and Gramian of these."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations

import torch
from torch import Tensor, nn

from mtl.balancers._math.gramian import gramian
from mtl.distributed.collectives import any_process, gather_slices, sum_over_processes
from mtl.distributed.sharding import as_sharded, gathered, is_sharded, local, num_replicas, part_of
from mtl.errors import UserError
from mtl.gradients.backward import gradients_at
from mtl.gradients.sums import reached, sum_gradients, sum_rows


class Rows:
    """The gradients of the tasks in one step, the rows of a matrix: norms, cosines, Gramian and combination.

    A row is stored as the tensors that autograd created, by parameter; they are never copied into one vector. With
    several processes, each has the gradients of its share of the batch. These are summed over all processes before
    norms and Gramian are computed, or else after they are combined. If the parameters are sharded, the gradients are
    parts of such sums from the beginning.

    Args:
        parameters: All parameters of the model, by name.
        tasks: The names of the tasks, in the order of the rows.
        scale: The factor on the gradients that keeps fp16 gradients from underflowing. Norms and Gramian are divided by
            it; the combination isn't.
        processes: The number of processes that train together.
        whole: With several processes, whether each of them needs the whole rows; otherwise it keeps slices of these.

    Attributes:
        shares: The share of the current micro-batch in each task's loss, by task name; 1 for tasks without an entry.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        tasks: Iterable[str],
        *,
        scale: float = 1.0,
        processes: int = 1,
        whole: bool = False,
    ) -> None:
        self._processes = processes
        self._parameters = parameters
        self._scale = scale
        self._whole = whole
        self._sharded = is_sharded(next(iter(parameters.values())))
        self._replicas = num_replicas(parameters.values())  # the number of processes that have the same slices
        self._summed = self._sharded  # whether the rows are sums over all processes
        self._apart: set[Tensor] = set()  # parameters whose gradients are not in the rows
        self.shares: dict[str, float] = {}
        self._gradients: dict[str, dict[Tensor, Tensor]] = {task: {} for task in tasks}
        self._gramian: Tensor | None = None  # the Gramian of the current rows, once it has been computed

    def add(self, task: str, loss: Tensor, cuts: Mapping[Tensor, Tensor] | None = None) -> None:
        """Computes the gradient of a task with `torch.autograd.grad` and adds it to the task's row.

        The graph, `.grad` and the random state don't change, so that the training passes are not affected.

        Args:
            task: The name of the task.
            loss: The unweighted loss of the task.
            cuts: If the features were detached, a mapping from each detached tensor to the original one.
        """
        gradients = self._gradients[task]
        self._gramian = None
        features, at_features = [], []
        for leaf, gradient in gradients_at([loss], [torch.full_like(loss, self.shares.get(task, 1.0) * self._scale)]):
            if cuts and leaf in cuts:
                features.append(cuts[leaf])
                at_features.append(gradient)
            else:
                gradients[leaf] = plus(gradients.get(leaf), gradient)
        for leaf, gradient in gradients_at(features, at_features):
            gradients[leaf] = plus(gradients.get(leaf), gradient)

    def row(self, task: str) -> Mapping[Tensor, Tensor]:
        """Returns the gradients of a task in this process, by parameter."""
        return self._gradients[task]

    def take(self, task: str) -> None:
        """Adds the gradients in `.grad` to a task's row, and clears `.grad` for the next task."""
        row = self._gradients[task]
        self._gramian = None
        for parameter in self._parameters.values():
            if parameter.grad is not None:
                row[parameter] = plus(row.get(parameter), local(parameter.grad))
                parameter.grad = None

    def shared(self) -> list[nn.Parameter]:
        """Returns the parameters that at least two tasks reach, in the model's order."""
        return self._shared()

    def _shared(self) -> list[nn.Parameter]:
        rows, parameters = list(self._gradients.values()), list(self._parameters.values())
        if self._summed or self._processes == 1:
            return [p for p in parameters if sum(p in row for row in rows) > 1]
        counts = [sum(flags) for flags in zip(*reached(rows, parameters), strict=True)]
        return [p for p, count in zip(parameters, counts, strict=True) if count > 1]

    def _sum(self) -> None:
        """Sums the rows over all processes, unless that has been done."""
        if not self._summed and self._processes > 1:
            sum_rows(self._gradients, list(self._parameters.values()), whole=self._whole, without=self._apart)
            self._summed = True

    @property
    def _is_sliced(self) -> bool:
        return self._sharded or (self._summed and not self._whole)

    def _over_slices(self, values: Tensor) -> Tensor:
        """Returns the sum of values that each process has computed from its slices of the rows."""
        return sum_over_processes(values) / self._replicas if self._is_sliced else values

    def gramian(self) -> Tensor:
        """Computes the Gramian G Gᵀ over the shared parameters, (T, T), float64.

        Raises:
            UserError: If no parameter is shared.
        """
        if self._gramian is None:
            self._sum()
            pieces = [[row.get(p) for row in self._gradients.values()] for p in self._to_balance()]
            products = gramian(pieces)
            self._gramian = self._over_slices(products) / self._scale**2
        return self._gramian

    def gramian_of_all(self) -> Tensor:
        """Computes the Gramian G Gᵀ over all parameters, (T, T), float64.

        It differs from `gramian` on the diagonal, by the parameters that only one task reaches.

        Raises:
            UserError: If no parameter is shared.
        """
        products = self.gramian()
        shared = set(self.shared())
        alone = self._norms(
            [gradient for parameter, gradient in row.items() if parameter not in shared]
            for row in self._gradients.values()
        )
        return products + (alone / self._scale).square().diag()

    def finite(self) -> Tensor:
        """Returns whether the gradient of each task, as far as it has been computed, is finite, (T,)."""
        local = torch.stack([self._norm(list(row.values())) for row in self._gradients.values()]).isfinite()
        if self._processes == 1:
            return local
        return torch.tensor(any_process((~local).tolist()), device=local.device).logical_not()

    def stacked(self, task_weights: Sequence[float]) -> dict[str, Tensor]:
        """Stacks the rows of all tasks over the shared parameters, and removes them from the rows.

        Since the rows are removed, only one parameter's gradients are in memory twice at any time.

        Args:
            task_weights: The factor of each task's row.

        Returns:
            A tensor of shape (T, *shape) for each shared parameter, by parameter name.
        """
        self._sum()
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
            for to, row, weight in zip(matrix, rows, task_weights, strict=True):
                if row is not None:
                    to.add_(gathered(row, parameter) if self._sharded else row, alpha=weight / self._scale)
            matrices[names[parameter]] = matrix
            del rows
        return matrices

    def place(self, direction: Mapping[str, Tensor], alone: Sequence[float]) -> None:
        """Leaves a combined gradient of the shared parameters in `.grad`, and those of single tasks as well.

        Args:
            direction: The combined gradient of the shared parameters, by parameter name.
            alone: The factor of each task's gradient over the parameters that only this task reaches.
        """
        self.combine([0.0] * len(alone), alone)  # `stacked` has removed the shared parameters from the rows
        for name, gradient in direction.items():
            parameter = self._parameters[name]
            if self._sharded:
                parameter.grad = as_sharded(part_of(gradient, parameter), parameter)
            else:
                parameter.grad = gradient.mul_(self._scale) if self._scale != 1 else gradient

    def combine(self, weights: Sequence[float], alone: Sequence[float]) -> None:
        """Leaves the weighted sum of the rows in `.grad`, and frees the rows.

        Args:
            weights: The factor of each task's gradient over the shared parameters.
            alone: The factor of each task's gradient over the parameters that only this task reaches.
        """
        self._combine(weights, alone)
        if self._processes > 1 and not self._summed:
            sum_gradients(self._parameters.values())

    def _combine(self, weights: Sequence[float], alone: Sequence[float]) -> None:
        """Does what `combine` does, but leaves the gradients of this process in `.grad` if the rows aren't summed."""
        shared = set(self._shared())
        totals: dict[Tensor, Tensor] = {}
        for row, weight, other in zip(self._gradients.values(), weights, alone, strict=True):
            for parameter, gradient in row.items():
                factor = weight if parameter in shared else other
                total = totals.get(parameter)
                if total is None:
                    totals[parameter] = gradient.mul_(factor)
                elif total.is_sparse and not gradient.is_sparse:
                    totals[parameter] = gradient.mul_(factor).add_(total)
                else:
                    total.add_(gradient, alpha=factor)
            row.clear()
        if self._sharded:
            totals = {parameter: as_sharded(total, parameter) for parameter, total in totals.items()}
        elif self._is_sliced:
            together = [p for p in self._parameters.values() if p in totals]
            totals = dict(zip(together, gather_slices([totals[p] for p in together], together), strict=True))
        for parameter, total in totals.items():
            parameter.grad = total

    def reach(self) -> dict[str, tuple[str, ...]]:
        """Returns, by parameter name in the model's order, the tasks that reach the parameter."""
        self._sum()
        return {
            name: tuple(task for task, gradients in self._gradients.items() if parameter in gradients)
            for name, parameter in self._parameters.items()
        }

    def norms(self) -> dict[str, Tensor]:
        """Computes the gradient norm of each task over all parameters that the task reaches, 0-dim float64."""
        self._sum()
        parameters, rows = self._parameters.values(), self._gradients
        norms = self._norms([row[p] for p in parameters if p in row] for row in rows.values()) / self._scale
        return dict(zip(rows, norms.unbind(), strict=True))

    def cosines(self) -> dict[tuple[str, str], Tensor]:
        """Computes the cosine between the gradients of each two tasks over the shared parameters, 0-dim float64.

        Returns:
            The cosines by pair of task names. A pair of tasks without common parameters is missing; if one of the two
            gradients is zero, the cosine is NaN.
        """
        self._sum()
        parameters = {task: set(gradients) for task, gradients in self._gradients.items()}
        shared = self.shared()
        if not shared:
            return {}
        products = self.gramian()
        norms = products.diagonal().sqrt()
        return {
            (a, b): products[i, j] / (norms[i] * norms[j])
            for (i, a), (j, b) in combinations(enumerate(parameters), 2)
            if any(p in parameters[a] and p in parameters[b] for p in shared)
        }

    def _to_balance(self) -> list[nn.Parameter]:
        shared = self._shared()
        if not shared:
            raise UserError(
                "the tasks share no parameter, so there is nothing to balance; take balancer=equal, or a balancer "
                "that uses only losses, such as uw"
            )
        return shared

    def _norms(self, of_tasks: Iterable[list[Tensor]]) -> Tensor:
        """Returns the norm of the gradients in each list, over the slices of all processes, (T,)."""
        norms = torch.stack([self._norm(tensors) for tensors in of_tasks])
        return self._over_slices(norms.square()).sqrt() if self._is_sliced else norms

    def _norm(self, tensors: list[Tensor]) -> Tensor:
        if not tensors:
            return torch.zeros((), dtype=torch.float64, device=next(iter(self._parameters.values())).device)
        each = [torch.linalg.vector_norm(_dense(tensor), dtype=torch.float64) for tensor in tensors]
        norm: Tensor = torch.linalg.vector_norm(torch.stack(each))
        return norm


def plus(total: Tensor | None, gradient: Tensor) -> Tensor:
    """Returns the sum of two gradients, which is sparse if both are sparse."""
    if total is None:
        return gradient
    return gradient + total if total.is_sparse else total + gradient  # torch doesn't support sparse + dense


def _dense(gradient: Tensor) -> Tensor:
    """Returns the values of a gradient, real and imaginary parts separately; of a sparse gradient, the stored ones."""
    gradient = gradient.coalesce().values() if gradient.is_sparse else gradient
    return torch.view_as_real(gradient) if gradient.is_complex() else gradient
