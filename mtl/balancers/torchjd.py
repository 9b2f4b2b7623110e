"""Any aggregator of the TorchJD package."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mtl.balancers.balancer import Balancer

NUMPY = "numpy: "  # before the names of arrays, which a checkpoint holds as tensors
PLAIN = (bool, int, float, str, tuple, type(None))  # what counters and the like are made of


class TorchJD(Balancer):
    """Combines the gradients by an aggregator of TorchJD, over the matrix that has a row for each task present.

    An aggregator that keeps something from step to step keeps it by the row's number, or begins anew when the number of
    rows changes: it needs the same tasks in all steps. So do the arguments that have a number for each task.

    Args:
        aggregator: the name of a class in `torchjd.aggregation`.
        arguments: what it is made with.

    Raises:
        ImportError: without TorchJD: pip install "mtl-train[torchjd]".
        ValueError: for a name that isn't that of an aggregator.

    `combine` raises an ArithmeticError when the tasks change under an aggregator that has a state.
    """

    needs = "rows"
    kept = ("aggregator", "tasks")

    def __init__(self, *, aggregator: str, **arguments: Any) -> None:
        try:
            from torchjd import aggregation
        except ImportError as error:
            raise ImportError('TorchJD is not installed: pip install "mtl-train[torchjd]"') from error
        kinds = [
            name
            for name in aggregation.__all__
            if name != "Aggregator" and issubclass(getattr(aggregation, name), aggregation.Aggregator)
        ]
        if aggregator not in kinds:
            raise ValueError(f"aggregator: '{aggregator}' is not one of {', '.join(sorted(kinds))}")
        self.aggregator = _Aggregator(getattr(aggregation, aggregator)(**arguments))
        self.tasks: list[int] | None = None  # those of the first step, where the aggregator has a state

    def combine(self, losses: Tensor, rows: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The aggregator's weights, NaN if it has none, and the direction."""
        if self.aggregator.stateful:
            tasks = list(range(len(losses))) if self.present is None else self.present.tolist()
            self.tasks = self.tasks or tasks
            if tasks != self.tasks:
                name = type(self.aggregator.module).__name__
                raise ArithmeticError(
                    f"TorchJD's {name} has a state for the tasks number {self.tasks}, and can't go on with a step that "
                    f"has {tasks}; take a balancer of mtl's own, or see to it that no batch lacks a task"
                )
        matrix = torch.cat([row.flatten(1) for row in rows.values()], dim=1)
        shapes = {name: row.shape[1:] for name, row in rows.items()}
        rows.clear()
        total = self.aggregator.module(matrix)
        pieces = total.split([shape.numel() for shape in shapes.values()])
        weights = torch.full_like(losses, torch.nan) if self.aggregator.weights is None else self.aggregator.weights
        return weights, {name: p.view(shape).clone() for (name, shape), p in zip(shapes.items(), pieces, strict=True)}


class _Aggregator:
    """An aggregator with its last weights, and its state: its own doesn't load before the first call."""

    def __init__(self, module: nn.Module) -> None:
        from torchjd import Stateful

        self.module = module
        self.stateful = any(isinstance(part, Stateful) for part in module.modules())
        self.weights: Tensor | None = None
        weighting = getattr(module, "gramian_weighting", None) or getattr(module, "weighting", None)
        if weighting is not None:
            weighting.register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, given: Any, weights: Tensor) -> None:
        self.weights = weights.detach()

    def state_dict(self) -> dict[str, dict[str, Any]]:
        return {
            path: {
                **dict(module._buffers),
                **{name: v for name, v in vars(module).items() if isinstance(v, PLAIN) and name != "training"},
                **{f"{NUMPY}{n}": torch.from_numpy(v.copy()) for n, v in vars(module).items() if _is_array(v)},
            }
            for path, module in self.module.named_modules()
        }

    def load_state_dict(self, state: dict[str, dict[str, Any]]) -> None:
        for path, module in self.module.named_modules():
            for name, value in state[path].items():
                if name.startswith(NUMPY):
                    setattr(module, name.removeprefix(NUMPY), value.numpy().copy())
                else:
                    setattr(module, name, value.clone() if isinstance(value, Tensor) else value)


def _is_array(value: Any) -> bool:
    return isinstance(value, np.ndarray)
