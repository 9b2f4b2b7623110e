"""Metrics that torchmetrics doesn't have. Importing this package imports torchmetrics, which takes seconds."""

from mtl.metrics.depth import DepthErrors
from mtl.metrics.group_auroc import GroupAUROC
from mtl.metrics.named import Named
from mtl.metrics.normals import NormalAngles
from mtl.metrics.scaled_mae import ScaledMAE

__all__ = ["DepthErrors", "GroupAUROC", "Named", "NormalAngles", "ScaledMAE"]
