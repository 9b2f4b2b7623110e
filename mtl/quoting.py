"""Commands for a person to copy: quoted for the shell, and their values for Hydra's grammar."""

import re
from collections.abc import Iterable, Sequence
from itertools import chain, pairwise
from pathlib import Path
from shlex import quote

PLAIN = re.compile(r"(?:[A-Za-z_/]|\.{1,2}/)[A-Za-z0-9_./-]*")  # what Hydra reads as a text without quotes
WORDS = ("null", "true", "false", "nan", "inf")  # and what it reads as something else
OTHERWISE = ("auto", "null", "???")  # what resume=, Hydra and OmegaConf don't take as a folder's name
_IN_ANSI = {"\n": r"\n", "\t": r"\t", "\\": r"\\", "'": r"\'"}


def in_quotes(text: str) -> str:
    """The text as a value in Hydra's grammar, with quotes where it needs any; `${…}` in it is filled in."""
    if PLAIN.fullmatch(text) and text.lower() not in WORDS:
        return text
    mark = "'" if '"' in text and "'" not in text else '"'
    text = re.sub(rf"(\\*){mark}", rf"\1\1\\{mark}", text)
    return mark + re.sub(r"(\\+)\Z", r"\1\1", text) + mark


def as_value(text: str) -> str:
    """The text as a value in Hydra's grammar, which gives that text, whatever is in it."""
    return in_quotes(re.sub(r"(\\*)\$\{", r"\1\1\\${", text))  # OmegaConf would take ${ as an interpolation


def override(key: str, text: str) -> str:
    """An override that gives the key this text, as Hydra reads it; for a shell it has to be quoted besides."""
    return f"{key}={as_value(text)}"


def as_path(path: str | Path) -> str:
    """The path, written so that no command takes it for a flag, a home folder, or a word with a meaning of its own."""
    text = str(path)
    return f"./{text}" if text[:1] in ("-", "~") or text in OTHERWISE else text


def command(*words: str) -> str:
    """The command line for a shell."""
    return " ".join(map(_word, words))


def resuming(arguments: Iterable[str], folder: str | Path) -> str:
    """The command by which the run or multirun in the folder, started with these arguments, goes on."""
    again = [argument for argument in arguments if not argument.lstrip("+").startswith("resume=")]
    return command("python", "-m", "mtl.train", *again, override("resume", as_path(folder)))


def evaluating(folder: str | Path, arguments: Sequence[str], *more: str) -> str:
    """The command that measures the model of the run in the folder.

    Args:
        folder: of the run.
        arguments: that the run was started with. A folder of --config-dir that isn't below the current one is named
            again: code there isn't trusted otherwise.
        more: further arguments.
    """
    named = [list(pair) for pair in pairwise(arguments) if pair[0] == "--config-dir" and Path(pair[1]).is_absolute()]
    return command("python", "-m", "mtl.evaluate", *chain(*named), override("run", as_path(folder)), *more)


def looking(folder: str | Path) -> str:
    """The command that shows the folder's events."""
    return command("tensorboard", "--logdir", as_path(folder))


def _word(word: str) -> str:
    """One word; what doesn't print, which a terminal or a page would change, as the escapes of bash, zsh and ksh."""
    if word.isprintable():
        return quote(word)
    escaped = (_IN_ANSI.get(c) or (c if c.isprintable() else _octal(c)) for c in word)
    return f"$'{''.join(escaped)}'"


def _octal(character: str) -> str:
    return "".join(f"\\{byte:03o}" for byte in character.encode("utf-8", "surrogateescape"))
