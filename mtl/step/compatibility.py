"""Checks of the arguments of `mtl.Step`, and of combinations that would give wrong numbers."""

from collections.abc import Mapping, Sequence

from torch import nn
from torch.optim import LBFGS

from mtl.balancers import Balancer
from mtl.choices import ON_NONFINITE
from mtl.distributed.collectives import world_size
from mtl.distributed.replicas import check_plain, check_replicas
from mtl.distributed.sharding import is_sharded
from mtl.errors import UserError
from mtl.model import MultiTaskModel
from mtl.step.balancing import Balancing
from mtl.step.descent import Descent
from mtl.step.lazy import check_not_lazy
from mtl.step.mean_tests import is_known
from mtl.task import Task


def check_arguments(
    model: MultiTaskModel,
    tasks: Sequence[Task],
    balancer: Balancer | None,
    micro_batch_size: int | None,
    num_micro_batches: int | None,
    on_nonfinite: str,
) -> None:
    """Checks each argument of `mtl.Step` by itself.

    Raises:
        UserError: If an argument is invalid.
    """
    check_plain(model)
    if not tasks:
        raise UserError("a step needs at least one task")
    unknown = [task.name for task in tasks if task.name not in model.heads]
    if unknown:
        raise UserError(f"the model has no task '{unknown[0]}'; it has: {', '.join(model.heads)}")
    check_not_lazy(model)
    if balancer is not None and not isinstance(balancer, Balancer):
        raise UserError(f"balancer is {balancer!r}; it must be an instance of a class in mtl.balancers")
    for name, number in (("micro_batch_size", micro_batch_size), ("num_micro_batches", num_micro_batches)):
        if number is not None and (type(number) is not int or number < 1):
            raise UserError(f"{name} is {number!r}; it must be a whole number of at least 1")
    if micro_batch_size is not None and num_micro_batches is not None:
        raise UserError("trainer.micro_batch_size and trainer.num_micro_batches: give one of the two")
    if on_nonfinite not in ON_NONFINITE:
        raise UserError(f"on_nonfinite: '{on_nonfinite}' is not one of {', '.join(ON_NONFINITE)}")


def check_processes(
    model: MultiTaskModel, tasks: Sequence[Task], sharded: bool, settings: Mapping[str, object]
) -> None:
    """Checks that the step can be taken in several processes.

    Args:
        model: The model.
        tasks: The tasks.
        sharded: Whether the model's parameters were divided over the processes when the step was made.
        settings: Descriptions of the other settings, by name.

    Raises:
        UserError: If a loss needs the predictions of all processes, or if the processes have different tasks, models or
            settings.
    """
    whole = [task.name for task in tasks if task.whole_batch and task.objective is not None]
    if whole:
        raise UserError(
            f"task '{whole[0]}': with whole_batch its objective needs the whole batch, which is divided over several "
            "processes. Train in one process, or take an objective that is a mean over samples"
        )
    for task in tasks:
        if not task.whole_batch and task.count is None and task.mean_over is None and not is_known(task):
            key = f"tasks.{task.name}"
            ways = f"{key}.count" if task.objective is not None else f"{key}.count or {key}.mean_over"
            raise UserError(
                f"task '{task.name}': what its loss is a mean over isn't known, and with several processes it can't be "
                f"tested, since each has only its share of the batch. Set {ways}"
            )
    check_plain(model)
    if is_sharded(next(model.parameters())) != sharded:
        raise UserError("the model was sharded after the step was made; shard it before, and before the optimizer")
    check_replicas(model, {"tasks": [task.name for task in tasks], **settings})


def check_aligned(tasks: Sequence[Task], compiled: Sequence[str]) -> None:
    """Checks that all processes can run the same passes, which sharded parameters and synchronised batch norm require.

    Raises:
        UserError: If a process without labels of a task couldn't run the task's passes.
    """
    objectives = [task.name for task in tasks if task.objective is not None]
    if objectives and world_size() > 1:
        raise UserError(
            f"task '{objectives[0]}' has an objective, and a process without labels of the task can't run its passes, "
            "as sharded parameters and synchronised batch norm require; take distributed=ddp and "
            "model.sync_batchnorm=false"
        )
    if compiled and world_size() > 1:
        raise UserError(
            "model.compile: compiled modules with sharded parameters or synchronised batch norm are not supported; set "
            "model.compile=false, or take distributed=ddp and model.sync_batchnorm=false"
        )


def check_shards(model: MultiTaskModel, balancing: Balancing, descent: Descent, precision: str) -> None:
    """Checks that the step can be taken with parameters that are divided over the processes.

    Raises:
        UserError: If another setting doesn't allow that.
    """
    learned = [name for name, loss in model.losses.items() if any(True for _ in loss.parameters())]
    if learned:
        raise UserError(
            f"task '{learned[0]}': its loss has parameters, and a process without labels of the task doesn't compute "
            "the loss, so that they can't be sharded; take distributed=ddp"
        )
    if balancing.collects and balancing.settings.source == "layerwise":
        raise UserError("gradients.source: with sharded parameters, layerwise is not supported; take rows or auto")
    if precision == "fp16":
        raise UserError(
            "precision: fp16 scales gradients by the overflows that a process sees in its part of them; with sharded "
            "parameters, take bf16"
        )
    for each in descent.optimizers:
        kind = type(each).__name__
        if isinstance(each, LBFGS):
            raise UserError(
                f"optimizer: {kind} joins all parameters into one vector; with sharded parameters, take another"
            )
        held = [p for group in each.param_groups for p in group["params"]]
        if not any(is_sharded(parameter) for parameter in held):
            raise UserError(
                f"{kind} has none of the sharded parameters; call mtl.distributed.prepare(model, 'fsdp') before the "
                "optimizer is made"
            )


def check_optimizers(
    descent: Descent, balancing: Balancing, learned: Sequence[nn.Parameter], *, precision: str, clips_shared: bool
) -> None:
    """Checks that the optimizers work together with the balancer, the precision and the clipping.

    Args:
        descent: Holds the optimizers.
        balancing: Holds the balancer.
        learned: The balancer's parameters that the model's optimizer trains.
        precision: The precision of the forward passes.
        clips_shared: Whether the gradient over the shared parameters is clipped separately.

    Raises:
        UserError: If an optimizer cannot be combined with the other settings.
    """
    name = type(balancing.balancer).__name__
    for each in descent.optimizers:
        kind = type(each).__name__
        if isinstance(each, LBFGS):
            _check_line_search(kind, name, balancing, precision, clips_shared and each is descent.first)
            if learned:
                raise UserError(
                    f"balancer.optimizer: LBFGS's line search uses a loss without the parameters of {name}; take own"
                )
        moved = {parameter for group in each.param_groups for parameter in group["params"]}
        if not moved.issuperset(learned):
            raise UserError(
                f"the balancer {name} has optimizer='model', and its parameters are not in {kind}; "
                f"give it [*model.parameters(), *balancer.parameters({balancing.num_tasks})]"
            )


def _check_line_search(kind: str, balancer: str, balancing: Balancing, precision: str, clips_shared: bool) -> None:
    """Checks that an optimizer with a line search works together with the other settings."""
    if clips_shared:
        raise UserError(
            f"trainer.clip_shared_norm: {kind} uses the unclipped gradient in its line "
            "search, so nothing would be clipped; leave it at null"
        )
    if balancing.needs == "rows":
        raise UserError(
            f"optimizer: {kind} uses the weighted loss in its line search, and the balancer {balancer} "
            "works on the gradients themselves; take one that gives weights"
        )
    if precision == "fp16":
        raise UserError(f"precision: fp16 scales gradients, and {kind} can't take that into account; take bf16")
