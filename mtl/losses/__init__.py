"""Losses that torch has not."""

from mtl.losses.binary_cross_entropy import BinaryCrossEntropy

__all__ = ["BinaryCrossEntropy"]
