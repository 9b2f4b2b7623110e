"""What a step changes before it moves the parameters, to be put back if it doesn't get to."""

import copy

from mtl.model import MultiTaskModel
from mtl.snapshots import Buffers
from mtl.step.balancing import Balancing
from mtl.step.loss_checks import LossChecks
from mtl.step.passes import generators_of, set_states


class Before:
    """Random state, buffers and the balancer's state as they are now.

    The state of a balancer on rows isn't kept: it is as large as the rows, and changes only when these are known to be
    finite.

    Args:
        model: whose forward passes draw and change buffers.
        balancing: the balancer at work.
        checks: the tests of losses that are taken in micro-batches.
    """

    def __init__(self, model: MultiTaskModel, balancing: Balancing, checks: LossChecks) -> None:
        self._generators = generators_of(model)
        self.draws = [generator.get_state() for generator in self._generators]
        self._buffers = Buffers(model)
        self._balancing = balancing
        self._checks, self._checked = checks, checks.state_dict()
        small = balancing.needs not in ("nothing", "rows")
        self._state = copy.deepcopy(balancing.state_dict()) if small else None

    def restore(self) -> None:
        """Puts it all back."""
        set_states(self._generators, self.draws)
        self._buffers.restore()
        self._checks.load_state_dict(self._checked)
        if self._state is not None:
            self._balancing.load_state_dict(copy.deepcopy(self._state))
