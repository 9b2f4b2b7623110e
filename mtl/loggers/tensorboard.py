"""All figures as TensorBoard events."""

import re
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class TensorBoardLogger:
    """Writes scalars by their tags, and a layout with one chart each for all tasks' losses, gradient norms, weights
    and cosines.

    Args:
        folder: the run's; the events go to its subfolder `tensorboard`.
        tasks: the tasks' names.
    """

    def __init__(self, folder: Path, tasks: Sequence[str]) -> None:
        self._folder = folder / "tensorboard"
        self._tasks = tasks
        self._writer: SummaryWriter | None = None

    def log(self, step: int, epoch: int, scalars: Mapping[str, float]) -> None:
        """Writes each scalar at this step."""
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter  # imported when the first step has been taken

            self._writer = SummaryWriter(str(self._folder))
            self._writer.add_custom_scalars(layout(self._tasks))
        for tag, value in scalars.items():
            self._writer.add_scalar(tag, value, step)

    def close(self) -> None:
        """Writes out what the writer holds back."""
        if self._writer is not None:
            self._writer.close()


def layout(tasks: Sequence[str]) -> dict[str, dict[str, list[object]]]:
    """TensorBoard's custom-scalar layout: charts by name, each with the regular expressions of its tags."""

    def chart(*wanted: str) -> list[object]:
        return ["Multiline", [f"^{re.escape(tag)}$" for tag in wanted]]

    charts = {f"loss ({split})": chart(*(f"loss/{t}/{split}" for t in tasks)) for split in ("train", "val")}
    charts["gradient norm"] = chart(*(f"grad_norm/{t}" for t in tasks), "grad_norm/total")
    charts["weight"] = chart(*(f"weight/{t}" for t in tasks))
    if len(tasks) > 1:
        charts["cosine"] = chart(*(f"cosine/{a}~{b}" for a, b in combinations(tasks, 2)))
    return {"tasks": charts}
