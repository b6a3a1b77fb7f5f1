"""What a run wrote at its evaluations, as conversations: each prompt once, the first answer beside the last."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from research.studies import pages
from research.studies.history import Run
from research.studies.pages import escape

_SHOWN = 40  # prompts
_STEPS = 10  # steps of samples that are plain texts
_SPECIAL = re.compile(r"(<\|[^<>|]*\|>|</?[a-z_]{1,20}>)")  # as tokenizers write them
_FILTERS = {
    "all": "all",
    "right": "right at the end",
    "wrong": "wrong at the end",
    "learned": "wrong at first, right at the end",
    "lost": "right at first, wrong at the end",
}


def section(run: Run, named: bool) -> str:
    """The section as HTML; "" where the run wrote nothing.

    Args:
      run: of the report.
      named: whether the report shows several runs.
    """
    if not run.samples:
        return ""
    title = pages.heading("Samples", run.name if named else "")
    talks, plain = [], []
    for sample in run.samples:
        (talks if "answers" in sample else plain).append(sample)
    return "\n".join([title, *_conversations(talks), *_texts(plain)])


def _conversations(samples: Sequence[Mapping[str, Any]]) -> list[str]:
    """Each prompt with its first and its last answers."""
    by_prompt: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for sample in samples:
        by_prompt.setdefault((sample["name"], sample["prompt"]), []).append(sample)
    if not by_prompt:
        return []
    judged = any(answer.get("right") is not None for sample in samples for answer in sample["answers"])
    radios = "".join(
        f'<label><input type="radio" name="samples" value="{kind}"{" checked" if kind == "all" else ""}> {text}</label>'
        for kind, text in _FILTERS.items()
    )
    newest = sorted(by_prompt.items(), key=lambda item: -item[1][-1]["step"])[:_SHOWN]
    cards = [_card(name, prompt, own) for (name, prompt), own in newest]
    left = f"<p>{len(by_prompt) - _SHOWN:,} more prompts are in samples.jsonl.</p>" if len(by_prompt) > _SHOWN else ""
    return [
        f'<div class="filters">{radios if judged else ""}</div>',
        f'<div class="samples">{"".join(cards)}</div>',
        left,
    ]


def _card(name: str, prompt: str, samples: Sequence[Mapping[str, Any]]) -> str:
    first, last = samples[0], samples[-1]
    columns = [_column(each) for each in ([first] if first is last else [first, last])]
    expected = f'<p class="name">expected {escape(repr(last["expected"]))}</p>' if last.get("expected") else ""
    between = ""
    if len(samples) > 2:
        inner = "".join(_column(each) for each in samples[1:-1])
        between = f'<details><summary>between</summary><div class="answers">{inner}</div></details>'
    return (
        f'<div class="sample" data-kinds="{_kinds(first, last)}"><p class="name">{escape(name)}</p>'
        f'<div class="turn">{_text(prompt)}</div><div class="answers">{"".join(columns)}</div>{expected}{between}</div>'
    )


def _kinds(first: Mapping[str, Any], last: Mapping[str, Any]) -> str:
    begun, ended = (any(answer.get("right") for answer in each["answers"]) for each in (first, last))
    kinds = ["right" if ended else "wrong"]
    kinds += ["learned"] * (ended and not begun) + ["lost"] * (begun and not ended)
    return " ".join(kinds)


def _column(sample: Mapping[str, Any]) -> str:
    """The answers of a step."""
    parts = []
    for answer in sample["answers"]:
        right, about = answer.get("right"), []
        verdict = "" if right is None else "right" if right else "wrong"
        about += [f"<b>{verdict}</b>"] if verdict else []
        about += [f"reward {answer['reward']:.3g}"] if answer.get("reward") is not None else []
        head = ", ".join([f"step {sample['step']}", *about])
        parts.append(
            f'<div class="{verdict}"><p class="name">{head}</p><div class="turn">{_text(answer["text"])}</div></div>'
        )
    return f"<div>{''.join(parts)}</div>"


def _text(text: str) -> str:
    """A text with its special tokens pale; "(nothing)" for an empty one."""
    pieces = [
        f'<span class="read special">{escape(piece)}</span>' if number % 2 else escape(piece)
        for number, piece in enumerate(_SPECIAL.split(text))
    ]
    return "".join(pieces) if text else '<span class="read">(nothing)</span>'


def _texts(samples: Sequence[Mapping[str, Any]]) -> list[str]:
    """Samples that are plain texts, the newest step first and unfolded."""
    by_step: dict[int, list[str]] = {}
    for sample in samples:
        block = f'<p class="name">{escape(sample["name"])}</p><pre>{escape(sample["text"])}</pre>'
        by_step.setdefault(sample["step"], []).append(block)
    steps, parts = sorted(by_step, reverse=True), []
    for step in steps[:_STEPS]:
        unfolded = " open" if step == steps[0] else ""
        parts.append(f"<details{unfolded}><summary>step {step}</summary>{''.join(by_step[step])}</details>")
    if len(steps) > _STEPS:
        parts.append(f"<p>Those of {len(steps) - _STEPS} earlier steps are in samples.jsonl.</p>")
    return parts
