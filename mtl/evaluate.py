"""python -m mtl.evaluate run=outputs/…: measures a trained model on one split of its data, or on other data."""

from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from mtl import cli, schema
from mtl.errors import UserError

SPLITS = ("train", "val", "test")


def evaluate(composed: DictConfig) -> None:
    """Prints the figures of the run's model; those of the test split are the ones the run itself printed.

    Raises:
        UserError: where there is no such run, checkpoint or split, and for data that the model can't be measured on.
    """
    own = OmegaConf.masked_copy(composed, [key for key in schema.EVALUATE if key != "data"])
    options: Any = OmegaConf.to_container(own, resolve=True, throw_on_missing=True)
    if options["split"] not in SPLITS:
        raise UserError(f"split: '{options['split']}' is not one of {', '.join(SPLITS)}")
    if options["checkpoint"] not in ("best", "last"):
        raise UserError(f"checkpoint: '{options['checkpoint']}' is not one of best, last")

    if not Path(str(options["run"])).is_dir():  # before torch is imported, which takes seconds
        raise UserError(f"'{options['run']}' is not the folder of a run; there is no such folder")

    from rich.console import Console

    from mtl import runs
    from mtl.build import build
    from mtl.config import with_other_data
    from mtl.precision import autocast_for
    from mtl.seeding import num_threads
    from mtl.summary import table_of
    from mtl.targets import add_code_folders
    from mtl.validation import Validation

    folder = Path(str(options["run"]))
    state = runs.read(folder, options["checkpoint"])
    facts, code = state.get("facts", {}), [*state["code_folders"], *cli.code_folders()]
    # On another device operations may have no deterministic algorithm, and figures need none. All samples are measured.
    config = {**state["config"], "device": options["device"] or state["config"]["device"], "deterministic": False}
    config["trainer"] = {**config["trainer"], "tail": "keep", "micro_batch_size": None, "num_micro_batches": None}
    add_code_folders(code)
    typed = cli.keys(HydraConfig.get().overrides.task)
    given: Any = OmegaConf.to_container(OmegaConf.masked_copy(composed, "data"), resolve=False)
    config, others = with_other_data(config, given["data"] or {}, typed, facts)
    with num_threads(config["threads"]):
        problem = build(config, code_folders=code, trained_on=facts)
        loaders, model = problem.loaders, problem.model
        if options["split"] not in loaders:
            raise UserError(f"split: the data have no '{options['split']}'; they have {', '.join(loaders)}")
        model.load_state_dict(state["model"])
        validation = Validation(model, problem.tasks, autocast_for(config["precision"], problem.device))
        figures = validation(loaders[options["split"]])
    lines = [f"warning  {line}" for line in cli.shadowed()]
    lines.append(f"data     {problem.splits.summary(options['split'])}")
    if others:
        known = "; vocabularies, means and standard deviations are those of the training" if facts else ""
        lines.append(f"others   these are not the run's own data{known}")
    lines += [line] if (line := validation.caveat()) else []
    console = Console(emoji=False)
    for line in (*lines, f"model    {folder}, {options['checkpoint']}.pt"):
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    console.print(table_of({options["split"]: figures}))


if __name__ == "__main__":
    cli.launch(evaluate, "evaluate")
