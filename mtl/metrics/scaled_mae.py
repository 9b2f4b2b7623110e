"""The mean absolute error in the unit of the targets before they were scaled."""

from collections.abc import Mapping

from torch import Tensor
from torchmetrics import MeanAbsoluteError


class ScaledMAE(MeanAbsoluteError):
    """The mean absolute error of a scaled target, in its own unit: the error times the scale.

    Args:
        scales: The scales by the names of the targets; in a config, `from_data` for the data's fact `scales`.
        of: The name of the target.

    Raises:
        ValueError: If there is no scale for this target.
    """

    def __init__(self, scales: Mapping[str, float], of: str) -> None:
        super().__init__()
        if of not in scales:
            raise ValueError(f"there is no scale for '{of}'; there are scales for: {', '.join(scales)}")
        self.scale = scales[of]

    def compute(self) -> Tensor:
        """Computes the error in the unit of the target."""
        return super().compute() * self.scale
