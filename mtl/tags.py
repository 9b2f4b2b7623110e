"""Builds the tags under which a run's metrics and pictures are logged."""

from collections.abc import Mapping

LOSS, METRIC, GRAD_NORM, WEIGHT, COSINE = "loss", "metric", "grad_norm", "weight", "cosine"  # the first parts of tags
SPEED = "speed/samples_per_second"
TOTAL_GRAD_NORM = f"{GRAD_NORM}/total"
MONITOR = "monitor/val"
BEST = "monitor/best"
COSINE_MATRIX = f"{COSINE}/matrix"  # the tag of a picture


def loss(task: str, split: str) -> str:
    """Returns the tag under which a task's loss on a split (`train`, `val` or `test`) is logged."""
    return f"{LOSS}/{task}/{split}"


def metric(task: str, name: str, split: str) -> str:
    """Returns the tag under which a task's metric on a split is logged."""
    return f"{METRIC}/{task}/{name}/{split}"


def figure(task: str, name: str, split: str) -> str:
    """Returns the tag under which a task's loss, if the name is `loss`, or a task's metric is logged."""
    return loss(task, split) if name == LOSS else metric(task, name, split)


def by_tag(figures: Mapping[str, Mapping[str, float]], split: str) -> dict[str, float]:
    """Returns the losses and metrics of a split by tag.

    Args:
        figures: The values by task and name.
        split: The name of the split.
    """
    return {figure(task, name, split): value for task, named in figures.items() for name, value in named.items()}


def grad_norm(task: str) -> str:
    """Returns the tag under which the norm of a task's gradient is logged."""
    return f"{GRAD_NORM}/{task}"


def weight(task: str) -> str:
    """Returns the tag under which a task's weight is logged."""
    return f"{WEIGHT}/{task}"


def cosine(first: str, second: str) -> str:
    """Returns the tag under which the cosine between two tasks' gradients is logged."""
    return cosine_of(pair(first, second))


def cosine_of(pair: str) -> str:
    """Returns the tag under which the cosine of the pair of tasks with this name, see `pair`, is logged."""
    return f"{COSINE}/{pair}"


def pair(first: str, second: str) -> str:
    """Returns the name of a pair of tasks."""
    return f"{first}~{second}"


def tasks_of(cosine: str) -> tuple[str, str]:
    """Returns the two tasks of a cosine's tag, or of the name of a pair."""
    first, _, second = cosine.removeprefix(f"{COSINE}/").partition("~")
    return first, second


def learning_rate(group: object) -> str:
    """Returns the tag under which the learning rate of an optimizer's parameter group is logged."""
    return f"lr/{group}"


def parameter(name: str) -> str:
    """Returns the tag under which the histogram of a parameter's values is logged."""
    return f"parameter/{name}"


def gradient(name: str) -> str:
    """Returns the tag under which the histogram of a parameter's gradient is logged."""
    return f"gradient/{name}"


def prediction(task: str) -> str:
    """Returns the tag under which the picture of a task's predictions is logged."""
    return f"prediction/{task}"


def is_of(kind: str, tag: str) -> bool:
    """Returns whether the tag is of that kind, such as `WEIGHT`."""
    return tag.startswith(f"{kind}/")
