"""A chat template as a program: Jinja in a sandbox, with what transformers shows it, and bounds on what it may use.

A template comes with a model, from whoever made it. It sees the conversation and nothing else. Each rendering has a
budget: so many passes through loops and macros, seconds, and characters in any one text that it makes.
"""

import contextvars
import dataclasses
import datetime
import functools
import json
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
from jinja2 import nodes

from research.errors import InputError

# Marks in a rendered text. Unicode keeps these code points for use inside a program; texts are rid of them.
SPELLED, SPELLED_END, ANSWER, ANSWER_END, HERE = map(chr, range(0xFDD0, 0xFDD5))
_NOT_ASCII = re.compile(rf"[^\x00-\x7f{SPELLED}-{HERE}]")
_NOW = datetime.datetime(2024, 7, 26)
_MOST_SOURCE = 2**20  # characters of a template
_MOST_STEPS, MOST_SECONDS = 200_000, 5.0
_MOST_LENGTH, _TIMES_INPUT = 2**20, 16  # characters of a text: so many, and as many times those of the conversation
_MOST_DIGITS, _MOST_NUMBER = 2**12, 10_000  # bits of a number; a number that says how long something is to be
_NESTED = re.compile(r"\{[^{}]*:[^{}]*\{")  # a format that takes its width from a value
_WIDTH = re.compile(r"\d{5}|\*")  # of a format
_FILTERS = ("center", "indent", "wordwrap", "truncate", "batch", "slice", "round", "format", "replace", "join")
_STEP, _HELD, _TILDE = " step", " held", " tilde"  # filters that a template can't name
_GROWING = ("center", "ljust", "rjust", "zfill", "expandtabs", "format", "format_map", "replace", "join", "translate")


class Exhausted(InputError):
    """A template has used up its budget, which no other conversation would change."""


class InvalidTemplate(InputError):
    """A template is no program that Jinja can run."""


@dataclasses.dataclass
class _Budget:
    """What one rendering may still use.

    Attributes:
      steps: passes through a loop, and calls of a macro.
      end: when it has to be done, by time.monotonic().
      length: the most characters of one text.
    """

    steps: int
    end: float
    length: int

    def step(self) -> None:
        self.steps -= 1
        if self.steps < 0:
            raise Exhausted(f"takes more than {_MOST_STEPS:,} steps")
        if self.steps % 64 == 0 and time.monotonic() > self.end:
            raise Exhausted(f"takes more than {MOST_SECONDS:g} seconds")

    def hold(self, length: int) -> None:
        """Raises Exhausted where a text or list of so many characters or entries is too long."""
        if length > self.length:
            raise Exhausted(f"makes a text or list of more than {self.length:,} characters")
        if time.monotonic() > self.end:
            raise Exhausted(f"takes more than {MOST_SECONDS:g} seconds")


_budget: contextvars.ContextVar[_Budget] = contextvars.ContextVar("budget")


def render(source: str, values: Mapping[str, Any]) -> str:
    """Renders a template.

    Args:
      source: the Jinja program.
      values: name -> what the template sees under it.

    Raises:
      Exhausted: it doesn't keep to its budget, or is longer than a template may be.
      InvalidTemplate: it is no valid Jinja.
      Exception: a template is a program, and can fail in any way.
    """
    template = _compile(source)
    length = _MOST_LENGTH + _TIMES_INPUT * _characters(values)
    token = _budget.set(_Budget(_MOST_STEPS + length // 16, time.monotonic() + MOST_SECONDS, length))
    try:
        return template.render(**values)
    except (MemoryError, RecursionError) as error:
        raise Exhausted(f"takes too much memory ({type(error).__name__})") from error
    finally:
        _budget.reset(token)


def _characters(value: Any) -> int:
    """Of all texts in a value of JSON's types."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(len(str(name)) + _characters(each) for name, each in value.items())
    return sum(map(_characters, value)) if isinstance(value, list | tuple) else 1


@functools.lru_cache(maxsize=16)
def _compile(source: str) -> jinja2.Template:
    if len(source) > _MOST_SOURCE:
        raise Exhausted(f"has {len(source):,} characters, more than {_MOST_SOURCE:,}")
    try:
        return _Environment().from_string(source)
    except jinja2.TemplateSyntaxError as e:
        raise InvalidTemplate(f"the chat template is no valid Jinja: line {e.lineno}: {e.message}. Mend it.") from e
    except (SyntaxError, RecursionError, MemoryError, ValueError, OverflowError) as e:
        raise InvalidTemplate(f"the chat template can't be compiled ({type(e).__name__}: {e!s:.200}). Mend it.") from e


class _Generation(jinja2.ext.Extension):
    """{% generation %}...{% endgeneration %}: writes its body, between marks."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Any) -> str:
        return f"{ANSWER}{caller()}{ANSWER_END}"


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Jinja's sandbox, in which loops, macros and whatever makes a text longer are charged to the budget."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols])
        for name in (
            "center",
            "indent",
            "wordwrap",
            "truncate",
            "batch",
            "slice",
            "round",
            "format",
            "replace",
            "join",
        ):
            self.filters[name] = _bounded(self.filters[name])
        self.filters |= {"tojson": _to_json, _STEP: _step, _HELD: _held, _TILDE: _tilde}
        self.globals["raise_exception"] = _raise
        self.globals["strftime_now"] = _NOW.strftime
        self.globals["dict"] = _dict
        del self.globals["lipsum"]

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        _charge(tree)
        return tree

    @staticmethod
    def concat(parts: Iterable[str]) -> str:
        """Joins what a template, macro or block has written."""
        return _joined("", list(parts))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        budget = _budget.get()
        if operator == "%" and isinstance(left, str):
            _check_format(left)
        elif operator in ("*", "**") and isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * (right if operator == "**" else 1) + right.bit_length()
            if bits > _MOST_DIGITS:
                raise Exhausted(f"makes a number of more than {_MOST_DIGITS:,} bits")
        elif operator in ("*", "+"):
            number, other = (left, right) if isinstance(left, int) else (right, left)
            budget.hold(number * _weight(other) if operator == "*" and isinstance(number, int) else 0)
            budget.hold(_weight(left) + _weight(right) if operator == "+" else 0)
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, called: Any, /, *args: Any, **kwargs: Any) -> Any:
        _budget.get().step()
        owner = getattr(called, "__self__", None)
        if isinstance(owner, str) and getattr(called, "__name__", "") in _GROWING:
            _check_growth(called.__name__, owner, args, kwargs)
        return super().call(context, called, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Any:
        """The sandbox's own `format` of a text, which is no method of it any more."""
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        def checked(*args: Any, **kwargs: Any) -> str:
            _check_growth("format", value.__self__, args, kwargs)
            return wrapped(*args, **kwargs)

        return functools.update_wrapper(checked, wrapped)


def _weight(value: Any) -> int:
    """Characters of a text; of a list or object those of all that is in it, and one for each place."""
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, Mapping):
        value = [each for pair in value.items() for each in pair]
    if not isinstance(value, list | tuple):
        return 1
    weight, most = len(value), _budget.get().length
    for each in value:
        weight += _weight(each) if isinstance(each, str | bytes | list | tuple | Mapping) else 0
        if weight > most:
            break
    return weight


@jinja2.pass_context
def _step(context: Any, value: None) -> None:
    """What each pass of a loop calls."""
    _budget.get().step()


@jinja2.pass_context
def _held(context: Any, value: Any) -> Any:
    """A list or object that a template writes out, once it is known not to be too large."""
    _budget.get().hold(_weight(value))
    return value


@jinja2.pass_context
def _tilde(context: Any, values: Sequence[Any]) -> str:
    """a ~ b ~ c."""
    return _joined("", [str(value) for value in values])


def _dict(*args: Any, **kwargs: Any) -> dict[str, Any]:
    return _held(None, dict(*args, **kwargs))


def _joined(between: str, parts: Sequence[str]) -> str:
    _budget.get().hold(sum(map(len, parts)) + len(between) * len(parts))
    return between.join(parts)


def _check_growth(name: str, text: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Raises Exhausted where a method of a text, or a filter, would make too long a one of it."""
    values = [*args, *kwargs.values()]
    sized = not name.startswith("format") or _NESTED.search(text)
    if sized and any(isinstance(value, int) and abs(value) > _MOST_NUMBER for value in values):
        raise Exhausted(f"{name}: is given a number of more than {_MOST_NUMBER:,}")
    if name in ("format", "format_map"):
        _check_format(text)
        _budget.get().hold(len(text) + sum(map(_weight, values)) * (1 + text.count("{")))
    texts = [value for value in values if isinstance(value, str)]
    if name == "replace" and len(texts) > 1:
        count = text.count(texts[0]) if texts[0] else len(text) + 1
        _budget.get().hold(len(text) + count * len(texts[1]))
    elif name == "join" and values and isinstance(values[0], list | tuple):
        _budget.get().hold(
            len(text) * len(values[0]) + sum(len(value) for value in values[0] if isinstance(value, str))
        )
    elif name in ("indent", "expandtabs", "wordwrap", "translate"):
        widths = [value if isinstance(value, int) else len(value) for value in values if isinstance(value, int | str)]
        _budget.get().hold(len(text) + (1 + len(re.findall(r"\s", text))) * max(widths, default=8))


def _check_format(text: str) -> None:
    if _WIDTH.search(text):
        raise Exhausted("formats a value to a width of five digits or one that isn't written")


def _bounded(function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter of Jinja that checks how much it would make."""

    @functools.wraps(function)  # keeps what Jinja notes on those that take the environment as well
    def bounded(*args: Any, **kwargs: Any) -> Any:
        passed = [value for value in args if not isinstance(value, jinja2.Environment | jinja2.nodes.EvalContext)]
        passed = passed[1:] if passed and isinstance(passed[0], jinja2.runtime.Context) else passed
        first, rest = (passed[0], passed[1:]) if passed else (None, [])
        name = function.__name__.removeprefix("do_")
        if name == "join":
            first, rest = (rest[0] if rest else kwargs.get("d", "")), [first]
        _check_growth(name, first if isinstance(first, str) else "", rest, kwargs)
        return function(*args, **kwargs)

    return bounded


def _charge(tree: nodes.Template) -> None:
    """Has each pass of a loop take a step, lists and objects that are written out be weighed, and `~` join by `_tilde`.

    Calls, of macros too, take a step in `_Environment.call`.
    """
    _rewrite(tree)
    for loop in tree.find_all(nodes.For):
        step = nodes.ExprStmt(_filter(nodes.Const(None), _STEP, loop.lineno))
        loop.body.insert(0, step.set_lineno(loop.lineno))
    tree.set_environment(tree.environment)


def _filter(node: nodes.Expr, name: str, line: int) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None).set_lineno(line)


def _rewrite(node: nodes.Node) -> None:
    for child in node.iter_child_nodes():
        _rewrite(child)
    for field, value in node.iter_fields():
        if isinstance(value, list):
            value[:] = [_charged(each) for each in value]
        elif isinstance(value, nodes.Node):
            setattr(node, field, _charged(value))


def _charged(node: Any) -> Any:
    if isinstance(node, nodes.Concat):
        return _filter(nodes.List(list(node.nodes)).set_lineno(node.lineno), _TILDE, node.lineno)
    if isinstance(node, nodes.List | nodes.Dict) or (isinstance(node, nodes.Tuple) and node.ctx == "load"):
        return _filter(node, _HELD, node.lineno) if next(node.iter_child_nodes(), None) is not None else node
    return node


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Jinja's own escapes what HTML would read; marks stay what they are."""
    if isinstance(indent, int) and indent > 100:
        raise Exhausted("tojson: is given an indent of more than 100")
    _budget.get().hold(_weight(x))
    text = json.dumps(x, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys)
    return _NOT_ASCII.sub(lambda character: json.dumps(character[0])[1:-1], text) if ensure_ascii else text
