"""Metrics that torchmetrics doesn't have. Importing this package imports torchmetrics, which takes seconds."""

from mtl.metrics.group_auroc import GroupAUROC

__all__ = ["GroupAUROC"]
