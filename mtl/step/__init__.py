"""One optimizer step."""

from mtl.step.step import Step, StepResult

__all__ = ["Step", "StepResult"]
