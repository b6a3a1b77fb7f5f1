"""Runs the list of runs that an experiment defines, one after the other or several at a time.

Each run has a folder of its own below the workdir, and a process of its own. The same command again goes on: finished
runs are skipped, begun ones resumed. At the end there is a table, in results.csv as well. The list stands beside
get_config in the experiment's file:

def sweep(add):
    for learning_rate in (1e-3, 3e-3):
        add({"optimizer.learning_rate": learning_rate})
"""

from collections.abc import Sequence
from types import SimpleNamespace

from research import cli, files
from research.cli import Flag

COMMAND = cli.Command(
    "sweep",
    __doc__,
    flags=(
        Flag("workdir", "the folder of the sweep", metavar="DIR", parse=cli.path, required=True),
        Flag("jobs", "how many run at a time", 1, metavar="N", parse=cli.whole(1)),
        Flag("metric", "sort the table by this", shown="eval/loss if there", metavar="NAME"),
        Flag("maximize", "the highest metric comes first", False),
        Flag("dry_run", "print the commands and stop", False),
    ),
    examples=("understudy sweep --config=experiments/pretrain.py:debug --workdir=runs/sweeps/pretrain --dry_run",),
    experiment=True,
)


def main(argv: Sequence[str]) -> int:
    return COMMAND.run(argv, _sweep)


def _sweep(args: SimpleNamespace) -> int:
    files.check_folder(args.workdir, "--workdir")
    from research.studies import sweep  # late: jax and the models take 1 s, which a wrong flag needn't wait for

    return sweep.sweep(
        args.experiment.name,
        args.experiment.texts,
        args.workdir,
        jobs=args.jobs,
        metric=args.metric,
        maximize=args.maximize,
        dry_run=args.dry_run,
    )
