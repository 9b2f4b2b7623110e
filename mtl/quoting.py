"""Commands for the user to copy, quoted for the shell and for Hydra's grammar."""

import re
from collections.abc import Iterable, Sequence
from itertools import chain, pairwise
from pathlib import Path
from shlex import quote

PLAIN = re.compile(r"(?:[A-Za-z_/]|\.{1,2}/)[A-Za-z0-9_./-]*")  # values that Hydra reads as a text without quotes
WORDS = ("null", "true", "false", "nan", "inf")  # words that Hydra reads as another type
OTHERWISE = ("auto", "null", "???")  # words that have a special meaning for resume=, Hydra or OmegaConf
_IN_ANSI = {"\n": r"\n", "\t": r"\t", "\\": r"\\", "'": r"\'"}


def in_quotes(text: str) -> str:
    """Returns the text as a value in Hydra's grammar, quoted if necessary; interpolations `${…}` are resolved."""
    if PLAIN.fullmatch(text) and text.lower() not in WORDS:
        return text
    mark = "'" if '"' in text and "'" not in text else '"'
    text = re.sub(rf"(\\*){mark}", rf"\1\1\\{mark}", text)
    return mark + re.sub(r"(\\+)\Z", r"\1\1", text) + mark


def as_value(text: str) -> str:
    """Returns the text as a value in Hydra's grammar that stands for exactly this text."""
    return in_quotes(re.sub(r"(\\*)\$\{", r"\1\1\\${", text))  # or OmegaConf would resolve ${ as an interpolation


def override(key: str, text: str) -> str:
    """Returns an override that sets the key to this text; it still has to be quoted for a shell."""
    return f"{key}={as_value(text)}"


def as_path(path: str | Path) -> str:
    """Returns the path in a form that no command mistakes for a flag, a home folder or a special word."""
    text = str(path)
    return f"./{text}" if text[:1] in ("-", "~") or text in OTHERWISE else text


def command(*words: str) -> str:
    """Returns the command line, quoted for a shell."""
    return " ".join(map(_word, words))


def resuming(arguments: Iterable[str], folder: str | Path) -> str:
    """Returns the command that resumes the run or multirun in the folder, which was started with these arguments."""
    again = [argument for argument in arguments if not argument.lstrip("+").startswith("resume=")]
    return command("python", "-m", "mtl.train", *again, override("resume", as_path(folder)))


def evaluating(folder: str | Path, arguments: Sequence[str], *more: str) -> str:
    """Returns the command that evaluates the model of the run in the folder.

    Args:
        folder: The folder of the run.
        arguments: The arguments that the run was started with. A folder of --config-dir outside the current folder is
            passed again, because code in it isn't trusted otherwise.
        more: Further arguments.
    """
    named = [list(pair) for pair in pairwise(arguments) if pair[0] == "--config-dir" and Path(pair[1]).is_absolute()]
    return command("python", "-m", "mtl.evaluate", *chain(*named), override("run", as_path(folder)), *more)


def viewing(folder: str | Path) -> str:
    """Returns the command that shows the events in the folder."""
    return command("tensorboard", "--logdir", as_path(folder))


def _word(word: str) -> str:
    """Quotes one word; unprintable characters are written as escapes of bash, zsh and ksh."""
    if word.isprintable():
        return quote(word)
    escaped = (_IN_ANSI.get(c) or (c if c.isprintable() else _octal(c)) for c in word)
    return f"$'{''.join(escaped)}'"


def _octal(character: str) -> str:
    return "".join(f"\\{byte:03o}" for byte in character.encode("utf-8", "surrogateescape"))
