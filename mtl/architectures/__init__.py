"""Architectures other than hard parameter sharing, which is `mtl.MultiTaskModel` itself."""

from mtl.architectures.aitm import AITM
from mtl.architectures.esmm import ESMM
from mtl.architectures.separate import SeparateModels

__all__ = ["AITM", "ESMM", "SeparateModels"]
