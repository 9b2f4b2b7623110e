"""Writes the report as Markdown, with the plots in separate files."""

import re
from collections.abc import Sequence

from mtl.reporting.document import Block, Bullets, Heading, Picture, Table, Text
from mtl.text import plain

FIGURES = "figures"  # the folder of the plots


def write(blocks: Sequence[Block]) -> str:
    """Returns the blocks as GitHub-flavoured Markdown; plots refer to files in `FIGURES`."""
    parts = []
    for block in blocks:
        if isinstance(block, Heading):
            parts.append(f"{'#' * block.level} {_plain(block.text)}")
        elif isinstance(block, Text):
            parts.append(_plain(block.text))
        elif isinstance(block, Bullets):
            parts.append("\n".join(f"- {_plain(item)}" for item in block.items))
        elif isinstance(block, Table):
            parts += _table(block)
        elif isinstance(block, Picture):
            parts += [
                f"![{_plain(block.title)}]({FIGURES}/{block.name}.svg)",
                f"*{_plain(block.title)}.* {_plain(block.note)}",
            ]
    return "\n\n".join(parts) + "\n"


def _table(block: Table) -> list[str]:
    lines = [
        _row([_plain(column) for column in block.columns]),
        _row(["---" if index < block.texts else "---:" for index in range(len(block.columns))]),
    ]
    for index, row in enumerate(block.rows):
        cells = [_plain(cell) for cell in row]
        lines.append(_row([f"**{cell}**" if cell and index in block.strong else cell for cell in cells]))
    return [f"**{_plain(block.title)}**", "\n".join(lines), *([_plain(block.note)] if block.note else [])]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _plain(text: str) -> str:
    """Escapes the text, in one line, so that no part is read as Markdown, HTML, a formula, an address or a mention."""
    escaped = re.sub(r"([\\`*_{}\[\]<>|#~&$])", r"\\\1", plain(re.sub(r"\s+", " ", text)))
    escaped = re.sub(r"(www)\.|:(?=//|\w+@)", lambda m: f"{m[1]}\\." if m[1] else r"\:", escaped, flags=re.I)
    return re.sub(r"@(?=\w)", "@<!-- -->", escaped)  # GitHub reads even an escaped @ as a mention
