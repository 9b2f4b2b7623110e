"""The viscous Burgers equation, u_t + u·u_x = ν u_xx, solved by a network u(t, x): a common test of such networks.

ν = 0.01/π, x in [−1, 1], t in [0, 1], u(0, x) = −sin πx, u(t, ±1) = 0. The tasks are the residual of the equation, the
boundary condition and the initial condition. The points of each task are drawn anew for every step.

Source: Raissi, Perdikaris and Karniadakis, arXiv 1711.10561; as a problem of conflicting gradients, arXiv 2408.11104.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from mtl.batch import Batch
from mtl.data import Drawn, Fields, Splits
from mtl.errors import UserError
from mtl.model import MultiTaskModel

VISCOSITY = 0.01 / math.pi
NODES = 100  # of the quadrature; more nodes change the result by less than 1e-14


class Network(nn.Module):
    """A network with tanh activations for u(t, x).

    Args:
        widths: The widths of the hidden layers.
    """

    def __init__(self, widths: Sequence[int] = (50, 50, 50, 50)) -> None:
        super().__init__()
        sizes = [2, *widths]
        layers: list[nn.Module] = []
        for before, after in pairwise(sizes):
            layers += [nn.Linear(before, after), nn.Tanh()]
        self.layers = nn.Sequential(*layers, nn.Linear(sizes[-1], 1))

    def forward(self, point: Tensor) -> Tensor:
        """Returns u (N,) at points (N, 2), which have the coordinates t and x."""
        t, x = point.unbind(1)
        u: Tensor = self.layers(torch.stack([2 * t - 1, x], dim=1)).squeeze(1)
        return u


def residual(model: MultiTaskModel, batch: Batch) -> Tensor:
    """Returns the mean square of u_t + u·u_x − ν u_xx at the points of the batch."""
    point = batch["point"].detach().requires_grad_()
    u = _u(model, point)
    (slope,) = torch.autograd.grad(u.sum(), point, create_graph=True)
    u_t, u_x = slope.unbind(1)
    (bend,) = torch.autograd.grad(u_x.sum(), point, create_graph=True)
    square: Tensor = (u_t + u * u_x - VISCOSITY * bend[:, 1]).square().mean()
    return square


def boundary(model: MultiTaskModel, batch: Batch) -> Tensor:
    """Returns the mean square of u, which is zero at x = ±1."""
    return _u(model, batch["point"]).square().mean()


def initial(model: MultiTaskModel, batch: Batch) -> Tensor:
    """Returns the mean square of u + sin πx at t = 0."""
    point = batch["point"]
    square: Tensor = (_u(model, point) + (math.pi * point[:, 1]).sin()).square().mean()
    return square


def interior_points(*, num_samples: int = 1_000_000, num_times: int = 101, num_places: int = 256) -> Splits:
    """Returns random points in the whole domain for training, and grids with the exact u for validation and testing.

    The points of the test grid lie between those of the validation grid.

    Args:
        num_samples: The number of points in an epoch, unless `data.epoch` sets the number of steps.
        num_times, num_places: The size of the validation grid.
    """
    times = torch.linspace(0, 1, num_times, dtype=torch.float64)
    places = torch.linspace(-1, 1, num_places, dtype=torch.float64)
    between = [(values[1:] + values[:-1]) / 2 for values in (times, places)]
    drawn = Drawn(_anywhere, num_samples=num_samples)
    return Splits(drawn, _grid(times, places), _grid(*between), name="points drawn in the domain")


def boundary_points(*, num_samples: int = 1_000_000) -> Splits:
    """Returns random points on the boundary, x = −1 and x = 1, at random times, for training.

    Args:
        num_samples: The number of points in an epoch, unless `data.epoch` sets the number of steps.
    """
    return Splits(Drawn(_at_the_ends, num_samples=num_samples), name="points drawn at the boundary")


def initial_points(*, num_samples: int = 1_000_000) -> Splits:
    """Returns random points at the initial time, t = 0, for training.

    Args:
        num_samples: The number of points in an epoch, unless `data.epoch` sets the number of steps.
    """
    return Splits(Drawn(_at_the_start, num_samples=num_samples), name="points drawn at the start")


def exact(point: Tensor) -> Tensor:
    """Returns the solution at points (N, 2), float64, by the Cole–Hopf transformation and Gauss–Hermite quadrature.

    Source: Basdevant et al., "Spectral and finite difference solutions of the Burgers equation", 1986.
    """
    t, x = point.double().numpy().T
    nodes, weights = np.polynomial.hermite.hermgauss(NODES)
    y = x[:, None] - 2 * np.sqrt(VISCOSITY * t)[:, None] * nodes
    exponent = -np.cos(np.pi * y) / (2 * np.pi * VISCOSITY)
    kernel = weights * np.exp(exponent - exponent.max(1, keepdims=True))  # the exponents reach ±50
    return torch.from_numpy(-(np.sin(np.pi * y) * kernel).sum(1) / kernel.sum(1))


def _u(model: MultiTaskModel, point: Tensor) -> Tensor:
    """Returns the network's u and checks its shape: (N, 1) would silently broadcast to all pairs of points."""
    if type(model).predict is not MultiTaskModel.predict:
        raise UserError(
            "the tasks of task=burgers have no heads: u is the output of the one trunk, and a "
            f"{type(model).__name__} has no single one; take model=hard_sharing"
        )
    u: Tensor = model.trunk(point)
    if u.shape != point.shape[:1]:
        raise UserError(
            f"the trunk returns u of shape {tuple(u.shape)} for {len(point)} points; it must return one number for "
            "each point"
        )
    return u


def _grid(times: Tensor, places: Tensor) -> Fields:
    point = torch.cartesian_prod(times, places)
    u = torch.cat([exact(part) for part in torch.split(point, 10_000)])
    return Fields({"point": point.float(), "u": u.float()})


def _anywhere(generator: torch.Generator, count: int) -> dict[str, Tensor]:
    point = torch.rand(count, 2, generator=generator)
    return {"point": torch.stack([point[:, 0], 2 * point[:, 1] - 1], dim=1)}


def _at_the_ends(generator: torch.Generator, count: int) -> dict[str, Tensor]:
    t, side = torch.rand(2, count, generator=generator)
    return {"point": torch.stack([t, (side < 0.5).float() * 2 - 1], dim=1)}


def _at_the_start(generator: torch.Generator, count: int) -> dict[str, Tensor]:
    x = 2 * torch.rand(count, generator=generator) - 1
    return {"point": torch.stack([torch.zeros(count), x], dim=1)}
