"""Training in the processes of torchrun or submitit: rank 0 runs the command line, and the others follow it.

A process that *follows* composes no config and writes no run folder. It waits for the message of rank 0, which contains
the checked config, and trains with that.
"""

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtl.errors import UserError, text_of
from mtl.process.signals import Ended, Stopped, held

if TYPE_CHECKING:
    from mtl.build import Built

_met = False  # whether this process has joined the others
# The variables that torchrun sets, and mtl.cli.submitted for submitit, from which a process group is made
NEEDED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# By the variable of the number of processes that were started together, who started them. SLURM_NTASKS and SLURM_PROCID
# won't do: a batch script and the shell of salloc, one process each, have the number of tasks of the whole job. The
# number for a step belongs to what srun starts, and is 1 in the interactive step of salloc.
SIZES = {"SLURM_STEP_NUM_TASKS": "srun", "OMPI_COMM_WORLD_SIZE": "mpirun", "PMI_SIZE": "mpirun"}


def count() -> int:
    """Returns the number of processes that were started to train together; 1 if this process was started otherwise."""
    return int(os.environ["WORLD_SIZE"]) if all(name in os.environ for name in NEEDED) else 1


def check_environment() -> None:
    """Checks that this process trains alone, or together with all that were started with it.

    Raises:
        UserError: If `WORLD_SIZE` is above 1 and other variables of torchrun are missing, or if srun or mpirun started
            several processes, each of which would train by itself. A shell that srun started is no such process.
    """
    missing = [name for name in NEEDED if name not in os.environ]
    size = os.environ.get("WORLD_SIZE", "1")
    if missing and size != "1":
        raise UserError(
            f"the environment has WORLD_SIZE={size}, as for several processes that train together, but no "
            f"{', '.join(missing)}. Start the processes with torchrun, which sets all of these variables, or remove "
            "WORLD_SIZE to train in one process"
        )
    if count() > 1 or (sys.stdin and sys.stdin.isatty()):
        return
    for name, launcher in SIZES.items():
        size = os.environ.get(name, "1")
        if size.isdecimal() and int(size) > 1:
            raise UserError(
                f"{launcher} started {size} processes ({name}={size}), and each of them would train by itself. To "
                f"train in all of them together, start torchrun: torchrun --nproc-per-node={size} -m mtl.train … on "
                "one node, with --nnodes on several, or scripts/train.sbatch with SLURM. To train in one, start one, "
                f"or remove {name} from the environment"
            )


def is_follower() -> bool:
    """Returns whether this process has a rank of 1 or higher, so that it follows the one of rank 0."""
    return count() > 1 and os.environ["RANK"] != "0"


def have_met() -> bool:
    """Returns whether this process, of rank 0, has joined the others, or tried to.

    If it has not, the others still wait for it, and have to be dismissed if it ends.
    """
    return _met


@contextmanager
def leading(**message: Any) -> Iterator[None]:
    """Joins the process of rank 0 to the others, which train together with it within the block.

    The others receive `message`, check with rank 0 that all can train together, and call `train_along`. With one
    process, this does nothing.

    Args:
        message: The arguments of `train_along` in the other processes.

    Raises:
        UserError: If a process has other arguments or a later state of the run, or if it failed or doesn't answer.
    """
    if count() == 1:
        yield
        return
    from mtl.cli.elsewhere import check_no_later_state
    from mtl.distributed.processes import process_group, send

    global _met
    _met = True
    ended: Ended | None = None
    with process_group(message["config"]["trainer"].get("timeout")):
        send(message)
        check_same_arguments()
        check_no_later_state(message["config"], Path(message["folder"]), is_resumed=message["state"] is not None)
        try:
            yield
        except Ended as error:  # after a signal, which all processes got: they leave together
            ended = error
    if ended is not None:
        raise ended


def follow() -> int:
    """Waits for the message of rank 0, and trains together with that process; returns the exit code."""
    with held():
        from mtl.distributed.processes import Lost, process_group, receive
    try:
        with process_group():
            return train_along(**receive())
    except Lost:
        return 1  # the process that failed, or the one of rank 0, reports why
    except UserError as error:
        sys.stderr.write(f"error: {text_of(error)}\n")
        return 1
    except Exception:
        traceback.print_exc()
        return 1


def train_along(config: dict[str, Any], code: list[str], state: dict[str, Any] | None, folder: str) -> int:
    """Trains in a process of rank 1 or higher, which neither reports nor writes; returns the exit code.

    Args:
        config: The checked config.
        code: The folders of the user's modules.
        state: The state from which the run is resumed; None for a new run.
        folder: The folder of the run.
    """
    from mtl.build import build
    from mtl.cli.conclusion import tested
    from mtl.cli.elsewhere import check_no_later_state
    from mtl.cli.fitting import explaining
    from mtl.cli.resuming import load_state
    from mtl.config.trainer import build_callbacks, build_trainer
    from mtl.config.training import build_step
    from mtl.loggers import Loggers
    from mtl.process.seeding import num_threads, seed_process
    from mtl.training.hooks import Hooks

    check_same_arguments()
    check_no_later_state(config, Path(folder), is_resumed=state is not None)
    with num_threads(config["threads"]):
        trained_on = None if state is None else state.get("facts", {})
        problem = build(config, code_folders=code, trained_on=trained_on, report=_nothing)
        check_same_data(problem)
        step = build_step(problem.config, problem.model, problem.tasks, problem.total_steps)
        hooks, loggers = Hooks(build_callbacks(problem.config)), Loggers([], _nothing)
        with loggers:
            trainer = build_trainer(problem, step, hooks, loggers, Path(folder), {})
            if state is not None:
                load_state(trainer, state, problem.config)
            else:
                seed_process(0)
            try:
                with explaining(trainer):
                    trainer.fit()
            except Stopped as stopped:
                return 128 + stopped.signal
            tested(problem, trainer, Path(folder))
    return 0


def check_same_arguments() -> None:
    """Checks that all processes were started with the same arguments, since the config is that of rank 0.

    Raises:
        UserError: In all processes, if two of them have different arguments.
    """
    from mtl.distributed.collectives import gather_objects

    everyone = gather_objects(sys.orig_argv[1:])  # sys.argv of rank 0 is rewritten for Hydra
    for rank, arguments in enumerate(everyone):
        if arguments != everyone[0]:
            ours, theirs = (
                " ".join(word for word in these if word not in those) or "nothing"
                for these, those in ((everyone[0], arguments), (arguments, everyone[0]))
            )
            raise UserError(
                f"the processes of rank 0 and {rank} were started with different arguments: rank 0 has {ours}, rank "
                f"{rank} has {theirs}. The config is that of rank 0; give all processes the same arguments"
            )


def check_same_data(problem: "Built") -> None:
    """Checks that all processes have data of the same sizes and facts.

    Raises:
        UserError: In all processes, if two of them differ.
    """
    if count() == 1:
        return
    from mtl.distributed.replicas import difference

    sizes = {split: [each.num_samples for each, _ in loader.by_source()] for split, loader in problem.loaders.items()}
    if number := difference({"sizes": sizes, "facts": problem.splits.facts}):
        raise UserError(
            f"data: the processes of rank 0 and {number} have different data, in size or in facts such as the classes. "
            "All machines need the same files, in the same order"
        )


def _nothing(line: str) -> None:
    """Ignores a line, which the process of rank 0 reports."""
