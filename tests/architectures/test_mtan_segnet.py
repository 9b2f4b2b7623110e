"""MTAN on SegNet trains exactly as the network of the paper, which is written here a second time, without `mtl`.

The architecture, the losses and the uncertainty weights are those of im2im_pred/model_segnet_mtan.py and utils.py in
github.com/lorenmt/mtan, for NYUv2.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mtl

WIDTHS = [4, 8, 8, 8, 8]
CHANNELS = {"segmentation": 13, "depth": 1, "normals": 3}


def convolution(a: int, b: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU())


def attention(a: int, b: int) -> nn.Sequential:
    first = [nn.Conv2d(a, b, 1), nn.BatchNorm2d(b), nn.ReLU()]
    return nn.Sequential(*first, nn.Conv2d(b, b, 1), nn.BatchNorm2d(b), nn.Sigmoid())


def head(task: str) -> nn.Module:
    layers = [nn.Conv2d(WIDTHS[0], WIDTHS[0], 3, padding=1), nn.Conv2d(WIDTHS[0], CHANNELS[task], 1)]
    return nn.Sequential(*layers, *([Normalised()] if task == "normals" else []), *_log(task))


def _log(task: str) -> list[nn.Module]:
    return [nn.LogSoftmax(1)] if task == "segmentation" else []


class Normalised(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / torch.norm(x, p=2, dim=1, keepdim=True)


class Original(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        w = WIDTHS
        self.down1 = nn.ModuleList([convolution(a, b) for a, b in zip([3, *w[:4]], w, strict=True)])
        self.down2 = nn.ModuleList([nn.Sequential(convolution(c, c)) for c in w[:2]])
        self.down2.extend(nn.Sequential(convolution(c, c), convolution(c, c)) for c in w[2:])
        ups = list(zip(w, [w[0], *w[:4]], strict=True))[::-1]  # from the deepest level to the surface
        self.up1 = nn.ModuleList([convolution(a, b) for a, b in ups])
        self.up2 = nn.ModuleList([nn.Sequential(convolution(b, b), convolution(b, b)) for _, b in ups[:3]])
        self.up2.extend(nn.Sequential(convolution(b, b)) for _, b in ups[3:])
        self.down_masks, self.up_masks, self.heads = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
        for task in CHANNELS:
            self.down_masks[task] = nn.ModuleList([attention(c if j == 0 else 2 * c, c) for j, c in enumerate(w)])
            self.up_masks[task] = nn.ModuleList([attention(a + b, b) for a, b in ups])
            self.heads[task] = head(task)
        self.down_f = nn.ModuleList([convolution(a, b) for a, b in zip(w, [*w[1:], w[4]], strict=True)])
        sources = [w[4], *(b for _, b in ups[:4])]
        self.up_f = nn.ModuleList([convolution(a, b) for a, (_, b) in zip(sources, ups, strict=True)])

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        down, up, maxima = [], [], []
        for one, two in zip(self.down1, self.down2, strict=True):
            u = one(x)
            p = two(u)
            x, at = F.max_pool2d(p, 2, 2, return_indices=True)
            maxima.append(at)
            down.append((u, p))
        for one, two in zip(self.up1, self.up2, strict=True):
            u = F.max_unpool2d(x, maxima.pop(), 2, 2)
            x = two(one(u))
            up.append((u, x))
        at_end = {task: self._attended(task, down, up) for task in CHANNELS}
        return {task: self.heads[task](features) for task, features in at_end.items()}

    def _attended(self, task: str, down: list[Any], up: list[Any]) -> Tensor:
        r = None
        for j, (u, p) in enumerate(down):
            mask = self.down_masks[task][j](u if r is None else torch.cat((u, r), dim=1))  # type: ignore[index]
            r = F.max_pool2d(self.down_f[j](mask * p), kernel_size=2, stride=2)
        for j, (u, p) in enumerate(up):
            r = self.up_f[j](F.interpolate(r, scale_factor=2, mode="bilinear", align_corners=True))
            r = self.up_masks[task][j](torch.cat((u, r), dim=1)) * p  # type: ignore[index]
        assert r is not None
        return r


def segmentation(prediction: Tensor, target: Tensor) -> Tensor:
    return F.nll_loss(prediction, target, ignore_index=-1)


def masked(target: Tensor) -> tuple[Tensor, int]:
    mask = (target.sum(1) != 0).to(target.dtype).unsqueeze(1)
    return mask, torch.nonzero(mask).size(0)


def depth(prediction: Tensor, target: Tensor) -> Tensor:
    mask, count = masked(target)
    return torch.sum(torch.abs(prediction - target) * mask) / count


def normals(prediction: Tensor, target: Tensor) -> Tensor:
    mask, count = masked(target)
    return 1 - torch.sum((prediction * target) * mask) / count


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "segmentation": segmentation,
    "depth": depth,
    "normals": normals,
}


def batches(dtype: torch.dtype) -> list[dict[str, Tensor]]:
    g = torch.Generator().manual_seed(3)
    made = []
    for _ in range(20):
        holes = torch.rand(2, 1, 32, 32, generator=g) < 0.2
        batch = {
            "image": torch.rand(2, 3, 32, 32, generator=g),
            "segmentation": torch.randint(-1, 13, (2, 32, 32), generator=g),
            "depth": torch.rand(2, 1, 32, 32, generator=g).masked_fill(holes, 0),
            "normals": F.normalize(torch.randn(2, 3, 32, 32, generator=g), dim=1).masked_fill(holes, 0),
        }
        made.append({key: v.to(dtype) if v.is_floating_point() else v for key, v in batch.items()})
    return made


def shipped(batch: dict[str, Tensor]) -> tuple[mtl.MultiTaskModel, list[mtl.Task]]:
    tasks = [
        mtl.Task(name, head=head(name), loss=LOSSES[name], target=name, missing=False, count=len) for name in CHANNELS
    ]
    model = mtl.architectures.MTAN(mtl.trunks.SegNet(widths=WIDTHS), tasks, inputs=["image"])
    model.to(batch["image"].dtype).eval()(batch)  # gives the layers of the attention their sizes
    return model.train(), tasks


def counterparts(original: Original, model: Any) -> list[tuple[nn.Module, list[nn.Module]]]:
    """Returns pairs of equal modules, with the parameters of each in the same order."""
    pairs: list[tuple[nn.Module, list[nn.Module]]] = []
    for j in range(5):
        encoder, decoder = model.trunk[j], model.trunk[5 + j]
        pairs += [(original.down1[j], [encoder.first]), (original.down2[j], [encoder.rest])]
        pairs.append((nn.ModuleList([original.up1[j], original.up2[j]]), [decoder.rest]))
        pairs += [(original.down_f[j], [model.after[str(j)]]), (original.up_f[j], [model.before[str(5 + j)]])]
        for task in CHANNELS:
            masks = [original.down_masks[task][j], original.up_masks[task][j]]  # type: ignore[index]
            pairs += [(masks[0], [model.attention[task][j]]), (masks[1], [model.attention[task][5 + j]])]
    return pairs + [(original.heads[task], [model.heads[task]]) for task in CHANNELS]


def values(pairs: list[tuple[nn.Module, list[nn.Module]]]) -> list[tuple[Tensor, Tensor]]:
    found: list[tuple[Tensor, Tensor]] = []
    for a, modules in pairs:
        found += zip(a.parameters(), (p for each in modules for p in each.parameters()), strict=True)
        found += zip(a.buffers(), (b for each in modules for b in each.buffers()), strict=True)
    return found


def trained(dtype: torch.dtype, weighting: str, **options: Any) -> list[tuple[Tensor, Tensor]]:
    """Returns the values of the original and of the shipped model after twenty steps."""
    data = batches(dtype)
    torch.manual_seed(0)
    original = Original().to(dtype)
    model, tasks = shipped(data[0])
    pairs = values(counterparts(original, model))
    everything = [*model.parameters(), *model.buffers()]
    assert {id(b) for _, b in pairs} == {id(value) for value in everything}
    with torch.no_grad():
        for a, b in pairs:
            a.copy_(b)
    log_sigma = nn.Parameter(torch.full((3,), -0.5, dtype=dtype))
    optimizer = torch.optim.Adam([*original.parameters(), log_sigma], lr=1e-4)
    learned = options["balancer"].parameters(3, dtype=dtype) if "balancer" in options else []
    step = mtl.Step(model, tasks, torch.optim.Adam([*model.parameters(), *learned], lr=1e-4), **options)
    for batch in data:
        losses = [LOSSES[task](each, batch[task]) for task, each in original(batch["image"]).items()]
        optimizer.zero_grad()
        if weighting == "equal":
            total = losses[0] + losses[1] + losses[2]
        else:
            weights = 1 / (2 * torch.exp(log_sigma))
            total = (weights * torch.stack(losses) + log_sigma / 2).sum()
        total.backward()
        optimizer.step()
        step(batch)
    if weighting == "uncertainty":
        pairs.append((log_sigma.detach(), options["balancer"].learned.values))
    return [(a.detach(), b.detach()) for a, b in pairs]


def test_equal_weights_are_bit_equal() -> None:
    for a, b in trained(torch.float32, "equal", passes="joint"):
        assert torch.equal(a, b)


@pytest.mark.parametrize("passes", ["joint", "shared"])
def test_uncertainty_weights(passes: str) -> None:
    balancer = mtl.balancers.UW(init=-0.5, optimizer="model")
    pairs = trained(torch.float64, "uncertainty", passes=passes, balancer=balancer)
    assert max(float((a - b).abs().max()) for a, b in pairs) < 1e-9
    learned = pairs[-1][1]
    assert float((learned + 0.5).abs().min()) > 1e-3  # the weights moved


def test_number_of_parameters() -> None:
    """The numbers of 3×3 and 1×1 convolutions, for the widths of the paper."""
    torch.manual_seed(0)
    w = [64, 128, 256, 512, 512]

    def conv(a: int, b: int, k: int = 3) -> int:
        return a * b * k * k + b + 2 * b

    shared = sum(conv(a, b) for a, b in zip([3, *w[:4]], w, strict=True)) + sum(map(conv, w, w))
    shared += sum(map(conv, w[2:], w[2:]))
    ups = list(zip(w, [w[0], *w[:4]], strict=True))
    shared += sum(conv(a, b) for a, b in ups) + sum(conv(b, b) * (2 if j > 1 else 1) for j, (_, b) in enumerate(ups))
    trunk = mtl.trunks.SegNet()
    assert sum(p.numel() for p in trunk.parameters()) == shared
