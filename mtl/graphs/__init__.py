"""Inspects the graphs that autograd builds in a step: leaves, operations, memory over time, and pictures."""

from mtl.graphs.life import Life, living_anyway
from mtl.graphs.walk import Walk
from mtl.graphs.watched import backward

__all__ = ["Life", "Walk", "backward", "living_anyway"]
