"""Scores text under a model: the loss and perplexity of each record; or, with --reward, writes rewards.

Each record keeps its fields, in order, and gets
  count       how many of its tokens are scored
  loss        nats per scored token: the mean of -log p(token | those before it)
  perplexity  exp(loss)
  logprobs    log p of each scored token, with --per_token

What is scored is what training learns: all of a `text`, its end token included; the answers of `prompt` and
`response`, or of `messages`, with their end tokens; of `tokens` (ids; no tokenizer is needed) all. The first token of
a sequence is never scored, since nothing comes before it; where the tokenizer begins a text with a token of its own,
that is the first.

With --reward MODEL is a reward model: a run of the objective reward, or a ...ForSequenceClassification. A record gets
  reward      of its text, its answer or its conversation, read at the last token
  rewards     where it has several answers: [of chosen, of rejected], or of each of `responses`, or of the
              `completions` that `understudy generate --n` has written
  reward_std, rewards_std   how far the members of an ensemble are apart: a head with several rewards, or several
              models, parted by commas; reward is then their mean

With --reward and --reference MODEL is a policy, and its rewards are implicit: beta (log p - log p_ref) of an answer.

Everything is read and checked before anything is computed. A killed run leaves OUTPUT.partial with whole lines, and the
same command goes on from there.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from research import cli, files
from research.cli import Flag
from research.errors import InputError

_BETA = 0.1  # as the objective preference has it

COMMAND = cli.Command(
    "score",
    __doc__,
    flags=(
        dataclasses.replace(cli.MODEL, parse=cli.paths, metavar="MODEL[,MODEL]"),
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
        Flag("reward", "write rewards, of a reward model or several, or of policies", False),
        Flag(
            "reference",
            "the policies' reference, to write their implicit rewards",
            shown="none",
            metavar="MODEL",
            parse=cli.path,
            of=("reward",),
        ),
        Flag(
            "beta",
            "of the implicit rewards: that of the policies' training",
            _BETA,
            metavar="X",
            parse=cli.above_zero,
            of=("reference",),
        ),
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
    examples=(
        "understudy score --model=runs/sft --data=texts.jsonl --output=scored.jsonl",
        "understudy score --reward --model=runs/reward --data=pairs.jsonl --output=scored.jsonl",
        "understudy score --reward --model=runs/dpo --reference=runs/sft --data=pairs.jsonl --output=scored.jsonl",
    ),
    renamed={"input": "data", "checkpoint": "model"},
    resumable=True,
)


def main(argv: Sequence[str]) -> int:
    return COMMAND.run(argv, _score)


def _score(args: SimpleNamespace) -> None:
    files.check_output(args.output, overwrite=args.overwrite)
    _check_together(args)

    # Late: jax and the models take 1 s, which --help and a wrong flag needn't wait for.
    from research import loading
    from research.devices import compilation, sharding
    from research.evals import record_rewards, record_scores

    origin = record_scores.find_records(args.data)
    compilation.use_compilation_cache()
    mesh = sharding.make_mesh(args.mesh)
    load = functools.partial(loading.load_model, step=args.step, ema=args.ema, mesh=mesh, adapter=args.adapter)
    if args.reward:
        truncate, beta = args.on_long == "truncate", args.beta if args.reference else None
        scorer = record_rewards.RecordRewarder(_rewarders(args, load), args.template, truncate, beta)
    else:
        loaded = load(args.model[0], needs_tokenizer=False)
        template = loaded.template_for(args.template)
        scorer = record_scores.RecordScorer(loaded, template, args.on_long, args.per_token, args.batch_tokens)
    count = scorer.write(origin, Path(args.output))
    print(f"{count:,} records scored: {args.output}", file=sys.stderr)


def _rewarders(args: SimpleNamespace, load: Callable[..., Any]) -> list[Any]:
    """What gives rewards, by args.model and args.reference. `load` is loading.load_model, with all but a name."""
    from research import loading  # late: see _score
    from research.evals import record_rewards

    if not args.reference:
        members = [load(name, check=record_rewards.check_reward_model).with_adapter() for name in args.model]
        return [record_rewards.HeadRewarder(member, args.batch_tokens) for member in members]
    policies = [load(name).with_adapter() for name in args.model]
    reference = loading.load_model(args.reference, mesh=policies[0].mesh)
    for name, policy in zip(args.model, policies, strict=True):
        if policy.tokenizer.backend.get_vocab() != reference.tokenizer.backend.get_vocab():
            raise InputError(
                f"--reference = {args.reference}: has another tokenizer than {name}. Name the model that {name} was "
                "trained against."
            )
    return [record_rewards.PolicyRewarder(policy, reference, args.beta, args.batch_tokens) for policy in policies]


def _check_together(args: SimpleNamespace) -> None:
    """Raises InputError where flags don't go together."""
    if not args.reward and len(args.model) > 1:
        raise InputError(f"--model = {','.join(args.model)}: several are an ensemble of rewards. Add --reward.")
    if args.reward and args.per_token:
        raise InputError("--per_token: a reward is of a whole answer. Leave out either it or --reward.")
    if args.reward and args.on_long == "split":
        raise InputError(
            "--on_long = split: a reward is of a whole answer. Use error or truncate, or leave out --reward."
        )
