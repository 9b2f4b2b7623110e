"""Data sets, splits and batches."""

from mtl.data.aliccp import aliccp
from mtl.data.celeba import celeba
from mtl.data.cifar100 import cifar100
from mtl.data.dense import cityscapes, dense, nyuv2
from mtl.data.drawn import Drawn
from mtl.data.fields import Fields, Splits
from mtl.data.graphs import collate_graphs
from mtl.data.image_table import image_table
from mtl.data.loader import Loader
from mtl.data.made_ctr import made_ctr
from mtl.data.mnist import mnist
from mtl.data.movielens import movielens
from mtl.data.multi_mnist import multi_mnist
from mtl.data.named import Named, Stream, datasets
from mtl.data.office import office_domain
from mtl.data.pets import pets
from mtl.data.qm9 import qm9
from mtl.data.sources import Mix, Sources
from mtl.data.table import table
from mtl.data.taskonomy import taskonomy

__all__ = [
    "Drawn",
    "Fields",
    "Loader",
    "Mix",
    "Named",
    "Sources",
    "Splits",
    "Stream",
    "aliccp",
    "celeba",
    "cifar100",
    "cityscapes",
    "collate_graphs",
    "datasets",
    "dense",
    "image_table",
    "made_ctr",
    "mnist",
    "movielens",
    "multi_mnist",
    "nyuv2",
    "office_domain",
    "pets",
    "qm9",
    "table",
    "taskonomy",
]
