"""Writes docs/configs.md, the list of all fields of a config, from the dataclasses that hold them.

    python docs/make_configs.py

A field's row has its name as the command line spells it, its type and range, its default, and what the docstring's
`Attributes:` say of it. An attribute of `Config` with dots in its name, such as model.dtype, describes that field in
place of the docstring of the section.
"""

import dataclasses
import inspect
import json
import pathlib
import re
import sys
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from research import config as config_lib  # noqa: E402 (the line above lets the script run from anywhere)
from research import ranges  # noqa: E402
from research.run import resume  # noqa: E402
from research.sources.spec import SourceSpec  # noqa: E402

PAGE = ROOT / "docs/configs.md"
HEAD = """\
# Configs

Every field of a config. An experiment sets them in Python, `config.optimizer.learning_rate = 3e-4`, and a command line
with `--config.optimizer.learning_rate=3e-4`: see [experiments.md](experiments.md). A name that isn't here is an error
that names the nearest. Objectives have options of their own: see [objectives.md](objectives.md).

The last column says what becomes of a change when a run goes on in its workdir: it *takes effect* from that step and
is said; or is said and gives the *same result* up to rounding; or goes on with the *same rows only*; or is *refused*
before anything is touched; or is *free*. See [experiments.md](experiments.md#going-on).

A number is to be within the range beside its type, and finite. Options of objectives, views, adapters and rewards have
ranges too, which stand in the signature of each `make`.

`python docs/make_configs.py` writes this page from the docstrings of the dataclasses: change those, and run it.
"""


@dataclasses.dataclass(frozen=True)
class Field:
    """A field of a config.

    Attributes:
      name: as the command line spells it.
      type: in words of Python, and the range of a number.
      default: as Python writes it; "" where a value has to be named.
      sentence: what it says; "" where no docstring describes it.
      resumed: what becomes of a change when a run goes on.
    """

    name: str
    type: str
    default: str
    sentence: str
    resumed: str

    def row(self) -> str:
        cells = (f"`{self.name}`", self.type, f"`{self.default}`" if self.default else "", _escape(self.sentence))
        cells += (self.resumed,)
        return f"| {' | '.join(cells)} |"


@dataclasses.dataclass(frozen=True)
class Section:
    """A dataclass of a config; `title` is its name there, `about` the first sentence of its docstring."""

    title: str
    about: str
    fields: tuple[Field, ...]

    def text(self) -> str:
        rows = [
            "| field | type | default | | going on |",
            "|---|---|---|---|---|",
            *(field.row() for field in self.fields),
        ]
        return "\n".join([f"## {self.title}", "", _escape(self.about), "", *rows, ""])


def attributes(cls: type) -> dict[str, str]:
    """Field -> what the `Attributes:` of the docstring, or of those of the bases, say of it.

    Names that share a sentence each have it.
    """
    sentences = attributes(cls.__base__) if dataclasses.is_dataclass(cls.__base__) else {}
    _, _, block = inspect.getdoc(cls).partition("Attributes:\n")
    for entry in re.split(r"\n(?=  \S)", block.rstrip()):
        if match := re.fullmatch(r"\s*([\w., ]+?): (.*)", entry, re.S):
            names, text = match.groups()
            sentences |= dict.fromkeys(names.split(", "), " ".join(text.split()))
    return sentences


def sections() -> list[Section]:
    """The top level of a config, and each of its sections."""
    defaults = config_lib.defaults()
    hints = typing.get_type_hints(config_lib.Config)
    parts = {name: cls for name in defaults if (cls := hints[name]) and dataclasses.is_dataclass(cls)}
    top = {name: value for name, value in defaults.items() if name not in parts}
    pages = [_section("The run", "", config_lib.Config, top)]
    for name, cls in parts.items():
        pages += _pages(name, cls, defaults[name])
        if name == "model":
            role = dataclasses.asdict(config_lib.RoleSection())
            extra = {field: value for field, value in role.items() if field not in defaults["model"]}
            pages.append(_section("roles.NAME", "roles.NAME.", config_lib.RoleSection, extra))
        if name == "data":
            source = dataclasses.asdict(SourceSpec("")) | {"path": None}
            pages.append(_section("data.sources.NAME", "data.sources.NAME.", SourceSpec, source))
    return pages


def _pages(name: str, cls: type, defaults: Mapping[str, Any]) -> Iterator[Section]:
    """The section of this name, then those inside it."""
    hints = ranges.hints(cls)
    inner = [field for field in defaults if dataclasses.is_dataclass(hints.get(field))]
    yield _section(name, f"{name}.", cls, {k: v for k, v in defaults.items() if k not in inner})
    for field in inner:
        yield from _pages(f"{name}.{field}", hints[field], defaults[field])


def _section(title: str, prefix: str, cls: type, defaults: Mapping[str, Any]) -> Section:
    own, top, hints = attributes(cls), attributes(config_lib.Config), ranges.hints(cls)
    fields = tuple(
        Field(
            name=prefix + name,
            type=_type(hints.get(name, type(value))),
            default="" if value is None and not _may_be_none(hints.get(name)) else _python(value),
            sentence=top.get(prefix + name) or own.get(name, ""),
            resumed=resume.rule_of(prefix + name).text(),
        )
        for name, value in defaults.items()
    )
    return Section(title, " ".join(inspect.getdoc(cls).split("\n\n")[0].split()), fields)


def _python(value: Any) -> str:
    """A value as Python writes it, but for strings, which have double quotes as in the project's code."""
    if isinstance(value, str):
        return json.dumps(value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_python(k)}: {_python(v)}" for k, v in value.items()) + "}"
    return repr(value)


def _type(hint: Any) -> str:
    """A type as a reader of configs knows it: a tuple[int, ...] is a "tuple of int"."""
    kind, args = typing.get_origin(hint) or hint, typing.get_args(hint)
    if kind is typing.Annotated:
        allowed = str(ranges.range_of(hint))
        return _type(hint.__origin__) + (f", {allowed}" if allowed else "")
    if kind in (typing.Union, types.UnionType):
        return " or ".join(_type(option) for option in args)
    if kind is types.NoneType:
        return "None"
    if kind is tuple:
        return f"tuple of {_type(args[0])}"
    if issubclass(kind, Mapping):
        return f"mapping to {_type(args[1])}" if len(args) == 2 and ranges.range_of(args[1]) else "mapping"
    return kind.__name__


def _may_be_none(hint: Any) -> bool:
    return types.NoneType in typing.get_args(hint)


def _escape(text: str) -> str:
    """Plain text for a cell of a table; a bar has to be escaped in code too."""
    pieces = re.split(r"(`[^`]*`)", text)
    return "".join(re.sub(r"([|*<])" if i % 2 == 0 else r"(\|)", r"\\\1", piece) for i, piece in enumerate(pieces))


def page() -> str:
    """The text of docs/configs.md."""
    return "\n".join([HEAD, *(section.text() for section in sections())]).rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
