"""The report on the terminal, without its plots."""

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text as RichText

from mtl.reporting.document import Block, Bullets, Heading, Table, Text


def show(console: Console, blocks: Sequence[Block]) -> None:
    """Prints the blocks; names are printed as they are, whatever is in them."""
    for block in blocks:
        if isinstance(block, Heading):
            console.print(RichText(f"\n{block.text}", style="bold underline" if block.level < 3 else "bold"))
        elif isinstance(block, Text):
            console.print(RichText(block.text))
        elif isinstance(block, Bullets):
            for item in block.items:
                grid = RichTable.grid(padding=(0, 1))
                grid.add_row(RichText("!" if block.warning else "-", style="bold" if block.warning else ""), RichText(item))
                console.print(grid)
        elif isinstance(block, Table) and not block.detail:
            console.print(_table(block))


def _table(block: Table) -> RichTable:
    table = RichTable(
        title=RichText(block.title, style="bold"),
        title_justify="left",
        caption=RichText(block.note) if block.note else None,
        caption_justify="left",
        header_style="bold",
        box=SIMPLE_HEAD,
        padding=(0, 1),
    )
    for index, column in enumerate(block.columns):
        table.add_column(RichText(column), justify="left" if index < block.texts else "right", overflow="fold")
    for index, row in enumerate(block.rows):
        table.add_row(*map(RichText, row), style="bold" if index in block.strong else "")
    return table
