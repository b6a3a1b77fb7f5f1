"""Completions that are worth learning from, as records of prompts and answers."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from research import files
from research.errors import InputError, located
from research.sources import entries, records, verification

_ADDED = ("completion", "tokens", "logprob")  # what `understudy generate` adds to a record


def select(data: str, output: Path, *, ended: int = 0, verified: bool = False, keep: float = 1.0) -> str:
    """Writes the chosen completions as the answers to their prompts. Returns a line that says how many those are.

    Args:
      data: a file of completions, as `understudy generate --output` writes them.
      output: the JSON lines to write.
      ended: drops completions of at least so many tokens, which were cut off there; 0 drops none.
      verified: keeps only those that the record's task, or its `response`, says are right.
      keep: the share of the rest to keep, those likeliest per token first; in (0, 1].

    Raises:
      InputError: the file or a record is at fault, or nothing is left.
    """
    good, dropped = _read(data, ended, verified)
    likelihood = np.array([record["logprob"] / len(record["tokens"]) for record in good])
    best = np.argsort(-likelihood, kind="stable")[: int(np.ceil(keep * len(good)))]
    dropped["unlikely"] += len(good) - len(best)
    counts = ", ".join(f"{n} {reason}" for reason, n in dropped.items() if n)
    if not len(best):
        raise InputError(f"--data = {data}: nothing is left ({counts or 'it is empty'}).")
    lines = [files.json_line(_answered(good[i])) for i in sorted(best.tolist())]
    files.write_bytes(output, b"".join(lines))
    return f"{len(best):,} records kept, dropped: {counts or 'none'}"


def _read(data: str, ended: int, verified: bool) -> tuple[Sequence[dict[str, Any]], Counter[str]]:
    """The records without a fault, and how many have which."""
    origin = entries.locate_flag(data)
    good: list[dict[str, Any]] = []
    dropped: Counter[str] = Counter()
    for where, raw in origin.read():
        with located(where):
            record = records.parse(raw)
        if not set(_ADDED) <= record.keys():
            raise InputError(f"{where}: has no completion. Give what `understudy generate --output` wrote.")
        _check_types(where, record)
        fault = _fault(where, record, ended, verified)
        if fault:
            dropped[fault] += 1
        else:
            good.append(record)
    return good, dropped


def _check_types(where: str, record: Mapping[str, Any]) -> None:
    """Raises InputError where a completion isn't as `understudy generate` writes it."""
    messages = record.get("messages", [{}])
    for name, fits in (
        ("completion", isinstance(record["completion"], str)),
        ("tokens", (isinstance(record["tokens"], list) and bool(record["tokens"])) or not record["completion"]),
        ("logprob", type(record["logprob"]) in (int, float) and math.isfinite(record["logprob"])),
        ("response", isinstance(record.get("response", ""), str)),
        ("messages", isinstance(messages, list) and bool(messages) and all(isinstance(m, dict) for m in messages)),
    ):
        if not fits:
            shown = f"{record[name]!r:.40}"
            raise InputError(f"{where}: {name} = {shown}: isn't what `understudy generate --output` writes. Mend it.")


def _fault(where: str, record: Mapping[str, Any], ended: int, verified: bool) -> str:
    """Why a completion is of no use; "" where it is of use."""
    if not record["completion"].strip():
        return "empty"
    if ended and len(record["tokens"]) >= ended:
        return "cut off"
    if verified:
        if "response" not in record:
            raise InputError(f"{where}: --verified needs the right answer, `response`, beside each prompt.")
        if not verification.verify_record(record, record["completion"]):
            return "wrong"
    return ""


def _answered(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record with its completion as the answer."""
    rest = {name: value for name, value in record.items() if name not in (*_ADDED, "response")}
    if "messages" not in record:
        return {**rest, "response": record["completion"]}
    messages = record["messages"]
    messages = messages[:-1] if messages[-1].get("role") == "assistant" else messages
    return {**rest, "messages": [*messages, {"role": "assistant", "content": record["completion"]}]}
