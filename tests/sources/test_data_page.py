"""docs/data.md has a row for each batch field, field of a source and view, and its example is a view."""

import dataclasses
import pkgutil
import re
from pathlib import Path

import numpy as np
import pytest

from research.errors import InputError
from research.sources import dataset, fields, views
from research.sources.spec import SourceSpec
from research.sources.tokenizers import TokenizerSpec

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


def test_the_view_with_tokens_of_its_own_works_and_its_options_are_checked_first(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(\"\"\"Some tokens.*?)```", PAGE, re.S)
    (tmp_path / "memory_as_shown.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "a.jsonl").write_text('{"text": "abc"}\n')
    options = {"kind": "memory_as_shown", "count": 3}
    spec = dataset.DataSpec("", sources={"a": {"path": str(tmp_path / "a.jsonl"), "view": options}}, eval_fraction=0)
    data = dataset.load(spec, TokenizerSpec())
    (row,) = data.train[0][0].batch(np.array([0]))["tokens"]
    assert data.tokenizer.decode(row[:5], skip_special=False) == "<|memory 0|><|memory 1|><|memory 2|><|bos|>a"
    with pytest.raises(InputError, match=r"view.cuont: no such option. Did you mean 'count'"):
        views.load({"kind": "memory_as_shown", "cuont": 3}, "view", 16)


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
