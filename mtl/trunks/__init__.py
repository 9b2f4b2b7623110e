"""Trunks: modules that compute features from the inputs of a batch; `num_features` is the number of features."""

from mtl.trunks.cnn import CNN
from mtl.trunks.lenet import LeNet
from mtl.trunks.mlp import MLP
from mtl.trunks.parts import Stage
from mtl.trunks.picked import Picked
from mtl.trunks.segnet import SegNet
from mtl.trunks.table import Table
from mtl.trunks.torchvision import Torchvision
from mtl.trunks.transformer import Transformer
from mtl.trunks.two_tower import TwoTower

__all__ = ["CNN", "MLP", "LeNet", "Picked", "SegNet", "Stage", "Table", "Torchvision", "Transformer", "TwoTower"]
