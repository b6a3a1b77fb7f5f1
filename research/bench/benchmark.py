"""How long a researcher waits: measures, on this machine, the parts of a run that decide it.

understudy benchmark --config=experiments/benchmark.py:small [--only=train,decode,...] [--against=hf,...]
    [--objectives=next_token,sft,distill,...] [--steps=N] [--profile=DIR] [--out=FILE.jsonl] [--config.a.b=value ...]

Takes any experiment: model, batch, objective, optimizer and mesh are the config's. Parts, in this order:

  train       the compiled train step; with --objectives, of each of these on the same model
  loop        what the loop of research.main adds to it, and how long it waits for data
  decode      greedy decoding: prompt and new tokens apart; many prompts of unequal lengths
  data        tokenising, from the text and from the cache; packing; batches
  loading     the model written and read: our checkpoints and safetensors
  checkpoint  how long the loop stands still for a save
  startup     from the start of the process to the end of the first step; with and without compiled programs

One JSON line each (or several) goes to standard output and FILE.jsonl, a readable one to standard error. Times are
{"median", "q1", "q3", "n"} after warm-up. --against measures another library on the same work in turn: hf is
transformers with torch, hf_compile the same compiled, jax plain jax.jit. --profile traces a few train steps for
Perfetto or TensorBoard, and names the costliest parts. Parameters are random and batches made up: neither data nor a
checkpoint is read, but by `loop`, `data` and `startup`. Rows hold several documents each; with --against one, so that
all do the same work and find the same loss. The status is 1 if a part failed; the others still run.
"""

import os
from collections.abc import Sequence
from typing import Any

from absl import flags

from research import cli
from research import config as config_lib
from research.bench import parts, peers, prepared
from research.bench.types import Bench
from research.errors import InputError, did_you_mean
from research.planning import abstract

_EXAMPLE = "--config=experiments/benchmark.py:small"


def main(argv: Sequence[str]) -> int:
    """The command; returns its status."""
    values = cli.experiment_flags(argv)
    flags.DEFINE_list("only", [], f"Of {', '.join(parts.PARTS)}: these alone.", flag_values=values)
    flags.DEFINE_list("against", [], f"Of {', '.join(peers.PEERS)}: measure these in turn.", flag_values=values)
    flags.DEFINE_list("objectives", [], "Of train: measure these instead of the config's.", flag_values=values)
    flags.DEFINE_list("decode_batch", ["1", "8"], "Of decode: batch sizes.", flag_values=values)
    flags.DEFINE_integer("steps", 0, "How often to measure; 0: for about 20 s.", lower_bound=0, flag_values=values)
    flags.DEFINE_string("profile", "", "A folder for traces of the train steps.", flag_values=values)
    flags.DEFINE_string("out", "", "Also append the JSON lines to this file.", flag_values=values)
    if {"--help", "-h"} & set(argv):
        print(f"{__doc__}{values.get_help()}")
        return 0

    def work() -> int:
        if not any(flag == "--config" or flag.startswith("--config=") for flag in argv):
            raise InputError(f"--config: names no experiment. For example: {_EXAMPLE}")
        experiment = cli.parse_experiment(values, argv, "config", _EXAMPLE)
        bench = make(experiment, values, tuple(flag for flag in argv if flag.startswith("--config")))
        return parts.run(bench, [part for part in parts.PARTS if part in (values.only or parts.PARTS)], values.out)

    return cli.run(work)


def make(experiment: dict[str, Any], values: Any, config_flags: tuple[str, ...] = ()) -> Bench:
    """What to measure.

    Args:
      experiment: a config, as a dict.
      values: the flags' values, as attributes.
      config_flags: those that describe the experiment.

    Raises:
      InputError: a flag or the config is at fault, or a peer isn't installed.
    """
    for part in values.only:
        if part not in parts.PARTS:
            raise InputError(f"--only={part}: there is no such part.{did_you_mean(part, parts.PARTS)}")
    if not all(size.isdecimal() and int(size) for size in values.decode_batch):
        raise InputError(f"--decode_batch={','.join(values.decode_batch)}: give sizes from 1 on, such as 1,8.")
    peers.check(values.against)
    if values.against:  # before jax begins: the peer needs room on the device too
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    run = abstract.describe(config_lib.parse({k: v for k, v in experiment.items() if k != "study"}))
    for name in values.objectives:
        prepared.with_objective(run.config, name)  # raises where there is none
    return Bench(
        run,
        steps=values.steps,
        against=tuple(values.against),
        objectives=tuple(values.objectives),
        decode=tuple(int(size) for size in values.decode_batch),
        profile=values.profile,
        flags=config_flags,
    )
