"""Initial values of a trunk from a file."""

from typing import Any

import torch
from torch import nn

from mtl.errors import UserError, first_line


def load_weights(model: nn.Module, weights: str, name: str, *, without: str | None) -> None:
    """Loads parameters and buffers from a file into a model.

    Args:
        model: The model. The file has to contain all of its parameters and buffers, and nothing else.
        weights: A file with a state dict, as `torch.save` writes it.
        name: The name of the model, for messages.
        without: The name of a module whose values in the file are ignored; None for no such module.

    Raises:
        UserError: If the file doesn't exist, or doesn't fit the model.
    """
    try:
        state: dict[str, Any] = torch.load(weights, map_location="cpu", weights_only=True)
        values = {key: value for key, value in state.items() if without is None or not key.startswith(f"{without}.")}
    except FileNotFoundError:
        raise UserError(f"model.trunk.weights: there is no file '{weights}'") from None
    except Exception as error:
        raise UserError(f"model.trunk.weights: '{weights}' contains no state dict: {first_line(error)}") from error
    state_dict = model.state_dict()
    common = [key for key in state_dict if key in values]
    lists = {
        "missing": [key for key in state_dict if key not in values],
        "unknown": [key for key in values if key not in state_dict],
        "of another shape": [key for key in common if getattr(values[key], "shape", None) != state_dict[key].shape],
    }
    differences = "; ".join(
        f"{kind}: {', '.join(keys[:3])}{', …' * (len(keys) > 3)}" for kind, keys in lists.items() if keys
    )
    if differences:
        raise UserError(f"model.trunk.weights: '{weights}' doesn't fit {name}; {differences}")
    model.load_state_dict(values)
