"""What every balancer is: from the tasks' losses and gradients to a weight for each task."""

import copy
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mtl.balancers.learned import Learned


class Balancer:
    """Gives each task a weight in every step; the step moves along the weighted sum of the tasks' gradients.

    A subclass has `weights`, or `combine` where it needs the rows. What it keeps from step to step is in the attributes
    that `kept` names.

    A task that has nothing in a step is absent from it: a method is applied to the P tasks that are present as if there
    were no others. What is kept is of all T tasks, an absent one's part stays as it is, bit by bit, and a task that is
    present for the first time begins as in a first step. `begun`, `of_present` and `put` serve such states.

    Attributes:
        needs: what the weights of a step depend on. `nothing`: they are the same in all steps. `past`: on earlier steps
            and on draws. `losses`: on this step's losses. `gramian`: on the Gramian of this step's gradients over the
            shared parameters. `rows`: on these gradients themselves.
        scope: what weights from gradients multiply: `shared`, a task's gradient over the shared parameters, while what
            it alone reaches gets what `alone` says; or `all` of its gradient, which is to multiply its loss. Weights
            that need no gradient always multiply the loss.
        over: which parameters the Gramian is over: `shared`, those that at least two tasks reach; or `all`, which adds
            the squared norm of a task's gradient over the parameters that it alone reaches, those of its head, to its
            diagonal element. `all` is for balancers that need the Gramian, and needs a scope of `all`: a combination
            that leaves the heads out has other products with the gradients than the method solved for.
        preference: how tasks' own weights come in. `scale`: they multiply losses and gradients before the balancer sees
            them. `steer`: the method doesn't see the scale of the losses; it is given them as they are, has the tasks'
            weights in `own`, and its result includes them. `none`: it can't be told what is preferred.
        looks_back: whether `after` is to be given the losses once more, as they are after the step.
        own: the tasks' own weights, (T,), float64, on the CPU, where `preference` is `steer`.
        num_tasks: T, of which a step may lack some; `None`: as many as there are in the step. Set by the caller, once.
        present: which of the T tasks are in the step, (P,), int64, ascending, on the CPU; `None`: all of them. Set by
            the caller before each step, and left until `after` is over.
        learned: numbers that are learned beside the model, with methods that have such; the model's optimizer may
            move them, see `parameters`.
        kept: names of attributes that a checkpoint has to hold: numbers, tensors, nests of them, generators, and
            objects that have a `state_dict`.
    """

    needs: ClassVar[str] = "gramian"
    preference: ClassVar[str] = "scale"
    looks_back: ClassVar[bool] = False
    kept: ClassVar[tuple[str, ...]] = ()
    scope: str = "shared"
    over: str = "shared"
    own: Tensor | None = None
    num_tasks: int | None = None
    present: Tensor | None = None
    learned: Learned | None = None

    def weights(self, losses: Tensor, gramian: Tensor | None) -> Tensor:
        """The weights, shape (P,).

        Args:
            losses: (P,), float64: with the Gramian on the CPU, else on the model's device. NaN where the weights
                depend on nothing, in which case this is called once, and on the past: they aren't known yet.
            gramian: (P, P), float64, on the CPU, where it is needed.
        """
        raise NotImplementedError

    def combine(self, losses: Tensor, rows: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The direction over the shared parameters, for balancers that need the rows.

        Args:
            losses: (P,), float64, on the device.
            rows: by parameter (P, *shape), a task's gradient a row. They are the balancer's to change and keep.

        Returns:
            What each task's gradient was multiplied by, (P,), for the log; the direction by parameter.
        """
        raise NotImplementedError

    def alone(self, losses: Tensor) -> Tensor:
        """What multiplies gradients that one task alone reaches, (P,), besides its own weight; `losses` as above."""
        return torch.ones_like(losses)

    def parameters(
        self, count: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> list[nn.Parameter]:
        """What the model's optimizer is to move: a number for each task where the balancer has `optimizer="model"`.

        Args:
            count: T.
            device, dtype: of those that are made by the first call.
        """
        learned = self.learned
        return learned.parameters(count, device=device, dtype=dtype) if isinstance(learned, Learned) else []

    def learn(self, losses: Tensor) -> None:
        """Called when the losses are known, (P,), float64, and nothing has moved: gives `parameters` gradients."""

    def after(self, losses: Tensor, again: Tensor | None) -> None:
        """Called when the parameters have moved.

        Args:
            losses: the step's, (P,), float64, on their device.
            again: where `looks_back`, the same after the step: same batch, same random draws.
        """

    def epoch_end(self) -> None:
        """Called after each epoch's last step."""

    def preferences(self, count: int) -> Tensor:
        """The present tasks' own weights where `preference` is `steer`, ones where none were given.

        Shape (P,), of which `count` is the P; float64, on the CPU.
        """
        return torch.ones(count, dtype=torch.float64) if self.own is None else self.of_present(self.own)

    def begun(self, state: Tensor | None, like: Tensor, value: float = 0.0) -> Tensor:
        """A state (T, ...), on the device of `like`, (P, ...); filled with the value where there is none yet."""
        if state is None or state.shape[1:] != like.shape[1:]:
            return like.new_full((self.num_tasks or len(like), *like.shape[1:]), value)
        return state.to(like.device)

    def of_present(self, state: Tensor) -> Tensor:
        """The present tasks' part, (P, ...), of a state (T, ...): a copy, or the state itself where all are present."""
        return state if self.present is None else state[self._at(state.device, self.present)]

    def put(self, state: Tensor, part: Tensor) -> Tensor:
        """The state with this as the present tasks' part, which is written into it; the part itself where all are."""
        return part if self.present is None else state.index_copy_(0, self._at(state.device, self.present), part)

    @staticmethod
    def _at(device: torch.device, present: Tensor) -> Tensor:
        return present.to(device, non_blocking=True)  # or the CPU would wait until a GPU has done all that came before

    def state_dict(self) -> dict[str, Any]:
        """What is kept from step to step."""
        state: dict[str, Any] = {}
        for name in self.kept:
            value = getattr(self, name)
            if isinstance(value, torch.Generator):
                value = value.get_state()
            elif hasattr(value, "state_dict"):
                value = value.state_dict()
            state[name] = value
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The counterpart of `state_dict`; what is loaded is copied, since states are written into."""
        state = copy.deepcopy(state)
        for name in self.kept:
            value = getattr(self, name)
            if isinstance(value, torch.Generator):
                value.set_state(state[name])
            elif hasattr(value, "load_state_dict"):
                value.load_state_dict(state[name])
            else:
                setattr(self, name, state[name])


def parameters_of(over: str, scope: str | None = None) -> tuple[str, str]:
    """The attributes `over` and `scope` from a balancer's arguments.

    Args:
        over: `shared` or `all`.
        scope: `shared` or `all`; None where the balancer has no such argument, and the scope is the same as `over`.

    Raises:
        ValueError: for another value, and for weights that are found over all parameters and multiply the shared ones.
    """
    for name, value in (("over", over), ("scope", scope)):
        if value not in ("shared", "all", None):
            raise ValueError(f"{name}: '{value}' is not one of shared, all")
    if over == "all" and scope == "shared":
        raise ValueError(
            "over: 'all' finds the weights for the whole gradients, heads included, and with scope 'shared' they would "
            "multiply the shared parameters' part alone; set scope to all"
        )
    return over, scope or over


TINY = 1e-30  # losses below it are zero: in float32 they have next to no gradient, and their inverse no room


def inverse(losses: Tensor) -> Tensor:
    """1/L, the slope of log L; 0 for a loss of zero, which is at its minimum, and NaN for one below."""
    found = torch.where(losses > TINY, 1 / losses, 0.0)
    return torch.where(losses >= 0, found, torch.nan)


def generator(seed: int, device: torch.device | None = None) -> torch.Generator:
    """A balancer's own random generator, so that its draws don't shift those of dropout."""
    return torch.Generator(device or "cpu").manual_seed(seed)
