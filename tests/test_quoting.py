"""Printed commands reproduce their values, whatever these contain, through the shell and Hydra's grammar."""

import os
import shlex
import subprocess

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from mtl import quoting
from mtl.cli.unquoted import quoted

PIECES = [
    *",=[](){}'\"#~$:;\\*?!& -\n\taé日1./%+@|^`<>_",
    "null",
    "${",
    "???",
    "nan",
    "true",
    "0x1",
    "1e5",
    "auto",
    "\u3000",
]
characters = st.characters(exclude_categories=["Cs"], exclude_characters="\0")
texts = st.lists(st.one_of(st.sampled_from(PIECES), characters), min_size=1, max_size=8).map("".join)
plain = texts.filter(lambda text: text != "???")  # which OmegaConf takes as missing, and as_path writes otherwise
examples = settings(max_examples=int(os.environ.get("MTL_FUZZ", "300")), deadline=None, derandomize=True)


def read(override: str) -> object:
    """Returns the config's value of x, as Hydra and OmegaConf read it; the same in a job of a multirun."""
    parsed = OverridesParser.create().parse_override(override)
    again = f"{parsed.get_key_element()}={parsed.get_value_element_as_str()}"
    assert OverridesParser.create().parse_override(again).value() == parsed.value()
    config = OmegaConf.create({"x": None})
    OmegaConf.update(config, "x", parsed.value())
    return OmegaConf.to_container(config, resolve=True)["x"]


@examples
@given(plain)
def test_hydra_reads_back_what_was_quoted(text: str) -> None:
    assert read(quoting.override("x", text)) == text


@examples
@given(texts.filter(str.isprintable))
def test_a_shell_reads_back_what_was_quoted(text: str) -> None:
    words = ["python", "-m", "mtl.evaluate", quoting.override("run", text), text]
    assert shlex.split(quoting.command(*words)) == words


def test_bash_reads_back_what_was_quoted() -> None:
    words = ["a\udcffb", *PIECES, *(f"{one}{two}" for one in PIECES for two in PIECES)]
    done = subprocess.run(["bash", "-c", quoting.command("printf", r"%s\0", *words)], capture_output=True, check=True)
    assert done.stdout.decode("utf-8", "surrogateescape").split("\0")[:-1] == words
    assert quoting.command(*words).isprintable()  # so nothing that prints it changes it


@examples
@given(texts)
def test_a_path_is_no_flag_and_no_word_of_ours(path: str) -> None:
    written = quoting.as_path(path)
    assert os.path.normpath(written) == os.path.normpath(path)
    assert not written.startswith(("-", "~"))
    assert written not in ("auto", "null", "???")


@pytest.mark.parametrize(
    ("path", "command"),
    [
        ("outputs/a/2026-01-01", "python -m mtl.train task=a seed=1 resume=outputs/a/2026-01-01"),
        ("a b,c", "python -m mtl.train task=a seed=1 'resume=\"a b,c\"'"),
        ("-été", "python -m mtl.train task=a seed=1 'resume=\"./-été\"'"),
        ("it's", "python -m mtl.train task=a seed=1 'resume=\"it'\"'\"'s\"'"),
        ("auto", "python -m mtl.train task=a seed=1 resume=./auto"),
    ],
)
def test_the_command_that_goes_on(path: str, command: str) -> None:
    given_before = ["task=a", "resume=old", "+resume=old", "seed=1"]
    assert quoting.resuming(given_before, path) == command


def test_the_other_commands() -> None:
    assert quoting.evaluating("a=b", [], "split=val") == "python -m mtl.evaluate 'run=\"a=b\"' split=val"
    inside = ["--config-dir", "mine", "task=a"]
    assert quoting.evaluating("a", inside) == "python -m mtl.evaluate run=a"
    outside = ["--config-dir", "/else where", "task=a"]
    assert quoting.evaluating("a", outside) == "python -m mtl.evaluate --config-dir '/else where' run=a"
    assert quoting.viewing("-a b") == "tensorboard --logdir './-a b'"
    assert quoting.command("ls", "a\nb'\t\x1b") == "ls $'a\\nb\\'\\t\\033'"


@pytest.mark.parametrize(
    "key", ["run", "resume", "init_from", "output_root", "data.root", "+data.path", "++data.labels"]
)
@examples
@given(plain.filter(lambda text: "\\" not in text and "${" not in text))
def test_a_path_that_was_typed_without_quotes_is_that_path(key: str, path: str) -> None:
    """Unless it is null, in quotes, or a mapping: Hydra's grammar comes first."""
    if path.strip().lower() == "null" or path[0] in "'\"" or (key.lstrip("+").startswith("data.") and path[0] in "{["):
        return
    assert read(quoted(f"{key}={path}", multirun=False).replace(key, "x", 1)) == path


@pytest.mark.parametrize(
    ("typed", "multirun", "expected"),
    [
        ("run=outputs/été", False, 'run="outputs/été"'),
        ("run=a,b", False, 'run="a,b"'),
        ("run=2024", False, 'run="2024"'),
        ("run=null", False, "run=null"),
        ("run='a b'", False, "run='a b'"),
        (r"run=a\,b", False, r"run=a\,b"),
        ("output_root=${oc.env:HOME}/é", False, 'output_root="${oc.env:HOME}/é"'),
        ("init_from=a,b", True, "init_from=a,b"),
        ("init_from=é,b", True, 'init_from="é",b'),
        ("init_from='é',ü", True, "init_from='é',ü"),
        ("data.path={train: a, test: b}", False, "data.path={train: a, test: b}"),
        ("data.path={train: é.csv, test: ü b.csv}", False, 'data.path={train: "é.csv", test: "ü b.csv"}'),
        ("model.inputs=[größe, a, 1]", False, 'model.inputs=["größe", a, 1]'),
        ("tasks.a.target=größe,a", True, 'tasks.a.target="größe",a'),
        ("tasks.a.target=größe", False, 'tasks.a.target="größe"'),
        ("model={größe: 1}", False, "model={größe: 1}"),
        ("größe=1", False, "größe=1"),
        ("seed=1,2", False, "seed=1,2"),
        ("a=[1,", False, "a=[1,"),
        ("~tasks.größe", False, "~tasks.größe"),
    ],
)
def test_what_was_typed(typed: str, multirun: bool, expected: str) -> None:
    assert quoted(typed, multirun=multirun) == expected
    assert quoted(expected, multirun=multirun) == expected
