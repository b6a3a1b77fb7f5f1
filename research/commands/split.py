"""Splits records into disjoint files: understudy split --data=x.jsonl --output=DIR --parts=weak:2000,test:500

Writes DIR/weak.jsonl and DIR/test.jsonl, with so many records each, drawn by chance; a part without a number gets
the rest. Records whose text, or prompt, is the same are one: the first is taken.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from research import cli
from research.errors import InputError
from research.sources import formats, records


def main(argv: Sequence[str]) -> int:
    return cli.run(lambda: _run(_parse(argv)))


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = cli.make_parser("split", __doc__)
    add = parser.add_argument
    add("--data", metavar="DATA[,DATA]", help="as in config.data.path: files, folders, builtin:NAME, tasks:NAME ...")
    add("--output", metavar="DIR", help="where the files go; made where it isn't there")
    add("--parts", metavar="NAME:COUNT,...", help="the files, and how many records each gets")
    add("--fields", type=json.loads, default={}, help='columns of other names: \'{"text": "headline"}\'')
    add("--seed", type=int, default=0, help="of which record goes where")
    add("--examples", type=int, default=10_000, help="how many records to generate, for each tasks:")
    remedy = "Give --data=x.jsonl --output=DIR --parts=train:1000,test."
    return cli.parse(parser, argv, ("data", "output", "parts"), remedy)


def _run(args: argparse.Namespace) -> None:
    parts = _parts(args.parts)
    try:
        origins = [records.locate(entry, count=args.examples, seed=args.seed) for entry in args.data.split(",")]
    except InputError as error:
        raise InputError(f"--data: {error}") from error
    distinct = {}
    for where, raw in itertools.chain.from_iterable(origin.read() for origin in origins):
        try:
            record = records.canonical(records.parse(raw), args.fields)
            if "text" in record:
                turns = records.check(record, "text", {})
            else:
                turns = records.check(record, records.detect_format(record, {}), {})
        except InputError as error:
            raise InputError(f"{where}: {error}") from error
        distinct.setdefault(formats.split_key(turns), record)
    asked = sum(count or 0 for count in parts.values())
    if asked > len(distinct) or (None in parts.values() and asked == len(distinct)):
        raise InputError(
            f"--parts = {args.parts}: asks for {asked:,} records and more, and --data = {args.data} holds "
            f"{len(distinct):,} different ones. Ask for fewer."
        )
    chosen = list(distinct.values())
    order = iter(np.random.default_rng(args.seed).permutation(len(chosen)).tolist())
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    for name, count in parts.items():
        lines = [json.dumps(chosen[i], ensure_ascii=False) + "\n" for i in itertools.islice(order, count)]
        part = folder / f"{name}.jsonl.part"
        part.write_text("".join(lines))
        part.replace(folder / f"{name}.jsonl")
        print(f"{len(lines):,} records: {folder / name}.jsonl", file=sys.stderr)


def _parts(text: str) -> dict[str, int | None]:
    """Name -> number of records, None for the rest; the one without a number comes last."""
    parts: dict[str, int | None] = {}
    for entry in text.split(","):
        name, colon, count = entry.partition(":")
        if not name or name in parts or (colon and not (count.isdecimal() and int(count))):
            raise InputError(f"--parts = {text}: {entry!r} isn't NAME:COUNT with a name of its own.")
        parts[name] = int(count) if colon else None
    if list(parts.values()).count(None) > 1:
        raise InputError(f"--parts = {text}: only one part can get the rest. Give the others a number.")
    return dict(sorted(parts.items(), key=lambda part: part[1] is None))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
