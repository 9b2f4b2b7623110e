"""Record of the tasks that reach each parameter, from the graphs of their losses; it defines the shared parameters."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from mtl.distributed.collectives import world_size
from mtl.gradients.leaves import leaves
from mtl.gradients.sums import reached


class Reach:
    """Records which tasks reach each parameter. A parameter that at least two tasks have reached is shared.

    Earlier steps count as well, so that the trunk is shared even in a step in which only one task takes part.

    Args:
        parameters: All parameters of the model, by name.
        tasks: The names of all tasks.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], tasks: Sequence[str]) -> None:
        self._parameters = parameters
        self._tasks = list(tasks)
        self._so_far: dict[Tensor, set[str]] = {}
        self._in_step: dict[Tensor, set[str]] = {}

    def begin(self) -> None:
        """Begins a step, and discards the record of a previous step that was not completed."""
        self._in_step = {}

    def add(self, task: str, loss: Tensor, cuts: Mapping[Tensor, Tensor] | None = None) -> None:
        """Records the parameters that a task reaches.

        Args:
            task: The name of the task.
            loss: The loss of the task, with its graph.
            cuts: If the features were detached, a mapping from each detached tensor to the original one.

        Raises:
            UserError: If re-entrant checkpointing hides a part of the graph.
        """
        cuts = cuts or {}
        near = leaves([loss])
        for leaf in (*near, *leaves(cuts[leaf] for leaf in near if leaf in cuts)):
            self._in_step.setdefault(leaf, set()).add(task)

    def shared(self) -> list[nn.Parameter]:
        """Completes the record of the step, and returns the shared parameters in the model's order."""
        in_step = self._in_step
        if world_size() > 1:
            parameters = list(self._parameters.values())
            rows = [{p for p, tasks in in_step.items() if task in tasks} for task in self._tasks]
            flags = dict(zip(self._tasks, reached(rows, parameters), strict=True))
            in_step = {p: {task for task in self._tasks if flags[task][n]} for n, p in enumerate(parameters)}
        for parameter in self._parameters.values():
            tasks = in_step.get(parameter, set())
            self._so_far[parameter] = self._so_far.get(parameter, set()) | tasks
        self._in_step = {}
        return [p for p in self._parameters.values() if len(self._so_far[p]) > 1]

    def state_dict(self) -> dict[str, list[str]]:
        """Returns, by parameter name, the names of the tasks that have reached the parameter."""
        return {name: sorted(self._so_far[p]) for name, p in self._parameters.items() if self._so_far.get(p)}

    def load_state_dict(self, state: Mapping[str, list[str]]) -> None:
        """Restores a state from `state_dict`."""
        self._so_far = {self._parameters[name]: set(tasks) for name, tasks in state.items()}
