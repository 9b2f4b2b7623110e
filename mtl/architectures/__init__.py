"""Architectures other than hard parameter sharing, which is `mtl.MultiTaskModel` itself."""

from mtl.architectures.separate import SeparateModels

__all__ = ["SeparateModels"]
