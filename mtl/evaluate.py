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

    from mtl import config as build
    from mtl import runs
    from mtl.precision import autocast_for
    from mtl.seeding import seed_all
    from mtl.summary import table_of
    from mtl.validation import Validation

    folder = Path(str(options["run"]))
    state = runs.read(folder, options["checkpoint"])
    config = state["config"]
    build.add_code_folders(state["code_folders"])
    device = build.choose_device(options["device"] or config["device"])
    seed_all(config["seed"])  # data may be drawn when they are built, so in the same order as in training
    splits = build.build_splits(config)
    build.check_facts(splits, state.get("facts", {}))
    loaders = build.build_loaders(config, splits, device)
    tasks = build.build_tasks(config, splits)
    model = build.build_model(config, tasks).to(device)
    if options["split"] not in loaders:
        raise UserError(f"split: the data have no '{options['split']}'; they have {', '.join(loaders)}")
    model.load_state_dict(state["model"])
    figures = Validation(model, tasks, autocast_for(config["precision"], device))(loaders[options["split"]])
    console = Console()
    console.print(f"data     {splits.summary()}", soft_wrap=True, highlight=False, markup=False)
    console.print(f"model    {folder}, {options['checkpoint']}.pt", soft_wrap=True, highlight=False, markup=False)
    console.print(table_of({options["split"]: figures}))


if __name__ == "__main__":
    cli.launch(evaluate, "evaluate")
