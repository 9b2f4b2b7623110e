"""Architectures other than hard parameter sharing, which is `mtl.MultiTaskModel` itself."""

from mtl.architectures.mtan import MTAN
from mtl.architectures.separate import SeparateModels

__all__ = ["MTAN", "SeparateModels"]
