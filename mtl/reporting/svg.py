"""Plots as SVG whose colours follow the page's light or dark theme."""

import io
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from mtl.text import plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Elements in one of these colours get the theme's colour of this name.
INK, MUTED, GRID, PALE = "#010101", "#010102", "#010103", "#010104"
SERIES = [f"#0101{number:02x}" for number in range(0x10, 0x18)]
NAMES = {INK: "ink", MUTED: "muted", GRID: "grid", PALE: "pale"} | {c: f"c{i}" for i, c in enumerate(SERIES)}
LIGHT = {
    **{"bg": "#ffffff", "ink": "#1b1f24", "muted": "#59636e", "grid": "#e3e6ea", "pale": "#8a939d"},
    **{"c0": "#20242a", "c1": "#0b67c2", "c2": "#c2410c", "c3": "#0f7b4f", "c4": "#8b3fc7", "c5": "#b0277a"},
    **{"c6": "#8a6500", "c7": "#0e7c8b"},
}
DARK = {
    **{"bg": "#14171b", "ink": "#e8eaed", "muted": "#9aa4af", "grid": "#2c3239", "pale": "#69737e"},
    **{"c0": "#f2f4f7", "c1": "#5aa9f5", "c2": "#f58b53", "c3": "#4cc38a", "c4": "#c293f2", "c5": "#f07cbb"},
    **{"c6": "#d9ac3d", "c7": "#4fc3d4"},
}
SCALE = 1.4  # pixels of the page per point of a figure
RC: Any = {
    **{"svg.fonttype": "none", "svg.hashsalt": "mtl", "text.parse_math": False, "axes.formatter.use_mathtext": False},
    **{"font.size": 8, "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"], "axes.titlesize": 8.5},
    **{"axes.titleweight": "bold", "axes.titlelocation": "left", "legend.fontsize": 8, "legend.frameon": False},
    **{"text.color": INK, "axes.labelcolor": MUTED, "xtick.color": MUTED, "ytick.color": MUTED},
    **{"axes.edgecolor": GRID, "axes.grid": True, "grid.color": GRID, "grid.linewidth": 0.7, "axes.axisbelow": True},
    **{"axes.spines.top": False, "axes.spines.right": False, "xtick.major.size": 0, "ytick.major.size": 0},
    **{"xtick.labelsize": 7.5, "ytick.labelsize": 7.5, "lines.linewidth": 1.5, "axes.linewidth": 0.8},
    **{"figure.constrained_layout.w_pad": 0.08, "figure.constrained_layout.h_pad": 0.06},
}


def take(figure: "Figure", name: str, title: str, labels: Sequence[str]) -> str:
    """Returns the figure as an SVG element for a page with several figures.

    Colours become CSS variables. Elements with the gid `method-3` show the label of this number on hover.

    Args:
        figure: A figure drawn with `RC`.
        name: A name that is unique on the page.
        title: The title for screen readers.
        labels: The labels of the methods.
    """
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.S)
    text = re.sub(
        r'<g id="method-(\d+)">', lambda m: f'<g class="method"><title>{escape(labels[int(m[1])])}</title>', text
    )
    used = set(re.findall(r'(?:url\(#|href="#)([^")]+)', text))
    text = re.sub(r' id="([^"]+)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", text)
    text = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", text)
    text = re.sub("|".join(NAMES), lambda m: f"var(--{NAMES[m[0]]})", text)
    text = re.sub(r"font-family: [^;\"]+", "font-family: inherit", text)
    text = re.sub(r"\n\s*", "\n", text)
    width, height = (float(size) for size in re.findall(r'(?:width|height)="([\d.]+)pt"', text)[:2])
    spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    head = f'<svg {spaces} viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(title)}" '
    head += f'style="max-width: {SCALE * width:.0f}px">'
    return plain(head + text[text.index(">") + 1 :], keep="\n")


def alone(svg: str) -> str:
    """Returns the SVG as a stand-alone file, in light colours on white."""
    text = re.sub(r"var\(--(\w+)\)", lambda m: LIGHT.get(m[1], m[0]), svg).replace("inherit", "sans-serif")
    width, height = re.findall(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', text)[0]
    head = f'<svg width="{width}" height="{height}"'
    ground = f'<rect width="{width}" height="{height}" fill="{LIGHT["bg"]}"/>'
    text = re.sub(r' style="max-width: \d+px"', "", text, count=1)
    begin = text.index(">") + 1
    return f"{head}{text[4:begin]}{ground}{text[begin:]}"


def variables(colours: Mapping[str, str]) -> str:
    """Returns the colours as CSS variables."""
    return " ".join(f"--{name}: {value};" for name, value in colours.items())
