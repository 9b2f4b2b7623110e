"""Runs that have been written: reading one back, and starting from one."""

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
    """The checkpoint of that name in the run's folder; a model of its config needs no first weights from elsewhere.

    Raises:
        UserError: where the folder holds no run, or the checkpoint can't be read.
    """
    folder = Path(run)
    check_kind(folder / "checkpoints")
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
    if "evaluated" in state:
        state["model"] = state.pop("evaluated")
    saved.check(state, f"the checkpoint {path}", saved.MODEL)
    state["config"]["init_from"] = None  # what it gave has been trained since
    if "threads" not in state["config"]:  # a run older than the key
        saved.check(state, f"the checkpoint {path}", {"versions": dict, "versions.threads": int})
        state["config"]["threads"] = state["versions"]["threads"]
    return state


def load(
    run: str | Path, *, checkpoint: str = "best", device: torch.device | str = "cpu", trust: Trusted = ()
) -> MultiTaskModel:
    """A trained model from the folder of its run, in eval mode: `model({"image": …})["digit"]`.

    What was known of the data is in `model.facts`: the names of classes, means and deviations of standardised targets.

    Args:
        run: the run's folder.
        checkpoint: `best` on validation, or `last`; `best-1`, `last-1` and so on, where more are kept.
        device: where the model is put.
        trust: modules, or names in modules, that the model may be built with besides those of mtl, torch.nn,
            torchvision, torchmetrics and the current folder, such as `["transformers"]`; True for whatever the run
            names. See docs/safety.md.

    Raises:
        UserError: where the folder holds no run, code that the model needs is gone, or it isn't trusted.
    """
    state = read(run, checkpoint)
    add_code_folders(trusted_folders(run, state, [], parts=("model", "tasks"), trust=trust))
    where = f"the checkpoint '{checkpoint}' of '{run}'"
    # Whoever loads a model keeps their random state.
    with saved.built_from(where), torch.random.fork_rng(devices=[]):
        model = build_model(state["config"], build_tasks(state["config"]))
    saved.load_into(model, state["model"], where)
    model.facts = state.get("facts", {})
    return model.to(device).eval()


def trusted_folders(
    run: str | Path, state: Mapping[str, Any], named: Sequence[str | Path], *, parts: Sequence[str], trust: Trusted
) -> list[str]:
    """Checks what is to be built of a run; gives the folders that the user's own code for it is in.

    Those that the run's checkpoint names are among them where they lie in the current folder, and not beside the run.
    What would load first values or download data is taken out of the config.

    Args:
        run: the run's folder.
        state: its checkpoint.
        named: folders that the user has named.
        parts: the keys of the run's config that are to be built.
        trust: see `load`.

    Raises:
        UserError: where the config names code that isn't trusted.
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
        others = [repr(each) for each in theirs if each not in folders]
        if not others:
            raise
        raise UserError(
            f"{error}. The run's own code was in {' or '.join(others[:3])}. A folder with code for it is named by "
            "--config-dir, or in Python added to sys.path and the modules named in trust=[…]; trust=true, in Python "
            "trust=True, searches the run's folders, and allows whatever it names"
        ) from error
    finally:
        sys.path[:] = path
    return folders


def start_from(model: nn.Module, run: str | Path) -> list[str]:
    """Gives the model the best parameters and buffers of another run, wherever name and shape agree.

    Returns:
        Lines for the user: what was loaded, what is new in this model, what of the other run isn't used.

    Raises:
        UserError: where nothing agrees.
    """
    theirs = read(run)["model"]
    ours = model.state_dict()
    if wrong := saved.unusable(theirs, ours):
        raise UserError(f"init_from: the checkpoint of '{run}' can't be used: {'; '.join(wrong)}")
    loaded = [name for name in ours if saved.fits(theirs.get(name), ours[name])]
    if not loaded:
        raise UserError(
            f"init_from: nothing in '{run}' has a name and shape of this model; it has: {', '.join(theirs)}"
        )
    model.load_state_dict({name: theirs[name] for name in loaded}, strict=False)
    new = [
        f"{name} (there of {saved.described(theirs[name])}, here {saved.described(ours[name])})"
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
