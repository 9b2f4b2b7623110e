"""Architectures other than hard parameter sharing, which is `mtl.MultiTaskModel` itself."""

from mtl.architectures.adapters import Adapters
from mtl.architectures.aitm import AITM
from mtl.architectures.cgc import CGC
from mtl.architectures.cross_stitch import CrossStitch
from mtl.architectures.dselect_k import DSelectK
from mtl.architectures.esmm import ESMM
from mtl.architectures.learned_branching import LearnedBranching
from mtl.architectures.mmoe import MMoE
from mtl.architectures.ple import PLE
from mtl.architectures.separate import SeparateModels

__all__ = [
    "AITM",
    "CGC",
    "ESMM",
    "PLE",
    "Adapters",
    "CrossStitch",
    "DSelectK",
    "LearnedBranching",
    "MMoE",
    "SeparateModels",
]
