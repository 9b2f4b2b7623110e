"""What every balancer is: from the tasks' losses and Gramian to a weight for each task."""

from typing import Any, ClassVar

import torch
from torch import Tensor


class Balancer:
    """Gives each task a weight in every step; the step moves along the weighted sum of the tasks' gradients.

    What it keeps from step to step is in the attributes that `kept` names, and in `generator` if it draws.

    Attributes:
        needs: what the weights depend on: `nothing`, which makes them the same in all steps, or this step's `gramian`.
        kept: names of attributes, plain numbers or tensors, that a checkpoint has to hold.
    """

    needs: ClassVar[str] = "gramian"
    kept: ClassVar[tuple[str, ...]] = ()

    def weights(self, losses: Tensor, gramian: Tensor | None) -> Tensor:
        """The weights, shape (T,), from the losses (T,) and, where it is needed, the Gramian (T, T), both float64.

        The Gramian is that of the tasks' gradients over the shared parameters. Tasks' own weights are in it and in the
        losses already. Where nothing is needed this is called once, before the first step, with losses of NaN.
        """
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """What is kept from step to step."""
        state = {name: getattr(self, name) for name in self.kept}
        if hasattr(self, "generator"):
            state["generator"] = self.generator.get_state()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The counterpart of `state_dict`."""
        for name in self.kept:
            setattr(self, name, state[name])
        if hasattr(self, "generator"):
            self.generator.set_state(state["generator"])


def generator(seed: int) -> torch.Generator:
    """A balancer's own random generator, so that its draws don't shift those of dropout."""
    return torch.Generator().manual_seed(seed)
