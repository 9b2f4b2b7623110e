"""All architectures on one small problem, for tests of what holds for each of them."""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import nn

import mtl
from mtl.architectures import (
    AITM,
    CGC,
    ESMM,
    MTAN,
    PLE,
    Adapters,
    CrossStitch,
    DSelectK,
    LearnedBranching,
    MMoE,
    SeparateModels,
)
from mtl.trunks import CNN, MLP

# By the name of the config in configs/model, a function of trunk, tasks and inputs; options that are good for small tests.
ARCHITECTURES: dict[str, Callable[..., mtl.MultiTaskModel]] = {
    "adapters": partial(Adapters, kind="adapter", width=5),
    "aitm": AITM,
    "cgc": partial(CGC, shared_experts=2),
    "cross_stitch": partial(CrossStitch, per_channel=True),
    "dselect_k": partial(DSelectK, experts=3, entropy=0.5, per_sample=True),
    "esmm": ESMM,
    "learned_branching": LearnedBranching,
    "mmoe": partial(MMoE, experts=3),
    "mtan": partial(MTAN, batch_norm=False),
    "ple": partial(PLE, shared_experts=2),
    "separate": SeparateModels,
}
NAMES = ("click", "cart", "sale")


def cnn(**options: Any) -> nn.Module:
    """Returns a trunk of three stages, with maps between them, for images (N, 1, 8, 8)."""
    return CNN(1, widths=[4, 5, 6], **options)


def mlp(**options: Any) -> nn.Module:
    """Returns a trunk of three stages, with vectors between them, for the same images."""
    return MLP(64, widths=[7, 8, 6], **options)


def problem(
    name: str, trunk: Callable[[], nn.Module] = cnn, *, seed: int = 0, names: tuple[str, ...] = NAMES
) -> tuple[mtl.MultiTaskModel, list[mtl.Task]]:
    """Returns a model with an architecture in float64, without lazy modules, and its tasks, which are binary."""
    torch.manual_seed(seed)
    tasks = [
        mtl.Task(each, head=mtl.heads.Linear(6, 1, squeeze=True), loss=nn.BCEWithLogitsLoss(), target=each)
        for each in names
    ]
    model = ARCHITECTURES[name](trunk, tasks, inputs=["image"]).double()
    model.eval()(batches(1)[0])  # gives lazy modules their shapes
    model.train()
    return model, tasks


def batches(count: int, size: int = 8, *, seed: int = 1, missing: bool = False) -> list[mtl.batch.Batch]:
    """Returns batches of images and labels of a chain; with `missing`, some of the second and third task are missing."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        labels = {each: torch.randint(2, (size,), generator=generator).double() for each in NAMES}
        for earlier, later in pairwise(NAMES):
            labels[later] = labels[earlier] * labels[later]
        if missing:
            labels["cart"][1] = labels["sale"][: size // 2 + 1] = torch.nan
        made.append({"image": torch.randn(size, 1, 8, 8, generator=generator, dtype=torch.float64), **labels})
    return made
