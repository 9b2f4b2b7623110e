"""The damped oscillator u'' + 2 d u' + s u = 0 with u(0) = 1 and u'(0) = 0, for a network u(t)."""

import math

import torch
from torch import Tensor, nn

DAMPING = 0.2
STIFFNESS = 4.0
END = 2.0


def exact(time: Tensor) -> Tensor:
    """Returns the exact solution at the times."""
    frequency = math.sqrt(STIFFNESS - DAMPING**2)
    swing = torch.cos(frequency * time) + DAMPING / frequency * torch.sin(frequency * time)
    return torch.exp(-DAMPING * time) * swing


class Times(torch.utils.data.Dataset):
    """A data set of evenly spaced times, with the exact solution.

    Args:
        count: The number of times.
        offset: The first time, in units of the distance between two times.
    """

    def __init__(self, count: int, offset: float = 0.0) -> None:
        self.time = END * (torch.arange(count) + offset) / count

    def __len__(self) -> int:
        return len(self.time)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"time": self.time[index], "u": exact(self.time[index])}


class Network(nn.Module):
    """A network that computes u, (N,), from times, (N,)."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Linear(1, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1))
        )

    def forward(self, time: Tensor) -> Tensor:
        """Returns u at the times, (N,)."""
        return self.layers(2 * time[:, None] / END - 1).squeeze(1)


def derivatives(model, time: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns u, u' and u'' at the times."""
    time = time.detach().requires_grad_()
    u = model.trunk(time)
    (first,) = torch.autograd.grad(u.sum(), time, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), time, create_graph=True)
    return u, first, second


def residual(model, batch) -> Tensor:
    """Returns the mean square of the left side of the equation."""
    u, first, second = derivatives(model, batch["time"])
    return (second + 2 * DAMPING * first + STIFFNESS * u).square().mean()


def start(model, batch) -> Tensor:
    """Returns the squared error of u(0) = 1 and u'(0) = 0."""
    u, first, _ = derivatives(model, torch.zeros_like(batch["time"][:1]))
    return (u - 1).square().sum() + first.square().sum()
