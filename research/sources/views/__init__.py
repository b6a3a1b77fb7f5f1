"""Views: how the documents of a source are seen. Each module here that has a `make` function is one, and any that
Python can import by its name, such as mine.py in the folder that a command is given in. Nothing is registered.

A view turns the tokens of a document into those that a row holds: the first hundred, the same in reverse, a middle
moved to the end. It does so once, when the tokens are prepared. So packing is planned by the lengths that it gives, a
run that resumes sees the same, and the tokens are kept in the cache under the view's options and code.
"""

import inspect
import re
import sys
from collections.abc import Callable, Collection, Mapping
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from research import options as option_types
from research.errors import InputError, did_you_mean
from research.sources import fields, special_tokens, stand_in


class Document(NamedTuple):
    """A document, whole or as a view shows it.

    Attributes:
      tokens: [n] int32, with those that begin and end it.
      mask: [n] bool, True where a token is to be predicted; in plain text everywhere.
      fields: further batch fields: name -> [n, ...], a value for each token.
    """

    tokens: np.ndarray
    mask: np.ndarray
    fields: Mapping[str, np.ndarray] = {}


class View(NamedTuple):
    """How documents are seen.

    Attributes:
      documents: (document, rng) -> the documents that it is seen as: one, several, or none. It depends on its arguments
        alone; `rng` draws the same for equal documents and equal prompts.
      fields: names of the further batch fields that each of them has; rows of sources.fields.TABLE, along "time".
    """

    documents: Callable[[Document, np.random.Generator], list[Document]]
    fields: tuple[str, ...] = ()


_OF_SOURCES = ("text", "labels", "annotations", "parallel", "source")  # groups of fields that sources give themselves


def load(view: Mapping[str, Any], field: str, seq_len: int, tokenizer: Any = None) -> View:
    """The view that a config names.

    Args:
      view: {"kind": NAME, option: value, ...}: research/sources/views/NAME.py, and the options of its `make`. A `make`
        with a parameter `seq_len` or `tokenizer` is given the run's.
      field: where the config says it, for errors.
      seq_len: T.
      tokenizer: a sources.tokenizers.Tokenizer; None where it isn't known yet, and options are only to be checked. A
        `make` whose parameter has no default is then given a stand-in.

    Raises:
      InputError: there is no such view or option, or a value can't be used.
    """
    module = find(view, field)
    parameters = inspect.signature(module.make).parameters
    of_run = {"seq_len": seq_len, "tokenizer": tokenizer}
    options = {option: value for option, value in view.items() if option != "kind"}
    allowed = [name for name in parameters if name not in of_run]
    for option in options:
        if option not in allowed:
            raise InputError(f"{field}.{option}: no such option.{did_you_mean(option, [*allowed, 'kind'])}")
    for name, parameter in parameters.items():
        if name in allowed and parameter.default is parameter.empty and name not in options:
            raise InputError(f"{field}.{name}: is missing. The view {view['kind']!r} needs it.")
    option_types.check(module.make, options, {option: f"{field}.{option}" for option in options})
    try:
        if tokenizer is None and "tokenizer" in parameters:
            of_run["tokenizer"] = stand_in.tokenizer(module, options, {"seq_len": seq_len})
        result = module.make(**options, **{name: value for name, value in of_run.items() if name in parameters})
    except InputError as error:
        raise _named(field, allowed, error) from error
    for name in result.fields:
        row = fields.find(name)
        if row.group in _OF_SOURCES or row.axes[:1] != ("time",):
            raise InputError(f"{field}.kind = {view['kind']!r}: a view can't give the batch field {name!r}.")
    return result


def needed_tokens(view: Mapping[str, Any], field: str, seq_len: int, tokenizer: Any) -> tuple[str, ...]:
    """The names of the special tokens that a view needs, which the tokenizer may lack.

    A view whose documents hold special tokens has a function special_tokens(tokenizer, **options) beside its `make`; a
    run adds what its tokenizer lacks of them before there are tokens.

    Args and errors: see `load`.
    """
    options = {option: value for option, value in view.items() if option != "kind"}
    try:
        return special_tokens.needed_by(find(view, field), tokenizer, options, {"seq_len": seq_len})
    except InputError as error:
        raise _named(field, options, error) from error


def noted_tokens(view: Mapping[str, Any], field: str, tokenizer: Any) -> dict[str, str]:
    """What a view wants a tokenizer_config.json to say: field -> token. Its module may have a function
    noted_tokens(tokenizer, **options) for it, beside `make`. Args: see `load`."""
    function = getattr(find(view, field), "noted_tokens", None)
    options = {option: value for option, value in view.items() if option != "kind"}
    return {} if function is None else function(tokenizer, **options)


def infilling_note(view: Mapping[str, Any], field: str, tokenizer: Any) -> dict[str, Any]:
    """How a model learns to fill in under a view (infilling.make_note), {} where it doesn't. The view's module may have
    a function infilling_note(tokenizer, **options) for it, beside `make`. Args: see `load`."""
    function = getattr(find(view, field), "infilling_note", None)
    options = {option: value for option, value in view.items() if option != "kind"}
    return {} if function is None else function(tokenizer, **options)


def _named(field: str, options: Collection[str], error: InputError) -> InputError:
    """The error of a view, with the config's field before it; it may begin with the name of one of the options."""
    first = re.match(r"\w+", str(error))
    return InputError(f"{field}{'.' if first and first[0] in options else ': '}{error}")


def find(view: Mapping[str, Any], field: str) -> ModuleType:
    """The module of a view that a config names. Raises InputError where there is none."""
    kind = view.get("kind")
    if not isinstance(kind, str):
        raise InputError(f'{field}.kind = {kind!r}: names no view. For example {{"kind": "truncate", "tokens": 100}}.')
    module = option_types.module(sys.modules[__name__], kind, f"{field}.kind = {kind!r}")
    if not hasattr(module, "make"):
        raise InputError(f"{field}.kind = {kind!r}: {module.__file__} has no function make(**options) -> View.")
    return module
