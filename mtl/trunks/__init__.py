"""Trunks: modules from a batch's inputs to features."""

from mtl.trunks.lenet import LeNet

__all__ = ["LeNet"]
