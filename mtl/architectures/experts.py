"""What the mixtures of experts have in common: experts, gates, and the model that mixes experts for each task."""

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from mtl.batch import Batch, describe
from mtl.errors import UserError
from mtl.model import MultiTaskModel
from mtl.task import Task
from mtl.trunks.stages import Stages, new_trunk, stages_of
from mtl.trunks.table import Columns


class Experts(nn.ModuleList):
    """Experts with the same input, whose outputs are stacked."""

    def forward(self, x: Any) -> Tensor:
        """Returns the outputs (N, experts, …).

        Raises:
            UserError: If the output of an expert isn't one tensor.
        """
        outputs = [expert(*x) if isinstance(x, tuple) else expert(x) for expert in self]
        for output in outputs:
            if not isinstance(output, Tensor):
                raise UserError(
                    f"model.trunk: an expert returns a {type(output).__name__}, and only single tensors can be mixed. "
                    "model/trunk=picked selects a part of the output"
                )
        return torch.stack(outputs, 1)


class Gate(nn.Module):
    """The weights of experts: the softmax of a linear map, without bias, of the flattened input of the experts.

    Args:
        experts: The number of experts.
    """

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.linear = nn.LazyLinear(experts, bias=False)

    def forward(self, x: Any) -> Tensor:
        """Returns the weights (N, experts), which sum to one for each sample."""
        return torch.softmax(self.linear(flat(x, self.linear)), 1)


def flat(x: Any, linear: nn.Linear) -> Tensor:
    """Returns the input of experts as the input (N, in_features) of a gate's linear map.

    Raises:
        UserError: If the input isn't one floating-point tensor, or has another size than the map.
    """
    advice = "set model.shared_stages, so that the input of the experts is the output of stages that all tasks share"
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise UserError(
            f"a gate takes one floating-point tensor, and the input of the experts is {describe(x)}; {advice}"
        )
    values: Tensor = x.flatten(1)
    if linear.in_features not in (0, values.shape[1]):  # 0 before the first batch
        raise UserError(
            f"a gate was built for {linear.in_features} values a sample, and a batch has {values.shape[1]}; let all "
            f"inputs be of one size, or {advice} and has one size"
        )
    return values


def mix(weights: Tensor, outputs: Tensor) -> Tensor:
    """Returns the weighted sum (N, …) of the experts' outputs (N, experts, …).

    Args:
        weights: The weights (N, experts), or (experts,) if they are the same for all samples.
        outputs: The outputs.
    """
    rows = weights.expand(len(outputs), -1).unsqueeze(1)
    return torch.matmul(rows, outputs.unsqueeze(-1).flatten(2)).view(outputs[:, 0].shape)


class Branch(nn.Module):
    """What a task has of its own in a layer of experts: a gate, and experts.

    Args:
        gate: The gate, from the input of the task's experts to weights for these and, after them, for the shared ones.
        experts: The task's experts, possibly none.
    """

    forward_methods = ("selectors",)  # see `mtl.distributed.sharding.shard`

    def __init__(self, gate: nn.Module, experts: Experts) -> None:
        super().__init__()
        self.gate = gate
        self.experts = experts

    def forward(self, x: Any, shared: Tensor) -> Tensor:
        """Returns the mixture for the task, from the task's input and the outputs of the shared experts."""
        weights: Tensor = self.gate(x)
        return mix(weights, torch.cat([*self.outputs(x), shared], 1))

    def selectors(self, x: Any) -> tuple[Tensor, Tensor]:
        """Returns the selectors of a gate that has them, see `mtl.architectures.dselect_k.StaticGate`."""
        values: tuple[Tensor, Tensor] = self.gate.selectors(x)  # type: ignore[operator]
        return values

    def outputs(self, x: Any) -> list[Tensor]:
        """Returns the outputs (N, experts, …) of the task's own experts in a list, which is empty if it has none."""
        return [self.experts(x)] if len(self.experts) else []


class Extraction(nn.Module):
    """The computation that all tasks share: shared stages, all layers of experts but the last, and its shared experts.

    Args:
        stem: The stages that all experts share.
        shared: The shared experts of each layer.
        branches: By layer and task, the gate and the experts of the task, for all layers but the last.
        gates: The gate of the shared experts, for all layers but the last.
    """

    def __init__(
        self, stem: Stages, shared: Sequence[Experts], branches: Sequence[nn.ModuleDict], gates: Sequence[nn.Module]
    ) -> None:
        super().__init__()
        self.stem = stem
        self.shared = nn.ModuleList(shared)
        self.branches = nn.ModuleList(branches)
        self.gates = nn.ModuleList(gates)

    def forward(self, *inputs: Any) -> tuple[Any, Tensor]:
        """Returns the input of the last layer and the outputs of that layer's shared experts.

        The input is a dict by task, or one value for all tasks if there is only one layer.
        """
        x = common = self.stem(*inputs)
        for shared, branches, gate in zip(self.shared, self.branches, self.gates, strict=False):
            outputs = shared(common)
            of_tasks: dict[str, Any] = dict(branches.items())  # type: ignore[operator]
            inputs_of = x if isinstance(x, dict) else dict.fromkeys(of_tasks, x)
            own = {task: branch.outputs(inputs_of[task]) for task, branch in of_tasks.items()}
            x = {
                task: mix(branch.gate(inputs_of[task]), torch.cat([*own[task], outputs], 1))
                for task, branch in of_tasks.items()
            }
            common = mix(gate(common), torch.cat([*(each for of_task in own.values() for each in of_task), outputs], 1))
        return x, self.shared[-1](common)


class ExpertModel(MultiTaskModel):
    """A model in which each task has a gate that mixes experts: shared ones, and possibly experts of its own.

    An expert is a trunk of its own, without the stages that all experts share. `model.trunk` contains what is computed
    once for all tasks, and `model.branches[task.name]` the task's gate and experts.

    Args:
        trunk: A function that creates a new trunk at each call.
        tasks: The tasks, at least one, with distinct names.
        inputs: The names of the batch's fields that are the inputs of the trunk.
        shared_experts, own_experts: The number of experts of all tasks, and of each task.
        layers: The number of layers of experts, among which the stages of an expert are divided.
        shared_stages: The number of the trunk's first stages that all experts share. The default is 1 if the first
            stage embeds the columns of a table or tokens, or has several inputs, otherwise 0.
        gate: A function from a number of experts to the gate of a task.

    Raises:
        UserError: If the trunk has fewer stages than `shared_stages + layers`, or if a number is too small.
    """

    def __init__(
        self,
        trunk: Callable[[], nn.Module],
        tasks: Sequence[Task],
        *,
        inputs: Sequence[str],
        shared_experts: int,
        own_experts: int = 0,
        layers: int = 1,
        shared_stages: int | None = None,
        gate: Callable[[int], nn.Module] = Gate,
    ) -> None:
        check_number("shared_experts", shared_experts, 1)
        check_number("layers", layers, 1)
        check_number("shared_stages", 0 if shared_stages is None else shared_stages, 0)
        first = new_trunk(trunk)
        start = first_stages(first, inputs) if shared_stages is None else shared_stages

        def parts(each: nn.Module) -> list[Stages]:
            """Returns the part of a trunk that belongs to each layer."""
            return [Stages(*stages) for stages in divided(stages_of(each, least=start + layers)[start:], layers)]

        names = [task.name for task in tasks]
        shared = [parts(first), *(parts(new_trunk(trunk)) for _ in range(shared_experts - 1))]
        own = {name: [parts(new_trunk(trunk)) for _ in range(own_experts)] for name in names}
        branches = [
            nn.ModuleDict(
                {
                    name: Branch(gate(own_experts + shared_experts), Experts(expert[layer] for expert in experts))
                    for name, experts in own.items()
                }
            )
            for layer in range(layers)
        ]
        total = own_experts * len(own) + shared_experts
        extraction = Extraction(
            Stages(*stages_of(first)[:start]),
            [Experts(expert[layer] for expert in shared) for layer in range(layers)],
            branches[:-1],
            [gate(total) for _ in range(layers - 1)],
        )
        super().__init__(extraction, tasks, inputs=inputs)
        self.branches = branches[-1]
        self.one_representation = layers == 1  # otherwise the tasks have inputs of their own in the last layer

    def predict(self, task: str, features: Any) -> Any:
        """Computes the prediction of a task from a mixture of the experts."""
        x, shared = features
        return super().predict(task, self._encode(self.own_part(task), (self._input_of(task, x), shared)))

    def own_part(self, task: str) -> nn.Module:
        """Returns the gate and the experts of a task."""
        return self.branches[task]

    def gate_weights(self, batch: Batch) -> dict[str, Tensor]:
        """Returns the weights of the experts for each task, in the last layer: the task's own experts, then the shared.

        Returns:
            By task, a tensor (N, experts), or (experts,) for gates without input.
        """
        x, _ = self.features(batch)
        return {task: branch.gate(self._input_of(task, x)) for task, branch in self.branches.items()}  # type: ignore[operator]

    @staticmethod
    def _input_of(task: str, x: Any) -> Any:
        return x[task] if isinstance(x, dict) else x


def first_stages(trunk: nn.Module, inputs: Sequence[str]) -> int:
    """Returns the default number of stages that all experts share.

    This is 1 if the first stage makes numbers of something else, so that gates have no input before it: if it embeds
    the columns of a table or tokens, or has several inputs. Otherwise it is 0.
    """
    first = stages_of(trunk)[0]
    while isinstance(first, nn.Sequential) and len(first):
        first = first[0]
    return int(len(inputs) > 1 or isinstance(first, Columns | nn.Embedding | nn.EmbeddingBag))


def divided(stages: Sequence[nn.Module], groups: int) -> list[Sequence[nn.Module]]:
    """Divides stages into groups whose numbers of stages differ by at most one; the first groups are larger."""
    size, more = divmod(len(stages), groups)
    ends = accumulate((size + (group < more) for group in range(groups)), initial=0)
    return [stages[start:end] for start, end in pairwise(ends)]


def check_number(name: str, value: int, least: int) -> None:
    """Checks an option of an architecture.

    Raises:
        UserError: If the value isn't a whole number of at least `least`.
    """
    if type(value) is not int or value < least:
        raise UserError(f"model.{name} is {value!r}; it must be a whole number of at least {least}")
