"""The end of a run: evaluates the best parameters, and prints and writes the results."""

from contextlib import suppress
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtl import cli, tags
from mtl.cli.record import add_to_log, folder_name, versions, write_status
from mtl.errors import UserError
from mtl.files import Folder
from mtl.safety.shards import KEY

if TYPE_CHECKING:
    from torch import nn

    from mtl.build import Built
    from mtl.runs.summary import Run
    from mtl.training.trainer import Trainer
    from mtl.training.validation import Figures, Validation


def tested(problem: "Built", trainer: "Trainer", folder: Path) -> "tuple[Validation, Figures]":
    """Evaluates the best parameters on the test split, if there is one; each process takes its share of it."""
    from mtl.training.validation import Validation

    validation = Validation(problem.model, problem.tasks, trainer.step.passes.autocast)
    if "test" not in problem.loaders:
        return validation, {}
    load_best(problem.model, trainer, folder)
    return validation, validation(problem.loaders["test"])


def measured(problem: "Built", trainer: "Trainer", folder: Path) -> "Run":
    """Evaluates the best parameters on the test split, and passes the final metrics to the loggers."""
    from mtl.runs.summary import Run
    from mtl.training.gallery import matrix_pictures

    validation, test = tested(problem, trainer, folder)
    matrices = validation.matrices if test else {}
    monitored = {tags.BEST: trainer.selection.best} if trainer.selection.best is not None else {}
    splits = {"best": trainer.selection.figures, "last": trainer.selection.mean(), "test": test}
    final = {tag: value for split, each in splits.items() for tag, value in tags.by_tag(each, split).items()}
    trainer.loggers.log(trainer.global_step, trainer.epoch, final | monitored)
    if problem.config["log"]["pictures"] is not None and trainer.loggers.takes("picture"):
        for tag, picture in matrix_pictures(problem.tasks, matrices, "test", problem.splits.facts).items():
            trainer.loggers.show("picture", tag, trainer.global_step, picture)
    labelled = validation.labelled if test else {}
    kinds, name = validation.kinds(), folder_name(folder)
    return Run(trainer, problem.splits, test, labelled, kinds, name, cli.arguments(), problem.config, matrices)


def conclude(console: Any, finished: "Run", home: Folder, began: list[Folder]) -> None:
    """Prints the results of a finished run and writes them to the run's folder.

    Raises:
        UserError: If some of the results couldn't be written.
    """
    from mtl.process.screen import Screen
    from mtl.runs.summary import summarise, written

    writer = finished.trainer.writer
    writer.check()
    figures = {**finished.figures(), "versions": versions()}
    text = StringIO()
    console.print()
    for shown in (console, Screen(file=text, width=120)):
        summarise(shown, finished)
    add_to_log(text.getvalue())
    if writer.failed:
        names = " and ".join(f"{name}.pt" for name in sorted(writer.failed))
        line = f"{names} could not be written to {writer.folder}: {writer.reason}; earlier files are unchanged"
        with suppress(UserError):
            write_status(home, "failed", error=line, **figures)
            began.clear()
        raise UserError(line)
    write_status(home, "finished", **figures)
    console.print(f"\nWritten to {finished.folder}: {', '.join(written(home.path))}", highlight=False, markup=False)


def load_best(model: "nn.Module", trainer: "Trainer", folder: Path) -> None:
    """Loads the best parameters, even if they couldn't be written to disk; each process gets those that it has."""
    from mtl.distributed import prepare, rank
    from mtl.distributed.processes import receive, send
    from mtl.distributed.sharding import is_sharded
    from mtl.training.layouts import fitted

    shares = is_sharded(next(model.parameters()))
    state = _best(trainer, folder) if rank() == 0 else None
    if shares and rank() == 0:
        send(state)
    elif shares:
        state = receive()
    if state is not None:
        model.load_state_dict(fitted(state, model)["model"])
    if not shares:
        prepare(model)


def _best(trainer: "Trainer", folder: Path) -> dict[str, Any]:
    """Returns the parameters of the best state, and where the sharded ones are."""
    from mtl.training import checkpoint

    unwritten = trainer.writer.failed.get("best")
    if unwritten is not None and unwritten.state["epoch"] == trainer.selection.best_epoch:
        return {"model": unwritten.state["model"]}
    state = checkpoint.load(folder / "checkpoints" / "best.pt", whole=False)
    return {key: state[key] for key in ("model", KEY) if key in state}
