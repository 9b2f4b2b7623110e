"""The model: a trunk that all tasks share, and a head for each task."""

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from mtl.batch import Batch, describe, field
from mtl.errors import FOREIGN, UserError, is_elsewhere, text_of, told
from mtl.task import Task


class MultiTaskModel(nn.Module):
    """Hard parameter sharing: every task goes through one trunk, then through a head of its own.

    The heads are `model.heads[task.name]`; losses and objectives that are modules are `model.losses[task.name]`, so
    that their buffers and parameters move, train and are saved with the model.

    Another architecture is a subclass that overrides `shared`, `features`, `predict` and `own_part`. What runs
    identically for every task is in `features`. A task's own part, such as gates, masks or a trunk of its own, is in
    `predict`, which goes from the features to the prediction. Passes, balancers and micro-batches rely on nothing else.

    Args:
        trunk: called with the input fields in order; gives the features, a tensor or a nest of tensors.
        tasks: at least one, names distinct.
        inputs: the batch's fields that the trunk is given.

    Attributes:
        frozen_until: from the names of parameters that are frozen for now to the optimizer steps until which they are.

    Raises:
        UserError: without tasks or inputs, or with two tasks of one name.
    """

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
        self.facts: dict[str, Any] = {}  # what is known of the data that a loaded model was trained on
        self._frozen: list[nn.Module] = []
        self.frozen_until: dict[str, int] = {}

    @property
    def shared(self) -> nn.Module | None:
        """The module that `features` calls, the same for every task; None where the tasks share none."""
        return self.trunk

    def features(self, batch: Batch) -> Any:
        """What is computed once for all tasks: the trunk's output for the batch's input fields.

        Raises:
            UserError: for an input that isn't in the batch, or one that the trunk can't take.
        """
        return self._encode(self.trunk, self._inputs_of(batch))

    def own_part(self, task: str) -> nn.Module:
        """The first module that `predict` calls: where a task's own part of the forward pass begins."""
        return self.heads[task]

    def _encode(self, trunk: nn.Module, inputs: Sequence[Any]) -> Any:
        try:
            return trunk(*inputs)
        except UserError:
            raise
        except FOREIGN as error:
            if is_elsewhere(error):
                raise
            raise UserError(
                f"the trunk can't take its inputs {', '.join(self.inputs)}, {describe(inputs)}: {told(error)}. "
                f"Look at model.trunk and model.inputs{_one_sample(error)}"
            ) from error

    def predict(self, task: str, features: Any) -> Any:
        """The task's prediction from the features.

        Raises:
            UserError: where the head can't take the features, or changes them in place: the next task's head
                would see the changed ones.
        """
        before = _versions(features)
        try:
            prediction = self.heads[task](features)
        except FOREIGN as error:
            if "in-place" in text_of(error) or "inplace" in text_of(error):
                raise UserError(_IN_PLACE.format(task=task)) from error
            if is_elsewhere(error):
                raise
            raise UserError(
                f"task '{task}': its head can't take the trunk's features, {describe(features)}: {told(error)}. "
                f"Look at tasks.{task}.head and model.trunk{_parts_of(features)}{_one_sample(error)}"
            ) from error
        if before != _versions(features):
            raise UserError(_IN_PLACE.format(task=task))
        return prediction

    def forward(self, batch: Batch) -> dict[str, Any]:
        """Every task's prediction, by name, from a batch that has the input fields."""
        features = self.features(batch)
        return {task: self.predict(task, features) for task in self.heads}

    def freeze(self, patterns: Iterable[str], *, until: int | None = None) -> list[str]:
        """Takes parameters out of the training; gives the names of those that were frozen.

        Modules whose parameters are all frozen stay in eval mode, since batch norm's statistics would move on.

        Args:
            patterns: see `match`.
            until: optimizer steps after which they are trained, see `thaw`; None for never. What several patterns
                match waits for the last of them; what wasn't trained before isn't trained after.

        Raises:
            UserError: for a pattern that no parameter matches.
        """
        names = match(self, patterns, "model.freeze" if until is None else "model.freeze_until")
        parameters = dict(self.named_parameters())
        for name in names:
            if until is None:
                self.frozen_until.pop(name, None)  # for good
            elif parameters[name].requires_grad or name in self.frozen_until:
                self.frozen_until[name] = max(until, self.frozen_until.get(name, 0))
            parameters[name].requires_grad = False  # as a lazy one lets it be done
        self._keep_in_eval_mode()
        return names

    def thaws(self, step: int) -> bool:
        """Whether parameters wait to be taken into the training after so many optimizer steps."""
        return any(until <= step for until in self.frozen_until.values())

    def thaw(self, step: int) -> None:
        """Takes those parameters into the training that were frozen until so many optimizer steps had been taken."""
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
    "task '{task}': its head changes the features in place, and the other tasks' heads would see the changed ones; "
    "use inplace=False in the head's first layers"
)


def _one_sample(error: BaseException) -> str:
    """What to do where batch norm is given one sample in training."""
    if "more than 1 value per channel" not in text_of(error):
        return ""
    return (
        ". Batch norm can't train on one sample: trainer.tail=drop leaves out an epoch's last batch where it is "
        "incomplete; trainer.micro_batch_size, trainer.num_micro_batches and data.batch_size say how batches are cut"
    )


def _parts_of(features: Any) -> str:
    """How a head is given a part of features that aren't one tensor."""
    if isinstance(features, Tensor):
        return ""
    return (
        f". The trunk gives a {type(features).__name__}: model/trunk=picked gives heads a part of that, such as an "
        "LSTM's last state with model.trunk.output=1.0.-1"
    )


def _versions(features: Any) -> int:
    """How often the features' tensors were changed in place; inference tensors don't count that."""
    if isinstance(features, Tensor):
        return 0 if features.is_inference() else features._version
    return sum(_versions(leaf) for leaf in tree_leaves(features) if isinstance(leaf, Tensor))


def match(model: nn.Module, patterns: Iterable[str], where: str) -> list[str]:
    """The names of the model's parameters that match one of the patterns, in the model's order.

    A pattern is a parameter's name with `*` and `?` in it, or a module's name, which stands for all of its parameters:
    `trunk`, `trunk.conv1.*`, `*.bias`.

    Raises:
        UserError: for a pattern that matches nothing; `where` says where in the config it stands.
    """
    first = {parameter: name for name, parameter in model.named_parameters()}  # tied ones have several names
    names = {name: first[p] for name, p in model.named_parameters(remove_duplicate=False)}
    found: set[str] = set()
    for pattern in patterns:
        hits = [name for name in names if fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")]
        if not hits:
            raise UserError(f"{where}: no parameter matches '{pattern}'; the parameters are: {', '.join(names)}")
        found.update(names[name] for name in hits)
    return [name for name in first.values() if name in found]
