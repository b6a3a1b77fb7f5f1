"""Says why a run doesn't learn: the likeliest causes, the numbers and rows of data that show them, and the remedies.

Of a run's workdir it reads the newest checkpoint, the metrics and some batches, and changes nothing but diagnosis.json,
which `understudy report` shows. With --config it looks at a run that hasn't begun: its data, masks, lengths and
template, and which learning rates lower the loss. --confirm tries the causes that can be tried: 30 steps with one
change and without. The status is 0 where the run is healthy or nothing can be told, and 1 where a cause was found.
docs/diagnosis.md says how to read the answer.
"""

import os
import sys
from collections.abc import Sequence
from types import SimpleNamespace

from research import cli, files
from research.cli import Flag
from research.errors import Exit

COMMAND = cli.Command(
    "diagnose",
    __doc__,
    flags=(
        Flag("workdir", "of a run; DIR alone is the same", shown="--config is given", metavar="DIR", parse=cli.path),
        Flag("confirm", "try each cause that can be tried: 30 steps with one change, and without", False),
        Flag("output", "also write the answer and all signals there, as JSON", metavar="FILE.json", parse=cli.path),
        cli.OVERWRITE,
    ),
    examples=(
        "understudy diagnose runs/sft",
        "understudy diagnose --config=experiments/sft.py:debug --output=diagnosis.json",
    ),
    experiment=True,
    instead="workdir",
)


def main(argv: Sequence[str]) -> int:
    return COMMAND.run(argv, _diagnose)


def _diagnose(args: SimpleNamespace) -> int:
    if args.output:
        files.check_output(args.output, overwrite=args.overwrite)

    # Late: jax and the models take 1 s, which --help and a wrong flag needn't wait for.
    from research import config
    from research.diagnosis import diagnose, report

    if args.workdir:
        diagnosis = diagnose.of_run(args.workdir, confirm=args.confirm)
        subject = f"{args.workdir} at step {diagnosis.evidence.signals.get('state/step', 0):.0f}"
    else:
        diagnosis = diagnose.of_config(config.parse(args.experiment.values), confirm=args.confirm)
        subject = f"{args.experiment.name} before its first step"
    print(report.text(diagnosis, subject))
    values = report.as_json(diagnosis, subject)
    if args.output:
        files.write_json(args.output, values)
    if args.workdir:
        _keep(os.path.join(args.workdir, report.FILE), values)
    return Exit.FAILED if diagnosis.findings else Exit.DONE


def _keep(path: str, values: dict) -> None:
    """Writes the answer into the workdir, for `understudy report`; a folder that can't be written to is said."""
    try:
        files.write_json(path, values)
    except OSError as error:
        print(f"{path}: isn't written ({error.strerror}), so that understudy report won't show it.", file=sys.stderr)
