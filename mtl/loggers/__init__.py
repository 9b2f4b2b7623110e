"""Where a run's figures go."""

from mtl.loggers.csv import CsvLogger
from mtl.loggers.mlflow import MLflowLogger
from mtl.loggers.tensorboard import TensorBoardLogger
from mtl.loggers.terminal import Terminal
from mtl.loggers.together import Logger, Loggers
from mtl.loggers.wandb import WandbLogger

__all__ = ["CsvLogger", "Logger", "Loggers", "MLflowLogger", "TensorBoardLogger", "Terminal", "WandbLogger"]
