"""Turns errors, including those of Hydra and OmegaConf, into sentences for users."""

import re
import sys

from hydra.errors import HydraException, OverrideParseException
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from mtl.cli.folders import TRAININGS
from mtl.cli.unknown import key_of, why_no_group, why_not
from mtl.errors import UserError, first_line, suggest, text_of
from mtl.text import plain, with_traceback

EXTRAS = {  # mtl-train's extra for each launcher or sweeper of a Hydra plugin
    **{"joblib": "joblib", "ray": "ray", "optuna": "optuna"},
    **{"submitit_slurm": "slurm", "submitit_local": "slurm"},
}
# Hydra's message for an option that a group doesn't have.
NO_OPTION = r".*Could not find '([^']+)/([^/']+)'\s+Available options in '[^']+':\n(.*?)(?:\n\S|\Z)"
RESOLVING = "UserError raised while resolving interpolation: "  # OmegaConf's prefix to errors of mtl's resolvers


def show(error: Exception, full: bool, config_name: str, where: str = "") -> None:
    """Prints an error message; a traceback is printed only if the error is a bug in mtl, or if one is requested.

    Args:
        error: The exception.
        full: Whether to always print a traceback.
        config_name: The config name of the command.
        where: The job that raised the error, to be shown before the message; empty if that is clear.
    """
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, UserError):
        cause = cause.__cause__ or cause.__context__
    if isinstance(error, OmegaConfBaseException) and isinstance(cause, UserError):
        error = cause  # raised by one of mtl's resolvers
    elif isinstance(error, OmegaConfBaseException | HydraException) and RESOLVING in str(error):
        error = UserError(str(error).partition(RESOLVING)[2].partition("\n    full_key")[0])
    if full or not isinstance(error, UserError | HydraException | OmegaConfBaseException | OSError):
        sys.stderr.write(with_traceback(error))
        return
    line = f"{where}error: {_sentence(error, config_name)}\n(debug=true or HYDRA_FULL_ERROR=1 shows the traceback)\n"
    sys.stderr.write(plain(line, keep="\n\t"))  # in one call, because parallel jobs write to the same stream


def _sentence(error: Exception, config_name: str) -> str:
    text = text_of(error).strip()
    unknown = key_of(error)
    if isinstance(error, OverrideParseException):
        return _unread(error, "task=mnist_two_head" if config_name in TRAININGS else "run=outputs/…")
    if isinstance(error, MissingMandatoryValue) and error.full_key:
        example = "run=outputs/…" if error.full_key == "run" else f"{error.full_key}=…"
        return f"{error.full_key}: a value is required: {example}"
    if plugin := re.match(r"In 'hydra/config': Could not find 'hydra/(?:launcher|sweeper)/(\w+)'", text):
        extra = EXTRAS.get(plugin[1])
        return text + (f'\nInstall it: pip install "mtl-train[{extra}]"' if extra else "")
    if "@task." in text:
        return f"{text}\nThe task's file must begin with the line: # @package _global_"
    if unknown == "sweep":
        return "a sweep is added with a plus: " + next(
            (f"+{argument}" for argument in sys.argv if argument.startswith("sweep=")), "+sweep=…"
        )
    if missing := re.match(NO_OPTION, text, re.S):
        return f"{missing[1]}: there is no '{missing[2]}'" + suggest(missing[2], missing[3].split())
    if unknown and "Did you mean" not in text:
        return why_not(unknown, sys.argv[1:], config_name)
    return _with_reason(text, error)


def _with_reason(text: str, error: Exception) -> str:
    """Returns Hydra's message with what it leaves out: the cause of the error, or what to write instead."""
    if in_file := re.match(r"In '([^']+)': Could not override '([^']+)'\. No match", text):
        return f"{in_file[1]}: override /{in_file[2]}: {why_no_group(in_file[2], sys.argv[1:])}"
    if group := re.match(r"(\S+) appears more than once in the final defaults list", text):
        return f"{group[1]}: the config has an option of this group; replace it without a plus: {group[1]}=…"
    if forced := re.match(r"force-add of config groups is not supported: '\+\+(.+)'", text):
        return f"++{forced[1]}: an option of a group is chosen without pluses: {forced[1]}"
    if "does not support sweep type : INTERVAL_SWEEP" in text:
        return "interval(…) needs a sweeper that searches, such as Optuna: +sweep=optuna; or list the values: …=1,2"
    if isinstance(error, HydraException) and isinstance(error.__cause__, OmegaConfBaseException):
        return f"{text.rstrip('.') or 'the config is invalid'}: {first_line(error.__cause__)}"
    return text


def _unread(error: OverrideParseException, example: str) -> str:
    if not error.override.partition("=")[0].isascii():
        return f"'{error.override}' can't be read: use only the letters a to z in keys; set other keys in a file"
    if not error.override.isascii():
        return (
            f"'{error.override}' can't be read: quote values that aren't ASCII, as in 'model.inputs=[\"größe\"]'; "
            "set mappings with such keys in a file"
        )
    lines = (error.message or "").splitlines()
    reason = next((line for line in lines if not line.startswith("Error parsing override")), "")
    if re.match(r"\w+Exception: ", reason):  # internals of the parser
        return f"'{error.override}' can't be read; values are written key=value, as {example}"
    return f"'{error.override}' can't be read: {reason}; values are written key=value, as {example}"
