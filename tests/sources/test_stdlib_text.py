import sys
import sysconfig
import time

import pytest

from research.errors import InputError
from research.sources import stdlib_text


@pytest.fixture
def library(tmp_path, monkeypatch):
    """An empty folder in the place of the standard library, and no help topics."""
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    return tmp_path


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


@pytest.mark.slow
def test_the_library_of_this_python():
    start = time.process_time()
    texts = [record["text"] for record in stdlib_text.records()]
    assert time.process_time() - start < 10  # About 2 s.
    assert sum(len(text.encode()) for text in texts) > 1_500_000
    assert min(map(len, texts)) >= stdlib_text.MIN_CHARACTERS
    assert any(text.startswith('The "assert" statement') for text in texts)
    argparse = next(text for text in texts if text.startswith("argparse\n\n"))
    assert "\n\nargparse.HelpFormatter\n\nFormatter for generating usage messages" in argparse
    assert not any(text.startswith(("test.", "idlelib.")) for text in texts)
    assert texts == [record["text"] for record in stdlib_text.records()]


def test_docstrings_under_their_names_in_order(library):
    write(
        library / "pkg" / "mod.py",
        f'''
"""Module: {"x" * stdlib_text.MIN_CHARACTERS}"""
raise RuntimeError("parsed, not imported")
PATTERN = "\\d"  # An invalid escape warns, and pytest makes the warning an error.
if True:
    class A:
        "Class."
        def f(self):
            """First line.

               Indented in the source.
            """
        async def g(self): "Coroutine."
try:
    pass
except ImportError:
    def h():
        "Of a handler."
def silent(): pass
def blank(): "  "
''',
    )
    (record,) = stdlib_text.records()
    head, *rest = record["text"].split("\n\n")
    assert head == "pkg.mod"
    assert rest[1:] == [
        "pkg.mod.A",
        "Class.",
        "pkg.mod.A.f",
        "First line.",
        "Indented in the source.",
        "pkg.mod.A.g",
        "Coroutine.",
        "pkg.mod.h",
        "Of a handler.",
    ]


def test_which_modules(library):
    long = f'"""{"word " * stdlib_text.MIN_CHARACTERS}"""'
    for name in (
        "b.py",
        "a.py",
        "c/__init__.py",
        "c/z.py",
        "test/d.py",
        "c/tests/e.py",
        "site-packages/f.py",
    ):
        write(library / name, long)
    write(library / "short.py", '"""Short."""')
    write(library / "note.txt", long)
    latin = "# coding: latin-1\n" + long.replace("word", "wörd")
    (library / "latin.py").write_bytes(latin.encode("latin-1"))
    records = [record["text"].split("\n\n") for record in stdlib_text.records()]
    assert [name for name, _ in records] == ["a", "b", "latin", "c", "c.z"]
    assert records[2][1].startswith("wörd wörd")


def test_a_python_without_sources_or_topics(library):
    with pytest.raises(InputError, match=r"no help topics \(pydoc_data\), and no sources in .* full Python"):
        next(stdlib_text.records())


def test_paragraphs_are_labelled_by_what_they_are_about(library, monkeypatch):
    monkeypatch.setattr(stdlib_text, "_topics", lambda: iter(["The if statement\n\n" + "is used for choices " * 4]))
    text = "Sends mail to a server and waits for it " * 8
    write(library / "smtplib.py", f'"""{text}\n\nToo short."""')
    write(library / "asyncio/tasks.py", f'def f():\n    """{text}"""')
    write(library / "fractions.py", f'"""{text}"""')
    first = " ".join(text.split()[:40])
    assert sorted((r["label"], r["text"]) for r in stdlib_text.topics()) == [
        ("concurrency", first),
        ("internet", first),
        ("language", " ".join(["is used for choices"] * 4)),
    ]
