"""How often is the diagnosis right? Faults are planted into small runs, and it is asked what is wrong with them.

    python -m research.main --config=experiments/faults.py --workdir=runs/faults
    python -m research.main --config=experiments/faults.py:debug --workdir=runs/faults-debug  # one kind, few runs

A study of two parts with other models, data and seeds. On `dev` the thresholds of the causes were chosen; `test` is
what the report is about: how often the first-ranked cause is the planted one, how often healthy runs of other settings
are called ill, what is taken for what, and after how many steps a fault is noticed. Each stage `trials` writes what was
measured of its runs, a line each, and goes on where it was stopped; a change of thresholds needs no new runs, only
`understudy study --report`.
"""

import functools
import json

from ml_collections import ConfigDict

from experiments import base
from research.studies.faults import report, setups
from research.studies.faults.files import PARTS


def get_config(arg: str = ""):
    chosen = base.variants(arg)
    config = base.get_config()
    study = {"seeds": 1, "setups": tuple(setups.SETUPS), "only": (), "parts": PARTS, "store": ""}
    if "debug" in chosen:
        base.debug(config)
        study |= {"setups": ("text",), "only": ("lr_zero_schedule", "frozen_all"), "parts": ("dev",)}
    with config.unlocked():
        config.study = ConfigDict(study)
    return config


def study(config, add):
    s, done = config.study, []
    for part in s.parts:
        data = add.command(f"data-{part}", "research.studies.faults.files", {"part": part, "output": "{workdir}"})
        starts = {}
        for name in setups.STARTS:
            values = setups.start(name, part, data.workdir)
            starts[name] = add.train(f"{name}-{part}", _nested(values)).workdir
        for setup in s.setups:
            flags = {"part": part, "data": data.workdir, "starts": json.dumps(starts), "setups": setup}
            flags |= {"seeds": s.seeds, "output": "{workdir}", "only": ",".join(s.only)}
            done.append(add.command(f"trials-{setup}-{part}", "research.studies.faults.trials", flags).workdir)
    return functools.partial(report.report, done)


def _nested(values):
    """Dotted names as nested mappings."""
    nested = {}
    for name, value in values.items():
        *sections, field = name.split(".")
        section = nested
        for each in sections:
            section = section.setdefault(each, {})
        section[field] = value
    return nested
