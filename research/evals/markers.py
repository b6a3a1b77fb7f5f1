"""A word to the user about records whose texts seem to be rendered already."""

import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from research.errors import printable
from research.sources.formats import count_markers, describe_markers
from research.sources.tokenizers import Tokenizer

_FIELDS = ("text", "prompt", "response", "question", "content", "prefix", "suffix", "middle")


def texts_of(record: str | Mapping[str, Any]) -> Iterator[str]:
    """The texts of a prompt or a record that are put to a model, those of its messages too."""
    if isinstance(record, str):
        yield record
        return
    yield from (record[name] for name in _FIELDS if isinstance(record.get(name), str))
    messages = record.get("messages")
    for message in messages if isinstance(messages, list) else ():
        if isinstance(message, Mapping):
            yield from texts_of(message)


def say_markers(where: str, records: Iterable[str | Mapping[str, Any]], tokenizer: Tokenizer | None) -> None:
    """Prints a line to stderr where records spell special tokens of the tokenizer; `where` says which records."""
    if tokenizer is None:
        return
    records = list(records)
    count, example = count_markers(map(texts_of, records), tokenizer)
    if count:
        print(printable(f"{where}: {describe_markers(count, len(records), example)}"), file=sys.stderr)


def source_lines(report: Mapping[str, Any]) -> list[str]:
    """Lines for each source of a data report (dataset.Data.report) of which records spell special tokens, or have a
    weight."""
    lines = []
    for source in report["sources"]:
        if source["markers"]:
            marked = describe_markers(source["markers"], source["records"], source["marker"])
            lines.append(f"{source['name']}: {marked}")
        if source["weights"]:
            lines.append(
                f"{source['name']}: {source['weights']:,} of {source['records']:,} records have a column 'weight', "
                "which isn't used: all count the same. Sources have weights (data.sources), and an assistant's message "
                "may have one of 0 or 1."
            )
    return lines
