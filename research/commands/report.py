"""Plots the metrics of a run, or of several compared, on one page.

Writes one PNG per metric and report.html, a page that needs no other file.
"""

from collections.abc import Sequence
from types import SimpleNamespace

from research import cli, files
from research.cli import Flag

COMMAND = cli.Command(
    "report",
    __doc__,
    flags=(
        Flag("workdir", "of a run; several are compared", metavar="DIR", parse=cli.path, many=True, required=True),
        Flag("output", "the folder to write to", shown="the first run's DIR/report", metavar="DIR", parse=cli.path),
    ),
    examples=(
        "understudy report --workdir=runs/sft",
        "understudy report --workdir=runs/sft --workdir=runs/dpo --output=compared",
    ),
    renamed={"out": "output"},
    makes_folders=True,
)


def main(argv: Sequence[str]) -> int:
    return COMMAND.run(argv, _report)


def _report(args: SimpleNamespace) -> None:
    if args.output:
        files.check_folder(args.output, "--output")
    from research.studies import report  # late: jax and matplotlib take 0.8 s, which a wrong flag needn't wait for

    print(report.write_report(args.workdir, args.output))
