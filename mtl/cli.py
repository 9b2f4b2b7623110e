"""What the entry points have in common: Hydra, run folders, and errors for a person."""

import os
import re
import secrets
import sys
import time
import traceback
from collections.abc import Callable
from functools import cache
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mtl import schema
from mtl.errors import UserError, suggest

# In a wheel the configs are inside the package, in a checkout beside it.
CONFIG_DIR = next(
    str(folder)
    for folder in (Path(__file__).with_name("configs"), Path(__file__).parents[1] / "configs")
    if (folder / "train.yaml").is_file()
)
INTERRUPTED = 130  # what a shell says of a command that Ctrl-C ended


def launch(job: Callable[[DictConfig], float | None], config_name: str) -> None:
    """Composes the config from the command line, runs the job, or each job of a multirun, and exits.

    A job that fails is reported, counts as NaN for a sweep and doesn't stop the other jobs; the exit code is then 1.
    """
    wanted = os.environ.get("HYDRA_FULL_ERROR", "0")
    tracebacks = wanted == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # makes Hydra raise its errors, so that they are shown the same way as ours
    OmegaConf.register_new_resolver("run_id", _run_id, replace=True)
    OmegaConf.register_new_resolver("job_id", _job_id, replace=True)
    if config_name == "train" and {"-h", "--help"} & set(sys.argv) and not _overrides("task"):
        sys.argv.append("task=mnist_two_head")  # Hydra composes a config even to show help, and `task` has no default
    failed = False

    def guarded(config: DictConfig) -> float | None:
        nonlocal failed
        try:
            return job(config)
        except Exception as error:
            _show(error, tracebacks or config.get("debug") is True)
            failed = True
            return float("nan")

    try:
        hydra.main(version_base="1.3", config_path=CONFIG_DIR, config_name=config_name)(guarded)()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except OSError as error:  # Hydra makes the run's folder before the job begins
        folder = f"{error.filename or 'the folder of the run'} can't be written: {error.strerror or error}"
        _show(UserError(f"{folder}; set output_root to a folder that can be"), tracebacks)
        failed = True
    except Exception as error:
        _show(error, tracebacks)
        failed = True
    finally:
        os.environ["HYDRA_FULL_ERROR"] = wanted
    sys.exit(1 if failed else 0)


def code_folders() -> list[str]:
    """Where modules of the user's own may be: the current folder, and that of --config-dir."""
    sources = HydraConfig.get().runtime.config_sources
    own = [source.path for source in sources if source.schema == "file" and source.path != CONFIG_DIR]
    return [os.getcwd(), *own]


def shadowed() -> list[str]:
    """Files of --config-dir that aren't read, since a file of mtl's with the same name comes first."""
    return [
        str(path)
        for folder in code_folders()[1:]
        for path in sorted(Path(folder).rglob("*.yaml"))
        if (Path(CONFIG_DIR) / path.relative_to(folder)).is_file()
    ]


def _overrides(key: str) -> bool:
    return any(argument.split("=")[0].lstrip("+~") == key for argument in sys.argv[1:])


def _show(error: Exception, full: bool) -> None:
    if full or not isinstance(error, UserError | HydraException | OmegaConfBaseException | OSError):
        traceback.print_exception(error)
        return
    text = str(error).strip()
    unknown = re.match(r"Could not override '([^']+)'", text)
    if isinstance(error, OverrideParseException):
        text = f"'{error.override}' can't be read: {error.message}"
    elif "@task." in text:
        text += "\nThe task's file must begin with the line: # @package _global_"
    elif unknown:
        text = f"there is no key '{unknown[1]}'" + suggest(unknown[1], schema.siblings(unknown[1]))
    print(f"error: {text}\n(debug=true or HYDRA_FULL_ERROR=1 shows the traceback)", file=sys.stderr)


@cache
def _run_id() -> str:
    return time.strftime("%Y-%m-%d_%H-%M-%S-") + secrets.token_hex(2)


def _job_id(number: int, overrides: str) -> str:
    """`0_lr-0.001_seed-0` for a job whose optimizer.lr and seed are swept: short, and a valid name everywhere."""
    swept = [pair.split("=", 1) for pair in str(overrides).split(",") if "=" in pair and pair not in sys.argv]
    names = [f"{key.split('.')[-1]}-{value}" for key, value in swept]
    return re.sub(r"[^\w.-]+", "-", "_".join([str(number), *names]))[:100]
