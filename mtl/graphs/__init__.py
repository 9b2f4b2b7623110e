"""What autograd builds in a step: its leaves and operations, how long it lives, and pictures of both."""

from mtl.graphs.life import Life, living_anyway
from mtl.graphs.walk import Walk
from mtl.graphs.watched import backward

__all__ = ["Life", "Walk", "backward", "living_anyway"]
