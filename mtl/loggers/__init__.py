"""Loggers, which record the metrics of a run."""

from mtl.loggers.csv import CsvLogger
from mtl.loggers.logger import Logger, Refusal
from mtl.loggers.mlflow import MLflowLogger
from mtl.loggers.tensorboard import TensorBoardLogger
from mtl.loggers.terminal import Terminal
from mtl.loggers.together import Loggers
from mtl.loggers.wandb import WandbLogger

__all__ = ["CsvLogger", "Logger", "Loggers", "MLflowLogger", "Refusal", "TensorBoardLogger", "Terminal", "WandbLogger"]
