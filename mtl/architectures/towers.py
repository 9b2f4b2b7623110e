"""The base class of models whose tasks are a chain of events, each of which needs the one before it."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from mtl.architectures.events import Events
from mtl.batch import Batch
from mtl.errors import UserError, suggest
from mtl.model import MultiTaskModel
from mtl.outputs import output_of
from mtl.task import Task
from mtl.trunks.stages import Stages, new_trunk, stages_of


class Towers(MultiTaskModel):
    """A shared bottom, which consists of the first stages of a trunk, and the remaining stages for each task.

    The bottom is `model.trunk`, and the towers are `model.towers[task.name]`. The tasks of the chain are the events
    of one sequence in their order, such as click and purchase, and their predictions are logits.

    Each event needs the towers of the events before it. `features` therefore contains the towers and the heads of the
    whole chain, so that each of them is called once, with one dropout mask and one update of batch norm's statistics.
    Tasks outside of the chain have their towers and heads in `predict`.

    Args:
        trunk: A function that creates a new trunk at each call. It is called once for each task. The bottom consists
            of the first stages of the first trunk.
        tasks: The tasks, at least one, with distinct names.
        inputs: The names of the batch's fields that are the inputs of the bottom.
        chain: The names of the tasks that are a chain, in the order of the events; None for all tasks in their order.
        shared_stages: The number of stages in the bottom, such as 1 for the embeddings of a `mtl.trunks.Table`.

    Raises:
        UserError: If the chain has an unknown task, names a task twice or has a task whose prediction isn't a binary
            logit, or if the trunk has no stages with parameters after the shared ones.
    """

    def __init__(
        self,
        trunk: Callable[[], nn.Module],
        tasks: Sequence[Task],
        *,
        inputs: Sequence[str],
        chain: Sequence[str] | None = None,
        shared_stages: int = 1,
    ) -> None:
        if type(shared_stages) is not int or shared_stages < 1:
            raise UserError(f"model.shared_stages is {shared_stages!r}; it must be a whole number of at least 1")
        trunks = [new_trunk(trunk) for _ in tasks]
        stages = [stages_of(each, least=shared_stages + 1) for each in trunks]
        bottom = Stages(*stages[0][:shared_stages]) if stages else Stages()
        super().__init__(bottom, tasks, inputs=inputs)
        self.towers = nn.ModuleDict(
            {task.name: Stages(*each[shared_stages:]) for task, each in zip(tasks, stages, strict=True)}
        )
        if not any(True for _ in self.towers.parameters()):
            raise UserError(
                f"model.shared_stages is {shared_stages}, and no later stage of the trunk has parameters, so that the "
                "towers would compute the same; take fewer shared stages, or model=hard_sharing"
            )
        self.num_features: int | None = getattr(trunks[0], "num_features", None)
        self.chain = self._checked(chain, tasks)
        self.one_representation = not self._events  # each event has features of its own
        by_name = {task.name: task for task in tasks}
        self._checks = Events(type(self).__name__, [by_name[name] for name in self.chain], len(tasks))

    @property
    def shared(self) -> nn.Module:
        """The bottom, and the towers and heads of the chain."""
        parts = [part for task in self._events for part in self.parts_of(task)]
        return nn.ModuleList([self.trunk, *parts])

    def parts_of(self, task: str) -> list[nn.Module]:
        """Returns the modules of an event that `features` calls."""
        return [self.towers[task], self.heads[task]]

    def features(self, batch: Batch) -> tuple[Any, dict[str, Any]]:
        """Computes the output of the bottom, and the logits of the events of the chain, by task name.

        Raises:
            UserError: If training batches have labels that aren't those of a chain, see `Events`.
        """
        if self.training:
            self._checks.check(batch)
        bottom = super().features(batch)
        return bottom, self.logits(self._events, bottom) if self._events else {}

    def logits(self, events: Sequence[str], bottom: Any) -> dict[str, Any]:
        """Computes the logits of events, in the order of the chain, from the output of the bottom."""
        raise NotImplementedError(f"{type(self).__name__} needs a method logits(events, bottom), see Towers.logits")

    def predict(self, task: str, features: Any) -> Any:
        """Returns the logit of an event, which the features contain; outside of the chain, computes the prediction."""
        bottom, logits = features
        return logits[task] if task in logits else self.head_of(task, self.tower_of(task, bottom))

    def tower_of(self, task: str, bottom: Any) -> Any:
        """Computes the output of a task's tower."""
        return self._encode(self.own_part(task), (bottom,))

    def head_of(self, task: str, output: Any) -> Any:
        """Computes the output of a task's head."""
        return super().predict(task, output)

    @property
    def _events(self) -> tuple[str, ...]:
        return self.chain if len(self.chain) > 1 else ()

    def own_part(self, task: str) -> nn.Module:
        """Returns the tower of a task."""
        return self.towers[task]

    def before(self, task: str) -> list[str]:
        """Returns the names of the tasks before a task in the chain, in order; none if it isn't in the chain."""
        return list(self.chain[: self.chain.index(task)]) if task in self.chain else []

    def _checked(self, chain: Sequence[str] | None, tasks: Sequence[Task]) -> tuple[str, ...]:
        by_name = {task.name: task for task in tasks}
        names = list(by_name) if chain is None else list(chain)
        for name in names:
            if name not in by_name:
                raise UserError(f"model.chain: there is no task '{name}'" + suggest(name, by_name))
            if names.count(name) > 1:
                raise UserError(f"model.chain names '{name}' twice")
            if len(names) > 1 and (output := output_of(by_name[name])) != "multilabel_logits":
                what = f"the output of task '{name}' is {output}" if output else f"task '{name}' has another output"
                raise UserError(
                    f"model: {type(self).__name__} needs a chain of events whose predictions are logits of yes or no, "
                    f"such as those of objective/binary, and {what}. model.chain lists the tasks that are events in "
                    "their order; with model.chain=[] each task only has a tower of its own"
                )
        return tuple(names)
