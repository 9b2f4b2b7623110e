"""python -m mtl.evaluate run=outputs/…: evaluates a trained model on one split of its data, or on other data."""

import os
import re
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from mtl import cli, schema
from mtl.errors import UserError

SPLITS = ("train", "val", "test")


def evaluate(composed: DictConfig) -> None:
    """Prints the losses and metrics of the run's model; on the test split they are the same as the run printed.

    Raises:
        UserError: If the run, checkpoint or split doesn't exist, or if the model can't be evaluated on the data.
    """
    own = OmegaConf.masked_copy(composed, [key for key in schema.EVALUATE if key != "data"])
    options: Any = OmegaConf.to_container(own, resolve=True, throw_on_missing=True)
    if options["split"] not in SPLITS:
        raise UserError(f"split: '{options['split']}' is not one of {', '.join(SPLITS)}")
    if not re.fullmatch(r"(best|last)(-[1-9]\d*)?", str(options["checkpoint"])):
        raise UserError(
            f"checkpoint: '{options['checkpoint']}' is not one of best, last, best-1, last-1 and so on; which of these "
            "exist depends on the run's checkpoint.best and checkpoint.keep"
        )

    if not Path(str(options["run"])).is_dir():  # before torch is imported, which takes seconds
        raise UserError(f"'{options['run']}' is not the folder of a run; there is no such folder")

    from mtl.build import build
    from mtl.config.other_data import with_other_data
    from mtl.config.targets import add_code_folders
    from mtl.process.screen import Screen
    from mtl.process.seeding import num_threads
    from mtl.runs import loading as runs
    from mtl.runs.summary import table_of
    from mtl.step.precision import autocast_for
    from mtl.training import saved
    from mtl.training.validation import Validation

    folder = Path(str(options["run"]))
    state = runs.read(folder, options["checkpoint"])
    facts, trust, typed = state.get("facts", {}), options["trust"], cli.keys(HydraConfig.get().overrides.task)
    built = ("model", "tasks") if "data" in typed else ("model", "tasks", "data")
    code = runs.trusted_folders(folder, state, cli.code_folders()[1:], parts=built, trust=trust)
    where = f"the checkpoint '{options['checkpoint']}' of '{folder}'"
    add_code_folders(code)
    changes: Any = OmegaConf.to_container(OmegaConf.masked_copy(composed, "data"), resolve=False)
    with saved.built_from(where):
        config, others = with_other_data(_measured(state["config"], options), changes["data"] or {}, typed, facts)
    with num_threads(config["threads"]):
        with saved.built_from(where):
            problem = build(config, code_folders=code, trained_on=facts, loaded=True)
        loaders, model = problem.loaders, problem.model
        if options["split"] not in loaders:
            raise UserError(f"split: the data have no '{options['split']}'; they have {', '.join(loaders)}")
        saved.load_into(model, state["model"], where)
        validation = Validation(model, problem.tasks, autocast_for(config["precision"], problem.device))
        figures = validation(loaders[options["split"]])
    lines = [f"warning  {line}" for line in cli.shadowed()]
    lines.append(f"data     {problem.splits.summary(options['split'])}")
    if others:
        encoded = "; vocabularies, means and standard deviations are those of the training" if facts else ""
        lines.append(f"others   these are not the run's own data{encoded}")
    lines += [line] if (line := validation.caveat()) else []
    console = Screen()
    for line in (*lines, f"model    {folder}, {options['checkpoint']}.pt"):
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    console.print(table_of({options["split"]: figures}))


def _measured(config: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """Returns the run's config, changed so that all samples are evaluated.

    Deterministic algorithms are switched off, because another device may lack them, and an evaluation needs none.
    """
    trainer = {**config["trainer"], "tail": "keep", "micro_batch_size": None, "num_micro_batches": None}
    data = config["data"]
    if isinstance(data, dict) and type(data.get("num_workers")) is int:  # the run's machine may have had more CPUs
        data = {**data, "num_workers": min(data["num_workers"], os.cpu_count() or 1)}
    device = options["device"] or config["device"]
    return {**config, "data": data, "device": device, "deterministic": False, "trainer": trainer}


if __name__ == "__main__":
    cli.launch(evaluate, "evaluate")
