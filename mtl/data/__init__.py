"""Data sets, splits and batches."""

from mtl.data.fields import Fields, Splits
from mtl.data.loader import Loader
from mtl.data.mnist import mnist

__all__ = ["Fields", "Loader", "Splits", "mnist"]
