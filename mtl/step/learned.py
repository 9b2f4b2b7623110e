"""The parameters of a balancer that the model's optimizer trains."""

import torch
from torch import Tensor, nn

from mtl.balancers import Balancer


def parameters_of(balancer: Balancer, num_tasks: int, like: Tensor) -> list[nn.Parameter]:
    """Creates the balancer's parameters on the device of `like`; none for a single task, which needs no balancer."""
    if num_tasks == 1:
        return []
    return balancer.parameters(num_tasks, device=like.device, dtype=torch.promote_types(like.dtype, torch.float32))
