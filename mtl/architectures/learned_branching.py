"""Learned branching: several copies of each stage, among which the tree that the tasks go through is learned."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from mtl.architectures.mixing import replaced, weighted
from mtl.batch import Batch
from mtl.errors import UserError
from mtl.model import MultiTaskModel
from mtl.seeds import seed_of
from mtl.task import Task
from mtl.trunks.stages import new_trunk, run_stages, stages_of, tensor_of


class LearnedBranching(MultiTaskModel):
    """Several blocks at each stage of the trunk; each block chooses a parent block in the stage before, by training.

    All blocks of the first stage get the inputs. Each block j of a later stage, and the head of each task, gets the
    output of one block of the stage before: of block i with the probability softmax(θ_j)_i, where the logits θ_j are
    learned. In training, i = argmax(θ_j + g) with Gumbel noise g. The gradient at θ_j is that of the weighted sum of
    the outputs with the weights softmax((θ_j + g) / τ), and the temperature τ falls. In eval mode, i = argmax(θ_j), so
    that the tasks share the blocks of a tree, see `tree`.

    The noise depends on `seed` and the number of optimizer steps only. It is therefore the same for all micro-batches,
    passes and processes of a step, and doesn't change the random state. `mtl.Step` calls `begin_step`, which draws it;
    other loops have to call it before each step.

    The blocks are `model.trunk.blocks[stage][block]`, and the logits are in `model.trunk.choices` and `model.branches`.
    With frozen logits, the blocks are trained in the tree that `tree` returns. As in the paper, the tree is found in a
    first run, and trained in a second one.

    Args:
        trunk: A function that creates a new trunk at each call.
        tasks: The tasks, at least one, with distinct names.
        inputs: The names of the batch's fields that are the inputs of the trunk.
        num_branches: The number of blocks at each stage; None for the number of tasks.
        temperature: The temperature τ of the first step. After n steps, it is `temperature` / √(n + 1).
        min_temperature: The lower limit of the temperature.
        seed: The seed of the noise.

    Raises:
        UserError: If an argument isn't positive.

    Source: Guo et al., "Learning to branch for multi-task learning", ICML 2020, arXiv 2006.01895. The temperature's
    defaults and schedule were chosen for `mtl`, and not taken from the paper; `temperature_at` may be overridden.
    """

    one_representation = False  # each task has features of its own

    def __init__(
        self,
        trunk: Callable[[], nn.Module],
        tasks: Sequence[Task],
        *,
        inputs: Sequence[str],
        num_branches: int | None = None,
        temperature: float = 10.0,
        min_temperature: float = 0.1,
        seed: int = 0,
    ) -> None:
        count = len(tasks) if num_branches is None else num_branches
        numbers = {"num_branches": count, "temperature": temperature, "min_temperature": min_temperature}
        for name, number in numbers.items():
            if tasks and not number > 0:
                raise UserError(f"model.{name} is {number}; it must be above 0")
        super().__init__(Branches([stages_of(new_trunk(trunk)) for _ in range(count)]), tasks, inputs=inputs)
        self.branches = nn.ModuleDict({task.name: Choice(1, count) for task in tasks})
        self.temperature = temperature
        self.min_temperature = min_temperature
        self.seed = seed
        self.begin_step(0)

    def temperature_at(self, step: int) -> float:
        """Returns the temperature after a number of optimizer steps."""
        return max(self.min_temperature, self.temperature / math.sqrt(step + 1))

    def begin_step(self, step: int) -> None:
        """Sets the temperature, and draws the noise, for the step after this number of optimizer steps."""
        super().begin_step(step)
        generator = torch.Generator().manual_seed(seed_of(self.seed, step))
        for choice in self._choices():
            choice.begin(self.temperature_at(step), generator)

    def features(self, batch: Batch) -> Any:
        """Computes the output of each block of the last stage; None for blocks outside of a fixed tree."""
        blocks = None
        if not any(choice.training for choice in self._choices()) and not any(map(is_lazy, self.parameters())):
            paths = self.tree().values()
            blocks = [set(of_stage) for of_stage in zip(*paths, strict=True)]
        return self._encode(partial(self.trunk, blocks), self._inputs_of(batch))

    def predict(self, task: str, features: Any) -> Any:
        """Computes the prediction of a task with the block that the task chooses, and with the head of the task."""
        return super().predict(task, self.branches[task](features)[0])

    def own_part(self, task: str) -> nn.Module:
        """Returns the task's choice of a block of the last stage."""
        return self.branches[task]

    def tree(self) -> dict[str, list[int]]:
        """Returns the numbers of the blocks that each task goes through in eval mode, by stage."""
        parents = [choice.chosen() for choice in self._choices()]
        between = parents[: -len(self.branches)]
        paths = {}
        for task, (block,) in zip(self.branches, parents[len(between) :], strict=True):
            path = [block]
            for of_block in reversed(between):
                path.append(of_block[path[-1]])
            paths[task] = path[::-1]
        return paths

    def _choices(self) -> "list[Choice]":
        """Returns the choices between the stages, and then those of the tasks."""
        return [module for module in self.modules() if isinstance(module, Choice)]


class Branches(nn.Module):
    """The blocks of all stages, and the choices between the stages.

    Args:
        trunks: The stages of several trunks, the copies of a stage being its blocks.
    """

    def __init__(self, trunks: Sequence[Sequence[nn.Module]]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleList(copies) for copies in zip(*trunks, strict=True))
        self.choices = nn.ModuleList(Choice(len(trunks), len(trunks)) for _ in range(len(self.blocks) - 1))

    def forward(self, needed: Sequence[set[int]] | None, *inputs: Any) -> list[Any]:
        """Returns the outputs of the blocks of the last stage.

        Args:
            needed: By stage, the numbers of the blocks that are called; None for all. The output of others is None.
            inputs: The inputs of the blocks of the first stage.
        """
        value = inputs if len(inputs) > 1 else inputs[0]
        values: list[Any] = []
        for stage, copies in enumerate(self.blocks):
            blocks = list(copies.children())
            numbers = range(len(blocks)) if needed is None else needed[stage]
            before = self.choices[stage - 1](values, numbers) if stage else [value] * len(blocks)
            values = [
                run_stages([block], of_block) if number in numbers else None
                for number, (block, of_block) in enumerate(zip(blocks, before, strict=True))
            ]
        return values


class Choice(nn.Module):
    """The choices that some children make among the parents: by Gumbel-softmax in training, else by argmax.

    Args:
        children_count: The number of children, J.
        parents_count: The number of parents, I.

    Attributes:
        logits: The parameter θ, (J, I), initially 0.
        noise: The Gumbel noise of the current step, (J, I).
        temperature: The temperature of the current step.
    """

    noise: Tensor
    temperature: Tensor

    def __init__(self, children_count: int, parents_count: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(children_count, parents_count))
        self.register_buffer("noise", torch.zeros(children_count, parents_count), persistent=False)
        self.register_buffer("temperature", torch.ones(()))

    def begin(self, temperature: float, generator: torch.Generator) -> None:
        """Sets the temperature and draws the noise."""
        # Drawn in float64 on the CPU, so that the choices don't depend on the device.
        exponential = torch.empty(self.noise.shape, dtype=torch.float64).exponential_(generator=generator)
        with torch.no_grad():
            self.noise.copy_(-exponential.log())
            self.temperature.fill_(temperature)

    def chosen(self) -> list[int]:
        """Returns the number of each child's most probable parent."""
        numbers: list[int] = self.logits.argmax(1).tolist()
        return numbers

    def weights(self) -> Tensor:
        """Returns 1 for the sampled parent of each child and 0 for others, with the gradient of the softmax; (J, I)."""
        soft = ((self.logits + self.noise) / self.temperature).softmax(1)
        hard = F.one_hot(soft.argmax(1), soft.shape[1]).to(soft.dtype)
        return hard + (soft - soft.detach())  # in this order the values are exactly 0 and 1

    def forward(self, values: Sequence[Any], needed: Any = None) -> list[Any]:
        """Returns the value that each child gets from the values of the parents.

        Args:
            values: The output of each parent. Of tuples, the first tensors are weighted, and the rest is that of the
                chosen parent.
            needed: The numbers of the children whose values are needed; None for all. The value of others is None.
        """
        if self.training:
            tensors = [tensor_of(value) for value in values]
            return [replaced(_chosen(row, values), weighted(row, tensors)) for row in self.weights()]
        children = [values[number] if needed is None or n in needed else None for n, number in enumerate(self.chosen())]
        # Each child gets a copy, which it may change in place.
        return [None if value is None else replaced(value, tensor_of(value).clone()) for value in children]


def _chosen(weights: Tensor, values: Sequence[Any]) -> Any:
    """Returns the value with weight one; the first one if all are single tensors, of which nothing else is used."""
    return values[int(weights.argmax())] if isinstance(values[0], tuple) else values[0]
