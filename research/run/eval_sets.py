"""Further data that the objective is measured on: `eval.sets`."""

import dataclasses
import re
from collections.abc import Callable

from research import config as config_lib
from research.config import Config
from research.errors import InputError, located
from research.objectives.terms import Terms
from research.sources.dataset import Data
from research.sources.rows import Rows


def read(config: Config, terms: Terms, load: Callable[..., Data]) -> dict[str, Rows]:
    """The rows of each set, by its name, read as the data that is trained on.

    Args:
      config: of the run.
      terms: of the objective.
      load: sources.dataset.load with all but the data: DataSpec -> Data.

    Raises:
      InputError: a set can't be read, or the objective can't be measured on it.
    """
    own = config_lib.data_spec(config)
    if config.eval.sets and len(own.sources) > 1 and any(term.sources for term in terms.values()):
        raise InputError("eval.sets: a term counts some of data.sources alone, and sets are of none. Leave them out.")
    reads = {name for term in terms.values() for name in term.objective.fields}
    given = {name for term in terms.values() for name in term.objective.gives}
    sets = {}
    for name, path in config.eval.sets.items():
        where = f"eval.sets.{name}"
        if not re.fullmatch(r"[\w-]+", name):
            raise InputError(f"{where}: {name!r} can't be in the names of metrics. Use letters, digits, _ and -.")
        with located(where):
            data = load(_spec(own, path, "mismatched" in reads))
        if len(data.train) > 1:
            raise InputError(f"{where} = {path!r}: has weights, but all of it is evaluated. Leave them out.")
        rows = data.train[0][0]
        if len(own.sources) > 1:  # batches say which source a token is of
            rows = dataclasses.replace(rows, sources=(0,) * len(rows.stores))
        if lacking := sorted(reads - given - rows.spec(1).keys()):
            raise InputError(f"{where} = {path!r}: doesn't give {lacking[0]!r}, which the objective reads.")
        sets[name] = rows
    return sets


def _spec(own: config_lib.DataSpec, path: str, mismatches: bool) -> config_lib.DataSpec:
    """How a set is read: as the run's data, whole and in its order."""
    whole = {"path": path, "sources": {}, "eval_path": "", "eval_fraction": 0.0, "select": "", "annotations": ""}
    whole |= {name: getattr(config_lib.DataSpec, name) for name in ("streaming", "buffer", "eval_records")}
    return dataclasses.replace(own, **whole, shuffle=False, mismatches=mismatches)
