"""Resumes a run: reads the newest state, checks it against the config, and loads it."""

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtl.cli.record import folder_name, report, versions
from mtl.errors import UserError, describe_error
from mtl.files import why
from mtl.runs import resume
from mtl.runs.resume import Refused

if TYPE_CHECKING:
    from mtl.training.trainer import Trainer


def newest_state(console: Any, config: dict[str, Any], folder: Path) -> dict[str, Any] | None:
    """Returns the newest state of the run to resume; None for a new run, or for a run without checkpoints.

    Raises:
        Refused: If no state can be used, or if the config differs from the run's config in options that must not
            change.
    """
    from mtl.training import checkpoint, saved

    if config["resume"] is None:
        return None
    if not (folder / "config.yaml").is_file():
        report(console, f"resume   no unfinished run of this config in {folder_name(folder.parent)}: a new one begins")
        return None
    if not list(folder.glob("checkpoints/last*.pt")):
        report(console, f"resume   {folder_name(folder)} has no checkpoint yet: it starts from the beginning")
        for name in ("metrics.csv", "nonfinite.jsonl"):
            (folder / name).unlink(missing_ok=True)
        for events in folder.glob("events.out.tfevents.*"):
            events.unlink()
        return None
    try:
        state = checkpoint.newest(folder / "checkpoints", lambda line: report(console, line), whole=False)
        saved.check(state, f"the newest checkpoint in {folder_name(folder)}", saved.RUN)
    except UserError as error:
        raise Refused(str(error)) from error
    settings = {"threads": state["versions"].get("threads")}  # for runs from before the config had this key
    resume.check(settings | state["composed"], config, folder_name(folder))
    resume.changed_versions(state["versions"], versions(), lambda line: report(console, line))
    return state


def load_state(trainer: "Trainer", state: dict[str, Any], config: dict[str, Any]) -> None:
    """Loads a saved state into the trainer, and applies those options of the optimizer that were changed on purpose.

    Args:
        trainer: The trainer, built from the config.
        state: The state from a checkpoint.
        config: The config of the resumed run.

    Raises:
        Refused: If the state doesn't fit the trainer.
    """
    from mtl.runs import exchanged
    from mtl.training.layouts import fitted
    from mtl.training.saved import check_kinds, load_into

    optimizer = trainer.step.optimizer
    assert optimizer is not None
    takes = {*inspect.signature(type(optimizer)).parameters, "name", "initial_lr"}  # some groups also contain state
    fresh = [
        {key: value for key, value in group.items() if key in takes - {"params"}} for group in optimizer.param_groups
    ]
    saved = [group if isinstance(group, dict) else {} for group in state["step"]["optimizer"]["param_groups"]]
    before, now = ([group.get("name") for group in groups] for groups in (saved, fresh))
    if before != now:  # the optimizer's state is ordered by position
        raise Refused(
            f"resume: optimizer.groups were {', '.join(map(str, before))} and are {', '.join(map(str, now))}; their "
            "values may change, but not their patterns or the patterns' order"
        )
    try:
        state = fitted(state, trainer.step.model, trainer.step.descent.parameters())
        load_into(trainer.step.model, state["model"], "the saved state")
        exchanged.check(trainer.step, state, config)
        check_kinds({key: value for key, value in state.items() if key != "model"}, trainer.state_dict())
        trainer.load_state_dict(state)
    except UserError as error:
        raise Refused(f"resume: {error}") from error
    except OSError as error:
        raise Refused(f"resume: the log files can't be continued: {why(error)}") from error
    except (LookupError, ValueError, RuntimeError, TypeError, AttributeError) as error:
        raise Refused(f"resume: the saved state doesn't fit this config: {describe_error(error)}") from error
    allowed = config["resume_allow"] + exchanged.options(trainer.step, state, config)
    resume.reset_options(trainer.step.descent.param_groups(first=True), fresh, allowed)
