"""The terminal, as everything of mtl prints to it."""

from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from mtl.text import plain


class Screen(Console):
    """A console of rich that prints text as it is: it obeys no control characters in it, and no markup.

    Args:
        options: those of rich's console.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """What is printed, in pieces: those of text are made plain, those that move the cursor are rich's own."""
        for piece in super().render(renderable, options):
            yield piece if piece.control else Segment(plain(piece.text, keep="\n"), piece.style)
