"""The card on top of a run's report: what was trained, on what, for how long, and what came of it."""

import os
from collections.abc import Mapping

from research.run import summary
from research.run.console import duration, size
from research.studies import sections
from research.studies.history import Run, differing
from research.studies.pages import escape

_MEASURES = 3  # of its courses
_SHOWN = 40  # fields that differ from the defaults; more are folded


def card(run: Run) -> str:
    """The card as HTML. What a run doesn't tell is left out."""
    facts = {
        "model": _model(run),
        "learns by": _objective(run),
        "data": _data(run),
        "length": _length(run),
        "time": _time(run),
        "hardware": _hardware(run),
    }
    body = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(text)}</dd></div>" for name, text in facts.items() if text)
    measure = course(run)
    others = [m for m in sections.measures([run], _MEASURES) if m.startswith("eval/") and measure and m != measure.name]
    courses = [each for each in (measure, *(summary.course(run.records, m, "max") for m in others)) if each]
    top = "".join(
        f'<div><dt>{escape(each.name)}</dt><dd class="course">{escape(_arrow(each))}</dd></div>' for each in courses
    )
    return f'<dl class="card">{top}{body}</dl>{_differing(run)}'


def course(run: Run) -> summary.Course | None:
    """How the measure of a run went."""
    checkpoint = run.settings.get("checkpoint", {})
    return summary.course(run.records, checkpoint.get("best_metric", ""), checkpoint.get("best_mode", "min"))


def tokens(run: Run) -> float:
    """How many tokens a run read."""
    return summary.tokens(run.records, 0)


def _arrow(measure: summary.Course) -> str:
    return str(measure).removeprefix(measure.name).strip().replace("->", "→")


def _model(run: Run) -> str:
    model, parts = run.settings.get("model", {}), []
    if not model:
        return ""
    whole, trained = run.last("startup/parameters"), run.last("startup/trained_parameters")
    if trained == trained:
        parts.append(f"{size(trained)} parameters trained")
    if whole == whole:
        parts = [f"{size(whole)} parameters", *(parts if trained != whole else ["all trained"])]
    parts.append(f"{model.get('num_layers')} layers of {model.get('d_model')}")
    if run.settings.get("adapter"):
        parts.append(f"adapter {run.settings['adapter'].get('kind', '')}".strip())
    if model.get("init_from"):
        parts.append(f"from {os.path.basename(os.path.normpath(str(model['init_from'])))}")
    return ", ".join(parts)


def _objective(run: Run) -> str:
    terms = run.settings.get("objective", {}).get("terms", {})
    names = [name if value == 1 or isinstance(value, Mapping) else f"{name} x {value}" for name, value in terms.items()]
    rewards = run.settings.get("rewards", {})
    return ", ".join(names) + (f"; rewards {', '.join(rewards)}" if rewards else "")


def _data(run: Run) -> str:
    data = run.settings.get("data", {})
    named = data.get("path", "").replace(",", ", ") or ", ".join(data.get("sources", {}))
    counts = [each["examples"] for each in run.data.get("lengths", ())]
    return named + (f": {sum(counts):,} examples" if counts else "")


def _length(run: Run) -> str:
    settings, parts = run.settings, [f"{run.last_step:,} steps"]
    if "batch_size" in settings:
        parts[0] += f" of {settings['batch_size']} x {settings['seq_len']:,}"
        if run.last_step < settings["steps"]:
            parts[0] += f", of {settings['steps']:,}"
    if count := tokens(run):
        parts.append(f"{size(count)} tokens")
    if "train/epoch" in run.series:
        parts.append(f"{run.last('train/epoch'):.3g} epochs")
    return ", ".join(parts)


def _time(run: Run) -> str:
    parts = [duration(run.seconds)] if run.seconds >= 1 else []
    if "startup/seconds_to_first_step" in run.series:
        parts.append(f"{run.last('startup/seconds_to_first_step'):.0f} s to the first step")
    if "train/tokens_per_second" in run.series:
        values = run.series["train/tokens_per_second"][1]
        parts.append(f"{size(sorted(values)[len(values) // 2])} tokens/s")
    if run.resumes:
        parts.append(f"went on {len(run.resumes)} times, at step {', '.join(map(str, run.resumes))}")
    return ", ".join(parts)


def _hardware(run: Run) -> str:
    about = run.about
    if "devices.kind" not in about:
        return ""
    mesh = [f"{k.rpartition('.')[2]} {v}" for k, v in about.items() if k.startswith("devices.mesh.") and v != "1"]
    packages = [f"{name} {about[f'versions.{name}']}" for name in ("jax",) if f"versions.{name}" in about]
    return ", ".join([f"{about.get('devices.count')} x {about['devices.kind']}", *mesh, *packages])


def _differing(run: Run) -> str:
    """A list of what differs from the defaults."""
    rows = [[field, value, default] for field, (value, default) in differing(run.settings).items()]
    if not rows:
        return ""
    items = "".join(
        f"<li>{escape(field)} <b>{escape(value)}</b>" + (f" <i>{escape(default)}</i>" if default else "") + "</li>"
        for field, value, default in rows
    )
    unfolded = " open" if len(rows) <= _SHOWN else ""
    title = f"{len(rows)} fields of the config differ from the defaults, which stand behind them"
    return f'<details{unfolded}><summary>{title}</summary><ul class="fields">{items}</ul></details>'
