"""One file of training state: written whole or not at all."""

import os
import pickle
from pathlib import Path
from typing import Any

import torch

from mtl.errors import UserError, first_line

FORMAT = 1


def save(path: Path, state: dict[str, Any]) -> None:
    """Writes the state, plain types and tensors, beside the path, and puts it in place when it is on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        torch.save({"format": FORMAT, **state}, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def load(path: Path) -> dict[str, Any]:
    """The state in the file, on the CPU. No code in it is run.

    Raises:
        UserError: where there is no such file, or it is damaged, or of another format.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise UserError(f"there is no checkpoint {path}") from None
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise UserError(f"the checkpoint {path} can't be read: {first_line(error)}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        found = state.get("format") if isinstance(state, dict) else None
        raise UserError(f"the checkpoint {path} has format {found}; this version of mtl reads format {FORMAT}")
    return state
