"""python -m mtl.evaluate run=outputs/…: measures a trained model on one split of its data."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from mtl import cli
from mtl.errors import UserError

SPLITS = ("train", "val", "test")


def evaluate(composed: DictConfig) -> None:
    """Prints the figures of the run's model; those of the test split are the ones the run itself printed.

    Raises:
        UserError: where there is no such run, checkpoint or split.
    """
    options: Any = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    if options["split"] not in SPLITS:
        raise UserError(f"split: '{options['split']}' is not one of {', '.join(SPLITS)}")
    if options["checkpoint"] not in ("best", "last"):
        raise UserError(f"checkpoint: '{options['checkpoint']}' is not one of best, last")

    if not Path(str(options["run"])).is_dir():  # before torch is imported, which takes seconds
        raise UserError(f"'{options['run']}' is not the folder of a run; there is no such folder")

    from rich.console import Console

    from mtl import runs
    from mtl.build import build
    from mtl.precision import autocast_for
    from mtl.seeding import num_threads
    from mtl.summary import table_of
    from mtl.validation import Validation

    folder = Path(str(options["run"]))
    state = runs.read(folder, options["checkpoint"])
    # On another device operations may have no deterministic algorithm, and figures need none.
    config = {**state["config"], "device": options["device"] or state["config"]["device"], "deterministic": False}
    with num_threads(config["threads"]):
        problem = build(config, code_folders=state["code_folders"], trained_on=state.get("facts", {}))
        loaders, model = problem.loaders, problem.model
        if options["split"] not in loaders:
            raise UserError(f"split: the data have no '{options['split']}'; they have {', '.join(loaders)}")
        model.load_state_dict(state["model"])
        autocast = autocast_for(config["precision"], problem.device)
        figures = Validation(model, problem.tasks, autocast)(loaders[options["split"]])
    console = Console()
    console.print(f"data     {problem.splits.summary()}", soft_wrap=True, highlight=False, markup=False)
    console.print(f"model    {folder}, {options['checkpoint']}.pt", soft_wrap=True, highlight=False, markup=False)
    console.print(table_of({options["split"]: figures}))


if __name__ == "__main__":
    cli.launch(evaluate, "evaluate")
