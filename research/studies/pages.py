"""HTML pages that need no other file: headings, tables and pictures in one look, light or dark as the reader has it."""

import base64
import html
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from research import files
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


def page(title: str, parts: Sequence[str], script: str = "") -> str:
    """Returns a page that refers to no other file.

    Args:
      title: of the window.
      parts: HTML; empty ones are left out.
      script: JavaScript that runs once the page is there.
    """
    body = "\n".join(filter(None, parts)) + (f"\n<script>{script}</script>" if script else "")
    return _PAGE.format(title=escape(title), style=_STYLE, body=body)


def plot(out: str | Path, name: str, draw: Callable[[str], Any], alt: str) -> str:
    """Writes a plot as NAME.png, NAME.svg and NAME.pdf into a folder; returns it as HTML.

    Args:
      out: the folder, which is there.
      name: of the files.
      draw: theme -> the plot, a Figure of matplotlib.
      alt: what it shows.
    """
    plots = load_plots()
    figures = {theme: draw(theme) for theme in plots.THEMES}
    png = {theme: plots.to_png(each) for theme, each in figures.items()}
    files.write_bytes(Path(out) / f"{name}.png", png["light"])
    for kind in ("svg", "pdf"):
        files.write_bytes(Path(out) / f"{name}.{kind}", plots.to_vector(figures["light"], kind))
    return picture(png, alt)


def picture(png: Mapping[str, bytes], alt: str) -> str:
    """A plot inside a page, light or dark as the reader has it; `png` holds theme -> PNG."""
    return (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{data_url(png["dark"])}">'
        f'<img src="{data_url(png["light"])}" alt="{escape(alt)}"></picture>'
    )


def escape(text: Any) -> str:
    """Text for HTML."""
    return html.escape(str(text))


def heading(title: str, run: str = "") -> str:
    """The heading of a section; of a page of several runs with the name of the section's own."""
    return f"<h2>{escape(f'{title} of {run}' if run else title)}</h2>"


def data_url(png: bytes) -> str:
    """A PNG inside a page."""
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def table(header: Sequence[str], rows: Sequence[Sequence[str]], kind: str) -> str:
    """A table of texts, which are escaped here; it scrolls sideways on a narrow screen."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{_cell(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return (
        f'<div class="scroll"><table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _cell(text: str) -> str:
    """A cell; an interval in brackets at its end stands smaller below the value, so that wide tables fit a screen."""
    value, interval = INTERVAL.fullmatch(text).groups() if INTERVAL.fullmatch(text) else (text, "")
    return escape(value) + (f' <span class="interval">{escape(interval)}</span>' if interval else "")


INTERVAL = re.compile(r"(-?[\d.]\S*) (\[[^\[\]]*\])")  # "0.71 [0.69, 0.73]"

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
  --done: #1f8a5b; --open: #b3691a; --bad: #c43c3c; --heat: 74 125 224;
  --c0: #4a7de0; --c1: #e07b39; --c2: #2f9e6e; --c3: #c0487f; --c4: #8a63d2; --c5: #c9a227; --c6: #3aa0b8;
  --c7: #8c6d5a; }
@media (prefers-color-scheme: dark) {
  :root { --page: #121419; --card: #1b1e24; --ink: #dfe3ea; --soft: #98a0ae; --line: #333842;
    --done: #5fcf9c; --open: #e8a75c; --bad: #f07f7f; --heat: 92 143 240; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 108rem; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .5rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.4rem 0 .7rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 .5rem; }
.chips span { display: inline-block; margin: 0 .6rem .4rem 0; padding: .1rem .7rem; border: 1px solid;
  border-radius: 1rem; font-size: .85rem; }
.done { color: var(--done); } .open { color: var(--open); }
.plots { display: grid; gap: 1rem; margin: 1rem 0;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); }
.plots img { display: block; width: 100%; height: auto; border: 1px solid var(--line); border-radius: .6rem; }
.scroll, details, .card, figure.chart, .sample { background: var(--card); border: 1px solid var(--line);
  border-radius: .6rem; }
.plots:has(img) { grid-template-columns: repeat(auto-fit, minmax(min(100%, 27rem), 1fr)); max-width: 74rem; }
.scroll { overflow-x: auto; width: fit-content; max-width: 100%; }
details { margin: .6rem 0; padding: .5rem .9rem; }
details .scroll { border: 0; }
details .plots { margin: .8rem 0 .4rem; }
summary { cursor: pointer; color: var(--soft); }
table { border-collapse: collapse; font-size: .88rem; }
th, td { padding: .35rem 1rem; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top; }
tbody tr:last-child td { border-bottom: 0; }
th { color: var(--soft); font-weight: 600; white-space: nowrap; }
.numbers td + td, .numbers th + th { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.numbers td:first-child { min-width: 7.5rem; } .numbers.wide td:first-child { white-space: nowrap; }
.numbers.wide th { white-space: normal; vertical-align: bottom; }
.interval { display: block; color: var(--soft); font-size: .82em; }
.settings td { font-family: ui-monospace, monospace; font-size: .82rem; overflow-wrap: anywhere; }
p { margin: .4rem 0 .8rem; max-width: 76rem; color: var(--soft); font-size: .88rem; }
.settings td:first-child { white-space: nowrap; }
.read { color: var(--soft); } .learned { color: var(--done); } .special { opacity: .75; font-weight: 600; }
.hidden { text-decoration: line-through; }
.name { margin: .8rem 0 .2rem; color: var(--soft); font-size: .85rem; }
pre { margin: 0 0 .4rem; padding: .6rem .8rem; background: var(--page); border-radius: .4rem;
  white-space: pre-wrap; overflow-wrap: anywhere; font: .85rem/1.45 ui-monospace, monospace; }
.card { padding: .4rem 1.1rem; display: grid; column-gap: 2rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); }
.card div { padding: .45rem 0; overflow-wrap: anywhere; }
.card dt { color: var(--soft); font-size: .8rem; } .card dd { margin: 0; }
.card .course { font-size: 1.1rem; font-variant-numeric: tabular-nums; }
.fields { margin: .4rem 0; padding: 0; columns: 20rem; column-gap: 2rem; list-style: none;
  font: .8rem/1.6 ui-monospace, monospace; overflow-wrap: anywhere; }
.fields i { color: var(--soft); }
figure.chart { position: relative; margin: 0; padding: .5rem .2rem .4rem; min-width: 0; }
figure.chart svg[role] { display: block; touch-action: pan-y; cursor: crosshair; }
figcaption { display: flex; gap: .5rem; align-items: center; min-height: 1.7rem; padding: 0 .8rem; font-size: .92rem; }
figcaption b { flex: 1; font-weight: 600; }
button { font: inherit; color: inherit; background: none; border: 0; cursor: pointer; }
.tool { padding: 0 .5rem; border: 1px solid var(--line); border-radius: .8rem; color: var(--soft); font-size: .75rem; }
.tool[aria-pressed=true] { color: var(--page); background: var(--soft); }
.legend { padding: 0 .6rem; display: flex; flex-wrap: wrap; font-size: .78rem; }
.entry { padding: .05rem .4rem; text-align: left; overflow-wrap: anywhere; } .entry svg { margin-right: .3rem; }
.entry.off { opacity: .35; text-decoration: line-through; }
.grid { stroke: var(--line); } .tick { fill: var(--soft); font-size: 11px; font-variant-numeric: tabular-nums; }
.curve { fill: none; stroke-width: 1.7; } .raw { fill: none; stroke-width: .8; opacity: .4; } .band { opacity: .16; }
.broken { fill: var(--bad); font-weight: 700; } .resume { stroke: var(--open); stroke-dasharray: 2 3; }
.cross { stroke: var(--soft); stroke-width: .8; pointer-events: none; } .dot { fill: var(--card); stroke-width: 2; }
.box { fill: var(--c0); opacity: .15; }
.tip { display: none; position: absolute; z-index: 1; pointer-events: none; max-width: 22rem; padding: .35rem .6rem;
  background: var(--card); border: 1px solid var(--line); border-radius: .4rem; box-shadow: 0 2px 10px rgb(0 0 0 / .18);
  font-size: .78rem; font-variant-numeric: tabular-nums; }
.key { display: inline-block; width: .6rem; height: .6rem; margin-right: .4rem; border-radius: 50%; }
.filters { display: flex; flex-wrap: wrap; gap: .2rem 1rem; margin: .4rem 0 .8rem; font-size: .88rem; }
.samples { display: grid; gap: .8rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 30rem), 1fr)); }
.sample { padding: .6rem .9rem; align-self: start; } .sample[hidden] { display: none; }
.turn { margin: .3rem 0; padding: .35rem .7rem; border-radius: .7rem; background: var(--page); white-space: pre-wrap;
  overflow-wrap: anywhere; width: fit-content; max-width: 100%; font: .85rem/1.45 ui-monospace, monospace; }
.answers { display: grid; gap: .2rem 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 18rem), 1fr)); }
.answers .turn { border: 1px solid var(--line); background: none; }
.right .turn { border-color: var(--done); } .wrong .turn { border-color: var(--bad); }
.right .name b { color: var(--done); } .wrong .name b { color: var(--bad); }
.heat td { text-align: center; font-variant-numeric: tabular-nums; }
.heat td + td { background: rgb(var(--heat) / calc(var(--part) * .75)); }
"""
