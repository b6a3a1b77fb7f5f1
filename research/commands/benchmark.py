"""Measures how long a researcher waits, on this machine: the parts of a run that decide it.

Takes any experiment: model, batch, objective, optimizer and mesh are the config's. Parts, in this order:

  train       the compiled train step; with --objectives, of each of these on the same model
  loop        what the loop of a run adds to it, and how long it waits for data
  decode      greedy decoding: prompt and new tokens apart; many prompts of unequal lengths
  data        tokenising, from the text and from the cache; packing; batches
  loading     the model written and read: our checkpoints and safetensors
  checkpoint  how long the loop stands still for a save
  startup     from the start of the process to the end of the first step; with and without compiled programs

One JSON line each (or several) goes to standard output, a readable one to standard error. Times are {"median", "q1",
"q3", "n"} after warm-up. --against measures another library on the same work in turn: hf is transformers with torch,
hf_compile the same compiled, peft and peft_compile PEFT's adapter of the same initial values, trl and trl_compile TRL's
DPOTrainer where the objective is preference and its GRPOTrainer where there are rewards, jax plain jax.jit. With
rewards a train step is a rollout with its updates; answers have rollout.max_new_tokens each. MKL in torch has slow
kernels for processors that aren't Intel's: it is told that they are, where there is a C compiler, and the record says
which it took (--mkl).
--profile traces a few train steps for Perfetto or TensorBoard, and names the costliest parts. Parameters are random
and batches made up: neither data nor a checkpoint is read, but by loop, data and startup. Rows hold several documents
each; with --against one, or one pair, so that all do the same work and find the same loss. The status is 1 if a part
failed; the others still run.
"""

import os
from collections.abc import Sequence
from types import SimpleNamespace

from research import cli, files
from research.bench.names import MKL, PARTS, PEERS
from research.cli import Flag
from research.errors import InputError, did_you_mean


def _parts(text: str) -> tuple[str, ...]:
    return _known(text, PARTS, "there is no such part")


def _peers(text: str) -> tuple[str, ...]:
    return _known(text, tuple(PEERS), "there is no such peer")


def _mkl(text: str) -> str:
    if text not in MKL:
        raise ValueError(f"give {' or '.join(MKL)}.")
    return text


def _known(text: str, known: Sequence[str], message: str) -> tuple[str, ...]:
    if not cli.words(text):
        raise ValueError(f"names none. Give some of {', '.join(known)}.")
    for word in cli.words(text):
        if word not in known:
            raise ValueError(f"{message} as {word!r}.{did_you_mean(word, known)}")
    return cli.words(text)


def _sizes(text: str) -> tuple[int, ...]:
    try:
        return tuple(cli.whole(1)(word) for word in cli.words(text))
    except ValueError:
        raise ValueError("give sizes from 1 on, such as 1,8.") from None


COMMAND = cli.Command(
    "benchmark",
    __doc__,
    flags=(
        Flag("only", "parts to measure", PARTS, "all", "PART,...", parse=_parts),
        Flag("against", f"libraries to measure in turn, of {', '.join(PEERS)}", (), "none", "NAME,...", parse=_peers),
        Flag("mkl", "kernels of MKL in torch: intel or own", "intel", metavar="WHOSE", parse=_mkl, of=("against",)),
        Flag("objectives", "of train: what to measure", (), "the config's", "NAME,...", parse=cli.words),
        Flag("decode_batch", "of decode: batch sizes", (1, 8), "1,8", "N,...", parse=_sizes),
        Flag("steps", "how often to measure", 0, "for about 20 s", "N", parse=cli.whole(0)),
        Flag("profile", "a folder for traces of the train steps", "", metavar="FOLDER", parse=cli.path),
        Flag("output", "also append the JSON lines to this file", "", metavar="FILE", parse=cli.path),
    ),
    examples=(
        "understudy benchmark --config=experiments/benchmark.py:small",
        "understudy benchmark --config=experiments/benchmark.py:small --only=train,decode --against=hf",
        "understudy benchmark --config=experiments/benchmark.py:small,lora --only=train --against=peft_compile",
        "understudy benchmark --config=experiments/benchmark.py:small,dpo --only=train --against=trl",
        "understudy benchmark --config=experiments/benchmark.py:small,grpo --only=train --against=trl",
        "understudy benchmark --config=experiments/sft.py --only=train --objectives=sft,distill --profile=traces",
    ),
    experiment=True,
    renamed={"out": "output"},
    makes_folders=True,
)


def main(argv: Sequence[str]) -> int:
    return COMMAND.run(argv, _benchmark)


def _benchmark(args: SimpleNamespace) -> int:
    for name, part in {"objectives": "train", "profile": "train", "decode_batch": "decode"}.items():
        if name in args.texts and part not in args.only:
            raise InputError(
                f"--{name} = {args.texts[name]}: is of the part {part}, and --only leaves it out. Leave it out."
            )
    if args.output:
        files.check_appended(args.output)
    if args.profile:
        files.check_folder(args.profile, "--profile")
    if args.against:  # before jax begins: the peer needs room on the device too
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

    from research.bench import (
        parts,  # late: jax and the models take 1 s, which --help and a wrong flag needn't wait for
    )

    bench = parts.make(
        args.experiment.values,
        steps=args.steps,
        against=tuple(args.against),
        objectives=tuple(args.objectives),
        decode=tuple(args.decode_batch),
        profile=args.profile,
        mkl=args.mkl,
        flags=tuple(args.experiment.flags),
    )
    return parts.run(bench, [part for part in PARTS if part in args.only], args.output)
