"""Whether a text answers a record: by the verifier of what generated the record, or by being its response."""

from collections.abc import Mapping
from typing import Any

from research.sources import preferences, reasoning, tasks


def verify_record(record: Mapping[str, Any], completion: str) -> bool:
    """Whether `completion` answers `record`: by the verifier of its task, or by being its response, white space aside,
    where it has no task of ours.

    Raises:
      InputError: the record is of reasoning-gym, and can't be judged (see reasoning.verify).
    """
    name = str(record.get("task"))
    if name.startswith(reasoning.PREFIX):
        return reasoning.verify(name, record.get("entry"), completion)
    if name.startswith(preferences.PREFIX):
        return preferences.verify(record, completion)
    if name.partition("/")[0] in tasks.TASKS:
        return tasks.verify(name, record["prompt"], record["response"], completion)
    return completion.strip() == record["response"].strip()


def utility(record: Mapping[str, Any], completion: str) -> float | None:
    """How good `completion` is as an answer to `record`, where that has a planted utility; None where it has none."""
    return preferences.utility(record, completion) if str(record.get("task")).startswith(preferences.PREFIX) else None
