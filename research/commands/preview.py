"""Shows the data of an experiment as the model will see it: rows of a batch, what is learned of them, and lengths.

What is only read is dim, what is learned is coloured, special tokens are reversed; without a terminal, what is learned
stands in ⟦ ⟧. Nothing is trained or written, but for the cache of tokens.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from research import cli
from research.cli import Flag
from research.errors import printable

COMMAND = cli.Command(
    "preview",
    __doc__,
    flags=(
        Flag("rows", "how many rows of the batch are shown", 3, metavar="N", parse=cli.whole(1)),
        Flag("step", "the batch of which step", 1, metavar="N", parse=cli.whole(1)),
        Flag("held_out", "rows of the held-out data in its place", False),
        Flag("whole", "show long stretches whole, and not their ends alone", False),
    ),
    examples=("understudy preview --config=experiments/sft.py", "understudy preview --config=pretrain --rows=1"),
    experiment=True,
)

_ENDS = 240  # letters of a long stretch that are shown at either end
_STYLES = {  # (learned, special) -> codes of a terminal
    (False, False): "2",
    (False, True): "2;7",
    (True, False): "32",
    (True, True): "32;7",
}


def main(argv: Sequence[str]) -> int:
    return COMMAND.run(argv, _preview)


def _preview(args: SimpleNamespace) -> None:
    from research import config  # late: jax and the models take 1 s, which --help and a wrong flag needn't wait for
    from research.run import console, preview

    with console.shown(True):
        shown = preview.preview(
            config.parse(args.experiment.values), rows=args.rows, step=args.step, held_out=args.held_out
        )
    color = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    for line in lines(shown, color=color, whole=args.whole):
        print(line)


def lines(shown: Any, *, color: bool, whole: bool) -> list[str]:
    """What is printed.

    Args:
      shown: a run.preview.Preview.
      color: whether codes of a terminal may be used.
      whole: whether long stretches are shown whole.
    """
    text = [_rule(f"{shown.title}", color)]
    for number, row in enumerate(shown.rows, 1):
        for place, document in enumerate(row.documents, 1):
            about = [*document.notes, f"{document.tokens:,} tokens", f"{document.learned:,} learned"]
            text.append(_rule(f"row {number}, document {place}: {', '.join(about)}", color))
            text.append("".join(_span(span, color, whole) for span in document.spans).replace("⟧⟦", ""))
        if row.padding:
            text.append(_dim(f"· {row.padding:,} place{'s' * (row.padding > 1)} of padding", color))
    text += ["", *shown.facts, "", *table(shown.lengths)]
    return text


def table(lengths: Sequence[Mapping[str, Any]]) -> list[str]:
    """The lengths of the sources' examples, in columns."""
    head = ("source", "examples", "median", "p90", "p99", "longest", "over seq_len")
    keys = ("examples", "median", "p90", "p99", "longest")
    body = [(row["source"], *(f"{row[key]:,}" for key in keys), _over(row)) for row in lengths]
    widths = [max(len(line[i]) for line in (head, *body)) for i in range(len(head))]
    return [
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(widths[i]) for i, cell in enumerate(line) if i)])
        for line in (head, *body)
    ]


def _over(row: Mapping[str, Any]) -> str:
    """How many examples are longer than a row, and what becomes of them."""
    share = f" ({row['over'] / row['examples']:.1%}, {row['fate']})" if row["over"] else ""
    return f"{row['over']:,}{share}"


def _span(span: Any, color: bool, whole: bool) -> str:
    text = span.text if whole or len(span.text) <= 3 * _ENDS else _shortened(span.text)
    text = printable(text)
    if span.hidden:
        text += printable(f"={span.hidden}")
    if color:
        return "\n".join(f"\x1b[{_STYLES[span.learned, span.special]}m{line}\x1b[0m" for line in text.split("\n"))
    return f"⟦{text}⟧" if span.learned else text


def _shortened(text: str) -> str:
    return f"{text[:_ENDS]} … {len(text) - 2 * _ENDS:,} letters … {text[-_ENDS:]}"


def _rule(text: str, color: bool) -> str:
    return f"\x1b[1m── {text}\x1b[0m" if color else f"── {text}"


def _dim(text: str, color: bool) -> str:
    return f"\x1b[2m{text}\x1b[0m" if color else text
