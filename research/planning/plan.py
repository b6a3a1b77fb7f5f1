"""A plan of an experiment: made, searched for, printed and written."""

from research import config as config_lib
from research import files
from research.config import Config
from research.errors import printable
from research.planning import estimate, report, topology
from research.planning.search import search


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
    print(printable(report.describe(best, place, plan)))
    if output:
        records = [report.record(tried, place, plan) for tried, plan in attempts]
        files.write_json(output, records)
    return 0 if plan.fits else 1


def _show(config: Config, plan: estimate.Plan) -> None:
    print(printable(report.describe_attempt(config, plan)), flush=True)
