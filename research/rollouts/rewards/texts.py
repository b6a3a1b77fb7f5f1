"""What rewards read of a sample: the right answer of its record, and the part of what the model wrote that counts."""

from collections.abc import Mapping
from typing import Any

from research.errors import InputError
from research.rollouts.rewards.types import Sample
from research.sources import reasoning


def response(record: Mapping[str, Any]) -> str | None:
    """The right answer that a record has: its `response` or `answer`, or the last turn of its conversation, where that
    is the assistant's; None where it has none."""
    for name in ("response", "answer"):
        if name in record:
            return str(record[name])
    turns = record.get("messages") or [{}]
    return turns[-1].get("content") if turns[-1].get("role") == "assistant" else None


def between(text: str, tag: str) -> str | None:
    """What stands in the last <tag>...</tag> of a text, white space around it aside; the whole text where `tag` is "".
    None where there is no such place."""
    if not tag:
        return text.strip()
    before, close, _ = text.rpartition(f"</{tag}>")
    _, begin, inside = before.rpartition(f"<{tag}>")
    return inside.strip() if close and begin else None


def check_tag(name: str, tag: str) -> None:
    """Raises InputError where an option isn't the name of a tag."""
    if tag and not tag.isidentifier():
        raise InputError(f"{name} = {tag!r}: is the name of a tag, such as 'answer' for <answer>...</answer>.")


def refuse_evaluated(sample: Sample) -> None:
    """Raises InputError where the scorer of a record's task would run the answer as code."""
    task = str(sample.record.get("task"))
    if reasoning.evaluates(task):
        raise InputError(
            f"rewards: the scorer of {task!r} runs answers as Python code, and a reward runs none. Use another "
            "dataset, or compare with the stored answer: {'reward': 'exact_match', 'verifier': 'exact'}."
        )
