"""Shows a run on one page: what it was, its curves, what it wrote, its data; of several runs how they differ.

Writes report.html, which needs no other file and no server, and one PNG per metric. The folder of a sweep or of a study
stands for its runs: they are grouped over seeds, with means and intervals, and lines or a heat map where one or two
fields tell the groups apart.
"""

from collections.abc import Sequence
from types import SimpleNamespace

from research import cli, files
from research.cli import Flag

COMMAND = cli.Command(
    "report",
    __doc__,
    flags=(
        Flag(
            "workdir",
            "of a run, a sweep or a study; several are compared",
            metavar="DIR",
            parse=cli.path,
            many=True,
            required=True,
        ),
        Flag("output", "the folder to write to", shown="the first run's DIR/report", metavar="DIR", parse=cli.path),
    ),
    examples=(
        "understudy report --workdir=runs/sft",
        "understudy report --workdir=runs/sft --workdir=runs/dpo --output=compared",
        "understudy report --workdir=runs/sweeps/rates",
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
