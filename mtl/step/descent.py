"""The update of the parameters: unscale and clip the gradients, then step the optimizer and the scheduler."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from mtl.errors import UserError, describe_error, text_of
from mtl.gradients.backward import clip, total_norm
from mtl.step.settings import Update


class Descent:
    """Updates the parameters with an optimizer, a scheduler and, later in training, a second optimizer.

    Args:
        parameters: All parameters of the model, by name.
        optimizer: The optimizer of these parameters; None if they are updated outside of this class.
        update: The settings of scheduler, clipping and second optimizer.

    Attributes:
        optimizer, scheduler: The current optimizer and scheduler.
        first: The optimizer that training begins with.
        interval: The unit that the scheduler counts: `step` for optimizer steps, `epoch` for epochs.
        num_taken: The number of steps that the optimizers have taken.
        moving: Whether the parameters may have changed since this attribute was last set to False.
        training: Whether an optimizer that has modes is in training mode.
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
        """The first and the second optimizer, without those that are None."""
        return [each for each in (self.first, self._then) if each is not None]

    def __call__(
        self,
        scaler: torch.amp.GradScaler | None = None,
        search: Callable[[], Any] | None = None,
        shared: Sequence[nn.Parameter] = (),
    ) -> Tensor | None:
        """Updates the parameters.

        Args:
            scaler: The gradient scaler that scaled the gradients, if any.
            search: Recomputes the loss and the gradient, for an optimizer with a line search; the gradients are then
                not clipped.
            shared: The parameters whose gradient `clip_shared_norm` clips.

        Returns:
            The norm of the gradient before clipping; None if the gradient isn't clipped.

        Raises:
            UserError: If the optimizer or the scheduler raises an exception.
        """
        assert self.optimizer is not None, "a Step without an optimizer has backward and after only"
        if all(p.grad is None for group in self.optimizer.param_groups for p in group["params"]):
            scaler = None  # it raises an exception if no parameter has a gradient
        if scaler:
            scaler.unscale_(self.optimizer)
        norm = self._clip(shared) if search is None else None
        before = self.num_taken
        component: Any = self.optimizer
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
                component = self.scheduler
                component.step()
            if self._is_over:
                self.train(False)  # the second optimizer starts from the parameters that would be evaluated
                self._take_over()
        except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:
            name = type(component).__name__
            if isinstance(error, RuntimeError):
                if "sparse" not in text_of(error):
                    raise
                raise UserError(
                    f"{name} can't take the sparse gradients of embeddings: {describe_error(error)}. "
                    "Take optimizer=adagrad "
                    "without weight decay, or embeddings with sparse=False"
                ) from error
            raise UserError(f"{name} failed in its step: {describe_error(error)}. Check its arguments") from error
        return norm

    def epoch_end(self, value: float | None = None) -> None:
        """Steps a scheduler that counts epochs.

        Args:
            value: The monitored value of a validation, for `ReduceLROnPlateau`. None at the end of an epoch, when all
                other schedulers step.
        """
        scheduler: Any = self.scheduler
        if scheduler is None or self.interval != "epoch" or self.waits_for_validation != (value is not None):
            return
        try:
            scheduler.step(*[] if value is None else [value])
        except (TypeError, ValueError, ArithmeticError) as error:
            name = type(scheduler).__name__
            raise UserError(
                f"{name} failed at the end of an epoch: {describe_error(error)}. Check its arguments"
            ) from error

    @property
    def waits_for_validation(self) -> bool:
        """Whether the current scheduler needs the monitored value of a validation."""
        return isinstance(self.scheduler, ReduceLROnPlateau)

    def train(self, mode: bool = True) -> None:
        """Puts an optimizer that has modes, such as a schedule-free one, into training or evaluation mode.

        The parameters have different values in the two modes, and each switch rounds them.
        """
        if self.has_modes:
            optimizer: Any = self.optimizer
            with torch.no_grad():
                optimizer.train() if mode else optimizer.eval()
            self.training = mode

    @property
    def has_modes(self) -> bool:
        """Whether the current optimizer has a training mode and an evaluation mode."""
        return all(callable(getattr(self.optimizer, name, None)) for name in ("train", "eval"))

    @contextmanager
    def evaluated(self) -> Iterator[None]:
        """Puts the optimizer into evaluation mode within the context; afterwards the parameters are bit-equal again."""
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
        """Clips the gradient over the shared parameters, then the whole gradient.

        Returns:
            The norm of the whole gradient before clipping; None if the whole gradient isn't clipped.
        """
        norm = None if self._update.clip_norm is None else total_norm(self._parameters.values())
        rest = norm
        if self._update.clip_shared_norm is not None and shared:
            clip(shared, self._update.clip_shared_norm, total_norm(shared))
            rest = None if norm is None else total_norm(self._parameters.values())
        if self._update.clip_norm is not None and rest is not None:
            clip(self._parameters.values(), self._update.clip_norm, rest)
        return norm

    @property
    def _is_over(self) -> bool:
        """Whether the first optimizer has taken all of its steps and the second one has to take over."""
        return self._then is not None and self.num_taken >= self._after and self.optimizer is not self._then

    def _take_over(self) -> None:
        self.optimizer = self._then
        self.scheduler = None

    def _count(self, *_: Any) -> None:
        """Counts a step; the optimizer calls it, since a gradient scaler doesn't report that it skipped a step."""
        self.num_taken += 1

    def param_groups(self, *, first: bool = False) -> list[dict[str, Any]]:
        """Returns the parameter groups of the current optimizer or, with `first`, of the first one."""
        optimizer = self.first if first else self.optimizer
        return [] if optimizer is None else optimizer.param_groups

    def parameters(self) -> dict[str, list[Tensor]]:
        """Returns the parameters of each optimizer, in the order of its state, by the optimizer's name."""
        return {
            name: [parameter for group in component.param_groups for parameter in group["params"]]
            for name, component in self.components().items()
            if isinstance(component, Optimizer)
        }

    def components(self) -> dict[str, Any]:
        """Returns the optimizers and the scheduler by name."""
        components = {"optimizer": self.first, "then": self._then, "scheduler": self._scheduler}
        return {name: component for name, component in components.items() if component is not None}

    def state_dict(self) -> dict[str, Any]:
        """Returns the number of steps taken and the states of optimizers and scheduler."""
        states = {name: component.state_dict() for name, component in self.components().items()}
        return {"num_taken": self.num_taken, **states}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a state from `state_dict`, with the optimizer that was active when the state was saved."""
        for name, component in self.components().items():
            component.load_state_dict(state[name])
        self.num_taken = state["num_taken"]
        if self._is_over:
            self._take_over()


@contextmanager
def _skipped_by_the_scaler(optimizer: Any) -> Iterator[None]:
    """Makes a gradient scaler skip the step of a fused optimizer when gradients overflow.

    Otherwise the scaler calls the optimizer, whose fused kernel then updates nothing. Hooks, counters and schedules
    would count a step that wasn't taken, and SGD would never initialise the momentum.
    """
    fused = getattr(optimizer, "_step_supports_amp_scaling", False)
    if fused:
        optimizer._step_supports_amp_scaling = False
    try:
        yield
    finally:
        if fused:
            optimizer._step_supports_amp_scaling = fused
