"""The three ways to go about one step's forward and backward passes. All leave the same gradient.

    passes      trunk forwards and backwards   graphs alive at once
    joint       1                              all
    sequential  one a task                     one task's
    shared      1                              the trunk's and one head's

From one state they also leave the same buffers and the same random state: `joint` and `shared` draw in the order
trunk, head 1, loss 1, head 2, loss 2, …, and `sequential` makes each later trunk forward start from the random state
and the buffers that the first one started from.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import NoneType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from mtl.batch import Batch, describe
from mtl.errors import FOREIGN, UserError, is_elsewhere, text_of, told
from mtl.gradients.at_features import AtFeatures
from mtl.gradients.reach import Reach
from mtl.gradients.rows import Rows
from mtl.labels import select
from mtl.model import MultiTaskModel
from mtl.snapshots import Buffers, kept_buffers
from mtl.step.precision import Autocast
from mtl.task import BY_CLASS, BY_ELEMENT, WEIGHTED, Task, check_weights

PLAIN = (Tensor, str, int, float, NoneType)  # what features may be made of, in tuples, lists and dicts


Weights = Sequence[float | Tensor]


class Backward(Protocol):
    """Takes 0-dim losses backward, each times its weight, scaled where the precision asks for it."""

    def __call__(self, losses: Sequence[Tensor], weights: Weights, *, retain_graph: bool = False) -> None:
        """`retain_graph` keeps the graph for another backward."""


Weigh = Callable[[Sequence[Tensor]], Weights]  # from the losses to what each is multiplied by


def joint(
    model: MultiTaskModel,
    tasks: Sequence[Task],
    batch: Batch,
    weights: Weights | Weigh,
    *,
    backward: Backward,
    autocast: Autocast,
    measure: Rows | None = None,
    collect: Rows | None = None,
    reach: Reach | None = None,
) -> list[Tensor]:
    """One forward of everything, the weighted losses summed, one backward.

    Args:
        model, tasks, batch: what is trained, on what.
        weights: what each task's loss is multiplied by, or what says so when the losses are known.
        backward: takes 0-dim losses backward, each times its weight, scaled where the precision asks for it.
        autocast: makes the context in which forward passes run.
        measure: takes each task's row beside the backward passes.
        collect: takes each task's row out of `.grad` when that task alone has gone backward; the weights are then 1.
        reach: walks each task's graph, where it is asked for.

    Returns:
        Each task's unweighted loss, detached.
    """
    losses = []
    features = None
    for task in tasks:
        with autocast():
            if features is None or not model.shares_trunk:
                features = model.features(batch, task.name)
            losses.append(loss_of(task, model.predict(task.name, features), batch))
        if measure is not None:
            _measure(measure, model, task, losses[-1])
        if reach is not None:
            reach.add(task.name, losses[-1])
    weights = weights(losses) if callable(weights) else weights
    if collect is None:
        backward(losses, weights)
    else:
        for task, loss, weight in zip(tasks, losses, weights, strict=True):
            more = task is not tasks[-1]
            with kept_buffers(model, kept=more):
                backward([loss], [weight], retain_graph=more)
            collect.take(task.name)
    return [loss.detach() for loss in losses]


def sequential(
    model: MultiTaskModel,
    tasks: Sequence[Task],
    batch: Batch,
    weights: Weights | Weigh,
    *,
    backward: Backward,
    autocast: Autocast,
    measure: Rows | None = None,
    collect: Rows | None = None,
    reach: Reach | None = None,
) -> list[Tensor]:
    """Per task: forward, backward, free. Arguments and result as for `joint`.

    Where the weights depend on the losses, a look without gradients comes first.
    """
    if callable(weights):
        weights = weights(look(model, [(tasks, batch)], autocast)[0])
    repeats = model.shares_trunk and len(tasks) > 1
    if repeats:
        generators = generators_of(model)
        draws_at_start = [generator.get_state() for generator in generators]
        buffers_at_start = Buffers(model.trunk)
    losses = []
    for position, (task, weight) in enumerate(zip(tasks, weights, strict=True)):
        with autocast():
            features = None
            if task.objective is not None:
                pass
            elif repeats and position > 0:
                draws = [generator.get_state() for generator in generators]
                set_states(generators, draws_at_start)
                buffers_at_start.restore()
                features = model.features(batch, task.name)
                set_states(generators, draws)
            else:
                features = model.features(batch, task.name)
            loss = loss_from(model, task, batch, features)
        if measure is not None:
            _measure(measure, model, task, loss)
        if reach is not None:
            reach.add(task.name, loss)
        backward([loss], [weight])
        if collect is not None:
            collect.take(task.name)
        losses.append(loss.detach())
        del features, loss  # the next task's graph is built only after this one's is gone
    return losses


def shared(
    model: MultiTaskModel,
    tasks: Sequence[Task],
    batch: Batch,
    weights: Weights | Weigh,
    *,
    backward: Backward,
    autocast: Autocast,
    measure: Rows | None = None,
    collect: AtFeatures | None = None,
    reach: Reach | None = None,
) -> list[Tensor]:
    """The trunk once; per head forward and backward down to the features; one backward of the trunk.

    Arguments and result as for `joint`. Where the weights depend on the losses, all heads' graphs are alive at once.
    """
    with autocast():
        features, structure = tree_flatten(model.features(batch, tasks[0].name))
    hidden = [type(f).__name__ for f in features if not isinstance(f, PLAIN)]
    if hidden:
        raise UserError(
            f"passes: 'shared' can't look into the trunk's features, a {hidden[0]}; let the trunk give tensors, "
            "or tuples, lists or dicts of them, take a part of it with model/trunk=picked, or take passes=sequential"
        )
    cuts = [f.detach().requires_grad_(f.requires_grad) if isinstance(f, Tensor) else f for f in features]
    cut_features = tree_unflatten(cuts, structure)
    pairs = {cut: feature for cut, feature in zip(cuts, features, strict=True) if is_cut(cut)}
    losses = []
    for index, task in enumerate(tasks):
        with autocast():
            loss = loss_of(task, model.predict(task.name, cut_features), batch)
        if measure is not None:
            _measure(measure, model, task, loss, pairs)
        if reach is not None:
            reach.add(task.name, loss, pairs)
        if not callable(weights):
            backward([loss], [weights[index]])
            loss = loss.detach()
        losses.append(loss)
        if collect is not None:
            collect.take_cuts(task.name, list(pairs.values()), list(pairs))
    if callable(weights):
        backward(losses, weights(losses))
    if collect is None:
        used = [(feature, cut.grad) for cut, feature in pairs.items() if cut.grad is not None]
        if used:  # a frozen trunk has no backward
            torch.autograd.backward([f for f, _ in used], [g for _, g in used])
    return [loss.detach() for loss in losses]


PASSES = {"joint": joint, "sequential": sequential, "shared": shared}


def choose(passes: str, model: MultiTaskModel) -> str:
    """The kind of passes that `passes`, which may be `auto`, means for this model.

    Raises:
        UserError: for `shared` where there is no shared trunk.
    """
    if passes == "auto":
        return "shared" if model.shares_trunk else "sequential"
    if passes not in PASSES:
        raise UserError(f"passes: '{passes}' is not one of {', '.join(PASSES)}, auto")
    if passes == "shared" and not model.shares_trunk:
        raise UserError("passes: 'shared' needs one trunk for all tasks; take auto, sequential or joint")
    return passes


def loss_of(task: Task, prediction: Any, batch: Batch) -> Tensor:
    """The task's loss, a 0-dim tensor.

    Raises:
        UserError: for a target that isn't in the batch, and for a loss that fails or isn't a scalar.
    """
    if task.seen is not None:
        task.seen(prediction, batch)
    prediction, target = select(task, prediction, batch)
    both = isinstance(prediction, Tensor) and isinstance(target, Tensor)
    by_element = isinstance(task.loss, BY_ELEMENT) or task.mean_over == "elements"
    if both and by_element and prediction.shape != target.shape:  # torch would broadcast them
        name = getattr(task.loss, "__name__", type(task.loss).__name__)
        raise UserError(
            f"task '{task.name}': its prediction is {describe(prediction)} and its target '{task.target}' "
            f"{describe(target)}; {name} compares them element by element, so they must be of one "
            f"shape. Look at tasks.{task.name}.head; mtl.heads.Linear with squeeze: true makes a single output (N,)"
        )
    if isinstance(task.loss, WEIGHTED) and isinstance(prediction, Tensor):
        check_weights(task, prediction)
    try:
        loss = task.loss(*_of_one_type(task, prediction, target))
    except FOREIGN as error:
        if is_elsewhere(error):
            raise
        raise UserError(
            f"task '{task.name}': its loss failed on a prediction {describe(prediction)} and the target "
            f"'{task.target}' {describe(target)}: {told(error)}. Look at tasks.{task.name}"
            + (
                f" and its num_outputs, {prediction.shape[1]} here"
                if "out of bounds" in text_of(error) and both
                else ""
            )
            + (f"; its head gives a {type(prediction).__name__}" if not isinstance(prediction, Tensor) else "")
        ) from error
    return _scalar(task, loss)


def _of_one_type(task: Task, prediction: Any, target: Any) -> tuple[Any, Any]:
    """Both in the wider one's type, float32 at least, for losses of torch's that compare numbers.

    Some of these fail on integers or on two types of floats, a few in the backward pass alone, and a binary
    cross-entropy takes the narrower of two types of floats.
    """
    if not isinstance(prediction, Tensor) or not isinstance(target, Tensor) or prediction.dtype == target.dtype:
        return prediction, target
    of_shares = isinstance(task.loss, BY_CLASS) and target.is_floating_point()
    of_numbers = of_shares or isinstance(task.loss, (*BY_ELEMENT, nn.MultiLabelSoftMarginLoss))
    if not of_numbers or not prediction.is_floating_point() or target.is_complex():
        return prediction, target
    wider = torch.promote_types(torch.promote_types(prediction.dtype, target.dtype), torch.float32)
    return prediction.to(wider), target.to(wider)


def objective_of(model: MultiTaskModel, task: Task, batch: Batch) -> Tensor:
    """The task's objective, a 0-dim tensor.

    Raises:
        UserError: for one that fails or isn't a scalar.
    """
    assert task.objective is not None
    try:
        loss = task.objective(model, batch)
    except FOREIGN as error:
        if is_elsewhere(error) or isinstance(error, UserError):
            raise
        raise UserError(
            f"task '{task.name}': its objective failed on a batch with {', '.join(map(str, batch))}: {told(error)}. "
            f"Look at tasks.{task.name}.objective"
        ) from error
    return _scalar(task, loss)


def loss_from(model: MultiTaskModel, task: Task, batch: Batch, features: Any) -> Tensor:
    """The task's objective, or its loss from the features."""
    if task.objective is not None:
        return objective_of(model, task, batch)
    return loss_of(task, model.predict(task.name, features), batch)


def _scalar(task: Task, loss: Any) -> Tensor:
    if not isinstance(loss, Tensor) or loss.ndim:
        shown = describe(loss) if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise UserError(f"task '{task.name}': its loss must be a 0-dim tensor, a mean over the samples; it is {shown}")
    return loss.float() if loss.dtype in (torch.float16, torch.bfloat16) else loss  # room for the scaler's factor


def look(
    model: MultiTaskModel,
    parts: Sequence[tuple[Sequence[Task], Batch]],
    autocast: Autocast,
    *,
    take: Callable[[Task, Any, Batch], Any] = loss_of,
) -> list[list[Any]]:
    """By part and task, the loss, or what else `take` makes of the prediction, without gradients.

    The parts, of which each is the tasks in it and their batch, draw one after the other, as their passes would; random
    state and buffers are afterwards what they were before.
    """
    found = []
    with kept_draws(model), kept_buffers(model), torch.no_grad(), autocast():
        for tasks, batch in parts:
            features = None
            taken = []
            for task in tasks:
                if task.objective is not None:
                    with torch.enable_grad():  # it may differentiate by itself
                        taken.append(objective_of(model, task, batch).detach())
                    continue
                if features is None or not model.shares_trunk:
                    features = model.features(batch, task.name)
                taken.append(take(task, model.predict(task.name, features), batch))
            found.append(taken)
    return found


def _measure(
    rows: Rows,
    model: nn.Module,
    task: Task,
    loss: Tensor,
    cuts: Mapping[Tensor, Tensor] | None = None,
) -> None:
    """Takes the task's row beside the backward passes, and leaves buffers as they were."""
    with kept_buffers(model):
        rows.add(task.name, loss, cuts)


def is_cut(value: Any) -> bool:
    """Whether gradients are to flow through this part of the features."""
    return isinstance(value, Tensor) and value.requires_grad


def generators_of(model: torch.nn.Module) -> list[torch.Generator]:
    """The random generators that a forward pass of the model draws from."""
    generators = [torch.default_generator]
    device = next(model.parameters()).device
    if device.type == "cuda":
        generators.append(torch.cuda.default_generators[device.index or 0])
    return generators


@contextmanager
def kept_draws(model: torch.nn.Module) -> Iterator[None]:
    """Puts the states of these generators back afterwards, also where the code inside fails."""
    generators = generators_of(model)
    states = [generator.get_state() for generator in generators]
    try:
        yield
    finally:
        set_states(generators, states)


def set_states(generators: Sequence[torch.Generator], states: Sequence[Tensor]) -> None:
    """Gives each generator its state."""
    for generator, state in zip(generators, states, strict=True):
        generator.set_state(state)
