"""How commands read their flags and how they end. `understudy NAME ...` runs the module NAME of research.commands.

flags.py says what a flag is, values.py how its value is read, command.py reads a command line, experiments.py the
experiment that it names, ending.py says how a command ends, and entry.py is where a process begins.
"""

from research.cli.command import Command
from research.cli.ending import fail, finish
from research.cli.entry import console, main, names, overview, summary
from research.cli.experiments import EXPERIMENTS, Experiment, load_module, read_experiment
from research.cli.flags import (
    ADAPTER,
    BATCH_TOKENS,
    EMA,
    MESH,
    MODEL,
    OVERWRITE,
    SEED,
    SERVERS,
    STEP,
    TEMPLATE,
    Flag,
    value,
)
from research.cli.values import (
    above_zero,
    amount,
    mesh,
    names_by_name,
    number,
    one_of,
    path,
    paths,
    section,
    seed,
    share,
    step,
    whole,
    words,
)

__all__ = [
    "ADAPTER",
    "BATCH_TOKENS",
    "EMA",
    "EXPERIMENTS",
    "MESH",
    "MODEL",
    "OVERWRITE",
    "SEED",
    "SERVERS",
    "STEP",
    "TEMPLATE",
    "Command",
    "Experiment",
    "Flag",
    "above_zero",
    "amount",
    "console",
    "fail",
    "finish",
    "load_module",
    "main",
    "mesh",
    "names",
    "names_by_name",
    "number",
    "one_of",
    "overview",
    "path",
    "paths",
    "read_experiment",
    "section",
    "seed",
    "share",
    "step",
    "summary",
    "value",
    "whole",
    "words",
]
