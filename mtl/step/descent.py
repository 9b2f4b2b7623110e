"""How the parameters move once their gradients are there: unscale, clip, optimizer, scheduler, each once."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from mtl.errors import UserError, text_of, told
from mtl.gradients.rows import total_norm
from mtl.step.settings import Update


class Descent:
    """An optimizer with what goes with it, and the one that takes over from it.

    Args:
        parameters: all of the model's, by name.
        optimizer: over them; None where somebody else's moves them.
        update: scheduler, clipping, and the optimizer that takes over.

    Attributes:
        optimizer, scheduler: those at work.
        first: the optimizer that began.
        interval: what the scheduler counts: `step`, optimizer steps, or `epoch`, epochs.
        num_taken: the optimizers' steps.
        moving: whether the parameters may have moved since this was last set to False.
        training: whether an optimizer with modes was put into that of training.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], optimizer: Optimizer | None, update: Update) -> None:
        self.optimizer = self.first = optimizer
        self.scheduler = self._scheduler = update.scheduler
        self.interval = update.interval
        self.num_taken = 0
        self.moving = False
        self.training = False
        self._parameters = parameters
        self._update = update
        self._after = update.then[0] if update.then else 0
        self._then = update.then[1] if update.then else None
        for each in self.optimizers:
            each.register_step_post_hook(self._count)

    @property
    def optimizers(self) -> list[Optimizer]:
        """The first one and the one that takes over, as far as there are any."""
        return [each for each in (self.first, self._then) if each is not None]

    def __call__(
        self,
        scaler: torch.amp.GradScaler | None = None,
        search: Callable[[], Any] | None = None,
        shared: Sequence[nn.Parameter] = (),
    ) -> Tensor | None:
        """Moves the parameters.

        Args:
            scaler: by which the gradients are scaled.
            search: gives the loss anew, with its gradient; for an optimizer that searches along a line, without
                clipping.
            shared: the parameters that `clip_shared_norm` is about.

        Returns:
            The gradient's norm before it was clipped; None where it wasn't to be.

        Raises:
            UserError: where optimizer or scheduler fail.
        """
        assert self.optimizer is not None, "a Step without an optimizer has backward and after only"
        if all(p.grad is None for group in self.optimizer.param_groups for p in group["params"]):
            scaler = None  # which takes offence
        if scaler:
            scaler.unscale_(self.optimizer)
        norm = self._clip(shared) if search is None else None
        before = self.num_taken
        part: Any = self.optimizer
        self.moving = True
        try:
            if scaler:
                with _skipped_by_the_scaler(self.optimizer):
                    scaler.step(self.optimizer)
                scaler.update()
            elif search is not None:
                self.optimizer.step(search)
            else:
                self.optimizer.step()
            if self.scheduler is not None and self.interval == "step" and self.num_taken > before:
                part = self.scheduler
                part.step()
            if self._is_over:
                self.train(False)  # what takes over starts from the parameters that are to be evaluated
                self._take_over()
        except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:
            name = type(part).__name__
            if isinstance(error, RuntimeError):
                if "sparse" not in text_of(error):
                    raise
                raise UserError(
                    f"{name} can't take the sparse gradients of embeddings: {told(error)}. Take optimizer=adagrad "
                    "without weight decay, or embeddings with sparse=False"
                ) from error
            raise UserError(f"{name} failed in its step: {told(error)}. Look at its arguments") from error
        return norm

    def epoch_end(self, value: float | None = None) -> None:
        """Steps a scheduler that counts epochs.

        Args:
            value: what is monitored on validation, for `ReduceLROnPlateau`, which steps when that is known; None at the
                end of an epoch's steps, when all others do.
        """
        scheduler: Any = self.scheduler
        if scheduler is None or self.interval != "epoch" or self.waits_for_validation != (value is not None):
            return
        try:
            scheduler.step(*[] if value is None else [value])
        except (TypeError, ValueError, ArithmeticError) as error:
            name = type(scheduler).__name__
            raise UserError(f"{name} failed at the end of an epoch: {told(error)}. Look at its arguments") from error

    @property
    def waits_for_validation(self) -> bool:
        """Whether the scheduler at work has to know the monitored value."""
        return isinstance(self.scheduler, ReduceLROnPlateau)

    def train(self, mode: bool = True) -> None:
        """Puts an optimizer that has modes, as schedule-free ones do, into that of training or that of evaluation.

        Its parameters are other ones in each, and going from one to the other rounds.
        """
        if self.has_modes:
            optimizer: Any = self.optimizer
            with torch.no_grad():
                optimizer.train() if mode else optimizer.eval()
            self.training = mode

    @property
    def has_modes(self) -> bool:
        """Whether the optimizer at work has a mode of training and one of evaluation."""
        return all(callable(getattr(self.optimizer, name, None)) for name in ("train", "eval"))

    @contextmanager
    def evaluated(self) -> Iterator[None]:
        """Within, the parameters are those to be evaluated; afterwards they have the bits that they had before."""
        assert self.optimizer is not None
        before = [(p, p.detach().clone()) for group in self.optimizer.param_groups for p in group["params"]]
        self.train(False)
        try:
            yield
        finally:
            self.train()
            for parameter, value in before:
                parameter.data.copy_(value)

    def _clip(self, shared: Sequence[nn.Parameter]) -> Tensor | None:
        """Clips the shared part of the gradient, then all of it; gives the norm that all of it had before."""
        norm = None if self._update.clip_norm is None else total_norm(self._parameters.values())
        rest = norm
        if self._update.clip_shared_norm is not None and shared:
            clip_grads_with_norm_(shared, self._update.clip_shared_norm, total_norm(shared))
            rest = None if norm is None else total_norm(self._parameters.values())
        if self._update.clip_norm is not None and rest is not None:
            clip_grads_with_norm_(self._parameters.values(), self._update.clip_norm, rest)
        return norm

    @property
    def _is_over(self) -> bool:
        """Whether the first optimizer has had its steps, and the other one is to take over."""
        return self._then is not None and self.num_taken >= self._after and self.optimizer is not self._then

    def _take_over(self) -> None:
        self.optimizer = self._then
        self.scheduler = None

    def _count(self, *_: Any) -> None:
        """Called by the optimizer when it has stepped; a scaler doesn't say that it skipped a step."""
        self.num_taken += 1

    def param_groups(self, *, first: bool = False) -> list[dict[str, Any]]:
        """Those of the optimizer at work, or of the first one."""
        optimizer = self.first if first else self.optimizer
        return [] if optimizer is None else optimizer.param_groups

    def components(self) -> dict[str, Any]:
        """Optimizers and scheduler, by name."""
        components = {"optimizer": self.first, "then": self._then, "scheduler": self._scheduler}
        return {name: component for name, component in components.items() if component is not None}

    def state_dict(self) -> dict[str, Any]:
        """The steps taken, and the states of optimizers and scheduler."""
        states = {name: component.state_dict() for name, component in self.components().items()}
        return {"num_taken": self.num_taken, **states}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The counterpart of `state_dict`; the optimizer whose turn it is goes on."""
        for name, component in self.components().items():
            component.load_state_dict(state[name])
        self.num_taken = state["num_taken"]
        if self._is_over:
            self._take_over()


@contextmanager
def _skipped_by_the_scaler(optimizer: Any) -> Iterator[None]:
    """Lets a scaler leave out the step of a fused optimizer too when gradients overflow.

    It would call it all the same, for the kernel to move nothing: then hooks, counters and schedules count a step that
    wasn't taken, and SGD's first momentum is never written.
    """
    fused = getattr(optimizer, "_step_supports_amp_scaling", False)
    if fused:
        optimizer._step_supports_amp_scaling = False
    try:
        yield
    finally:
        if fused:
            optimizer._step_supports_amp_scaling = fused
