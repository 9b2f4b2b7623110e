"""Trunks: modules from a batch's inputs to features."""

from mtl.trunks.lenet import LeNet
from mtl.trunks.table import Table

__all__ = ["LeNet", "Table"]
