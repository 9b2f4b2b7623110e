"""Which tasks reach a parameter, found by walking the graphs of their losses; for what shared parameters alone get."""

from collections.abc import Mapping

from torch import Tensor, nn

from mtl.gradients.rows import leaves


class Reach:
    """The shared parameters: those that at least two tasks have reached, in this step or in one before.

    Earlier steps count because a step may lack tasks: the trunk is shared in a step of one task, too.

    Args:
        parameters: all of the model's, by name.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._parameters = parameters
        self._so_far: dict[Tensor, set[str]] = {}
        self._in_step: dict[Tensor, set[str]] = {}

    def begin(self) -> None:
        """Forgets a step that was not taken."""
        self._in_step = {}

    def add(self, task: str, loss: Tensor, cuts: Mapping[Tensor, Tensor] | None = None) -> None:
        """Walks the graph of a task's loss.

        Args:
            task: its name.
            loss: with its graph.
            cuts: where the graph was cut at the features: from each detached tensor to the one it stands for.

        Raises:
            UserError: where re-entrant checkpointing hides what lies behind it.
        """
        cuts = cuts or {}
        near = leaves([loss])
        for leaf in (*near, *leaves(cuts[leaf] for leaf in near if leaf in cuts)):
            self._in_step.setdefault(leaf, set()).add(task)

    def shared(self) -> list[nn.Parameter]:
        """The shared parameters, in the model's order; the step's graphs count from now on."""
        for parameter in self._parameters.values():
            more = self._in_step.get(parameter, set())
            self._so_far[parameter] = self._so_far.get(parameter, set()) | more
        self._in_step = {}
        return [p for p in self._parameters.values() if len(self._so_far[p]) > 1]

    def state_dict(self) -> dict[str, list[str]]:
        """By parameter, the names of the tasks that have reached it."""
        return {name: sorted(self._so_far[p]) for name, p in self._parameters.items() if self._so_far.get(p)}

    def load_state_dict(self, state: Mapping[str, list[str]]) -> None:
        """The counterpart of `state_dict`."""
        self._so_far = {self._parameters[name]: set(tasks) for name, tasks in state.items()}
