"""How trunk and heads are wired. Hard sharing is `mtl.MultiTaskModel` itself."""

from mtl.architectures.separate import SeparateModels

__all__ = ["SeparateModels"]
