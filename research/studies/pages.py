"""HTML pages that need no other file: headings, tables and pictures in one look, light or dark as the reader has it."""

import base64
import html
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

from research.errors import InputError


def load_plots() -> ModuleType:
    """research.studies.plots. Its import of matplotlib takes 0.5 s, and what has no plots does without.

    Raises:
      InputError: matplotlib or Pillow isn't installed.
    """
    try:
        from research.studies import plots
    except ImportError as error:
        raise InputError(
            f"plots need matplotlib and Pillow, and {error.name} can't be imported ({error}). Install them: "
            "pip install matplotlib pillow"
        ) from error
    return plots


def page(title: str, parts: Sequence[str]) -> str:
    """Returns a page that refers to no other file; `parts` are HTML, empty ones left out."""
    return _PAGE.format(title=escape(title), style=_STYLE, body="\n".join(filter(None, parts)))


def picture(png: Mapping[str, bytes], alt: str) -> str:
    """A plot inside a page, light or dark as the reader has it; `png` holds theme -> PNG."""
    return (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{data_url(png["dark"])}">'
        f'<img src="{data_url(png["light"])}" alt="{escape(alt)}"></picture>'
    )


def escape(text: Any) -> str:
    """Text for HTML."""
    return html.escape(str(text))


def data_url(png: bytes) -> str:
    """A PNG inside a page."""
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def table(header: Sequence[str], rows: Sequence[Sequence[str]], kind: str) -> str:
    """A table of texts, which are escaped here; it scrolls sideways on a narrow screen."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return (
        f'<div class="scroll"><table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""

_STYLE = """
:root { --page: #f5f6f8; --card: #ffffff; --ink: #23272f; --soft: #69707d; --line: #e6e8ec;
  --done: #1f8a5b; --open: #b3691a; }
@media (prefers-color-scheme: dark) {
  :root { --page: #121419; --card: #1b1e24; --ink: #dfe3ea; --soft: #98a0ae; --line: #333842;
    --done: #5fcf9c; --open: #e8a75c; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 76rem; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .5rem; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2.2rem 0 .7rem; }
.chips span { display: inline-block; margin: 0 .6rem .4rem 0; padding: .1rem .7rem; border: 1px solid;
  border-radius: 1rem; font-size: .85rem; }
.done { color: var(--done); } .open { color: var(--open); }
.plots { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 27rem), 1fr)); }
.plots img { display: block; width: 100%; height: auto; border: 1px solid var(--line); border-radius: .6rem; }
.scroll, details { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; }
.scroll { overflow-x: auto; }
details { margin: .6rem 0; padding: .5rem .9rem; }
details .scroll { border: 0; }
summary { cursor: pointer; color: var(--soft); }
table { border-collapse: collapse; width: 100%; font-size: .88rem; }
th, td { padding: .35rem .9rem; text-align: left; border-bottom: 1px solid var(--line); }
tbody tr:last-child td { border-bottom: 0; }
th { color: var(--soft); font-weight: 600; white-space: nowrap; }
.numbers td + td, .numbers th + th { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.settings td { font-family: ui-monospace, monospace; font-size: .82rem; overflow-wrap: anywhere; }
p { margin: .4rem 0 .8rem; color: var(--soft); font-size: .88rem; }
.settings td:first-child { white-space: nowrap; }
.read { color: var(--soft); } .learned { color: var(--done); } .special { opacity: .75; font-weight: 600; }
.hidden { text-decoration: line-through; }
.name { margin: .8rem 0 .2rem; color: var(--soft); font-size: .85rem; }
pre { margin: 0 0 .4rem; padding: .6rem .8rem; background: var(--page); border-radius: .4rem;
  white-space: pre-wrap; overflow-wrap: anywhere; font: .85rem/1.45 ui-monospace, monospace; }
"""
