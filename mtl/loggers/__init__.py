"""Where a run's figures go."""

from mtl.loggers.csv import CsvLogger
from mtl.loggers.tensorboard import TensorBoardLogger
from mtl.loggers.terminal import Terminal

__all__ = ["CsvLogger", "TensorBoardLogger", "Terminal"]
