"""The console with which mtl prints to the terminal."""

from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from mtl.text import plain


class Screen(Console):
    """A rich console that prints text literally: control characters are escaped, and markup is ignored.

    Args:
        options: Arguments of rich's console.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Yields the segments to print; text is escaped, and rich's own control segments stay unchanged."""
        for piece in super().render(renderable, options):
            yield piece if piece.control else Segment(plain(piece.text, keep="\n"), piece.style)
