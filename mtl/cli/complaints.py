"""Whatever goes wrong, Hydra's and OmegaConf's own complaints too, as a sentence for a person."""

import re
import sys

from hydra.errors import HydraException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException

from mtl import schema
from mtl.cli.folders import TRAININGS
from mtl.errors import UserError, suggest, text_of
from mtl.text import plain, with_traceback

EXTRAS = {  # of mtl-train, by the launcher or sweeper of a plugin of Hydra's
    **{"joblib": "joblib", "ray": "ray", "optuna": "optuna"},
    **{"submitit_slurm": "slurm", "submitit_local": "slurm"},
}
# What Hydra says of an option that a group hasn't.
NO_OPTION = r".*Could not find '([^']+)/([^/']+)'\s+Available options in '[^']+':\n(.*?)(?:\n\S|\Z)"
RESOLVING = "UserError raised while resolving interpolation: "  # what OmegaConf says of our own errors


def show(error: Exception, full: bool, config_name: str, where: str = "") -> None:
    """Prints what was wrong, without a traceback unless the mistake is none of the user's.

    Args:
        error: what was raised.
        full: whether a traceback is wanted all the same.
        config_name: of the command that was called.
        where: the job that it was raised in, as far as that has to be told.
    """
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, UserError):
        cause = cause.__cause__ or cause.__context__
    if isinstance(error, OmegaConfBaseException) and isinstance(cause, UserError):
        error = cause  # raised by a resolver of ours
    elif isinstance(error, OmegaConfBaseException | HydraException) and RESOLVING in str(error):
        error = UserError(str(error).partition(RESOLVING)[2].partition("\n    full_key")[0])
    if full or not isinstance(error, UserError | HydraException | OmegaConfBaseException | OSError):
        sys.stderr.write(with_traceback(error))
        return
    text = text_of(error).strip()
    unknown = re.match(r"Could not override '([^']+)'", text)
    if isinstance(error, OverrideParseException):
        text = _unread(error, "task=mnist_two_head" if config_name in TRAININGS else "run=outputs/…")
    elif plugin := re.match(r"In 'hydra/config': Could not find 'hydra/(?:launcher|sweeper)/(\w+)'", text):
        extra = EXTRAS.get(plugin[1])
        text += f'\nInstall it: pip install "mtl-train[{extra}]"' if extra else ""
    elif "@task." in text:
        text += "\nThe task's file must begin with the line: # @package _global_"
    elif unknown and unknown[1] == "sweep":
        text = "a sweep is added: " + next(
            (f"+{given}" for given in sys.argv if given.startswith("sweep=")), "+sweep=…"
        )
    elif missing := re.match(NO_OPTION, text, re.S):
        text = f"{missing[1]}: there is no '{missing[2]}'" + suggest(missing[2], missing[3].split())
    elif unknown and unknown[1] not in schema.SCHEMA:
        text = f"there is no key '{unknown[1]}'" + suggest(unknown[1], schema.siblings(unknown[1], config_name))
        if unknown[1].split(".")[0] in ("data", "model", "optimizer", "scheduler", "balancer", "tasks"):
            text += "; what a _target_ takes is possible too: --cfg job shows what is set"
    line = f"{where}error: {text}\n(debug=true or HYDRA_FULL_ERROR=1 shows the traceback)\n"
    sys.stderr.write(plain(line, keep="\n\t"))  # at once: jobs side by side write there too


def _unread(error: OverrideParseException, example: str) -> str:
    if not error.override.isascii():
        key, _, value = error.override.partition("=")
        return f"""'{error.override}' can't be read: quote what isn't plain ASCII: '{key}="{value}"'"""
    lines = (error.message or "").splitlines()
    reason = next((line for line in lines if not line.startswith("Error parsing override")), "")
    return f"'{error.override}' can't be read: {reason}; values are written key=value, as {example}"
