"""Turns completions into training data.

Reads what `understudy generate --output` wrote, one answer to a prompt or, with its --n, several. Drops what the flags
tell it to, and writes records with `prompt` or `messages` and the completion as the answer; with --pairs records with
`chosen` and `rejected`, for the objective preference.

--min_reward, --best and --pairs go by rewards: those that `understudy score --reward` has put into the file, or
--rewards, which are computed here, in processes of their own, as in a run (docs/rl.md). An answer that a reward can't
judge is dropped, and so is an empty one, whatever its reward: there is nothing in it to learn.
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from research import cli, files
from research.cli import Flag
from research.errors import InputError

COMMAND = cli.Command(
    "filter",
    __doc__,
    flags=(
        Flag("data", "completions, as understudy generate writes them", metavar="FILE", parse=cli.path, required=True),
        Flag("output", "where the records go, as JSON lines", metavar="FILE", parse=cli.path, required=True),
        cli.OVERWRITE,
        Flag(
            "ended", "drop completions of N tokens, which were cut off there", 0, "keep them", "N", parse=cli.whole(1)
        ),
        Flag("verified", "keep those that the record's task, or its `response`, says are right", False),
        Flag(
            "rewards",
            'config.rewards, of which the sum by weight is the reward: {"exact_match": 1.0}',
            shown="those in the file",
            metavar="JSON",
            parse=cli.section,
        ),
        Flag("min_reward", "keep those whose reward is at least X", shown="any", metavar="X", parse=cli.number),
        Flag("best", "keep of each record the answer with the highest reward, the first of several", False),
        Flag(
            "pairs",
            "write of each record the answers with the highest and the lowest reward, where these differ, as a "
            "preference",
            False,
        ),
        Flag("keep", "of the rest, keep this share: those likeliest per token", 1.0, metavar="SHARE", parse=cli.share),
    ),
    examples=(
        "understudy filter --data=completions.jsonl --output=pairs.jsonl --verified",
        """understudy filter --data=answers.jsonl --output=best.jsonl --best --rewards='{"exact_match": 1.0}'""",
    ),
)


def main(argv: Sequence[str]) -> int:
    return COMMAND.run(argv, _filter)


def _filter(args: SimpleNamespace) -> None:
    _check(args)
    files.check_output(args.output, overwrite=args.overwrite)
    from research.sources import selection  # late: numpy and the readers of records take 0.2 s

    names = [field.name for field in dataclasses.fields(selection.Selection)]
    conditions = selection.Selection(**{name: getattr(args, name) for name in names})
    answers = selection.read(args.data)
    if args.rewards:
        answers = _judged(args, answers)
    elif conditions.by_reward and all(answer.reward is None for answer in answers):
        raise InputError(
            f"--data = {args.data}: has no rewards. Let `understudy score --reward` put them there, or give --rewards."
        )
    print(selection.select(answers, conditions, Path(args.output)), file=sys.stderr)


def _check(args: SimpleNamespace) -> None:
    """Raises InputError where flags don't go together."""
    by_reward = args.best or args.pairs or args.min_reward is not None
    if args.rewards and not by_reward:
        raise InputError("--rewards: nothing is chosen by them. Add --best, --pairs or --min_reward=X.")
    if args.pairs:
        for name, value in (("best", args.best), ("keep", args.keep < 1)):
            if value:
                raise InputError(f"--{name}: is of answers that are kept by themselves. Leave out it or --pairs.")


def _judged(args: SimpleNamespace, answers: Sequence[Any]) -> list[Any]:
    """The answers with their rewards by --rewards."""
    from research.rollouts import rewards
    from research.rollouts.rewards import judging  # both late, as above

    samples = [
        rewards.Sample(
            answer.record,
            str(answer.record.get("prompt", "")),
            answer.text,
            answer.tokens,
            "length" if args.ended and answer.tokens >= args.ended else "stop",
        )
        for answer in answers
    ]
    entries = rewards.load(args.rewards)
    if of_runs := [name for name, entry in entries.items() if entry.by_model]:
        raise InputError(
            f"--rewards: {of_runs[0]} is the reward of a model in a run. Let `understudy score --reward` write rewards "
            "of models into the file."
        )
    with judging.Judge(entries) as judge:
        judge.start()
        totals = judge(samples).total().tolist()
    return [answer._replace(reward=round(total, 6)) for answer, total in zip(answers, totals, strict=True)]
