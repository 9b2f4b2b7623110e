"""Names for the numbers of a metric that returns a vector."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torchmetrics import Metric
from torchmetrics.wrappers.abstract import WrapperMetric


class Named(WrapperMetric):
    """A metric that returns a vector, such as a value for each class, with a name for each number.

    Args:
        metric: The metric, such as `torchmetrics.classification.MulticlassJaccardIndex` with `average="none"`.
        names: The names of the numbers, in their order.

    Attributes:
        figures: The names, each with `max` or `min` for the better direction, or None.

    Raises:
        ValueError: If a name occurs twice.
    """

    def __init__(self, metric: Metric, names: Sequence[str]) -> None:
        super().__init__()
        if len(set(names)) < len(names):
            raise ValueError(f"names has a name twice: {', '.join(names)}")
        self.metric = metric
        better = metric.higher_is_better
        self.figures = dict.fromkeys(names, None if better is None else "max" if better else "min")

    @property
    def update_called(self) -> bool:
        """Whether the metric was updated since it was reset; torchmetrics doesn't count the updates of a wrapper."""
        return self.metric.update_called

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Updates the metric."""
        self.metric.update(*args, **kwargs)

    def compute(self) -> Tensor:
        """Computes the vector, in the order of the names."""
        value: Tensor = self.metric.compute()
        return value

    def reset(self) -> None:
        """Resets the metric."""
        super().reset()
        self.metric.reset()
