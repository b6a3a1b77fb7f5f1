"""English that ships inside Python: the topics of `help()` and the docstrings of the standard library.

Text to train on with nothing downloaded, and a task with classes made of it: is a sentence's word order right? It
differs a little between Python versions and installations.
Sources are parsed, never imported, so that nothing runs and no display or optional library is needed.
"""

import ast
import inspect
import os
import pathlib
import random
import re
import sysconfig
import warnings
import zlib
from collections.abc import Iterator

from research.errors import InputError

MIN_CHARACTERS = 200  # A shorter document is a name and a line.
_SKIPPED_FOLDERS = {"test", "tests", "idlelib", "site-packages", "dist-packages", "__pycache__"}


def records(half: str = "") -> Iterator[dict[str, str]]:
    """Yields {"text": document}, in a fixed order: each topic of `help()`, then each module's docstrings.

    Args:
      half: "a" or "b": only the documents of this half, chosen by a hash of each.

    Raises:
      InputError: this Python ships neither the topics nor library sources.
    """
    library = pathlib.Path(sysconfig.get_path("stdlib"))
    empty = True
    for text in (*_topics(), *_modules(library)):
        if len(text) >= MIN_CHARACTERS:
            empty = False
            if not half or half == "ab"[zlib.crc32(text.encode()) % 2]:
                yield {"text": text}
    if empty:
        raise InputError(
            f"built-in text: this Python has no help topics (pydoc_data), and no sources in {library}. "
            "Use a full Python installation, or name a data file."
        )


def word_order() -> Iterator[dict[str, str | int]]:
    """Yields {"text": sentence, "label": 1 if its words are in order, else 0}; about half of them each.

    Where they are not, two pairs of neighbours are swapped. The sentences are those of half b of the documents, so that
    a model that has read half a has learned English, and none of them. Each call yields the same.
    """
    sentences = {s: None for record in records("b") for s in _sentences(record["text"])}
    order = random.Random(0)
    chosen = list(sentences)
    order.shuffle(chosen)
    for sentence in chosen:
        right = order.random() < 0.5
        yield {"text": sentence if right else _swap(sentence, order, pairs=2), "label": int(right)}


def _sentences(text: str) -> Iterator[str]:
    """Sentences of 6 to 30 words, most of them plain words."""
    for paragraph in re.split(r"\n\s*\n", text):
        for sentence in re.split(r"(?<=[.!?]) (?=[A-Z])", " ".join(paragraph.split())):
            words = sentence.split()
            plain = sum(word.strip(".,").isalpha() for word in words)
            if 6 <= len(words) <= 30 and plain >= 0.6 * len(words) and re.fullmatch(r"[A-Z].*[.!?]", sentence):
                yield sentence


def _swap(sentence: str, order: random.Random, pairs: int) -> str:
    """The first word, and the mark at the end, stay where they are."""
    words, end = sentence[:-1].split(), sentence[-1]
    places = [i for i in range(1, len(words) - 1) if words[i] != words[i + 1]]
    for i in order.sample(places, min(pairs, len(places))):
        words[i], words[i + 1] = words[i + 1], words[i]
    return " ".join(words) + end


def _topics() -> Iterator[str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # Some distributions package it apart from the interpreter.
        return
    for name in sorted(topics):
        yield topics[name].strip()


def _modules(library: pathlib.Path) -> Iterator[str]:
    for folder, subfolders, files in os.walk(library):
        subfolders[:] = sorted(set(subfolders) - _SKIPPED_FOLDERS)
        for file in sorted(files):
            if file.endswith(".py"):
                path = pathlib.Path(folder, file)
                parts = path.relative_to(library).with_suffix("").parts
                name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
                with warnings.catch_warnings(action="ignore"):  # Invalid escapes and the like in old modules.
                    tree = ast.parse(path.read_bytes())
                yield "\n\n".join(_docstrings(tree, name))


def _docstrings(node: ast.AST, name: str) -> Iterator[str]:
    """Each docstring at and below `node` under its qualified name, in the order of the source."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        docstring = ast.get_docstring(node, clean=False)
        if docstring and docstring.strip():
            yield f"{name}\n\n{inspect.cleandoc(docstring).strip()}"
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _docstrings(child, f"{name}.{child.name}")
        elif isinstance(child, ast.stmt | ast.ExceptHandler):  # Definitions sit in `if` and `try` too.
            yield from _docstrings(child, name)
