"""English that ships inside Python: the topics of `help()` and the docstrings of the standard library.

Text to train on with nothing downloaded, and paragraphs of it with four topics to tell apart. It differs a little
between Python versions and installations.
Sources are parsed, never imported, so that nothing runs and no display or optional library is needed.
"""

import ast
import inspect
import itertools
import os
import pathlib
import re
import sysconfig
import warnings
from collections.abc import Iterator

from research.errors import InputError

MIN_CHARACTERS = 200  # A shorter document is a name and a line.
TOPICS: dict[str, tuple[str, ...]] = {
    "language": (),
    "interfaces": ("cmd", "curses", "pty", "readline", "tkinter", "tty", "turtle"),
    "concurrency": (
        "_threading_local", "asyncio", "concurrent", "contextvars", "multiprocessing", "queue", "sched", "selectors",
        "signal", "subprocess", "threading",
    ),
    "internet": (
        "base64", "cgi", "email", "ftplib", "html", "http", "imaplib", "ipaddress", "mailbox", "mimetypes", "nntplib",
        "poplib", "smtplib", "socket", "socketserver", "ssl", "telnetlib", "urllib", "uuid", "webbrowser", "wsgiref",
        "xmlrpc",
    ),
}  # fmt: skip
_SKIPPED_FOLDERS = {"test", "tests", "idlelib", "site-packages", "dist-packages", "__pycache__"}


def records() -> Iterator[dict[str, str]]:
    """Yields {"text": document}, in a fixed order: each topic of `help()`, then each module's docstrings.

    Raises:
      InputError: this Python ships neither the topics nor library sources.
    """
    library = pathlib.Path(sysconfig.get_path("stdlib"))
    empty = True
    for text in (*_topics(), *_modules(library)):
        if len(text) >= MIN_CHARACTERS:
            empty = False
            yield {"text": text}
    if empty:
        raise InputError(
            f"built-in text: this Python has no help topics (pydoc_data), and no sources in {library}. "
            "Use a full Python installation, or name a data file."
        )


def topics() -> Iterator[dict[str, str]]:
    """Yields {"text": the first 40 words of a paragraph, "label": one of TOPICS}, in a fixed order.

    What is of the topics of `help()` is "language"; of the library, TOPICS says which modules are of which. The name of
    what a docstring belongs to is left out. (`records` has the paragraphs too, with these names and without labels.)
    """
    library = pathlib.Path(sysconfig.get_path("stdlib"))
    topic_of = {module: topic for topic, modules in TOPICS.items() for module in modules}
    documents = itertools.chain(
        (("language", text) for text in _topics()),
        ((topic_of.get(re.split(r"[.\n]", text)[0]), text) for text in _modules(library)),
    )
    for topic, text in documents:
        for paragraph in re.split(r"\n\s*\n", text) if topic else ():
            words = paragraph.split()
            if len(words) >= 8:
                yield {"text": " ".join(words[:40]), "label": topic}


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
