"""The tags under which a run's figures and pictures are logged, built in one place."""

from collections.abc import Mapping

LOSS, METRIC, GRAD_NORM, WEIGHT, COSINE = "loss", "metric", "grad_norm", "weight", "cosine"  # what tags begin with
SPEED = "speed/samples_per_second"
TOTAL_GRAD_NORM = f"{GRAD_NORM}/total"
MONITOR = "monitor/val"
BEST = "monitor/best"
COSINE_MATRIX = f"{COSINE}/matrix"  # a picture


def loss(task: str, split: str) -> str:
    """Of a task's loss on a split: `train`, `val` or `test`."""
    return f"{LOSS}/{task}/{split}"


def metric(task: str, name: str, split: str) -> str:
    """Of a task's metric on a split."""
    return f"{METRIC}/{task}/{name}/{split}"


def figure(task: str, name: str, split: str) -> str:
    """Of a task's loss, whose name is `loss`, or of one of its metrics."""
    return loss(task, split) if name == LOSS else metric(task, name, split)


def by_tag(figures: Mapping[str, Mapping[str, float]], split: str) -> dict[str, float]:
    """The figures of a split, by task and name, under their tags."""
    return {figure(task, name, split): value for task, named in figures.items() for name, value in named.items()}


def grad_norm(task: str) -> str:
    """Of the norm of a task's gradient."""
    return f"{GRAD_NORM}/{task}"


def weight(task: str) -> str:
    """Of the weight that a task had in a step."""
    return f"{WEIGHT}/{task}"


def cosine(first: str, second: str) -> str:
    """Of the cosine between two tasks' gradients."""
    return cosine_of(pair(first, second))


def cosine_of(pair: str) -> str:
    """The same, of the name of a pair."""
    return f"{COSINE}/{pair}"


def pair(first: str, second: str) -> str:
    """The name of a pair of tasks."""
    return f"{first}~{second}"


def tasks_of(cosine: str) -> tuple[str, str]:
    """The two tasks of a tag of a cosine, or of the name of a pair."""
    first, _, second = cosine.removeprefix(f"{COSINE}/").partition("~")
    return first, second


def learning_rate(group: object) -> str:
    """Of an optimizer group's learning rate."""
    return f"lr/{group}"


def parameter(name: str) -> str:
    """Of the histogram of a parameter's values."""
    return f"parameter/{name}"


def gradient(name: str) -> str:
    """Of the histogram of a parameter's gradient."""
    return f"gradient/{name}"


def prediction(task: str) -> str:
    """Of the picture of a task's predictions."""
    return f"prediction/{task}"


def is_of(kind: str, tag: str) -> bool:
    """Whether the tag is of that kind, such as `WEIGHT`."""
    return tag.startswith(f"{kind}/")
