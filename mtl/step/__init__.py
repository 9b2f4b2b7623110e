"""One optimizer step; step.py is the file to read first."""

from mtl.step.result import StepResult
from mtl.step.settings import Gradients, Update
from mtl.step.step import Step

__all__ = ["Gradients", "Step", "StepResult", "Update"]
