"""Loss functions that torch doesn't have."""

from mtl.losses.binary_cross_entropy import BinaryCrossEntropy

__all__ = ["BinaryCrossEntropy"]
