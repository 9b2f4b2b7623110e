"""First values from a file."""

from typing import Any

import torch
from torch import nn

from mtl.errors import UserError, first_line


def load_weights(model: nn.Module, weights: str, name: str, *, without: str | None) -> None:
    """Gives the model the values in the file.

    Args:
        model: of which every parameter and buffer has to be in the file, and nothing else.
        weights: a file with a state dict, as `torch.save` writes it.
        name: the model's, for messages.
        without: a module whose values in the file aren't used.

    Raises:
        UserError: where there is no such file, or it doesn't fit.
    """
    try:
        state: dict[str, Any] = torch.load(weights, map_location="cpu", weights_only=True)
        own = {key: value for key, value in state.items() if without is None or not key.startswith(f"{without}.")}
    except FileNotFoundError:
        raise UserError(f"model.trunk.weights: there is no file '{weights}'") from None
    except Exception as error:
        raise UserError(f"model.trunk.weights: '{weights}' holds no state dict: {first_line(error)}") from error
    wanted = model.state_dict()
    unlike = [key for key in wanted if key in own and getattr(own[key], "shape", None) != wanted[key].shape]
    lists = {
        "missing": [key for key in wanted if key not in own],
        "unknown": [key for key in own if key not in wanted],
        "of another shape": unlike,
    }
    found = "; ".join(f"{kind}: {', '.join(keys[:3])}{', …' * (len(keys) > 3)}" for kind, keys in lists.items() if keys)
    if found:
        raise UserError(f"model.trunk.weights: '{weights}' doesn't fit {name}; {found}")
    model.load_state_dict(own)
