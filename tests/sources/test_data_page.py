"""docs/data.md has a row for each batch field, field of a source and view, and its example is a view."""

import dataclasses
import pkgutil
import re
from pathlib import Path

import numpy as np

from research.sources import fields, views
from research.sources.spec import SourceSpec

PAGE = (Path(__file__).parents[2] / "docs/data.md").read_text()


def table(heading):
    """The first column of the table under a heading of the page, and the rest of each row."""
    (section,) = re.findall(rf"\n## {heading}\n(.*?)\n## ", PAGE + "\n## ", re.S)
    rows = [line.strip("|").split("|", 1) for line in section.splitlines() if line.startswith("| `")]
    return {name: rest for names, rest in rows for name in re.findall(r"`([^`]*)`", names)}


def test_every_batch_field_is_described():
    rows = table("From documents to batches")
    assert list(rows) == list(fields.TABLE)
    letters = {"time": "T", "labels": "C", "candidates": "K"}
    for name, row in fields.TABLE.items():
        shape = ", ".join(["B", *(letters[axis] for axis in row.axes)])
        assert f"[{shape}] {np.dtype(row.dtype)}" in rows[name]


def test_every_field_of_a_source_and_every_view_is_described():
    assert set(table("Named sources")) == {field.name for field in dataclasses.fields(SourceSpec)}
    kinds = {module.name for module in pkgutil.iter_modules(views.__path__)}
    assert set(re.findall(r'^\| `\{"kind": "(\w+)"', PAGE, re.M)) == kinds


def test_the_view_of_the_page_works(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(\"\"\"Every document.*?)```", PAGE, re.S)
    (tmp_path / "twice_as_shown.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    view = views.load({"kind": "twice_as_shown"}, "view", 16)
    tokens = np.arange(40, dtype=np.int32)
    whole, shuffled = view.documents(views.Document(tokens, np.ones(40, bool)), np.random.default_rng(0))
    assert whole.tokens is tokens
    assert sorted(shuffled.tokens) == list(range(40)) != shuffled.tokens.tolist()
    assert (shuffled.tokens[0], shuffled.tokens[-1]) == (0, 39)
