"""The model card of what is given away: data, settings, metrics, and the licence of the model that a run began with.

It says nothing of where things lie on this machine: of a path the last part alone.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from research import config as config_lib
from research.errors import InputError
from research.files import read_json
from research.pretrained import checkpoints
from research.pretrained import load as pretrained

FILE = "README.md"
_UNSAID = ("log.", "checkpoint.", "stall_seconds", "compilation_cache", "data.cache_dir", "plan.")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(@[\w.-]+)?")


class Origin(NamedTuple):
    """Where a model comes from.

    Attributes:
      base: the model that its runs began with, "" for none.
      license: of that model, as the front matter of its README.md says it; "" where it doesn't.
    """

    base: str
    license: str


def trace(name: str) -> Origin:
    """Where a model comes from: through the runs that went before, to a model that isn't one of ours.

    Args:
      name: see names.find.

    Raises:
      InputError: a model on the way is gone.
    """
    seen = set()
    while checkpoints.steps(os.path.expanduser(name)) and name not in seen:
        seen.add(name)
        name = _record(name)["config"]["model"].get("init_from", "")
        if not name:
            return Origin("", "")
    place = pretrained.find(name)
    readme = place / FILE if place.is_dir() else place.with_name(FILE)
    return Origin(name, _front_matter(readme).get("license", ""))


def write(model: str, title: str, origin: Origin, *, license: str = "", peft: bool = False) -> str:
    """The card, in Markdown with a front matter that the hub reads.

    Args:
      model: a run's workdir, or another model.
      title: what it is called on the hub.
      origin: see `trace`.
      license: in the place of the base's.
      peft: what is given away is an adapter alone.
    """
    run = _record(model) if checkpoints.steps(os.path.expanduser(model)) else {}
    values = run.get("config", {})
    terms = list(values.get("objective", {}).get("terms", {}))
    base = _public(origin.base)
    front = {
        "license": license or origin.license,
        "base_model": origin.base if _HUB_NAME.fullmatch(origin.base) and not Path(origin.base).exists() else "",
        "library_name": "peft" if peft else "transformers",
        "tags": ["understudy", *terms],
    }
    parts = [
        "---\n" + "".join(f"{name}: {json.dumps(value)}\n" for name, value in front.items() if value) + "---",
        f"# {title.rpartition('/')[2]}",
        _summary(base, terms, peft),
        *(_of_run(model, run) if run else ()),
    ]
    said = license or origin.license
    if base:
        parts.append(
            f"## Licence\n\n`{said}`" + (f", that of {base}." if said == origin.license else f"; from {base}.")
        )
    return "\n\n".join(parts) + "\n"


def _summary(base: str, terms: list[str], peft: bool) -> str:
    kind = "An adapter (PEFT)" if peft else "A model"
    came = f" that began with {base}" if base else " that was trained from the beginning" if terms else ""
    how = f", trained with {', '.join(terms)}" if terms else ""
    return f"{kind}{came}{how}. Written by Understudy."


def _of_run(model: str, run: Mapping[str, Any]) -> Iterator[str]:
    """Sections on data, settings and metrics."""
    values = run["config"]
    data = values["data"]
    sources = data.get("sources") or {"data": {"path": data.get("path", "")}}
    rows = [f"| {name} | `{_public(str(source.get('path', '')))}` |" for name, source in sources.items()]
    seen = values["steps"] * values["batch_size"] * values["seq_len"]
    size = f"{values['steps']:,} steps of {values['batch_size']} rows of {values['seq_len']} tokens"
    yield "## Data\n\n| Source | |\n|---|---|\n" + "\n".join(rows) + f"\n\n{size}: at most {seen:,} tokens."
    changed = [f"{name}: {_public(value)}" for name, value in _changed(values)]
    version = run.get("versions", {}).get("understudy", "")
    text = "\n".join(changed) or "none"
    yield f"## Settings\n\nWhat differs from the defaults of Understudy {version}:\n\n```text\n{text}\n```"
    if metrics := _evaluations(Path(model).expanduser() / "metrics.jsonl"):
        (first, before), (last, after) = metrics
        lines = [f"| {name} | {before.get(name, float('nan')):.4g} | {value:.4g} |" for name, value in after.items()]
        head = f"| On held-out data | step {first:,} | step {last:,} |\n|---|---|---|\n"
        yield "## Metrics\n\n" + head + "\n".join(lines)


def _changed(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The fields that differ from their defaults, those apart that say nothing of the model."""
    usual = dict(_leaves(json.loads(json.dumps(config_lib.defaults()))))
    for name, value in _leaves(values):
        if usual.get(name) != value and not name.startswith(_UNSAID):
            yield name, value


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _evaluations(path: Path) -> list[tuple[int, dict[str, float]]]:
    """The first and the last evaluation: step, and metrics by name."""
    found: list[tuple[int, dict[str, float]]] = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            record = json.loads(line)
        except ValueError:
            continue  # a kill tore it
        named = {k.removeprefix("eval/"): v for k, v in record.items() if k.startswith("eval/")}
        named = {name: value for name, value in named.items() if isinstance(value, int | float)}
        if named:
            found.append((int(record.get("step", 0)), named))
    return [found[0], found[-1]] if found else []


def _public(value: Any) -> Any:
    """A value without the folders of this machine: of each path in it, the last part."""
    if isinstance(value, list):
        return [_public(each) for each in value]
    if not isinstance(value, str) or "/" not in value:
        return value
    parts = []
    for part in value.split(","):
        kind, colon, path = part.rpartition(":")
        local = path.startswith(("/", "~", ".")) or Path(path).suffix or Path(path).exists() or path.count("/") > 1
        hub = kind == "hf" or (_HUB_NAME.fullmatch(path) and not Path(path).exists() and not path.startswith("."))
        parts.append(part if hub or not local else f"{kind}{colon}{os.path.basename(path.rstrip('/'))}")
    return ",".join(parts)


def _front_matter(readme: Path) -> dict[str, str]:
    """The fields with a value on their line of a card's front matter; of a license called other, its name or link."""
    text = readme.read_text(encoding="utf-8", errors="replace") if readme.is_file() else ""
    block = re.match(r"---\s*\n(.*?)\n---", text, re.S)
    fields = dict(re.findall(r"^(\w+):[ \t]*['\"]?([^'\"\n]+?)['\"]?[ \t]*$", block[1], re.M)) if block else {}
    if fields.get("license") == "other":
        fields["license"] = fields.get("license_name") or fields.get("license_link") or "other"
    return fields


def _record(workdir: str) -> dict[str, Any]:
    path = Path(workdir).expanduser() / "config.json"
    if not path.is_file():
        raise InputError(f"{workdir}: lacks config.json, which a run writes beside its checkpoints.")
    return read_json(path)
