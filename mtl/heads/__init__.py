"""Heads: modules from features to one task's prediction."""

from mtl.heads.conv import Conv
from mtl.heads.decoder import Decoder
from mtl.heads.linear import Linear
from mtl.heads.mlp import MLP

__all__ = ["MLP", "Conv", "Decoder", "Linear"]
