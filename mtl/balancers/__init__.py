"""Balancers turn the tasks' losses and gradients into one weight a task."""

from mtl.balancers.equal import Equal

__all__ = ["Equal"]
