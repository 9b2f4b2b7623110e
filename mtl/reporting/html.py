"""Writes the report as one self-contained HTML page with a light and a dark theme."""

from collections.abc import Sequence
from html import escape

from mtl.reporting.document import Block, Bullets, Heading, Picture, Table, Text
from mtl.reporting.svg import DARK, LIGHT, variables
from mtl.reporting.writing import slug
from mtl.text import plain

HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<link rel="icon" href="data:,">
"""
STYLE = """
:root { color-scheme: light dark; @light }
@media (prefers-color-scheme: dark) { :root { @dark } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.5rem 5rem; max-width: 68rem; background: var(--bg); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .4rem; letter-spacing: -.01em; }
h2 { font-size: 1.3rem; margin: 3rem 0 .6rem; padding-top: 1rem; border-top: 2px solid var(--ink); }
h3 { font-size: 1rem; margin: 1.6rem 0 .3rem; }
p, ul { max-width: 46rem; margin: .5rem 0; }
ul { padding-left: 1.2rem; }
li { margin: .25rem 0; }
nav { margin: 1rem 0; }
a { color: var(--c1); }
.warning { border-left: 3px solid var(--c2); padding-left: 2rem; }
figure { margin: 1.8rem 0; }
figcaption, caption { text-align: left; padding: 0 0 .4rem; font-weight: 600; }
.note { color: var(--muted); font-size: .87rem; font-weight: 400; margin: .35rem 0 0; }
.scroll { overflow-x: auto; }
.scroll:focus-visible { outline: 2px solid var(--c1); outline-offset: 3px; }
svg { display: block; width: 100%; min-width: min(34rem, 100%); height: auto; stroke-linejoin: round; }
.method:hover { stroke-width: 3.5px; filter: drop-shadow(0 0 1.5px var(--ink)); }
.method:hover path { stroke-width: 3px !important; }
.table { margin: 1.8rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .3rem .75rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--grid); }
th { color: var(--muted); font-weight: 600; border-bottom: 1px solid var(--muted); vertical-align: bottom; }
tr > .text { text-align: left; }
tr > .text.last { white-space: normal; min-width: 9rem; overflow-wrap: anywhere; }
th:first-child, td:first-child { padding-left: 0; }
tr.strong td { font-weight: 650; }
tbody tr:hover td { background: color-mix(in srgb, var(--ink) 5%, transparent); }
details { margin: 1.8rem 0; }
summary { cursor: pointer; font-weight: 600; }
@media print { body { max-width: none; } details > * { display: block; } }
""".replace("@light", variables(LIGHT)).replace("@dark", variables(DARK))


def write(blocks: Sequence[Block]) -> str:
    """Returns the blocks as an HTML page; names are escaped, and invisible characters are made visible."""
    headings = [block for block in blocks if isinstance(block, Heading)]
    title = next((h.text for h in headings if h.level == 1), "Report")
    sections = [h for h in headings if h.level == 2]
    anchors = [f"{slug(h.text)}-{number}" for number, h in enumerate(sections, 1)]  # titles may share a slug
    links = " · ".join(f'<a href="#{a}">{escape(h.text)}</a>' for a, h in zip(anchors, sections, strict=True))
    body = []
    for block in blocks:
        body.append(_block(block, anchors.pop(0) if isinstance(block, Heading) and block.level == 2 else ""))
        if isinstance(block, Heading) and block.level == 1:
            body.append(f"<nav>{links}</nav>")
    inside = "\n".join(body)
    page = (
        f"{HEAD}<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{inside}\n</body>\n</html>\n"
    )
    return plain(page, keep="\n")


def _block(block: Block, anchor: str = "") -> str:
    if isinstance(block, Heading):
        named = f' id="{anchor}"' if anchor else ""
        return f"<h{block.level}{named}>{escape(block.text)}</h{block.level}>"
    if isinstance(block, Text):
        return f"<p>{escape(block.text)}</p>"
    if isinstance(block, Bullets):
        items = "".join(f"<li>{escape(item)}</li>" for item in block.items)
        return f'<ul class="{"warning" if block.warning else "plain"}">{items}</ul>'
    if isinstance(block, Picture):
        caption = f"<figcaption>{escape(block.title)}{_note(block.note)}</figcaption>"
        return f"<figure>{caption}{_scrolling(block.title)}{block.svg}</div></figure>"
    return _table(block)


def _table(block: Table) -> str:
    classes = [_class(index, block.texts) for index in range(len(block.columns))]
    head = "".join(f"<th{c}>{escape(column)}</th>" for c, column in zip(classes, block.columns, strict=True))
    rows = "\n".join(
        ('<tr class="strong">' if index in block.strong else "<tr>")
        + "".join(f"<td{c}>{escape(cell)}</td>" for c, cell in zip(classes, row, strict=True))
        + "</tr>"
        for index, row in enumerate(block.rows)
    )
    inside = f"<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody></table></div>"
    begin = f"{_scrolling(block.title)}<table>"
    if block.detail:
        return f"<details><summary>{escape(block.title)}</summary>{_note(block.note)}{begin}{inside}</details>"
    caption = f"<caption>{escape(block.title)}{_note(block.note)}</caption>"
    return f'<div class="table">{begin}{caption}{inside}</div>'


def _scrolling(title: str) -> str:
    """Returns the opening tag of a box that scrolls wide content, also with the keyboard."""
    return f'<div class="scroll" tabindex="0" role="group" aria-label="{escape(title)}">'


def _class(index: int, texts: int) -> str:
    if index >= texts:
        return ""
    return ' class="text last"' if 0 < index == texts - 1 else ' class="text"'


def _note(text: str) -> str:
    return f'<div class="note">{escape(text)}</div>' if text else ""
