"""The choice of the steps in which the tasks' gradients are measured."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


class Measuring:
    """Chooses the steps in which gradients are measured: the first one, and every n-th.

    If tasks alternate between steps, each of these steps might have the same task. The following steps are therefore
    measured as well until every task has been measured, up to a limit, since a task may be rare or have no labels.

    Args:
        every: The number of steps from one measured step to the next.
        names: The names of all tasks.
    """

    def __init__(self, every: int, names: Sequence[str]) -> None:
        self.every = every
        self._names = names
        self._due = False  # whether the next step is measured
        self._missing = set(names)  # the tasks without a measured step since the last regular one
        self._extra = 0  # the number of steps measured since then

    def includes(self, number: int, *, anyway: bool) -> bool:
        """Returns whether the step with this number is measured; with `anyway`, it always is.

        If the step is skipped, for instance because of an fp16 overflow, the next step is measured instead.
        """
        self._due |= number == 1 or number % self.every == 0 or anyway
        return self._due

    def measured(self, names: Iterable[str]) -> None:
        """Records the tasks of a measured step, and decides whether the next step is measured as well."""
        self._missing -= set(names)
        self._extra += 1
        self._due = bool(self._missing) and self._extra < 2 * len(self._names)
        if not self._due:
            self._missing, self._extra = set(self._names), 0

    def state_dict(self) -> dict[str, Any]:
        """Returns the state as plain data; the keys are those of earlier versions, so that old checkpoints load."""
        return {"unmeasured": sorted(self._missing), "_due": self._due, "_chased": self._extra}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a state from `state_dict`; other keys are ignored."""
        self._missing, self._due, self._extra = set(state["unmeasured"]), state["_due"], state["_chased"]
