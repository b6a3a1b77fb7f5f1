"""Runs one experiment: trains, evaluates, saves; or does the stages of its study, as `understudy study` does.

`python -m research.main --config=...` is the same. The same command again goes on from the last checkpoint.
"""

import contextlib
import os
import shlex
import sys
import time
import traceback
from collections.abc import Sequence
from types import SimpleNamespace

from research import cli, files, ownership
from research.cli import Flag
from research.commands import study
from research.devices import startup
from research.errors import Exit, InputError, Unavailable, disk_fault


def _step(text: str) -> int | str:
    if text == "whole":
        return text
    try:
        return cli.whole(0)(text)
    except ValueError:
        raise ValueError("must be the number of a step, or 'whole'.") from None


COMMAND = cli.Command(
    "train",
    __doc__,
    flags=(
        Flag("workdir", "where the run's files go", shown="a dated folder under runs/", metavar="DIR", parse=cli.path),
        Flag(
            "step",
            "go on from the checkpoint of this step, or 'whole' from the newest that is whole; later ones are moved "
            "aside",
            shown="the newest",
            metavar="N",
            parse=_step,
        ),
        Flag("coordinator", "of several processes: HOST:PORT of process 0", "", "peers find each other", "HOST:PORT"),
        Flag("num_processes", "with --coordinator: processes of the run", 0, "all", "N", cli.whole(0)),
        Flag("process_id", "with --coordinator: which one this is, from 0", -1, "none", "N", cli.whole()),
    ),
    examples=("understudy train --config=experiments/sft.py:debug --workdir=runs/sft --config.steps=20",),
    experiment=True,
)


def main(argv: Sequence[str]) -> int:
    return COMMAND.run(argv, lambda args: _train(args, argv))


def _train(args: SimpleNamespace, argv: Sequence[str]) -> int:
    with startup.quick_imports():  # late: jax and the models take 1 s, which --help and a wrong flag needn't wait for
        from research import config
        from research.devices import distributed
        from research.run import checkpoint, console, run

    files.check_folder(args.workdir or "runs", "--workdir")
    try:
        distributed.start(args.coordinator, args.num_processes, args.process_id)
    except distributed.Unreachable as error:
        return cli.fail(error, Exit.LOST)
    has_study = "study" in args.experiment.config
    if distributed.several() and (has_study or not args.workdir):
        reason = "the runs of a study are processes of their own" if has_study else "--workdir: is missing"
        remedy = "Give each run of several processes a --workdir on storage that all share; --submit a study."
        return distributed.leave(cli.fail(f"{reason}. {remedy}", Exit.BAD_INPUT))
    if has_study and args.step is not None:
        return cli.fail("--step: is of a run, and the experiment is a study. Leave it out.", Exit.BAD_INPUT)
    if has_study:
        return study.main([*args.experiment.flags, *([f"--workdir={args.workdir}"] if args.workdir else [])])
    name = os.path.basename(args.experiment.name).removesuffix(".py")
    command = shlex.join(["python", "-m", "research.main", *argv])
    try:
        parsed, started = config.parse(args.experiment.values), startup.start_time()
        dated = os.path.join("runs", time.strftime(f"%Y-%m-%d_%H-%M-%S_{name}"))
        folder = contextlib.nullcontext(args.workdir) if args.workdir else ownership.new_folder(dated)
        with folder as workdir, console.shown(distributed.main()):
            run.run(parsed, workdir, started=started, command=command, step=args.step)
    except run.Diverged as error:
        return cli.fail(error, Exit.DIVERGED)
    except run.Preempted as stop:
        print(stop, file=sys.stderr)
        return Exit.PREEMPTED
    except InputError as error:
        return distributed.leave(cli.fail(error, Exit.BAD_INPUT))
    except Unavailable as error:
        return cli.fail(error, Exit.LOST)
    except checkpoint.SaveFailed as error:
        return cli.fail(error, Exit.FAILED)
    except Exception as error:
        if fault := disk_fault(error):
            return distributed.leave(cli.fail(f"{fault}. The same command goes on.", Exit.FAILED))
        traceback.print_exc()
        return distributed.leave(Exit.FAILED)
    return Exit.DONE
