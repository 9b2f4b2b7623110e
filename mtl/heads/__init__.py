"""Heads: modules that compute the prediction of one task from the features."""

from mtl.heads.conv import Conv
from mtl.heads.decoder import Decoder
from mtl.heads.linear import Linear
from mtl.heads.mlp import MLP

__all__ = ["MLP", "Conv", "Decoder", "Linear"]
