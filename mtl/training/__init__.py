"""The training loop, with validation, metrics and checkpoints."""
