"""Loss functions that torch doesn't have."""

from mtl.losses.binary_cross_entropy import BinaryCrossEntropy
from mtl.losses.depth import InverseL1, ScaleInvariant
from mtl.losses.normals import CosineDistance

__all__ = ["BinaryCrossEntropy", "CosineDistance", "InverseL1", "ScaleInvariant"]
