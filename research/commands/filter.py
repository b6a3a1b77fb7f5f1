"""Turns completions into training data.

Reads what `understudy generate --output` wrote, drops what --ended, --verified and --keep tell it to, and writes
records with `prompt` or `messages` and the completion as the answer.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

from research import cli, files
from research.cli import Flag

COMMAND = cli.Command(
    "filter",
    __doc__,
    flags=(
        Flag("data", "completions, as understudy generate writes them", metavar="FILE", parse=cli.path, required=True),
        Flag("output", "where the records go, as JSON lines", metavar="FILE", parse=cli.path, required=True),
        cli.OVERWRITE,
        Flag(
            "ended", "drop completions of N tokens, which were cut off there", 0, "keep them", "N", parse=cli.whole(1)
        ),
        Flag("verified", "keep those that the record's task, or its `response`, says are right", False),
        Flag("keep", "of the rest, keep this share: those likeliest per token", 1.0, metavar="SHARE", parse=cli.share),
    ),
    examples=("understudy filter --data=completions.jsonl --output=pairs.jsonl --verified",),
)


def main(argv: Sequence[str]) -> int:
    return COMMAND.run(argv, _filter)


def _filter(args: SimpleNamespace) -> None:
    files.check_output(args.output, overwrite=args.overwrite)
    from research.sources import selection  # late: numpy and the readers of records take 0.2 s

    line = selection.select(args.data, Path(args.output), ended=args.ended, verified=args.verified, keep=args.keep)
    print(line, file=sys.stderr)
