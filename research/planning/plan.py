"""Whether a run fits a machine, how fast it can be and what it costs, before the machine is there.

understudy plan --config=experiments/x.py --topology=v5e:16x16 [--search] [--json=FILE] [--config.a.b=value ...]

Compiles the real train step, with its real shardings, for a TPU topology (v4, v5e, v5p, v6e; 2*v5p:4x4x4 is two slices)
with no TPU attached: pip install 'understudy[tpu]'. For gpu:8xH100 and cpu:8 it compiles for as many simulated CPU
devices, and what it says is an estimate. --search tries meshes, rematerialisation and microbatches, and names the
fastest that fits. Roles without init_from have the shape that their section describes.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from research import cli
from research import config as config_lib
from research.config import Config
from research.planning import estimate, report, topology
from research.planning.search import search


def main(argv: Sequence[str]) -> int:
    """The command; returns its status."""
    values = cli.experiment_flags(argv)
    flags.DEFINE_string("topology", None, "v5e:16x16, 2*v5p:4x4x4, gpu:8xH100 or cpu:8.", flag_values=values)
    flags.DEFINE_bool("search", False, "Try meshes, remat policies and microbatches.", flag_values=values)
    flags.DEFINE_integer("max_compiles", 8, "Of --search: how many to compile, the most promising.", flag_values=values)
    flags.DEFINE_string("json", "", "Also write the figures there.", flag_values=values)
    if {"--help", "-h"} & set(argv):
        print(f"{__doc__}{values.get_help()}")
        return 0

    def work() -> int:
        experiment = cli.parse_experiment(values, argv, "topology", "--config=experiments/x.py --topology=v5e:4x4")
        experiment.pop("study", None)
        max_compiles = values.max_compiles if values.search else 0
        return run(experiment, values.topology, max_compiles=max_compiles, output=values.json)

    return cli.run(work)


def run(experiment: dict, name: str, *, max_compiles: int = 0, output: str = "") -> int:
    """Prints the plan of an experiment.

    Args:
      experiment: a config, as a dict.
      name: of a topology.
      max_compiles: settings to search; 0: the config's own alone.
      output: a file for the figures, as JSON; "": none.

    Returns:
      0 where the run fits, 1 where it doesn't.
    """
    place = topology.find(name)  # first, as it decides what devices jax has
    config = config_lib.parse(experiment)
    attempts = search(config, place, max_compiles, _show) if max_compiles else [(config, estimate.make(config, place))]
    best, plan = attempts[-1]
    print(report.describe(best, place, plan))
    if output:
        records = [report.record(tried, place, plan) for tried, plan in attempts]
        Path(output).write_text(json.dumps(records, indent=2) + "\n")
    return 0 if plan.fits else 1


def _show(config: Config, plan: estimate.Plan) -> None:
    print(report.describe_attempt(config, plan), flush=True)
