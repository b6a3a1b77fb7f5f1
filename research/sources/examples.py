"""Examples: records that were checked."""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from research.errors import InputError
from research.sources import comparisons, formats, records
from research.sources.comparisons import Comparison
from research.sources.entries import Origin
from research.sources.records import CONFIG_SETTINGS, NUMBERED, BadRecord, Classes, Raw, Turn, speaker


class Example(NamedTuple):
    """A checked record."""

    record: dict[str, Any]  # under the fields' own names
    turns: list[Turn]  # of several answers, with the best
    key: int  # equal for equal documents and equal prompts
    where: str  # file and line, or the like
    label: int | list[float] | None = None
    comparison: Comparison | None = None

    @property
    def documents(self) -> list[list[Turn]]:
        """The turns of each document that it is: one, or as many as it has answers."""
        if self.comparison is None:
            return [self.turns]
        return [[*self.comparison.prompt, *answer] for answer in self.comparison.answers]


def read_examples(
    origin: Origin,
    format: str,
    fields: Mapping[str, str],
    on_bad_record: str,
    counts: Counter[str],
    classes: Classes = NUMBERED,
) -> Iterator[Example]:
    """Yields the checked records of `origin`; counts "records", "duplicates" and the bad ones by reason.

    Raises:
      InputError: a record is bad and `on_bad_record` is "error"; or no record is good.
    """
    how = Reading(format, fields, on_bad_record, classes)
    seen: set[int] = set()
    any_good = False
    for where, raw in origin.read():
        found, how = of_record(where, raw, how, counts)
        any_good = any_good or bool(found)
        if found and origin.generated:
            if found[0].key in seen:
                counts["duplicates"] += 1
                continue
            seen.add(found[0].key)
        yield from found
    if not any_good:
        raise none_usable(origin.name, counts)


class Reading(NamedTuple):
    """How records are read.

    Attributes:
      format: theirs; "auto" is found by the first of them.
      fields: field -> the column that holds it.
      on_bad_record: "error", or "skip".
      classes: of those of the format "labelled".
    """

    format: str
    fields: Mapping[str, str]
    on_bad_record: str
    classes: Classes


def of_record(where: str, raw: Raw, how: Reading, counts: Counter[str]) -> tuple[list[Example], Reading]:
    """The examples that a record is, none where it is bad and skipped; and how those after it are read.

    Args:
      where: it comes from: file and line, or the like.
      raw: the record.
      how: it is read.
      counts: counts "records", and the bad ones by reason.

    Raises:
      BadRecord: it is bad, and how.on_bad_record is "error".
    """
    counts["records"] += 1
    try:
        record = records.parse(raw)
        if how.format == "auto":
            how = how._replace(
                format=comparisons.detect(record, how.fields) or records.detect_format(record, how.fields)
            )
        checked = _checked(record, how.format, how.fields, how.classes)
    except BadRecord as e:
        if how.on_bad_record == "error":
            raise e.at(where, **CONFIG_SETTINGS) from e
        counts[f"bad: {e.reason}"] += 1
        return [], how
    key = formats.split_key(checked[0].turns)
    return [example._replace(key=key, where=where) for example in checked], how


def _checked(record: dict[str, Any], format: str, fields: Mapping[str, str], classes: Classes) -> list[Example]:
    """The examples that a record is, without their keys and places. Raises BadRecord."""
    if format in comparisons.FORMATS:
        return [
            Example(_asked(record, fields, each), [*each.prompt, *each.answers[0]], 0, "", comparison=each)
            for each in comparisons.read_all(record, format, fields)
        ]
    turns, label = records.check(record, format, fields), None
    if format == "labelled":
        if classes.known:
            label = records.label(record, fields, classes.names)
        turns = [turn._replace(text=classes.prompt.replace("{text}", turn.text)) for turn in turns]
    return [Example(records.canonical(record, fields), turns, 0, "", label)]


def _asked(record: Mapping[str, Any], fields: Mapping[str, str], comparison: Comparison) -> dict[str, Any]:
    """A record of answers as one of a prompt and its best answer, for evaluations that generate."""
    turns = [*comparison.prompt, *comparison.answers[0]]
    turns = turns[1:] if turns[0].role == records.TOOLS else turns
    rest = records.canonical(record, fields)
    if [(speaker(turn.role), turn.more) for turn in turns] == [("user", {}), ("assistant", {})]:
        rest = {name: value for name, value in rest.items() if name != "messages"}
        return {**rest, "prompt": turns[0].text, "response": turns[1].text}
    messages = [{"role": speaker(turn.role), "content": turn.text, **turn.more} for turn in turns]
    return {**rest, "messages": messages}


def none_usable(name: str, counts: Counter[str]) -> InputError:
    bad = ", ".join(f"{n} {reason}" for reason, n in counts.items() if reason.startswith("bad: "))
    return InputError(f"{name!r} holds no usable record ({bad or 'it is empty'}). Give another.")
