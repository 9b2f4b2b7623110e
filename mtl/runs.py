"""Runs that have been written: reading one back, and starting from one."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from mtl import checkpoint, config
from mtl.errors import UserError
from mtl.model import MultiTaskModel
from mtl.targets import add_code_folders


def read(run: str | Path, name: str = "best") -> dict[str, Any]:
    """The checkpoint of that name in the run's folder; a model of its config needs no first weights from elsewhere.

    Raises:
        UserError: where the folder holds no run, or the checkpoint can't be read.
    """
    folder = Path(run)
    if not (folder / "checkpoints").is_dir() and (folder / "metrics.json").is_file():
        raise UserError(f"the run in '{run}' ended before it saved a checkpoint; its metrics.json says why")
    if not (folder / "checkpoints").is_dir():
        raise UserError(f"'{run}' is not the folder of a run; it would hold a folder 'checkpoints'")
    path = folder / "checkpoints" / f"{name}.pt"
    there = sorted(p.stem for p in path.parent.glob("*.pt"))
    if name not in there:
        raise UserError(
            f"'{run}' has no checkpoint '{name}'; it has: {', '.join(there) or 'none'}; ask for it with checkpoint=…"
        )
    state = checkpoint.load(path)
    state["model"] = state.pop("evaluated", state["model"])
    state["config"]["init_from"] = None  # what it gave has been trained since
    state["config"].setdefault("threads", state["versions"]["threads"])  # a run older than the key
    trunk = state["config"]["model"]["trunk"]
    if trunk["_target_"] == "mtl.trunks.Torchvision":
        trunk["weights"] = None  # they are in the checkpoint, and the file may be gone
    return state


def load(run: str | Path, *, checkpoint: str = "best", device: torch.device | str = "cpu") -> MultiTaskModel:
    """A trained model from the folder of its run, in eval mode: `model({"image": …})["digit"]`.

    What was known of the data is in `model.facts`: the names of classes, means and deviations of standardised targets.

    Args:
        run: the run's folder.
        checkpoint: `best` on validation, or `last`.
        device: where the model is put.

    Raises:
        UserError: where the folder holds no run, or code that the model needs is gone.
    """
    state = read(run, checkpoint)
    add_code_folders(state["code_folders"])
    with torch.random.fork_rng(devices=[]):  # whoever loads a model keeps their random state
        model = config.build_model(state["config"], config.build_tasks(state["config"]))
    model.load_state_dict(state["model"])
    model.facts = state.get("facts", {})
    return model.to(device).eval()


def start_from(model: nn.Module, run: str | Path) -> list[str]:
    """Gives the model the best parameters and buffers of another run, wherever name and shape agree.

    Returns:
        Lines for the user: what was loaded, what is new in this model, what of the other run isn't used.

    Raises:
        UserError: where nothing agrees.
    """
    theirs = read(run)["model"]
    ours = model.state_dict()
    loaded = [name for name in ours if name in theirs and theirs[name].shape == ours[name].shape]
    if not loaded:
        raise UserError(
            f"init_from: nothing in '{run}' has a name and shape of this model; it has: {', '.join(theirs)}"
        )
    model.load_state_dict({name: theirs[name] for name in loaded}, strict=False)
    new = [
        f"{name} (there of shape {tuple(theirs[name].shape)}, here {tuple(ours[name].shape)})"
        if name in theirs
        else name
        for name in ours
        if name not in loaded
    ]
    unused = [name for name in theirs if name not in ours]
    return [
        f"{kind}: {', '.join(names) or 'nothing'}"
        for kind, names in (("loaded", loaded), ("new", new), ("not used", unused))
    ]
