"""Architectures other than hard parameter sharing, which is `mtl.MultiTaskModel` itself."""

from mtl.architectures.cgc import CGC
from mtl.architectures.dselect_k import DSelectK
from mtl.architectures.mmoe import MMoE
from mtl.architectures.ple import PLE
from mtl.architectures.separate import SeparateModels

__all__ = ["CGC", "PLE", "DSelectK", "MMoE", "SeparateModels"]
