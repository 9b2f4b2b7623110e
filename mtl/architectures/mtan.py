"""MTAN: attention of each task on the stages of a shared trunk."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtl.architectures._lazy import LazyBatchNorm, LazyLayer
from mtl.architectures.mixing import channels_of, check_channels
from mtl.errors import UserError
from mtl.model import MultiTaskModel
from mtl.task import Task
from mtl.trunks.parts import Stage, parted
from mtl.trunks.stages import averaged, new_trunk, stages_of


class MTAN(MultiTaskModel):
    """A shared trunk, and for each task attention masks on the features of each stage.

    A stage j of the trunk offers u_j, a value from its inside, and p_j, its features before its pooling; see
    `mtl.trunks.Stage`, and `mtl.trunks.parts.parted` for stages of other kinds. With the masked features â_j of a task,

        a_j = sigmoid(h(g([u_j; r_j])))      â_j = a_j ⊙ p_j      r_{j+1} = pool(f(â_j))

    g is a 1×1 convolution, batch norm and ReLU, and h a 1×1 convolution and batch norm, both of each task and stage. f
    is a 3×3 convolution, batch norm and ReLU of each stage, one for all tasks. r_1 is left out. In a decoder, r_{j+1} =
    f(resize(â_j)). The head of the task gets â of the last stage after the rest of this stage, such as a pooling.

    Values of another size are resized: larger ones by max pooling, smaller ones by bilinear interpolation. In stages
    with vectors (N, C) or tokens (N, T, C), the convolutions are linear layers, and maps from the stage before are
    averaged. The number of channels of all layers follows from the first batch. With all masks 1, this is hard
    parameter sharing. The batch norm of f runs once for each task; its running statistics are those of all tasks
    together, as in the authors' code.

    Args:
        trunk: The trunk, or a function that creates it. It is divided into its stages, `model.trunk[j]`.
        tasks: The tasks, at least one, with distinct names.
        inputs: The names of the batch's fields that are the inputs of the trunk.
        skip: The number of stages at the beginning without attention, such as 1 for the first convolution of a ResNet.
        batch_norm: Whether f, g and h contain batch norm.

    Raises:
        UserError: If no stage is left for attention, or if a task has an objective and no head.

    Source: Liu, Johns and Davison, "End-to-End Multi-Task Learning with Attention", arXiv 1803.10704.
    """

    one_representation = False  # f is shared and follows after the features

    def __init__(
        self,
        trunk: nn.Module | Callable[[], nn.Module],
        tasks: Sequence[Task],
        *,
        inputs: Sequence[str],
        skip: int = 0,
        batch_norm: bool = True,
    ) -> None:
        stages = parted(stages_of(trunk if isinstance(trunk, nn.Module) else new_trunk(trunk), least=skip + 1))
        if not 0 <= skip < len(stages):
            raise UserError(
                f"model.skip is {skip}; the trunk has {len(stages)} stages, of which at least one is needed"
            )
        for task in tasks:
            if task.objective is not None and isinstance(task.head, nn.Identity):
                raise UserError(
                    f"model: MTAN is for tasks with heads, and task '{task.name}' has an objective without a head, "
                    "which calls the trunk itself; take model=hard_sharing"
                )
        super().__init__(_Trunk(stages, skip), tasks, inputs=inputs)
        attended = stages[skip:]
        self._stages = attended
        self.attention = nn.ModuleDict(
            {task.name: nn.ModuleList(Attention(batch_norm=batch_norm) for _ in attended) for task in tasks}
        )
        pairs = list(enumerate(pairwise(attended)))
        self.after = nn.ModuleDict({str(j): Merge(batch_norm=batch_norm) for j, (s, _) in pairs if not s.decoder})
        self.before = nn.ModuleDict({str(j + 1): Merge(batch_norm=batch_norm) for j, (_, s) in pairs if s.decoder})

    def predict(self, task: str, features: Any) -> Any:
        """Computes the prediction of a task from the trunk's features by the attention and the head of the task."""
        carried = None
        masked = None
        for j, (mask, (u, p)) in enumerate(zip(self._attention(task), features, strict=True)):
            if masked is not None:
                carried = self._carried(j, masked, p, features[j - 1][1])
            attention = mask(p if u is None else u, carried, p)
            masked = attention * p
        assert masked is not None
        return super().predict(task, self._stages[-1].finish(masked))

    def own_part(self, task: str) -> nn.Module:
        """Returns the attention module of a task at the first stage with attention."""
        return self._attention(task)[0]

    def _attention(self, task: str) -> nn.ModuleList:
        attention = self.attention[task]
        assert isinstance(attention, nn.ModuleList)
        return attention

    def _carried(self, j: int, masked: Tensor, p: Tensor, before: Tensor) -> Tensor:
        """Returns the features that a task carries from stage j − 1 to stage j, of the size of p."""
        channels = p.shape[channels_of(p)]
        if str(j - 1) in self.after:
            masked = self.after[str(j - 1)](masked, channels)
            pool = self._stages[j - 1].pool
            masked = masked if pool is None else pool(masked)
        masked = resized(masked, p)
        return self.before[str(j)](masked, channels) if str(j) in self.before else masked


class _Trunk(nn.ModuleList):
    """The stages of the trunk, of which those with attention offer their u and p."""

    def __init__(self, stages: Sequence[Stage], skip: int) -> None:
        super().__init__(stages)
        self.skip = skip

    def forward(self, *inputs: Any) -> list[tuple[Tensor | None, Tensor]]:
        """Returns the pairs (u, p); u is None where it is p."""
        pairs: list[tuple[Tensor | None, Tensor]] = []
        value: Any = inputs
        stages = list(self)
        for number, stage in enumerate(stages):
            assert isinstance(stage, Stage)
            u, p, value = stage.parts(*(value if isinstance(value, tuple) else (value,)))
            if number >= self.skip:
                check_channels(p, *stages[: number + 1])
                pairs.append((None if u is p else u, p))
        return pairs


class Attention(nn.Module):
    """The attention of one task on one stage: two layers from u and the task's features r to a mask for p.

    Args:
        batch_norm: Whether batch norm follows each layer.
    """

    def __init__(self, *, batch_norm: bool = True) -> None:
        super().__init__()
        self.g = LazyLayer(1)
        self.g_norm: nn.Module = LazyBatchNorm() if batch_norm else nn.Identity()
        self.h = LazyLayer(1)
        self.h_norm: nn.Module = LazyBatchNorm() if batch_norm else nn.Identity()

    def forward(self, u: Tensor, r: Tensor | None, p: Tensor) -> Tensor:
        """Returns the mask, with values between 0 and 1, of the shape of p."""
        channels = p.shape[channels_of(p)]
        x = resized(u, p)
        x = _rows(x if r is None else torch.cat((x, r), channels_of(p)))
        hidden = F.relu(self.g_norm(self.g(x, channels)))
        mask: Tensor = self.h_norm(self.h(hidden, channels)).sigmoid()
        return mask.reshape(p.shape)


class Merge(nn.Module):
    """A 3×3 convolution, or a linear layer, with batch norm and ReLU: f, which all tasks use.

    Args:
        batch_norm: Whether batch norm follows the layer.
    """

    def __init__(self, *, batch_norm: bool = True) -> None:
        super().__init__()
        self.f = LazyLayer(3)
        self.norm: nn.Module = LazyBatchNorm() if batch_norm else nn.Identity()

    def forward(self, features: Tensor, channels: int) -> Tensor:
        """Returns features with another number of channels."""
        output = F.relu(self.norm(self.f(_rows(features), channels)))
        return output.reshape(*features.shape[:2], channels) if features.ndim == 3 else output


def resized(x: Tensor, like: Tensor) -> Tensor:
    """Returns features of the same kind and size as others, with their own number of channels.

    Args:
        x: Maps (N, C, H, W), tokens (N, T, C) or vectors (N, C).
        like: Features of one of these kinds.
    """
    if x.ndim == like.ndim == 4:
        size = [min(a, b) for a, b in zip(x.shape[2:], like.shape[2:], strict=True)]
        if list(x.shape[2:]) != size:
            x = F.adaptive_max_pool2d(x, size)
        if like.shape[2:] != x.shape[2:]:
            x = F.interpolate(x, like.shape[2:], mode="bilinear", align_corners=True)
        return x
    if x.ndim == like.ndim and (x.ndim == 2 or x.shape[1] == like.shape[1]):
        return x
    vectors = averaged(x)
    if like.ndim == 2:
        return vectors
    if like.ndim == 3:
        return vectors[:, None].expand(-1, like.shape[1], -1)
    return vectors[:, :, None, None].expand(-1, -1, *like.shape[2:])


def _rows(features: Tensor) -> Tensor:
    """Returns tokens as vectors (N·T, C), and other features unchanged."""
    return features.flatten(0, 1) if features.ndim == 3 else features
