"""Whether a text answers a record: by the verifier of what generated the record, or by its response."""

import decimal
import re
from collections.abc import Callable, Mapping
from typing import Any

from research.sources import preferences, reasoning, tasks

Record = Mapping[str, Any]

# Digits with or without commas between thousands, a fraction, an exponent; a sign, but not the minus of 7-3.
_NUMBER = re.compile(r"(?:(?<![\w)])[-+−])?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:[eE][-+]?\d{1,3}(?!\w))?")


def verify_record(record: Record, completion: str) -> bool:
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
    return _same_text(record, completion)


def utility(record: Record, completion: str) -> float | None:
    """How good `completion` is as an answer to `record`, where that has a planted utility; None where it has none."""
    return preferences.utility(record, completion) if str(record.get("task")).startswith(preferences.PREFIX) else None


def last_number(text: str) -> decimal.Decimal | None:
    """The last number in `text`, or None. "It is 1,234.50." has 1234.5, "x = -2" has -2 and "7-3" has 3."""
    numbers = _NUMBER.findall(text)
    return decimal.Decimal(numbers[-1].replace(",", "").replace("−", "-")) if numbers else None


def _same_number(record: Record, completion: str) -> bool:
    number = last_number(completion)
    return number is not None and number == last_number(record["response"])


def _same_text(record: Record, completion: str) -> bool:
    return completion.strip() == record["response"].strip()


def _contains(record: Record, completion: str) -> bool:
    return record["response"].strip().casefold() in completion.casefold()


# (record, completion) -> is it right?
VERIFIERS: dict[str, Callable[[Record, str], bool]] = {
    "task": verify_record,  # that of the record's task, where it has one; else as "exact"
    "exact": _same_text,  # the response, white space around it aside
    "number": _same_number,  # the last number of the completion is the last of the response
    "contains": _contains,  # the response is somewhere in the completion, in whatever case
}
