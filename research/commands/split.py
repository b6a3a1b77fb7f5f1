"""Splits records into disjoint files.

Writes DIR/weak.jsonl and DIR/test.jsonl for --parts=weak:2000,test:500, with so many records each, drawn by chance; a
part without a number gets the rest. Records whose text, or prompt, is the same are one: the first is taken.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

from research import cli, files
from research.cli import Flag

COMMAND = cli.Command(
    "split",
    __doc__,
    flags=(
        Flag(
            "data",
            "as in config.data.path: files, folders, builtin:NAME, tasks:NAME ..., parted by commas",
            metavar="DATA",
            required=True,
            parse=cli.paths,
        ),
        Flag("output", "the folder of the files; it may exist", metavar="DIR", parse=cli.path, required=True),
        Flag("overwrite", "replace files of these names that are there", False),
        Flag("parts", "the files, and how many records each gets", metavar="NAME:COUNT,...", required=True),
        Flag("fields", 'columns of other names: \'{"text": "headline"}\'', {}, "none", "JSON", cli.names_by_name),
        Flag("seed", "of which record goes where, and of generated records", 0, metavar="N", parse=cli.seed),
        Flag(
            "examples",
            "how many records to generate, for each tasks: or grammar:",
            10_000,
            metavar="N",
            parse=cli.whole(1),
        ),
    ),
    examples=("understudy split --data=tasks:reverse --output=data/reverse --parts=train:1000,test",),
    makes_folders=True,
)


def main(argv: Sequence[str]) -> int:
    return COMMAND.run(argv, _split)


def _split(args: SimpleNamespace) -> None:
    from research.sources import partition  # late: numpy and the readers of records take 0.2 s

    parts = cli.value("parts", args.parts, partition.read_parts)
    files.check_folder(args.output, "--output")
    partition.check_parts(parts, Path(args.output), args.data, overwrite=args.overwrite)
    distinct = partition.read_distinct(args.data, args.fields, examples=args.examples, seed=args.seed)
    for path, count in partition.write_parts(distinct, parts, Path(args.output), args.seed).items():
        print(f"{count:,} records: {path}", file=sys.stderr)
