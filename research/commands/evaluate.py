"""Evaluates a model: understudy evaluate --model=WORKDIR --task=choice:arc.jsonl --task=perplexity:x.txt

A task is KIND[,OPTION=VALUE...]:DATA, and --task may come several times:

  perplexity:x.jsonl                           text, prompt + response, messages or tokens
  choice:x.jsonl                               {"question", "choices": [...], "answer": text, number from 0, or letter}
  exact_match,verifier=number:x.jsonl          prompt + response or question + answer, or messages
  exact_match,max_new_tokens=16:tasks:reverse  generated, each with its verifier

Options of all: name, template, limit. Of exact_match: verifier (task: that of the record's task, else exact; exact;
number: the last number; contains), max_new_tokens, batch_size.

--lm_eval=TASK,TASK runs tasks of EleutherAI's lm-evaluation-harness (pip install -e '.[lm-eval]').
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from research import cli
from research.commands.score import add_model_flags, parse_flags
from research.devices import sharding
from research.errors import InputError

Metrics = Mapping[str, float]


def main(argv: Sequence[str]) -> int:
    return cli.run(lambda: _run(_parse(argv)))


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = cli.make_parser("evaluate", __doc__)
    add = parser.add_argument
    add_model_flags(parser)
    add("--task", action="append", default=[], help="see above; can be repeated")
    add("--lm_eval", default="", metavar="TASK,...", help="tasks, groups or tags of lm-evaluation-harness")
    add("--include_path", metavar="DIR", help="of --lm_eval: a folder with more task files (.yaml)")
    add("--num_fewshot", type=int, help="of --lm_eval: examples before each question; default: the task's own")
    add("--limit", type=int, default=0, help="only the first so many records of each task")
    add("--output", metavar="FILE.json", help="write the results here, and each record's beside it, FILE.samples.jsonl")
    args = parse_flags(parser, argv)
    if not args.model:
        raise InputError("--model: is missing. Give the workdir of a run.")
    if not args.task and not args.lm_eval:
        raise InputError("--task: is missing. Give --task=KIND:DATA, or --lm_eval=TASK.")
    if args.limit < 0:
        raise InputError(f"--limit = {args.limit}: must be at least 0; 0 takes all.")
    if args.output and (not args.output.endswith(".json") or not Path(args.output).parent.is_dir()):
        raise InputError(f"--output = {args.output}: must be a .json in a folder that exists. Name another file.")
    return args


def _run(args: argparse.Namespace) -> None:
    from research.evals import lm_eval_adapter, tasks

    for spec in args.task:
        tasks.parse(spec)
    if args.lm_eval:
        lm_eval_adapter.import_lm_eval()

    from research import loading
    from research.run import run  # last, because it takes long to import

    run.use_compilation_cache()
    loaded = loading.load_model(args.model, step=args.step, ema=args.ema, mesh=sharding.make_mesh(args.mesh))
    model, params, tokenizer = loaded.model, loaded.params, loaded.tokenizer
    results: dict[str, Metrics] = {}
    counts: dict[str, int] = {}
    samples: list[dict[str, Any]] = []
    with jax.set_mesh(loaded.mesh):
        loading = {"limit": args.limit, "batch_tokens": args.batch_tokens}
        template = args.template or loaded.template
        evaluations = [tasks.load(spec, model, tokenizer, template, **loading) for spec in args.task]
        names = [evaluation.name for evaluation in evaluations]
        for name in names:
            if names.count(name) > 1:
                raise InputError(
                    f"--task: {names.count(name)} are named {name!r}. Tell them apart: KIND,name=NAME:DATA."
                )
        for name, evaluate in evaluations:
            print(f"{name} ...", file=sys.stderr)
            results[name], judged = evaluate(params, jax.random.key(0))
            counts[name] = len(judged)
            samples += [{"evaluation": name, **sample._asdict()} for sample in judged]
        if args.lm_eval:
            # The harness's own default is no template, and its published figures are without.
            template = args.template or "plain"
            lm = lm_eval_adapter.make_lm(model, params, tokenizer, template=template, batch_tokens=args.batch_tokens)
            out = lm_eval_adapter.evaluate(
                lm,
                args.lm_eval.split(","),
                include_path=args.include_path,
                num_fewshot=args.num_fewshot,
                limit=args.limit,
                chat=template != "plain",
            )
            for name, metrics in out["results"].items():
                judged = out["samples"].get(name, [])
                name = f"lm_eval/{name}"
                results[name], counts[name] = lm_eval_adapter.plain_metrics(metrics), len(judged)
                samples += [{"evaluation": name, **sample} for sample in judged]
    print(table(results, counts))
    if args.output:
        _write(Path(args.output), args, results, counts, samples)


def table(results: Mapping[str, Metrics], counts: Mapping[str, int]) -> str:
    """A line for each task's metric: value, standard error, 95 % interval (normal), number of records."""
    rows = [("task", "metric", "value", "stderr", "95 % interval", "records")]
    for task, metrics in results.items():
        for name, value in metrics.items():
            if name.endswith("_stderr"):
                continue
            error = metrics.get(f"{name}_stderr")
            spread = (
                ("", "")
                if error is None
                else (f"{error:.4f}", f"{value - 1.96 * error:.4f} to {value + 1.96 * error:.4f}")
            )
            rows.append(
                (
                    task,
                    name,
                    f"{value:.4f}" if value % 1 or error is not None else f"{value:g}",
                    *spread,
                    f"{counts[task]}",
                )
            )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def _write(path: Path, args: argparse.Namespace, results, counts, samples) -> None:
    text = {
        "model": args.model,
        "command": vars(args),
        "results": {name: {**metrics, "records": counts[name]} for name, metrics in results.items()},
    }
    path.write_text(json.dumps(text, indent=1, ensure_ascii=False, default=str) + "\n", encoding="utf-8")
    with open(path.with_suffix(".samples.jsonl"), "w", encoding="utf-8") as file:
        file.writelines(json.dumps(sample, ensure_ascii=False, default=str) + "\n" for sample in samples)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
