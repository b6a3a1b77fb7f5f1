"""Fields of an experiment's config by their dotted names: those that a command line adds, and hints for others."""

import ast
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from research import other_names
from research.errors import MAPPINGS, InputError

# Mappings of which an entry may be a number, its weight: an option then joins it. The names of their entries are free.
_WEIGHED = ("objective.terms", "rewards")


def dotted(values: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The dotted names of all fields of a config; those of a section follow the section's own."""
    names = []
    for name, value in values.items():
        names.append(f"{prefix}{name}")
        if hasattr(value, "items"):
            names += dotted(value, f"{prefix}{name}.")
    return names


def hint(field: str, own: Any = None) -> str:
    """What a field that isn't there may have meant; a sentence that begins with a space, or "".

    Args:
      field: its dotted name, as given.
      own: the config of the experiment, which may have sections of its own, such as `study`.
    """
    from research import config  # late: only errors need it, and it imports jax

    known = [*dotted(config.defaults()), *(dotted(own) if hasattr(own, "items") else ())]
    return other_names.hint(field, dict.fromkeys(known))


def is_new(config: Any, field: str) -> bool:
    """Whether a dotted name isn't in the config, and could be: it lies in a mapping whose names are free."""
    if mapping_of(field) is None:
        return False
    node = config
    for part in field.split("."):
        if not hasattr(node, "items") or part not in node:
            return True
        node = node[part]
    return False


def mapping_of(field: str) -> str | None:
    """The mapping of free names that a dotted name lies in; None for other fields."""
    above = [field[:i] for i, letter in enumerate(field) if letter == "."]
    return next((name for name in reversed(above) if name in MAPPINGS), None)


def add(config: ConfigDict, field: str, text: str) -> Any:
    """Sets a field that `is_new`, in place; returns its value.

    A term or reward that was a number becomes a mapping with this weight: {"sft": 1.0} and objective.terms.sft.z_loss
    are {"sft": {"weight": 1.0, "z_loss": ...}}.

    Raises:
      InputError: what lies above it is one value and not a mapping.
    """
    value, node, above = read(text), config, ""
    *sections, last = field.split(".")
    with config.unlocked(), config.ignore_type():
        for part in sections:
            path = above = f"{above}.{part}".removeprefix(".")
            if part not in node:
                node[part] = ConfigDict()
            elif not hasattr(node[part], "items"):
                if path.rpartition(".")[0] not in _WEIGHED:
                    raise InputError(f"--config.{field}={text}: {path} = {node[part]!r} is no mapping.")
                node[part] = ConfigDict({"weight": node[part]})
            node = node[part]
        node[last] = value
    return value


def read(text: str) -> Any:
    """A value as Python writes it, else the text itself."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text
    return ConfigDict(value) if isinstance(value, dict) else value
