"""Heads: modules that compute the prediction of one task from the features."""

from mtl.heads.conv import Conv
from mtl.heads.decoder import Decoder
from mtl.heads.deep_lab import DeepLab
from mtl.heads.linear import Linear
from mtl.heads.mlp import MLP
from mtl.heads.upsampling import Upsampling

__all__ = ["MLP", "Conv", "Decoder", "DeepLab", "Linear", "Upsampling"]
