"""Turns completions into training data: understudy filter --data=completions.jsonl --output=pairs.jsonl

Reads what `understudy generate --output` wrote, drops what --ended, --verified and --keep tell it to, and
writes records with `prompt` or `messages` and the completion as the answer.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from research import cli
from research.errors import InputError
from research.sources import records, tasks


def main(argv: Sequence[str]) -> int:
    return cli.run(lambda: _run(_parse(argv)))


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = cli.make_parser("filter", __doc__)
    add = parser.add_argument
    add("--data", metavar="FILE", help="completions, as understudy generate writes them")
    add("--output", metavar="FILE", help="where the records go, as JSON lines")
    add("--ended", type=int, metavar="N", help="drop completions of N tokens, which were cut off there")
    add("--verified", action="store_true", help="keep those that the record's task, or its `response`, says are right")
    add("--keep", type=float, default=1.0, help="of the rest, keep this share: those likeliest per token")
    args = cli.parse(parser, argv, ("data", "output"), "Give --data=completions.jsonl --output=pairs.jsonl.")
    if not 0 < args.keep <= 1:
        raise InputError(f"--keep = {args.keep}: must be in (0, 1].")
    return args


def _run(args: argparse.Namespace) -> None:
    try:
        origin = records.locate(args.data, count=0, seed=0)
    except InputError as error:
        raise InputError(f"--data: {error}") from error
    kept: list[dict[str, Any]] = []
    dropped: Counter[str] = Counter()
    for where, raw in origin.read():
        record = records.parse(raw)
        if not {"completion", "tokens", "logprob"} <= record.keys():
            raise InputError(f"{where}: has no completion. Give what `understudy generate --output` wrote.")
        reason = _fault(where, record, args)
        if reason:
            dropped[reason] += 1
        else:
            kept.append(record)
    likelihood = np.array([record["logprob"] / len(record["tokens"]) for record in kept])
    best = np.argsort(-likelihood, kind="stable")[: int(np.ceil(args.keep * len(kept)))]
    dropped["unlikely"] += len(kept) - len(best)
    if not len(best):
        raise InputError(f"--data = {args.data}: nothing is left ({_told(dropped) or 'it is empty'}).")
    output = Path(args.output)
    part = output.with_name(output.name + ".part")
    part.write_text("".join(json.dumps(_pair(kept[i]), ensure_ascii=False) + "\n" for i in sorted(best.tolist())))
    part.replace(output)
    print(f"{len(best):,} records kept, dropped: {_told(dropped) or 'none'}", file=sys.stderr)


def _fault(where: str, record: Mapping[str, Any], args: argparse.Namespace) -> str:
    """Why a completion is of no use; "" where it is."""
    if not record["completion"].strip():
        return "empty"
    if args.ended and len(record["tokens"]) >= args.ended:
        return "cut off"
    if args.verified:
        if "response" not in record:
            raise InputError(f"{where}: --verified needs the right answer, `response`, beside each prompt.")
        if not tasks.verify_record(record, record["completion"]):
            return "wrong"
    return ""


def _pair(record: Mapping[str, Any]) -> dict[str, Any]:
    made = {k: v for k, v in record.items() if k not in ("completion", "tokens", "logprob", "response")}
    if "messages" not in record:
        return {**made, "response": record["completion"]}
    asked = record["messages"]
    asked = asked[:-1] if asked[-1].get("role") == "assistant" else asked
    return {**made, "messages": [*asked, {"role": "assistant", "content": record["completion"]}]}


def _told(dropped: Counter[str]) -> str:
    return ", ".join(f"{n} {reason}" for reason, n in dropped.items() if n)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
