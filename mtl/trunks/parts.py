"""Stages that also offer values from their inside, for architectures that read the trunk at several depths."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from mtl.trunks.stages import Applied, run_stages, tensor_of


class Stage(nn.Module):
    """A stage of a trunk, in three parts that are called one after the other.

    A trunk whose stages have several inputs, or connections to later stages, overrides `parts`.

    Args:
        first: The first part, whose output is u. None if the stage has no value to offer before p; u is p then.
        rest: The second part, from u to p, the features of the stage.
        last: The third part, from p to the stage's output, such as a pooling; None for none.
        pool: The pooling of other features of the size of p, such as those of a task; None for none.
        decoder: Whether the stage is in a decoder, where features are resized before a convolution. In an encoder they
            are pooled after it.
    """

    def __init__(
        self,
        first: nn.Module | None,
        rest: nn.Module,
        last: nn.Module | None = None,
        *,
        pool: nn.Module | None = None,
        decoder: bool = False,
    ) -> None:
        super().__init__()
        self.first = first
        self.rest = rest
        self.last = last
        self.pool = pool
        self.decoder = decoder

    def parts(self, *inputs: Any) -> tuple[Tensor, Tensor, Any]:
        """Returns u, p and the output of the stage."""
        inner: Any = inputs if self.first is None else self.first(*inputs)
        features = run_stages([self.rest], *(inner if isinstance(inner, tuple) else (inner,)))
        output = features if self.last is None else run_stages([self.last], features)
        p = tensor_of(features)
        return (p if self.first is None else tensor_of(inner)), p, output

    def forward(self, *inputs: Any) -> Any:
        """Returns the output of the stage."""
        return self.parts(*inputs)[2]

    def finish(self, features: Tensor) -> Any:
        """Returns the output of the stage for other features in place of p."""
        return features if self.last is None else self.last(features)


def parted(stages: Sequence[nn.Module]) -> list[Stage]:
    """Divides the stages of a trunk into parts.

    A stage that isn't a `Stage` is taken as a sequence of layers. Poolings and changes of the shape at its end are the
    last part. The rest begins with the last layer, or block of layers, that has weights. If there is only one, there is
    no first part. Stages without weights are joined with the stage before them.
    """
    groups: list[list[nn.Module]] = []
    parts: list[Stage | None] = []
    for stage in stages:
        if isinstance(stage, Stage):
            groups.append([])
            parts.append(stage)
        elif groups and parts[-1] is None and not (_has_weights(stage) and any(map(_has_weights, groups[-1]))):
            groups[-1] += _layers(stage)
        else:
            groups.append(_layers(stage))
            parts.append(None)
    return [part or _divided(layers) for part, layers in zip(parts, groups, strict=True)]


def _divided(layers: list[nn.Module]) -> Stage:
    end = len(layers)
    while end > 1 and _only_reshapes(layers[end - 1]):
        end -= 1
    weighted = [number for number, layer in enumerate(layers[:end]) if _has_weights(layer)]
    start = weighted[-1] if len(weighted) > 1 else 0
    last = nn.Sequential(*layers[end:]) if layers[end:] else None
    return Stage(_joined(layers[:start]) if start else None, _joined(layers[start:end]), last)


def _joined(layers: Sequence[nn.Module]) -> nn.Module:
    """Returns the layers as one module. A single layer is returned itself, since it may have several inputs."""
    return layers[0] if len(layers) == 1 else nn.Sequential(*layers)


def _layers(stage: nn.Module) -> list[nn.Module]:
    """Returns the layers in nested sequences."""
    if type(stage).forward is not nn.Sequential.forward:
        return [stage]
    return [layer for child in stage.children() for layer in _layers(child)]


def _has_weights(module: nn.Module) -> bool:
    return any(parameter.ndim > 1 for parameter in module.parameters())


def _only_reshapes(module: nn.Module) -> bool:
    return isinstance(module, nn.Flatten | nn.Identity | Applied) or type(module).__module__ == nn.MaxPool2d.__module__
