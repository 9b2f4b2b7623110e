"""Prints the report on the terminal, without plots."""

from collections.abc import Sequence
from typing import Literal

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text as RichText

from mtl.reporting.document import Block, Bullets, Heading, Table, Text
from mtl.text import plain

GAP = 3  # characters between columns
MOST, LEAST = 24, 8  # characters of a name in narrow terminals


def show(console: Console, blocks: Sequence[Block]) -> None:
    """Prints the blocks; names are printed literally."""
    for block in blocks:
        if isinstance(block, Heading):
            console.print(RichText(f"\n{plain(block.text)}", style="bold underline" if block.level < 3 else "bold"))
        elif isinstance(block, Text):
            console.print(RichText(plain(block.text)))
        elif isinstance(block, Bullets):
            for item in block.items:
                grid = RichTable.grid(padding=(0, 1))
                mark = RichText("!" if block.warning else "-", style="bold" if block.warning else "")
                grid.add_row(mark, RichText(plain(item)))
                console.print(grid)
        elif isinstance(block, Table) and not block.detail:
            console.print(RichText(f"\n{plain(block.title)}", style="bold"))
            for columns in _fitting(block, console.width):
                console.print(_table(block, columns, console.width))
            if block.note:
                console.print(RichText(plain(block.note), style="italic"))


def _fitting(block: Table, width: int) -> list[list[int]]:
    """Splits the columns into parts that fit the width; each part repeats the columns that name the rows."""
    names = list(range(block.texts))
    room = width - sum(min(MOST, _longest(block, index)) + GAP for index in names)
    parts: list[list[int]] = [[]]
    taken = 0
    for index in range(block.texts, len(block.columns)):
        taken += _longest(block, index) + GAP
        if parts[-1] and taken > room + GAP:
            parts.append([])
            taken = _longest(block, index) + GAP
        parts[-1].append(index)
    return [[*names, *part] for part in parts]


def _longest(block: Table, index: int) -> int:
    """Returns the length of a column's longest cell or of the longest word in the heading."""
    return max(len(text) for text in [*(plain(row[index]) for row in block.rows), *block.columns[index].split()])


def _widths(block: Table, columns: Sequence[int], width: int) -> dict[int, int]:
    """Returns the widths of the columns: headings are wrapped first, then names; numbers are never wrapped."""
    widths = {index: _longest(block, index) for index in columns}
    room = width - sum(widths.values()) - GAP * (len(columns) - 1)
    while room < 0 and max(widths[index] for index in range(block.texts)) > LEAST:
        widest = max(range(block.texts), key=widths.__getitem__)
        widths[widest] -= 1
        room += 1
    for index in columns:
        extra = max(0, min(room, len(block.columns[index]) - widths[index]))
        widths[index] += extra
        room -= extra
    return widths


def _table(block: Table, columns: Sequence[int], width: int) -> RichTable:
    table = RichTable(header_style="bold", box=SIMPLE_HEAD, padding=(0, 1), show_edge=False, pad_edge=False)
    for index, wide in _widths(block, columns, width).items():
        side: Literal["left", "right"] = "left" if index < block.texts else "right"
        table.add_column(RichText(plain(block.columns[index])), justify=side, overflow="fold", width=wide)
    for number, row in enumerate(block.rows):
        cells = [RichText(plain(row[index])) for index in columns]
        table.add_row(*cells, style="bold" if number in block.strong else "")
    return table
