"""Aggregators of the TorchJD package as balancers."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mtl.balancers.balancer import Balancer

NUMPY = "numpy: "  # the prefix of the names of arrays, which a checkpoint contains as tensors
PLAIN = (bool, int, float, str, tuple, type(None))  # the types of attributes that are saved, such as counters


class TorchJD(Balancer):
    """Combines the gradients of the present tasks over the shared parameters by an aggregator of TorchJD.

    An aggregator with a state stores it by the number of the row, or resets it when the number of rows changes.
    Therefore it needs the same tasks in all steps. The same holds for arguments with a number for each task. Needs the
    gradient of each task (the rows).

    Args:
        aggregator: The name of a class in `torchjd.aggregation`.
        arguments: The arguments of this class.

    Raises:
        ImportError: If TorchJD is not installed: pip install "mtl-train[torchjd]".
        ValueError: If there is no such aggregator.
    """

    needs = "rows"
    state_names = ("aggregator", "tasks")

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
        self.tasks: list[int] | None = None  # the tasks of the first step, if the aggregator has a state

    def combine(self, losses: Tensor, rows: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the aggregator's weights, NaN if it has none, and the direction.

        Raises:
            ArithmeticError: If the aggregator has a state and the present tasks are not those of the first step.
        """
        if self.aggregator.stateful:
            tasks = list(range(len(losses))) if self.present is None else self.present.tolist()
            self.tasks = self.tasks or tasks
            if tasks != self.tasks:
                name = type(self.aggregator.module).__name__
                raise ArithmeticError(
                    f"TorchJD's {name} has a state for the tasks with the indices {self.tasks}, but this step has "
                    f"{tasks}; use a balancer of mtl itself, or make sure that every batch has labels for all tasks"
                )
        matrix = torch.cat([row.flatten(1) for row in rows.values()], dim=1)
        shapes = {name: row.shape[1:] for name, row in rows.items()}
        rows.clear()
        total = self.aggregator.module(matrix)
        pieces = total.split([shape.numel() for shape in shapes.values()])
        weights = torch.full_like(losses, torch.nan) if self.aggregator.weights is None else self.aggregator.weights
        return weights, {name: p.view(shape).clone() for (name, shape), p in zip(shapes.items(), pieces, strict=True)}


class _Aggregator:
    """An aggregator, its last weights, and a state that can be loaded before the first call, unlike TorchJD's own."""

    def __init__(self, module: nn.Module) -> None:
        from torchjd import Stateful

        self.module = module
        self.stateful = any(isinstance(submodule, Stateful) for submodule in module.modules())
        self.weights: Tensor | None = None
        weighting = getattr(module, "gramian_weighting", None) or getattr(module, "weighting", None)
        if weighting is not None:
            weighting.register_forward_hook(self._store)

    def _store(self, module: nn.Module, inputs: Any, weights: Tensor) -> None:
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
