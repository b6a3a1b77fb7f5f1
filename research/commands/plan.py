"""Says whether a run fits a machine, how fast it can be and what it costs, before the machine is there.

Compiles the real train step, with its real shardings, for a TPU topology (v4, v5e, v5p, v6e; 2*v5p:4x4x4 is two slices)
with no TPU attached: pip install -e '.[tpu]'. For gpu:8xH100 and cpu:8 it compiles for as many simulated CPU
devices, and what it says is an estimate. --search tries meshes, rematerialisation and microbatches, and names the
fastest that fits. Roles without init_from have the shape that their section describes. The status is 1 where it
doesn't fit.
"""

from collections.abc import Sequence
from types import SimpleNamespace

from research import cli, files
from research.cli import Flag

COMMAND = cli.Command(
    "plan",
    __doc__,
    flags=(
        Flag("topology", "v5e:16x16, 2*v5p:4x4x4, gpu:8xH100, cpu:8 and the like", metavar="KIND:SHAPE", required=True),
        Flag("search", "try meshes, remat policies and microbatches", False),
        Flag(
            "max_compiles",
            "of --search: how many settings to compile, the most promising",
            8,
            metavar="N",
            parse=cli.whole(1),
            of=("search",),
        ),
        Flag("output", "also write the figures there, as JSON", "", metavar="FILE", parse=cli.path),
        cli.OVERWRITE,
    ),
    examples=(
        "understudy plan --config=experiments/pretrain.py:debug --topology=cpu:4",
        "understudy plan --config=experiments/large.py:70b --topology=v5p:8x8x8 --search",
    ),
    experiment=True,
    renamed={"json": "output"},
)


def main(argv: Sequence[str]) -> int:
    return COMMAND.run(argv, _plan)


def _plan(args: SimpleNamespace) -> int:
    if args.output:
        files.check_output(args.output, overwrite=args.overwrite)
    from research.planning import (
        plan,  # late: jax and the models take 1 s, which --help and a wrong flag needn't wait for
    )

    max_compiles = args.max_compiles if args.search else 0
    return plan.run(args.experiment.values, args.topology, max_compiles=max_compiles, output=args.output)
