"""What a run's first rows looked like, as a part of its report: see run/preview.py."""

from collections.abc import Mapping
from typing import Any

from research.studies import pages
from research.studies.pages import escape


def section(title: str, preview: Mapping[str, Any]) -> str:
    """HTML of a run's data: lengths by source, and the first rows; what is learned of them is coloured.

    Args:
      title: of the section.
      preview: as WORKDIR/preview.json has it.
    """
    keys = ("examples", "median", "p90", "p99", "longest")
    rows = [
        [
            each["source"],
            *(f"{each[key]:,}" for key in keys),
            f"{each['over']:,} {each['fate'] if each['over'] else ''}",
        ]
        for each in preview["lengths"]
    ]
    head = ["source", "examples", "median tokens", "90 %", "99 %", "longest", "over seq_len"]
    parts = [f"<h3>{escape(title)}</h3>", *(f"<p>{escape(line)}.</p>" for line in preview["facts"])]
    parts.append(pages.table(head, rows, "numbers"))
    documents = []
    for number, row in enumerate(preview["rows"], 1):
        for place, document in enumerate(row["documents"], 1):
            about = [*document["notes"], f"{document['tokens']:,} tokens", f"{document['learned']:,} learned"]
            documents.append(f'<p class="name">row {number}, document {place}: {escape(", ".join(about))}</p>')
            documents.append(f"<pre>{''.join(_span(span) for span in document['spans'])}</pre>")
    summary = f"{escape(preview['title'])}; what is learned is coloured"
    parts.append(f"<details><summary>{summary}</summary>{''.join(documents)}</details>")
    return "\n".join(parts)


def _span(span: Mapping[str, Any]) -> str:
    kind = ("learned" if span["learned"] else "read") + (" special" if span["special"] else "")
    hidden = f'<span class="learned">{escape(span["hidden"])}</span>' if span["hidden"] else ""
    crossed = " hidden" if hidden else ""
    return f'<span class="{kind}{crossed}">{escape(span["text"])}</span>{hidden}'
