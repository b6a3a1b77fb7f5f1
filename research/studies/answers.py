"""Draws a model's answers to prompts, and says how good they are and how far it has moved from another model.

    python -m research.studies.answers --model=runs/dpo --start=runs/sft --data=preferences:reverse/0 --output=runs/a

A stage of studies: it writes answers.jsonl, and metrics.jsonl as a run has it, so that the reports of runs read it.
Metrics:

  answers/utility      the mean planted utility of the answers, where their prompts are generated preferences
  answers/exact_match  the share of right answers, where a verifier can tell
  answers/kl           nats of an answer: KL(model || start), the mean of log p(answer) - log p_start(answer)
  answers/length       tokens of an answer
  answers/ended        the share of answers that end before --max_new_tokens
  answers/reward       the mean reward that the model --reward gives them
  NAME/METRIC          what --task=KIND,name=NAME:DATA measures of the model, as `understudy evaluate` does
"""

import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np

from research import cli, files, loading
from research.cli import Flag
from research.devices import compilation
from research.evals import record_rewards, results
from research.evals.completions import make_responder
from research.evals.prompts import Prompt
from research.evals.scoring import BATCH_TOKENS, Example, make_token_scorer
from research.run.metrics import METRICS_FILE
from research.sources import entries, records, verification

COMMAND = cli.Command(
    "answers",
    __doc__,
    flags=(
        cli.MODEL,
        Flag("start", "the model that it began as", metavar="MODEL", parse=cli.path, required=True),
        Flag("data", "prompts: records with a prompt, or generated ones", metavar="DATA", required=True),
        Flag("output", "the folder that is written to", metavar="DIR", parse=cli.path, required=True),
        Flag("limit", "answer the first so many prompts", 256, metavar="N", parse=cli.whole(1)),
        Flag("max_new_tokens", "of an answer", 64, metavar="N", parse=cli.whole(1)),
        Flag("temperature", "divides the logits of what is drawn", 1.0, metavar="X", parse=cli.number),
        Flag("samples", "answers to each prompt", 1, metavar="N", parse=cli.whole(1)),
        Flag("reward", "a reward model, which judges the answers too", None, "none", "MODEL", cli.path),
        Flag("task", "a task of `understudy evaluate`, for the model", metavar="KIND:DATA", many=True),
        cli.SEED,
    ),
    examples=(
        "python -m research.studies.answers --model=runs/dpo --start=runs/sft --data=preferences:reverse/0 --output=a",
    ),
)
ANSWERS_FILE = "answers.jsonl"
_BATCH = 64
PROMPT_SEED = 0x7E57  # of generated prompts: none that training is likely to draw from


def main(argv: Sequence[str]) -> int:
    return COMMAND.run(argv, _answer)


def _answer(args: SimpleNamespace) -> None:
    compilation.use_compilation_cache()
    asked = [each for each in _read(args.data, args.limit) for _ in range(args.samples)]
    prompts = [Prompt(where, _question(record)) for where, record in asked]
    loaded = loading.load_model(args.model)
    responder = make_responder(
        loaded, {"temperature": args.temperature}, max_new_tokens=args.max_new_tokens, seed=args.seed
    )
    ids = responder.encode_all(prompts)
    answers = [each for some in responder.complete(prompts, _BATCH, ids=ids) for each in some]
    examples = [_example(before, completion.tokens) for before, (_, _, completion) in zip(ids, answers, strict=True)]
    ratios = _log_probs(loaded, examples) - _log_probs(loading.load_model(args.start), examples)
    stop = loaded.tokenizer.stop
    lines = []
    for i, ((_, record), (_, text, completion), ratio) in enumerate(zip(asked, answers, ratios, strict=True)):
        line = {"number": i // args.samples, "prompt": record["prompt"], "completion": text}
        line |= {"length": len(completion.tokens), "kl": float(ratio)}
        line["ended"] = float(completion.tokens[-1] in stop)
        lines.append(line | _judged(record, text))
    if args.reward:
        rewards = _rewards(args.reward, asked, [text for _, text, _ in answers])
        lines = [{**line, "reward": reward} for line, reward in zip(lines, rewards, strict=True)]
    metrics = {f"answers/{name}": statistics.fmean(line[name] for line in lines) for name in _numbers(lines[0])}
    metrics |= _measured(loaded, args.task)
    out = Path(args.output)
    out.mkdir(parents=True, exist_ok=True)
    files.write_bytes(out / ANSWERS_FILE, b"".join(map(files.json_line, lines)))
    files.write_bytes(out / METRICS_FILE, files.json_line({"step": 0, **metrics}))
    print("  ".join(f"{name} {value:.4g}" for name, value in metrics.items()), file=sys.stderr)


def _read(data: str, limit: int) -> list[tuple[str, dict[str, Any]]]:
    """The first `limit` records, and where each one is."""
    origin = entries.locate_flag(data, count=limit, seed=PROMPT_SEED)
    return [(where, records.parse(raw)) for (where, raw), _ in zip(origin.read(), range(limit), strict=False)]


def _question(record: Mapping[str, Any]) -> dict[str, Any]:
    """What is asked: a prompt that is a text or a list of messages."""
    prompt = record["prompt"]
    return {"prompt": prompt} if isinstance(prompt, str) else {"messages": prompt}


def _example(prompt: Sequence[int], answer: Sequence[int]) -> Example:
    """A prompt and its answer, of which the answer is scored."""
    return Example(np.array([*prompt, *answer], np.int32), np.arange(len(prompt) + len(answer)) >= len(prompt))


def _log_probs(loaded: loading.LoadedModel, examples: Sequence[Example]) -> np.ndarray:
    """log p of each answer."""
    with jax.set_mesh(loaded.mesh):
        return np.array([each.sum() for each in make_token_scorer(loaded.model)(loaded.params, examples)])


def _rewards(name: str, asked: Sequence[tuple[str, Mapping[str, Any]]], texts: Sequence[str]) -> list[float]:
    """What a reward model gives each answer: the mean of its members.

    Args:
      name: of the model.
      asked: where each prompt is, and its record.
      texts: the answers.
    """
    judge = loading.load_model(name, check=record_rewards.check_reward_model)
    generated = [
        {**_question(record), "completion": text, "tokens": (), "logprob": 0.0}
        for (_, record), text in zip(asked, texts, strict=True)
    ]
    answers, where = [record_rewards.read_answers(record) for record in generated], [where for where, _ in asked]
    documents = record_rewards.encode(answers, judge.tokenizer, judge.template, where)
    with jax.set_mesh(judge.mesh):
        values = record_rewards.HeadRewarder(judge).rewards([example for (example,) in documents])
    return values.mean(axis=1, dtype=np.float64).tolist()


def _measured(loaded: loading.LoadedModel, specs: Sequence[str]) -> dict[str, float]:
    """What tasks measure of a model."""
    with jax.set_mesh(loaded.mesh):
        template = loaded.template_for(None)
        measured = results.evaluate_tasks(loaded, specs, template=template, limit=0, batch_tokens=BATCH_TOKENS)
    return {f"{name}/{metric}": value for name, result in measured.items() for metric, value in result.metrics.items()}


def _judged(record: Mapping[str, Any], text: str) -> dict[str, float]:
    """How good an answer is, of generated preferences."""
    utility = verification.utility(record, text)
    if utility is None:
        return {}
    return {"utility": utility, "exact_match": float(verification.verify_record(record, text))}


def _numbers(line: Mapping[str, Any]) -> list[str]:
    """The fields that say something of an answer; `number` is that of its prompt."""
    return [name for name, value in line.items() if isinstance(value, int | float) and name != "number"]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
