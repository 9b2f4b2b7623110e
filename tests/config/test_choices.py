"""The values of options are defined in one place; the comments in the configs, which --help shows, name the same."""

import re

import pytest
from conftest import ROOT

from mtl import choices, schema

COMMENTED = {
    ("train.yaml", "precision"): choices.PRECISIONS,
    ("train.yaml", "on_nonfinite"): choices.ON_NONFINITE,
    ("train.yaml", "passes"): (*choices.PASSES, "auto"),
    ("train.yaml", "source"): choices.SOURCES,
    ("trainer/default.yaml", "tail"): choices.TAILS,
    ("data/sources.yaml", "sampling"): choices.SAMPLING,
}


@pytest.mark.parametrize(("file", "key"), COMMENTED)
def test_the_comments_name_the_values(file: str, key: str) -> None:
    (line,) = re.findall(rf"^ *{key}: .*", (ROOT / "configs" / file).read_text(), re.MULTILINE)
    named = re.findall(r"[\w.]+(?= \|)|(?<=\| )[\w.]+", line.partition("#")[2])
    assert set(named) == set(COMMENTED[file, key])


def test_the_schema_takes_these_values_and_no_others() -> None:
    for key, values in {
        "precision": choices.PRECISIONS,
        "on_nonfinite": choices.ON_NONFINITE,
        "passes": (*choices.PASSES, "auto"),
        "gradients.source": choices.SOURCES,
        "scheduler.interval": choices.INTERVALS,
        "trainer.tail": choices.TAILS,
    }.items():
        is_valid, description = schema.SCHEMA[key]
        assert all(is_valid(value) for value in values)
        assert not is_valid("x")
        assert description == f"one of {', '.join(values)}"


def test_no_other_file_lists_them() -> None:
    """As a tuple, a list or a set of two or more of the values, in order."""
    lists = [values for name, values in vars(choices).items() if name.isupper() and len(values) > 1]
    for path in (ROOT / "mtl").rglob("*.py"):
        text = re.sub(r"\s+", " ", path.read_text())
        for values in lists:
            joined = ", ".join(f'"{value}"' for value in values)
            written = [f"({joined})" in text, f"[{joined}]" in text, f"{{{joined}}}" in text]
            assert path.name == "choices.py" or not any(written), (path, values)
