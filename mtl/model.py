"""The model: a trunk that all tasks share and a head for each task."""

from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from mtl.batch import Batch, describe, field
from mtl.errors import FOREIGN, UserError, describe_error, is_unrelated, text_of
from mtl.task import Task


class MultiTaskModel(nn.Module):
    """A model with hard parameter sharing: one trunk for all tasks, and a head for each task.

    The heads are `model.heads[task.name]`. Losses and objectives that are modules are `model.losses[task.name]`, so
    that their buffers and parameters are moved, trained and saved with the model.

    Another architecture is a subclass that overrides `shared`, `features`, `predict` and `own_part`. `features`
    contains the computation that is the same for all tasks. `predict` contains the computation for a single task, from
    the features to the prediction, such as gates, masks or a separate trunk. Passes, balancers and micro-batches use
    only these methods.

    `features` also contains what several tasks need and must compute equally, such as layers with dropout. The
    class attribute `one_representation` says whether all tasks use the same features, and share no parameters but those
    of `shared`; otherwise `gradients.source=representation` is refused, since it would miss conflicts.

    Args:
        trunk: The module that is called with the input fields in order, and returns the features: a tensor or nested
            tensors.
        tasks: The tasks, at least one, with distinct names.
        inputs: The names of the batch's fields that are the inputs of the trunk.

    Attributes:
        frozen_until: By name of a temporarily frozen parameter, the number of optimizer steps after which the parameter
            is trained.

    Raises:
        UserError: If there are no tasks or no inputs, or if two tasks have the same name.
    """

    one_representation = True

    def __init__(self, trunk: nn.Module, tasks: Sequence[Task], *, inputs: Sequence[str]) -> None:
        super().__init__()
        names = [task.name for task in tasks]
        if not names:
            raise UserError("a model needs at least one task")
        if len(set(names)) < len(names):
            raise UserError(f"two tasks have the same name; the names are: {', '.join(names)}")
        if isinstance(inputs, str) or not inputs:
            raise UserError(f"model.inputs: give a list of one or more fields of the batch, not {inputs!r}")
        self.trunk = trunk
        self.heads = nn.ModuleDict({task.name: task.head for task in tasks})
        losses = {task.name: task.objective or task.loss for task in tasks}
        self.losses = nn.ModuleDict({name: loss for name, loss in losses.items() if isinstance(loss, nn.Module)})
        self.inputs = tuple(inputs)
        self.facts: dict[str, Any] = {}  # facts about the data on which a loaded model was trained
        self._frozen: list[nn.Module] = []
        self.frozen_until: dict[str, int] = {}

    @property
    def shared(self) -> nn.Module | None:
        """The module that `features` calls for all tasks; None if the tasks share no module."""
        return self.trunk

    def features(self, batch: Batch) -> Any:
        """Computes the features, which are the same for all tasks: the trunk's output for the batch's input fields.

        Raises:
            UserError: If an input isn't in the batch, or if the trunk fails on the inputs.
        """
        return self._encode(self.trunk, self._inputs_of(batch))

    def own_part(self, task: str) -> nn.Module:
        """Returns the first module that `predict` calls, where the task-specific part of the forward pass begins."""
        return self.heads[task]

    def _encode(self, trunk: Callable[..., Any], inputs: Sequence[Any]) -> Any:
        try:
            return trunk(*inputs)
        except UserError:
            raise
        except FOREIGN as error:
            if is_unrelated(error):
                raise
            raise UserError(
                f"the trunk can't take its inputs {', '.join(self.inputs)}, {describe(inputs)}: "
                f"{describe_error(error)}. "
                f"Check model.trunk and model.inputs{_one_sample(error)}"
            ) from error

    def predict(self, task: str, features: Any) -> Any:
        """Computes the prediction of a task from the features.

        Raises:
            UserError: If the head fails on the features, or if it changes them in place, so that the heads of other
                tasks would get the changed features.
        """
        before = _versions(features)
        try:
            prediction = self.heads[task](features)
        except FOREIGN as error:
            if "in-place" in text_of(error) or "inplace" in text_of(error):
                raise UserError(_IN_PLACE.format(task=task)) from error
            if is_unrelated(error):
                raise
            raise UserError(
                f"task '{task}': its head can't take the trunk's features, {describe(features)}: "
                f"{describe_error(error)}. "
                f"Check tasks.{task}.head and model.trunk{_parts_of(features)}{_one_sample(error)}"
            ) from error
        if before != _versions(features):
            raise UserError(_IN_PLACE.format(task=task))
        return prediction

    def penalty(self, task: str, features: Any) -> Tensor | None:
        """Computes a term that a training step adds to the loss of a task, such as a regulariser of a gate.

        A step calls it in training mode, after `predict` and with the same features.

        Returns:
            The penalty of each sample, (N,), which is averaged as the loss averages over the samples; None for none.
        """
        return None

    def forward(self, batch: Batch) -> dict[str, Any]:
        """Computes the predictions of all tasks, by task name, from a batch that has the input fields."""
        features = self.features(batch)
        return {task: self.predict(task, features) for task in self.heads}

    def freeze(self, patterns: Iterable[str], *, until: int | None = None) -> list[str]:
        """Freezes parameters, so that they are not trained.

        Modules whose parameters are all frozen stay in eval mode, so that the statistics of batch norm don't change.

        Args:
            patterns: Patterns of parameter names, see `match`.
            until: The number of optimizer steps after which the parameters are trained, see `thaw`; None for never. If
                several calls match a parameter, the largest number counts. Parameters that were frozen before, without
                a number of steps, stay frozen.

        Returns:
            The names of the frozen parameters.

        Raises:
            UserError: If no parameter matches a pattern.
        """
        names = match(self, patterns, "model.freeze" if until is None else "model.freeze_until")
        parameters = dict(self.named_parameters())
        for name in names:
            if until is None:
                self.frozen_until.pop(name, None)  # frozen permanently
            elif parameters[name].requires_grad or name in self.frozen_until:
                self.frozen_until[name] = max(until, self.frozen_until.get(name, 0))
            parameters[name].requires_grad = False  # an assignment, which lazy parameters support
        self._keep_in_eval_mode()
        return names

    def begin_step(self, step: int) -> None:
        """Prepares the model for an optimizer step. `mtl.Step` calls this before the forward passes of each step.

        Unfreezes parameters, see `thaw`. Architectures that depend on the number of steps override it.

        Args:
            step: The number of optimizer steps taken so far.
        """
        self.thaw(step)

    def thaws(self, step: int) -> bool:
        """Returns whether `thaw` would unfreeze parameters after this number of optimizer steps."""
        return any(until <= step for until in self.frozen_until.values())

    def thaw(self, step: int) -> None:
        """Unfreezes the parameters that were frozen until this number of optimizer steps, or a smaller one."""
        due = [name for name, until in self.frozen_until.items() if until <= step]
        if not due:
            return
        parameters = dict(self.named_parameters())
        for name in due:
            del self.frozen_until[name]
            parameters[name].requires_grad_(True)
        self._keep_in_eval_mode()

    def _keep_in_eval_mode(self) -> None:
        self._frozen = [
            module
            for module in self.modules()
            if module is not self
            and any(True for _ in module.parameters())
            and not any(p.requires_grad for p in module.parameters())
        ]
        self.train(self.training)

    def train(self, mode: bool = True) -> "MultiTaskModel":
        """Sets training mode, in which frozen modules stay in eval mode."""
        super().train(mode)
        for module in self._frozen:
            module.eval()
        return self

    def _inputs_of(self, batch: Batch) -> list[Any]:
        missing = [name for name in self.inputs if name not in batch]
        if missing:
            field(batch, missing[0], "model.inputs:")  # which raises the error
        return [batch[name] for name in self.inputs]


_IN_PLACE = (
    "task '{task}': its head changes the features in place, and the other tasks' heads would get the changed features; "
    "use inplace=False in the head's first layers"
)


def _one_sample(error: BaseException) -> str:
    """Returns advice if batch norm failed on a batch of one sample, else an empty string."""
    if "more than 1 value per channel" not in text_of(error):
        return ""
    return (
        ". Batch norm can't train on one sample: trainer.tail=drop leaves out the last batch of an epoch if it is "
        "incomplete; trainer.micro_batch_size, trainer.num_micro_batches and data.batch_size set the sizes"
    )


def _parts_of(features: Any) -> str:
    """Returns advice on features that aren't a single tensor, else an empty string."""
    if isinstance(features, Tensor):
        return ""
    return (
        f". The trunk returns a {type(features).__name__}: model/trunk=picked selects a part of it, such as an "
        "LSTM's last state with model.trunk.output=1.0.-1"
    )


def _versions(features: Any) -> int:
    """Returns the number of in-place changes of the features' tensors; inference tensors don't count changes."""
    if isinstance(features, Tensor):
        return 0 if features.is_inference() else features._version
    return sum(_versions(leaf) for leaf in tree_leaves(features) if isinstance(leaf, Tensor))


def match(model: nn.Module, patterns: Iterable[str], where: str) -> list[str]:
    """Returns the names of the parameters that match at least one pattern, in the model's order.

    Args:
        model: The model.
        patterns: Names of parameters, with the wildcards `*` and `?`, or names of modules, which stand for all
            parameters of the module. Examples: `trunk`, `trunk.conv1.*`, `*.bias`.
        where: The config key of the patterns, for messages.

    Raises:
        UserError: If a pattern matches no parameter.
    """
    first = {parameter: name for name, parameter in model.named_parameters()}  # tied parameters have several names
    names = {name: first[p] for name, p in model.named_parameters(remove_duplicate=False)}
    matched: set[str] = set()
    for pattern in patterns:
        hits = [name for name in names if fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")]
        if not hits:
            raise UserError(f"{where}: no parameter matches '{pattern}'; the parameters are: {', '.join(names)}")
        matched.update(names[name] for name in hits)
    return [name for name in first.values() if name in matched]
