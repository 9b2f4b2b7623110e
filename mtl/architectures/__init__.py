"""Architectures other than hard parameter sharing, which is `mtl.MultiTaskModel` itself."""

from mtl.architectures.aitm import AITM
from mtl.architectures.cgc import CGC
from mtl.architectures.dselect_k import DSelectK
from mtl.architectures.esmm import ESMM
from mtl.architectures.mmoe import MMoE
from mtl.architectures.ple import PLE
from mtl.architectures.separate import SeparateModels

__all__ = ["AITM", "CGC", "ESMM", "PLE", "DSelectK", "MMoE", "SeparateModels"]
