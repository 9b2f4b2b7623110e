"""The blocks of a report, independent of the output format."""

from collections.abc import Set
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Heading:
    """A heading of level 1, 2 or 3."""

    text: str
    level: int


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Bullets:
    """A list of sentences; `warning` marks caveats."""

    items: list[str]
    warning: bool = False


@dataclass(frozen=True)
class Table:
    """A table.

    Args:
        title: The title.
        columns: The column headings; the first `texts` columns contain text, the others numbers.
        rows: The rows, with one cell per column.
        texts: The number of text columns.
        strong: The numbers of the rows to emphasise.
        note: An explanation of the table.
        detail: Whether the table is for reference: folded in HTML, and left out on the terminal.
    """

    title: str
    columns: list[str]
    rows: list[list[str]]
    texts: int = 1
    strong: Set[int] = field(default_factory=frozenset)
    note: str = ""
    detail: bool = False


@dataclass(frozen=True)
class Picture:
    """A plot.

    Args:
        name: The name of the plot's file.
        title: The title, which is also the description for screen readers.
        svg: The SVG from mtl.reporting.svg.take.
        note: An explanation of the plot.
    """

    name: str
    title: str
    svg: str
    note: str


Block = Heading | Text | Bullets | Table | Picture
