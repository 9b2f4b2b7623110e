"""The monitored value, which decides about the best checkpoint and early stopping and is the result for a sweep."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mtl.errors import UserError, suggest

if TYPE_CHECKING:
    from mtl.training.figures import Kind
    from mtl.training.validation import Figures


class Monitor:
    """The mean of some figures of the validation.

    Args:
        terms: A mapping from `task/metric` to `max` or `min`, or to {mode: max or min, scale: the size of one unit}.
            A metric with several figures has the names `task/metric.figure`. None stands for the first figure of each
            task.
        kinds: The figures that can be monitored.

    Attributes:
        mode: Whether larger (`max`) or smaller (`min`) values are better. If the terms have scales, the mode is `max`,
            and terms whose mode is `min` count negatively.

    Raises:
        UserError: If a figure is unknown, if a mode or scale is invalid, or if figures of different units have no
            scales.
    """

    def __init__(self, terms: Mapping[str, Any] | None, kinds: "Mapping[str, Kind]") -> None:
        if terms is None:
            self._where = "trainer.monitor is null, which means the mean of the tasks' main metrics, but"
            mains: dict[str, str] = {}
            for name in kinds:
                mains.setdefault(name.split("/")[0], name)
            modes = {name: kinds[name].mode for name in mains.values()}
            scales: dict[str, float] = {}
        else:
            self._where = "trainer.monitor:"
            modes = {name: term.get("mode") if isinstance(term, Mapping) else term for name, term in terms.items()}
            scales = {n: term["scale"] for n, term in terms.items() if isinstance(term, Mapping) and "scale" in term}
        self._check(modes, scales, kinds)
        self.mode = "max" if scales else str(next(iter(modes.values())))
        self.factors = {n: (1 if mode == self.mode else -1) / scales.get(n, 1) for n, mode in modes.items()}
        self._scales = scales

    def __call__(self, figures: "Figures") -> float:
        """Computes the monitored value from the figures of a validation."""
        self.check(figures)
        values = [figures[task][metric] for task, metric in (name.split("/", 1) for name in self.factors)]
        return sum(f * v for f, v in zip(self.factors.values(), values, strict=True)) / len(values)

    def check(self, figures: "Figures") -> None:
        """Raises a UserError if a monitored figure isn't among the figures of a validation."""
        available = [f"{task}/{name}" for task, named in figures.items() for name in named]
        for name in self.factors:
            if name not in available:
                raise UserError(f"{self._where} there is no figure '{name}'" + suggest(name, available))

    def better(self, value: float, best: float | None) -> bool:
        """Returns whether `value` is better than the best value so far; NaN never is."""
        if math.isnan(value):
            return False
        return best is None or math.isnan(best) or (value > best if self.mode == "max" else value < best)

    def terms(self, figures: "Figures") -> str:
        """Returns the calculation of the monitored value, such as (0.9 / 0.1 - 0.3 / 0.05) / 2; "" without scales.

        The figures have enough digits to reproduce the value.
        """
        if not self._scales:
            return ""
        text = ""
        for name, factor in self.factors.items():
            task, metric = name.split("/", 1)
            sign = ("" if factor > 0 else "-") if not text else " + " if factor > 0 else " - "
            text += f"{sign}{figures[task][metric]:.6g} / {self._scales[name]:g}"
        return f"({text}) / {len(self.factors)}" if len(self.factors) > 1 else text

    def __str__(self) -> str:
        """Returns the names of the metrics with their signs and scale factors, and the mode, `max` or `min`."""
        named = [
            f"{'-' * (factor < 0)}{name}" + (f" / {self._scales[name]:g}" if self._scales else "")
            for name, factor in self.factors.items()
        ]
        return f"{'mean of ' * (len(named) > 1)}{', '.join(named)} ({self.mode})"

    def _check(self, modes: Mapping[str, str | None], scales: Mapping[str, float], kinds: "Mapping[str, Kind]") -> None:
        if not modes:
            raise UserError("trainer.monitor: name at least one of " + ", ".join(kinds))
        for name, mode in modes.items():
            if name not in kinds and not _metric_of(name, kinds):
                raise UserError(f"trainer.monitor: there is no figure '{name}'" + suggest(name, kinds))
            if mode not in ("max", "min"):
                raise UserError(f"{self._where} '{name}' needs a mode, max or min; it has {mode!r}")
        for name, scale in scales.items():
            if type(scale) not in (int, float) or not 0 < scale < math.inf:
                raise UserError(f"trainer.monitor: the scale of '{name}' is {scale!r}; it must be a number above 0")
        if len(scales) == len(modes):
            return
        if scales or len({(mode, _unit(name, kinds)) for name, mode in modes.items()}) > 1:
            example = ", ".join(f"{name}: {{mode: {mode}, scale: 1.0}}" for name, mode in modes.items())
            raise UserError(
                f"{self._where} {', '.join(modes)} have unlike units, so their mean means nothing. Set scales, "
                f"the changes that count as equal: 'trainer.monitor={{{example}}}'"
            )


def _metric_of(name: str, kinds: "Mapping[str, Kind]") -> str | None:
    """Returns the metric that may give the figure, if its figures are unknown before it was computed."""
    return next((known for known in kinds if name.startswith(f"{known}.")), None)


def _unit(name: str, kinds: "Mapping[str, Kind]") -> str:
    return kinds[name if name in kinds else str(_metric_of(name, kinds))].unit
