"""Divides a model of torchvision's into stages, and compares these with the model."""

from itertools import pairwise

import torch
from torch import Tensor, nn

from mtl.errors import FOREIGN, UserError
from mtl.trunks.stages import Applied, averaged, run_stages

SIZE = 224  # the size of the image with which the stages are compared with the trunk
POOLINGS = (nn.MaxPool2d, nn.AvgPool2d)


def sequence(trunk: nn.Module, model: nn.Module) -> list[nn.Module]:
    """Returns stages that compute what the trunk computes; each ends after a block of layers or a pooling.

    Args:
        trunk: The trunk, which computes features from images (N, 3, H, W).
        model: The model of torchvision's that the trunk contains.

    Raises:
        UserError: If the parts of the model, called one after the other, don't compute what the trunk computes.
    """
    training = trunk.training
    trunk.eval()
    try:
        with torch.no_grad():
            parts = _parts(trunk, model)
    finally:
        trunk.train(training)
    if not parts:
        raise UserError(
            "model.trunk: this architecture needs a trunk with stages, and this model of torchvision's isn't a "
            "sequence of its parts. Take another one, such as resnet18, or a trunk with a method stages()"
        )
    groups: list[list[nn.Module]] = [[Applied(in_colours)]]
    previous: nn.Module | None = None
    for part in parts:
        if previous is not None and (isinstance(previous, POOLINGS) or any(True for _ in previous.children())):
            groups.append([])
        groups[-1].append(part)
        previous = part
    if len(groups) > 1 and not any(p.ndim > 1 for part in groups[-1] for p in part.parameters()):
        last = groups.pop()  # a pooling or a norm at the end isn't a stage of its own
        groups[-1] += last
    if type(model).__name__ == "SwinTransformer":  # its maps are (N, H, W, C)
        for before, after in pairwise(groups):
            before.append(Applied(channels_first))
            after.insert(0, Applied(channels_last))
    return [nn.Sequential(*group) for group in groups]


def channels_first(maps: Tensor) -> Tensor:
    """Returns maps (N, H, W, C) as (N, C, H, W)."""
    return maps.permute(0, 3, 1, 2)


def channels_last(maps: Tensor) -> Tensor:
    """Returns maps (N, C, H, W) as (N, H, W, C)."""
    return maps.permute(0, 2, 3, 1)


def in_colours(image: Tensor) -> Tensor:
    """Returns images with three channels; a single channel is repeated."""
    return image.expand(-1, 3, -1, -1) if image.shape[1] == 1 else image


def _parts(trunk: nn.Module, model: nn.Module) -> list[nn.Module]:
    """Returns the longest sequence of parts of the model that computes what the trunk computes; empty if none does."""
    image = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)).to(next(trunk.parameters()))
    wanted = trunk(image)
    children: list[nn.Module] = []
    for name, child in model.named_children():
        children += child.children() if name == "features" and isinstance(child, nn.Sequential) else [child]
    parts: list[nn.Module] = []
    found: list[nn.Module] = []
    value = image
    for child in children:
        for step in ([child], [nn.Flatten(), child]):  # some models flatten maps by a function
            try:
                value = run_stages(step, value)
            except FOREIGN:
                continue
            parts += step
            break
        else:
            break
        tails: list[list[nn.Module]] = [
            [],
            [nn.Flatten()],
            [Applied(averaged)],
            [nn.ReLU(), Applied(averaged)],
            [nn.ReLU()],
        ]
        if value.ndim == 4:  # the trunk may turn maps (N, H, W, C)
            tails += [[Applied(channels_first)], [Applied(channels_first), Applied(averaged)]]
        for tail in tails:
            output = run_stages(tail, value)
            if output.shape == wanted.shape and torch.allclose(output, wanted, rtol=1e-4, atol=1e-5):
                found = [*parts, *tail]
                break
    return found
