"""Runs a study: stages that name each other's outputs, from one experiment.

The experiment's file has `get_config(arg)`, whose config has a section `study` with whatever the study wants to have
set from the command line, and beside it

def study(config, add):
    small = add.train("small", {...})  # the config of a run
    large = add.train("large", {..., "roles": {"teacher": {"init_from": small.workdir}}})
    labels = add.command("labels", "label", {"model": small.workdir, "output": "{workdir}/labels.jsonl"})
    return functools.partial(report, [large.workdir])  # report(workdir): called once all stages are done

Finished stages are skipped, and a study that was killed goes on where it was: the same command again. Stages run one
after the other in this process, or, with --jobs=N, N at a time in processes of their own. docs/studies.md tells more.
"""

import contextlib
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

from research import cli, files, ownership
from research.cli import Flag
from research.errors import Exit, InputError

COMMAND = cli.Command(
    "study",
    __doc__,
    flags=(
        Flag(
            "workdir",
            "of the study: its record and report",
            shown="a dated folder under runs/",
            metavar="DIR",
            parse=cli.path,
        ),
        Flag("dry_run", "list the stages and how they stand", False),
        Flag("keep_going", "go on with the other stages after a failure", False),
        Flag(
            "jobs",
            "run so many stages at a time, each in a process",
            0,
            "one after the other in this process",
            "N",
            cli.whole(0),
        ),
        Flag("only", "run this stage alone", shown="all", metavar="STAGE"),
        Flag(
            "submit",
            "hand stages to a queue by this command, in which {command}, {name} and {after} are filled in; print "
            "prints the commands alone",
            shown="run them here",
            metavar="COMMAND",
        ),
        Flag("report", "make the report of what is done", False),
    ),
    examples=("understudy study --config=experiments/weak_to_strong.py:debug --workdir=runs/weak_to_strong",),
    experiment=True,
)


def main(argv: Sequence[str]) -> int:
    return COMMAND.run(argv, _study)


def _study(args: SimpleNamespace) -> int | None:
    alone = ("dry_run", "only", "submit", "report")
    if sum(bool(getattr(args, name)) for name in alone) > 1:
        raise InputError("--dry_run, --only, --submit and --report: give one of them.")
    other = next((name for name in alone if getattr(args, name)), "")
    for name in ("keep_going", "jobs"):
        if getattr(args, name) and other:
            raise InputError(
                f"--{name}: is of a study whose stages run here one after the other, and not of --{other}."
            )

    files.check_folder(args.workdir or "runs", "--workdir")

    dated = os.path.join("runs", time.strftime(f"%Y-%m-%d_%H-%M-%S_{Path(args.experiment.path).stem}"))
    with contextlib.nullcontext(args.workdir) if args.workdir else ownership.new_folder(dated) as workdir:
        return _run(args, workdir)


def _run(args: SimpleNamespace, workdir: str) -> int | None:
    """Does what is asked of the study in a workdir."""
    # Late: jax and the models take 1 s, which --help and a wrong flag needn't wait for.
    from research.run import run
    from research.studies import execution, study
    from research.studies.submit import submit

    experiment = args.experiment
    planned = study.plan(experiment.name, experiment.config, workdir, experiment.overrides)
    try:
        if args.dry_run:
            return planned.list()
        if args.submit:
            submit(planned.stages, args.submit, planned.command, planned.report is not None)
            return planned.rounds and print(study.UNKNOWN, file=sys.stderr)
        if args.only:
            return planned.run_one(args.only)
        if args.report:
            return planned.make_report()
        return planned.run(keep_going=args.keep_going, jobs=args.jobs)
    except execution.StageFailed as error:
        return cli.fail(error, error.status)
    except run.Preempted as stop:
        print(stop, file=sys.stderr)
        return Exit.PREEMPTED
