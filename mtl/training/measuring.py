"""In which steps of a training the tasks' gradients are measured."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


class Measuring:
    """Chooses the steps: the first, and every n-th.

    Where tasks come by turns, one task might have its turn in every such step. So the steps after it are measured too
    until every task had one, but not for ever: a task may be rare, or have no labels at all.

    Args:
        every: the number of steps from one measured step to the next.
        names: of all tasks.
    """

    def __init__(self, every: int, names: Sequence[str]) -> None:
        self.every = every
        self._names = names
        self._due = False  # whether the next step is measured
        self._missing = set(names)  # the tasks without a measured step since the last regular one
        self._extra = 0  # the number of steps measured since then

    def includes(self, number: int, *, anyway: bool) -> bool:
        """Whether the step of this number is measured; `anyway` if there is a reason for this step in particular.

        A step that isn't taken, as after an overflow in fp16, leaves its turn to the next.
        """
        self._due |= number == 1 or number % self.every == 0 or anyway
        return self._due

    def measured(self, names: Iterable[str]) -> None:
        """Notes the tasks of a step that was measured, and decides about the next."""
        self._missing -= set(names)
        self._extra += 1
        self._due = bool(self._missing) and self._extra < 2 * len(self._names)
        if not self._due:
            self._missing, self._extra = set(self._names), 0

    def state_dict(self) -> dict[str, Any]:
        """What decides about the next step, as plain data, under the names that checkpoints have always had."""
        return {"unmeasured": sorted(self._missing), "_due": self._due, "_chased": self._extra}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The counterpart of `state_dict`; other keys are ignored."""
        self._missing, self._due, self._extra = set(state["unmeasured"]), state["_due"], state["_chased"]
