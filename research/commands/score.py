"""Scores records: by loss and perplexity under a model, by rewards (--reward), or by any scorers (--with).

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

With --with the scores come in a file of their own, a row for each record with its file, number, tokens and scores:
see docs/selection.md. The scorers are
  perplexity    nats per token, exp of them, and bits per byte
  ifd           how much a prompt helps to predict its answer
  rho           the loss under the model less that under --reference
  el2n, gradient_norm   how far predictions are off, and how long the gradient is
  less          how much a record's gradient helps with --target, by the checkpoints of a run
  dsir          how much likelier its n-grams are in --target than in --data
  reward, confidence    of a reward model, or a classifier, which --options names
  duplicates    copies, and records that are nearly the same
  overlap       n-grams that it has in common with --eval_data; always there where that is given
  length        characters and words
or modules of your own.

Everything is read and checked before anything is computed. A killed run leaves OUTPUT.partial with whole lines, and the
same command goes on from there.
"""

import dataclasses
import functools
import json
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from research import cli, files
from research.cli import Flag
from research.errors import InputError

_OF_ROWS = ("number", "of")  # fields of a row that say which record it is of
_BETA = 0.1  # as the objective preference has it

COMMAND = cli.Command(
    "score",
    __doc__,
    flags=(
        dataclasses.replace(cli.MODEL, parse=cli.paths, metavar="MODEL[,MODEL]", unless=("with", "eval_data")),
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
            "with --reward the policies' reference, to write their implicit rewards; with --with that of rho",
            shown="none",
            metavar="MODEL",
            parse=cli.path,
            of=("reward", "with"),
        ),
        Flag(
            "beta",
            "of the implicit rewards: that of the policies' training",
            _BETA,
            metavar="X",
            parse=cli.above_zero,
            of=("reference",),
        ),
        Flag("with", "write a row of scores of each record, by these scorers", metavar="NAME[,NAME]", parse=cli.words),
        Flag(
            "options",
            'of scorers, as in {"ifd": {"form": "loss"}}',
            shown="each scorer's own",
            metavar="JSON",
            parse=cli.section,
            of=("with", "eval_data"),
        ),
        Flag(
            "target",
            "a file of what is wanted, for the scorers dsir and less",
            metavar="FILE",
            parse=cli.path,
            of=("with",),
        ),
        Flag(
            "eval_data",
            "a file of what models are to be evaluated on: a row says how much of a record is there too",
            metavar="FILE",
            parse=cli.path,
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
        "understudy score --with=ifd,duplicates --model=runs/small --data=pairs.jsonl --eval_data=test.jsonl "
        "--output=scores.jsonl",
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
    names = _scorers(args)
    _check_together(args, names)

    # Late: jax and the models take 1 s, which --help and a wrong flag needn't wait for.
    from research import loading
    from research.devices import compilation, sharding
    from research.evals import record_rewards, record_scores

    origin = record_scores.find_records(args.data)
    compilation.use_compilation_cache()
    mesh = sharding.make_mesh(args.mesh)
    load = functools.partial(loading.load_model, step=args.step, ema=args.ema, mesh=mesh, adapter=args.adapter)
    if names:
        scorer = _row_scorer(args, names, origin, mesh)
    elif args.reward:
        truncate, beta = args.on_long == "truncate", args.beta if args.reference else None
        scorer = record_rewards.RecordRewarder(_rewarders(args, load), args.template, truncate, beta)
    else:
        loaded = load(args.model[0], needs_tokenizer=False)
        template = loaded.template_for(args.template)
        scorer = record_scores.RecordScorer(loaded, template, args.on_long, args.per_token, args.batch_tokens)
    count = scorer.write(origin, Path(args.output))
    print(f"{count:,} records scored: {args.output}", file=sys.stderr)
    if means := _means(args.output, reward=args.reward, rows=bool(names)):
        print(f"means: {means}", file=sys.stderr)


def _means(path: str, *, reward: bool, rows: bool) -> str:
    """The means over a file of scored records: of the loss over tokens, of rewards, or of each score of rows."""
    sums: dict[str, list[float]] = {}
    with open(path, "rb") as lines:
        for line in lines:
            record = json.loads(line)
            if rows:
                values = {n: (x, 1) for n, x in record.items() if type(x) in (int, float) and n not in _OF_ROWS}
            elif reward:
                names = [name for name in ("reward", "rewards") if name in record]
                values = {name: (_mean(record[name]), 1) for name in names}
            else:
                values = {"loss": (record["loss"] * record["count"], record["count"])}
            for name, (value, weight) in values.items():
                each = sums.setdefault(name, [0.0, 0.0])
                each[0], each[1] = each[0] + value, each[1] + weight
    means = {name: total / weight for name, (total, weight) in sums.items() if weight}
    told = [f"{name} {value:.4g}" for name, value in means.items()]
    if "loss" in means and not (rows or reward):
        told[0] += f" nats a token (perplexity {math.exp(min(means['loss'], 700)):.4g})"
    return ", ".join(told)


def _mean(value: float | Sequence[float]) -> float:
    return statistics.fmean(value) if isinstance(value, list) else value


def _scorers(args: SimpleNamespace) -> tuple[str, ...]:
    """The scorers whose rows are to be written; none where records are."""
    names = getattr(args, "with") or ()
    return (*names, "overlap") if args.eval_data and "overlap" not in names else tuple(names)


def _row_scorer(args: SimpleNamespace, names: Sequence[str], origin: Any, mesh: Any) -> Any:
    """What writes rows of scores."""
    from research import loading  # late: see _score
    from research.devices import sharding
    from research.evals import scored_rows, scorers

    def load(name: str, is_own: bool, check: Callable[..., None] | None) -> Any:
        of_own = {"step": args.step, "ema": args.ema, "adapter": args.adapter} if is_own else {}
        return loading.load_model(name, mesh=mesh, needs_tokenizer=False, check=check, **of_own)

    flags = {name: getattr(args, name) or "" for name in ("reference", "target", "eval_data")}
    model = args.model[0] if args.model else ""
    inputs = scorers.Inputs(
        origin, load, mesh, model, **flags, template=args.template, on_long=args.on_long, batch_tokens=args.batch_tokens
    )
    options = args.options or {}
    by_name = scorers.load(names, options, inputs)
    together = scored_rows.BATCHES_AT_ONCE * args.batch_tokens * sharding.num_parts(sharding.RULES["batch"], mesh)
    return scored_rows.RowScorer(by_name, options, inputs.counting_encoder(), together)


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


def _check_together(args: SimpleNamespace, names: Sequence[str]) -> None:
    """Raises InputError where flags don't go together; `names` are those of scorers."""
    if names and (args.reward or args.per_token or "beta" in args.texts):
        flag = "reward" if args.reward else "per_token" if args.per_token else "beta"
        raise InputError(f"--{flag}: writes into records, and --with and --eval_data rows of scores. Leave one out.")
    if names and not args.model and (args.adapter or args.ema or args.step is not None):
        raise InputError("--step, --ema, --adapter: are of --model, which isn't given. Leave them out.")
    if names and len(args.model or ()) > 1:
        raise InputError(f"--model = {','.join(args.model)}: --with scores by one. Name another in a file of its own.")
    if not args.reward and not names and len(args.model) > 1:
        raise InputError(f"--model = {','.join(args.model)}: several are an ensemble of rewards. Add --reward.")
    if args.reward and args.per_token:
        raise InputError("--per_token: a reward is of a whole answer. Leave out either it or --reward.")
    if args.reward and args.on_long == "split":
        raise InputError(
            "--on_long = split: a reward is of a whole answer. Use error or truncate, or leave out --reward."
        )
