"""Selects records by their scores, and says what is kept and dropped.

Reads what `understudy score --with` wrote. Writes a list of the records that are kept, which `data.select=OUTPUT` reads
beside the data's own path: the data isn't copied. With --write=records the records are written whole.

--keep says what comes first, and --tokens or --records for how much of it there is room:
  top, bottom  the highest scores; the lowest
  middle       those nearest to the quantile --center: a band as wide as the room is
  gumbel       a draw in which chances are in proportion to exp(score / temperature), for log-weights
  kcenter      records far apart: --by=A,B,... are their coordinates, each divided by its spread
  random       any, to compare with

Equal scores keep the data's order. A record without a score, or that --min, --max or --drop leave out, is never kept.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

from research import cli, files
from research.cli import Flag
from research.errors import InputError

_WAYS = ("top", "bottom", "middle", "gumbel", "kcenter", "random")

COMMAND = cli.Command(
    "select",
    __doc__,
    flags=(
        Flag("scores", "of the records", metavar="FILE", parse=cli.path, required=True),
        Flag("by", "the score to select by; of kcenter also several", shown="none", metavar="NAME", parse=cli.words),
        Flag("keep", "what comes first: " + ", ".join(_WAYS), metavar="WHAT", parse=cli.one_of(*_WAYS), required=True),
        Flag("output", "where the list goes, as JSON lines", metavar="FILE", parse=cli.path, required=True),
        cli.OVERWRITE,
        Flag("tokens", "keep so many tokens; up to 1 it is a share", shown="all", metavar="N", parse=cli.amount),
        Flag("records", "keep so many records; up to 1 it is a share", shown="all", metavar="N", parse=cli.amount),
        Flag("min", "keep none whose score is below X", shown="any", metavar="X", parse=cli.number, of=("by",)),
        Flag("max", "keep none whose score is above X", shown="any", metavar="X", parse=cli.number, of=("by",)),
        Flag("drop", "keep none of which one of these scores is true, or above 0", (), "none", "NAME,...", cli.words),
        Flag(
            "stratify",
            "give each of the data's files ('file'), or each value of a score, a part of the room in proportion to "
            "what it holds, and quantiles of its own",
            shown="all records are one stratum",
            metavar="NAME",
        ),
        Flag(
            "weights",
            'the parts of the room that strata get instead: {"a.jsonl": 0.7, "b.jsonl": 0.3}',
            shown="what they hold",
            metavar="JSON",
            parse=cli.section,
            of=("stratify",),
        ),
        Flag("center", "of middle: the quantile, by tokens, of its center", 0.5, metavar="SHARE", parse=cli.share),
        Flag("temperature", "of gumbel", 1.0, metavar="X", parse=cli.above_zero),
        cli.SEED,
        Flag("ordered", "the order of preference is that of training: a curriculum, with data.shuffle=False", False),
        Flag(
            "write", "the list (ids), or the records whole", "ids", metavar="WHAT", parse=cli.one_of("ids", "records")
        ),
        Flag("report", "also write the report as JSON", shown="none", metavar="FILE", parse=cli.path),
    ),
    examples=(
        "understudy select --scores=scores.jsonl --by=ifd --max=1 --keep=top --tokens=0.3 --output=kept.jsonl",
        "understudy select --scores=scores.jsonl --keep=random --tokens=0.3 --output=random.jsonl",
    ),
)


def main(argv: Sequence[str]) -> int:
    return COMMAND.run(argv, _select)


def _select(args: SimpleNamespace) -> None:
    _check(args)
    for flag in ("output", "report"):
        if getattr(args, flag):
            files.check_output(getattr(args, flag), overwrite=args.overwrite, flag=f"--{flag}")
            files.check_apart(getattr(args, flag), [args.scores], flag=f"--{flag}")

    # Late: numpy and the readers of records take 0.2 s.
    from research.sources import choice, selected
    from research.studies import kept_report

    chosen = choice.choose(_request(args))
    for flag in ("output", "report"):
        if getattr(args, flag):
            files.check_apart(getattr(args, flag), chosen.table.files, flag=f"--{flag}")
    report = kept_report.describe(chosen)
    if args.write == "records":
        selected.copy(chosen, Path(args.output))
    else:
        selected.write(Path(args.output), chosen)
    if args.report:
        files.write_json(args.report, report)
    print(kept_report.as_text(report))
    print(f"{report['kept']['records']:,} records kept: {args.output}", file=sys.stderr)


def _request(args: SimpleNamespace):
    from research.sources import choice  # late, as above

    names = ("scores", "by", "keep", "min", "max", "drop", "stratify", "weights", "center", "temperature", "seed")
    amount, unit = (args.records, "records") if args.records else (args.tokens or 1.0, "tokens")
    options = {name: getattr(args, name) for name in names}
    return choice.Request(**options, amount=amount, unit=unit, ordered=args.ordered)


def _check(args: SimpleNamespace) -> None:
    """Raises InputError where flags don't go together."""
    if args.tokens and args.records:
        raise InputError("--tokens, --records: the room is of one of them. Leave one out.")
    if args.keep == "random" and args.by and args.min is None and args.max is None:
        raise InputError(f"--by = {','.join(args.by)}: random looks at no score. Leave it out, or add --min or --max.")
    if args.keep != "random" and not args.by:
        raise InputError(f"--keep = {args.keep}: needs a score. Name it: --by=NAME.")
    if args.by and len(args.by) > 1 and (args.keep != "kcenter" or args.min is not None or args.max is not None):
        raise InputError(f"--by = {','.join(args.by)}: several are coordinates of kcenter. Name one score.")
    for name, way in (("center", "middle"), ("temperature", "gumbel")):
        if name in args.texts and args.keep != way:
            raise InputError(f"--{name}: is of --keep={way}, and not of {args.keep}. Leave it out.")
    if "seed" in args.texts and args.keep not in ("random", "gumbel"):
        raise InputError(f"--seed: {args.keep} draws nothing by chance. Leave it out.")
    if args.report and Path(args.report).resolve() == Path(args.output).resolve():
        raise InputError(f"--report = {args.report}: is --output too. Name another file.")
    if args.ordered and args.write == "records":
        raise InputError("--ordered: is of a list for data.select. Leave out it, or --write=records.")
    room, unit = args.tokens or args.records, "records" if args.records else "tokens"
    bounded = args.ordered or args.drop or args.min is not None or args.max is not None
    if room == 1 and not (bounded or args.weights):
        raise InputError(f"--{unit} = 1: is a share, and all records would be kept. Give another share or number.")
    if not (room or bounded):
        raise InputError("--tokens: all records would be kept. Give --tokens, --records, --min, --max or --drop.")
