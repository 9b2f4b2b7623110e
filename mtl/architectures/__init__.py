"""Architectures other than hard parameter sharing, which is `mtl.MultiTaskModel` itself."""

from mtl.architectures.adapters import Adapters
from mtl.architectures.cross_stitch import CrossStitch
from mtl.architectures.learned_branching import LearnedBranching
from mtl.architectures.separate import SeparateModels

__all__ = ["Adapters", "CrossStitch", "LearnedBranching", "SeparateModels"]
