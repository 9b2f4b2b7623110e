"""Metrics with several figures, each of which is logged, monitored and reported by its own name."""

from mtl.metrics.depth import DepthErrors
from mtl.metrics.named import Named
from mtl.metrics.normals import NormalAngles

__all__ = ["DepthErrors", "Named", "NormalAngles"]
