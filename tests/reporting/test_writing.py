"""Numbers as text, and names that could be taken for something else."""

import pytest

from mtl.reporting import markdown
from mtl.reporting.document import Bullets, Heading, Picture, Table, Text
from mtl.reporting.estimates import Estimate
from mtl.reporting.writing import listed, number, p_value, plus_minus, shortened, signed, slug


@pytest.mark.parametrize(
    ("found", "text"),
    [
        (Estimate(0.93412, 0.01234, 3), "0.934 ± 0.012"),
        (Estimate(0.93412, 0.1234, 3), "0.93 ± 0.12"),
        (Estimate(1234.5, 67.8, 3), "1234 ± 68"),
        (Estimate(-0.5, 0.25, 3), "−0.50 ± 0.25"),
        (Estimate(0.93412, None, 1), "0.9341"),
        (Estimate(3.143417, 0.000011, 3), "3.14342 ± 0.00001"),
        (Estimate(12345.678, 0.5, 3), "12345.7 ± 0.5"),
        (Estimate(0.25, 3e-8, 3), "0.25 ± 3e−08"),
        (Estimate(0.123456789, 3e-8, 3), "0.12345679 ± 3e−08"),
        (Estimate(0.25, 0.0, 3), "0.25 ± 0"),
        (Estimate(0.25, 2e-17, 3), "0.25 ± 0"),
        (Estimate(3.1e-7, 1.2e-8, 3), "3.1e−07 ± 1.2e−08"),
        (Estimate(0.0, 0.5, 3), "0.00 ± 0.50"),
        (None, "–"),
    ],
)
def test_plus_minus(found: Estimate | None, text: str) -> None:
    assert plus_minus(found) == text


@pytest.mark.parametrize(
    ("found", "text"),
    [
        (Estimate(1.234, 1.5, 3), "+1.2 [−0.3, +2.7]"),
        (Estimate(3.1e-7, 1.2e-8, 3), "+3.1e−07 [+3e−07, +3.2e−07]"),
        (Estimate(-0.5, None, 1), "−0.5"),
        (Estimate(0.0, 0.0, 3), "+0.0000 [+0.0000, +0.0000]"),
        (None, "–"),
    ],
)
def test_signed(found: Estimate | None, text: str) -> None:
    assert signed(found) == text


def test_small_things() -> None:
    assert [p_value(p) for p in (None, 0.0004, 0.04567)] == ["–", "< 0.001", "0.046"]
    assert [listed(list(names)) for names in ("", "a", "ab", "abc")] == ["", "a", "a and b", "a, b and c"]
    assert listed(list("abcd"), 2) == "a, b and 2 more"
    assert listed(["lr=1, width=2", "lr=2, width=4"]) == "lr=1, width=2; lr=2, width=4"
    assert listed(["lr=1, width=2", "b", "c", "d"], 2) == "lr=1, width=2; b; 2 more"
    assert shortened("abcdefghij", 6) == "abc…ij"
    assert slug("mnist two/head (source=x)") == "mnist-two-head-source-x"
    assert number(-12345.678) == "−1.235e+04"


def test_markdown_holds_what_it_is_given() -> None:
    """A table has as many cells in every line, whatever stands in them."""
    hostile = "a|b *c* <script> `d` [e](f) _g_ ~~i~~\n# h"
    table = Table(hostile, ["method", hostile], [[hostile, "1"], ["x", "2"]], strong={0}, note="n")
    text = markdown.write(
        [Heading(hostile, 2), Text(hostile), Bullets([hostile]), table, Picture("p", "t", "<svg>", "n")]
    )
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(lines) == 4
    assert {len(line.replace("\\|", "").split("|")) for line in lines} == {4}
    assert lines[1] == "| --- | ---: |"
    assert "![t](figures/p.svg)" in text
    from markdown_it import MarkdownIt

    page = MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(text)
    assert page.count("<tr>") == 3
    assert page.count("<h2>") == 1
    assert not any(tag in page.replace("<em>t.</em>", "") for tag in ("<script>", "<em>", "<a ", "<code>", "<s>"))
