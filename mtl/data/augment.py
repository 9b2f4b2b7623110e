"""Augmentation that moves a picture together with its maps, by torchvision's transforms v2.

A map is a tensor type of torchvision's, so that every transform of `torchvision.transforms.v2` treats it as it should:
class numbers, depths and normals are never interpolated, and flips turn normals.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import functional
from torchvision.tv_tensors import Image, Mask, TVTensor, wrap  # type: ignore[attr-defined]

from mtl.errors import UserError


class Depth(Mask):
    """Depths, (1, H, W)."""


class InverseDepth(Mask):
    """Inverse depths, (1, H, W)."""


class Normals(Mask):
    """Surface normals, (3, H, W): x to the right, y up or down, and z."""


KINDS: dict[str, type[TVTensor]] = {
    **{"image": Image, "classes": Mask, "values": Mask},
    **{"depth": Depth, "inverse_depth": InverseDepth, "normals": Normals},
}
_FLIP = torch.tensor([-1.0, 1.0, 1.0])[:, None, None]


def _flip_horizontally(normals: Tensor) -> Any:
    return wrap(normals.as_subclass(Tensor).flip(-1) * _FLIP, like=normals)


def _flip_vertically(normals: Tensor) -> Any:
    return wrap(normals.as_subclass(Tensor).flip(-2) * _FLIP.roll(1, 0), like=normals)


def _refused(normals: Tensor, *_: Any, **__: Any) -> Any:
    raise UserError(
        "data.augment: normals can be cropped, resized and flipped; rotations and distortions aren't possible"
    )


_F: Any = functional
_KERNELS = {
    **{_F.horizontal_flip: _flip_horizontally, _F.vertical_flip: _flip_vertically},
    **dict.fromkeys((_F.rotate, _F.affine, _F.perspective, _F.elastic), _refused),
}
for _transform, _kernel in _KERNELS.items():
    _F.register_kernel(_transform, Normals)(_kernel)


class RandomScaleCrop(nn.Module):
    """Cuts out a part of the picture and its maps at random, and enlarges it to the size of the whole.

    The part has 1 / scale of the height and of the width, rounded down. Since objects that appear larger are nearer,
    depths are divided by the scale, and inverse depths multiplied. Pictures are interpolated bilinearly, and maps take
    the nearest value.

    Args:
        scales: The scales, one of which is drawn for each sample; each is at least 1.

    Raises:
        UserError: If a scale is below 1.
    """

    def __init__(self, scales: Sequence[float] = (1.0, 1.2, 1.5)) -> None:
        super().__init__()
        if not scales or not all(math.isfinite(scale) and scale >= 1 for scale in scales):
            raise UserError(f"data.augment: scales is {list(scales)!r}; it must be numbers of at least 1")
        self.scales = list(scales)

    def forward(self, sample: dict[str, Any]) -> dict[str, Any]:
        """Transforms the fields of a sample that are pictures or maps; other fields are left unchanged."""
        fields = {name: value for name, value in sample.items() if isinstance(value, TVTensor)}
        height, width = next(iter(fields.values())).shape[-2:]
        scale = self.scales[int(torch.randint(len(self.scales), ()))]
        size = [int(height / scale), int(width / scale)]
        top, left = (int(torch.randint(a - b + 1, ())) for a, b in zip((height, width), size, strict=True))
        for name, value in fields.items():
            moved: Any = _F.resized_crop(value, top, left, *size, size=[height, width])
            if isinstance(value, Depth | InverseDepth):
                moved = wrap(moved / scale if isinstance(value, Depth) else moved * scale, like=value)
            fields[name] = moved
        return {**sample, **fields}
