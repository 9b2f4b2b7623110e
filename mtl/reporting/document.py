"""What a report is made of, whatever it is written as."""

from collections.abc import Set
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Heading:
    """A heading, of level 1, 2 or 3."""

    text: str
    level: int


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Bullets:
    """A list of sentences, `warning` where they say what to beware of."""

    items: list[str]
    warning: bool = False


@dataclass(frozen=True)
class Table:
    """A table.

    Args:
        title: what it shows.
        columns: their heads; the first `texts` of them are of text, the others of numbers.
        rows: as many cells each.
        texts: as above.
        strong: the rows to be set off, by number.
        note: what is to be known to read it.
        detail: whether it is for looking things up: folded on the page, and left out of the terminal.
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
        name: of its file.
        title: what it shows, also for those who can't see it.
        svg: as mtl.reporting.svg.take gives it.
        note: what is to be known to read it.
    """

    name: str
    title: str
    svg: str
    note: str


Block = Heading | Text | Bullets | Table | Picture
