"""Loads finished runs, and initialises models from them."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mtl import schema
from mtl.config.model import build_model
from mtl.config.targets import Absent, add_code_folders
from mtl.config.tasks import build_tasks
from mtl.errors import UserError
from mtl.model import MultiTaskModel
from mtl.runs.trust import Own, Trusted, check, loads_nothing, project
from mtl.safety.regular import check_kind
from mtl.training import checkpoint, saved


def read(run: str | Path, name: str = "best") -> dict[str, Any]:
    """Reads a checkpoint from the run's folder, without `init_from` in its config.

    Args:
        run: The folder of the run.
        name: The name of the checkpoint.

    Raises:
        UserError: If the folder contains no run, or if the checkpoint can't be read.
    """
    folder = Path(run)
    check_kind(folder / "checkpoints")
    if not (folder / "checkpoints").is_dir() and (folder / "metrics.json").is_file():
        raise UserError(f"the run in '{run}' ended before it saved a checkpoint; its metrics.json has the reason")
    if not (folder / "checkpoints").is_dir():
        raise UserError(f"'{run}' is not the folder of a run, which would contain a folder 'checkpoints'")
    path = folder / "checkpoints" / f"{name}.pt"
    names = sorted(p.stem for p in path.parent.glob("*.pt"))
    if name not in names:
        raise UserError(
            f"'{run}' has no checkpoint '{name}'; it has: {', '.join(names) or 'none'}; choose one with checkpoint=…"
        )
    state = checkpoint.load(path)
    if "evaluated" in state:
        state["model"] = state.pop("evaluated")
    saved.check(state, f"the checkpoint {path}", saved.MODEL)
    state["config"]["init_from"] = None  # the checkpoint contains the trained weights
    if "threads" not in state["config"]:  # a run from before the config had this key
        saved.check(state, f"the checkpoint {path}", {"versions": dict, "versions.threads": int})
        state["config"]["threads"] = state["versions"]["threads"]
    return state


def load(
    run: str | Path, *, checkpoint: str = "best", device: torch.device | str = "cpu", trust: Trusted = ()
) -> MultiTaskModel:
    """Loads a trained model from the folder of its run, in eval mode: `model({"image": …})["digit"]`.

    The facts of the data are in `model.facts`: names of classes, means and deviations of standardised targets.

    Args:
        run: The folder of the run.
        checkpoint: `best` on validation, or `last`; `best-1`, `last-1` and so on, if the run kept more checkpoints.
        device: The device of the model.
        trust: Modules, or names in modules, that may be used to build the model, in addition to mtl, torch.nn,
            torchvision, torchmetrics and the current folder, such as `["transformers"]`; True trusts everything that
            the run names. See docs/safety.md.

    Raises:
        UserError: If the folder contains no run, or if code that the model needs is missing or isn't trusted.
    """
    state = read(run, checkpoint)
    add_code_folders(trusted_folders(run, state, [], parts=("model", "tasks"), trust=trust))
    where = f"the checkpoint '{checkpoint}' of '{run}'"
    # Loading a model must not change the caller's random state.
    with saved.built_from(where), torch.random.fork_rng(devices=[]):
        model = build_model(state["config"], build_tasks(state["config"]))
    saved.load_into(model, state["model"], where)
    model.facts = state.get("facts", {})
    return model.to(device).eval()


def trusted_folders(
    run: str | Path, state: Mapping[str, Any], named: Sequence[str | Path], *, parts: Sequence[str], trust: Trusted
) -> list[str]:
    """Checks which code a run's config would execute, and returns the folders of the user's code for the run.

    Folders that the checkpoint names are included if they are in the current folder and not in the run's folder.
    Options that would load initial values or download data are removed from the config.

    Args:
        run: The folder of the run.
        state: The checkpoint of the run.
        named: Folders that the user has named.
        parts: The keys of the run's config that are to be built.
        trust: See `load`.

    Raises:
        UserError: If the config names code that isn't trusted.
    """
    config, theirs = state["config"], state.get("code_folders")
    theirs = [each for each in theirs if isinstance(each, str)] if type(theirs) is list else []
    own = Own(Path(run), project(), [Path(folder) for folder in named])
    hints = theirs if trust is True else own.hints(theirs)
    folders = [str(Path(folder).resolve()) for folder in (*own.project, *own.named, *hints)]
    unbuilt = {"model", "tasks", "data", *schema.UNBUILT}
    path = list(sys.path)
    add_code_folders(folders)
    try:
        check({key: value for key, value in config.items() if key in parts or key not in unbuilt}, own=own, trust=trust)
        for part in parts:
            loads_nothing(config.get(part))
    except Absent as error:
        remaining = [repr(each) for each in theirs if each not in folders]
        if not remaining:
            raise
        raise UserError(
            f"{error}. The run's own code was in {' or '.join(remaining[:3])}. Name the folder of its code with "
            "--config-dir, or in Python add the folder to sys.path and name the modules in trust=[…]; trust=true, in "
            "Python trust=True, searches the run's folders and allows everything that the run names"
        ) from error
    finally:
        sys.path[:] = path
    return folders


def start_from(model: nn.Module, run: str | Path) -> list[str]:
    """Copies the best parameters and buffers of another run to the model, wherever names and shapes agree.

    Args:
        model: The model to initialise.
        run: The folder of the other run.

    Returns:
        Lines for the user: what was loaded, what is new in this model, and what of the other run isn't used.

    Raises:
        UserError: If no parameter or buffer agrees.
    """
    theirs = read(run)["model"]
    ours = model.state_dict()
    if wrong := saved.unusable(theirs, ours):
        raise UserError(f"init_from: the checkpoint of '{run}' can't be used: {'; '.join(wrong)}")
    loaded = [name for name in ours if saved.fits(theirs.get(name), ours[name])]
    if not loaded:
        raise UserError(
            f"init_from: '{run}' has no name and shape in common with this model; it has: {', '.join(theirs)}"
        )
    model.load_state_dict({name: theirs[name] for name in loaded}, strict=False)
    new = [
        f"{name} ({saved.described(theirs[name])} in the run, {saved.described(ours[name])} in this model)"
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
