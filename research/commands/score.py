"""Scores text under a model: the loss and perplexity of each record.

Each record keeps its fields, in order, and gets
  count       how many of its tokens are scored
  loss        nats per scored token: the mean of -log p(token | those before it)
  perplexity  exp(loss)
  logprobs    log p of each scored token, with --per_token

What is scored is what training learns: all of a `text`, its end token included; the answers of `prompt` and
`response`, or of `messages`, with their end tokens; of `tokens` (ids; no tokenizer is needed) all. The first token of
a sequence is never scored, since nothing comes before it; where the tokenizer begins a text with a token of its own,
that is the first.

Everything is read and checked before anything is computed. A killed run leaves OUTPUT.partial with whole lines, and the
same command goes on from there.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

from research import cli, files
from research.cli import Flag

COMMAND = cli.Command(
    "score",
    __doc__,
    flags=(
        cli.MODEL,
        cli.STEP,
        cli.EMA,
        cli.ADAPTER,
        Flag(
            "data",
            ".jsonl, .jsonl.gz, .json, .parquet or .txt; a folder or glob of them",
            metavar="FILE",
            parse=cli.path,
            required=True,
        ),
        Flag("output", "where the records go, as JSON lines", metavar="FILE", parse=cli.path, required=True),
        cli.OVERWRITE,
        Flag("per_token", "also write the log-probability of each scored token", False),
        Flag(
            "on_long",
            "a record longer than the model's max_length: name it and end (error); score its beginning (truncate); or "
            "score all of it, piece by piece, each token from at most max_length before it (split)",
            "error",
            metavar="WHAT",
            parse=cli.one_of("error", "truncate", "split"),
        ),
        cli.TEMPLATE,
        cli.MESH,
        cli.BATCH_TOKENS,
    ),
    examples=("understudy score --model=runs/sft --data=texts.jsonl --output=scored.jsonl",),
    renamed={"input": "data", "checkpoint": "model"},
    resumable=True,
)


def main(argv: Sequence[str]) -> int:
    return COMMAND.run(argv, _score)


def _score(args: SimpleNamespace) -> None:
    files.check_output(args.output, overwrite=args.overwrite)

    # Late: jax and the models take 1 s, which --help and a wrong flag needn't wait for.
    from research import loading
    from research.devices import compilation, sharding
    from research.evals import record_scores

    origin = record_scores.find_records(args.data)
    compilation.use_compilation_cache()
    loaded = loading.load_model(
        args.model,
        step=args.step,
        ema=args.ema,
        mesh=sharding.make_mesh(args.mesh),
        needs_tokenizer=False,
        adapter=args.adapter,
    )
    scorer = record_scores.RecordScorer(
        loaded, args.template or loaded.template, args.on_long, args.per_token, args.batch_tokens
    )
    count = scorer.write(origin, Path(args.output))
    print(f"{count:,} records scored: {args.output}", file=sys.stderr)
