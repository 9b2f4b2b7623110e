"""The choice of the source of a balancer's Gramian, with checks against the balancer and the passes."""

from mtl.balancers import Balancer
from mtl.errors import UserError
from mtl.model import MultiTaskModel
from mtl.step.settings import Gradients

NEEDS = ("nothing", "past", "losses", "gramian", "rows")
COLLECTING = ("gramian", "rows")  # needs for which the tasks' gradients are collected


def choose_source(balancer: Balancer, needs: str, gradients: Gradients, passes: str, *, at_once: bool) -> str:
    """Chooses the source of the Gramian: `rows`, `layerwise` or `representation`.

    Args:
        balancer: The balancer that receives the Gramian.
        needs: What the balancer needs; `nothing` if there is only one task.
        gradients: The settings, whose source may be `auto`.
        passes: The kind of passes: `joint`, `sequential` or `shared`.
        at_once: Whether the whole batch is always processed at once, not in micro-batches.

    Raises:
        UserError: If the attributes of the balancer contradict each other, or if the source can't be used with the
            balancer or the passes.
    """
    name, collects = type(balancer).__name__, needs in COLLECTING
    if balancer.needs not in NEEDS:
        raise UserError(f"balancer {name}: needs is '{balancer.needs}', not one of {', '.join(NEEDS)}")
    if balancer.over == "all" and collects and (needs, balancer.scope) != ("gramian", "all"):
        raise UserError(
            f"balancer {name}: over is 'all', which requires needs 'gramian' and scope 'all'; here they "
            f"are '{needs}' and '{balancer.scope}'"
        )
    if gradients.every > 1 and needs == "rows":
        raise UserError(
            f"gradients.every: the balancer {name} works on the gradients themselves, in every step; set it to 1"
        )
    source = gradients.source
    if source == "auto":
        return "layerwise" if passes == "shared" and needs == "gramian" and at_once else "rows"
    if source != "rows" and needs == "rows":
        raise UserError(f"gradients.source: the balancer {name} needs the gradients themselves; take rows or auto")
    if source == "representation" and balancer.over == "all" and collects:
        raise UserError(
            "gradients.source: 'representation' has products of the gradients at the features, to which the norms "
            "of the heads' gradients can't be added, as balancer.over=all asks for; take layerwise, rows or auto"
        )
    if not at_once:
        return source_in_micro_batches(gradients)
    if source != "rows" and passes != "shared":
        raise UserError(
            f"gradients.source: '{source}' needs one trunk forward for all tasks, passes=shared, and passes is "
            f"'{passes}' here; take rows or auto"
        )
    return source


def check_representation(model: MultiTaskModel, source: str) -> None:
    """Checks that the gradients at the model's features show the conflicts between the tasks.

    Raises:
        UserError: If the source is `representation`, and tasks have features of their own or share other parameters.
    """
    if source == "representation" and not model.one_representation:
        raise UserError(
            "gradients.source: 'representation' needs features that all tasks use, behind which they share nothing; in "
            f"{type(model).__name__} it would miss conflicts between the tasks. Take auto, layerwise or rows"
        )


def source_in_micro_batches(gradients: Gradients) -> str:
    """Returns the source of the Gramian for a batch that is processed in micro-batches.

    Raises:
        UserError: If the settings name another source, which would miss the products between micro-batches.
    """
    if gradients.source in ("layerwise", "representation"):
        raise UserError(
            f"gradients.source: '{gradients.source}' needs the whole batch's graph, and the batch is cut into "
            "micro-batches; take rows or auto"
        )
    return "rows"
