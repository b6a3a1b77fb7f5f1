"""Evaluates a model on tasks: accuracy, exact match, perplexity, with standard errors.

A task is KIND[,OPTION=VALUE...]:DATA, and --task may come several times:

  perplexity:x.jsonl                           text, prompt + response, messages or tokens
  pseudo_perplexity:x.jsonl                    the same, of a model that reads both ways, such as BERT
  choice:x.jsonl                               {"question", "choices": [...], "answer": text, number from 0, or letter}
  exact_match,verifier=number:x.jsonl          prompt + response or question + answer, or messages
  exact_match,max_new_tokens=16:tasks:reverse  generated, each with its verifier
  exact_match,samples=8:tasks:reverse          the same of 8 answers to each prompt: avg@8, pass@2, pass@4, pass@8
  infill,span=1:x.jsonl                        {"prefix", "middle", "suffix"}, or text, of which words are left out
  best_of:x.jsonl                              {"prompt", "chosen": [...], "rejected": [...]}, to a reward model

Options of all: name, limit. Of all but infill: template. Of both perplexities: split=paragraph, with which a blank line
ends a record (else a .txt is cut into documents of 16 KiB). Of exact_match: verifier (task: that of the record's task,
else exact; exact; number: the last number; contains), max_new_tokens, batch_size, samples, temperature (1 where there
are several samples, else 0). Of infill: form (auto, psm, spm, sentinel, left: the prefix alone, mask: of encoders),
max_new_tokens, batch_size; of texts: span (words left out, N or MIN-MAX), context (the most words shown on either
side).

--lm_eval=TASK,TASK runs tasks of EleutherAI's lm-evaluation-harness (pip install -e '.[lm-eval]').
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from research import cli, files
from research.cli import Flag
from research.errors import InputError

COMMAND = cli.Command(
    "evaluate",
    __doc__,
    flags=(
        cli.MODEL,
        cli.STEP,
        cli.EMA,
        cli.ADAPTER,
        Flag("task", "a task, as above", metavar="KIND:DATA", many=True),
        Flag("lm_eval", "tasks, groups or tags of lm-evaluation-harness", (), "none", "TASK,...", cli.words),
        Flag(
            "include_path",
            "of --lm_eval: a folder with more task files (.yaml)",
            metavar="DIR",
            parse=cli.path,
            of=("lm_eval",),
        ),
        Flag(
            "num_fewshot",
            "of --lm_eval: examples before each question",
            shown="the task's own",
            metavar="N",
            parse=cli.whole(0),
            of=("lm_eval",),
        ),
        Flag("max_records", "only the first N records of each task; 0 takes all", 0, metavar="N", parse=cli.whole(0)),
        Flag(
            "output",
            "write the results here, and each record's beside it, FILE.samples.jsonl",
            metavar="FILE.json",
            parse=cli.path,
        ),
        cli.OVERWRITE,
        cli.TEMPLATE,
        cli.SERVERS,
        cli.MESH,
        cli.BATCH_TOKENS,
    ),
    examples=(
        "understudy evaluate --model=runs/sft --task=exact_match,max_new_tokens=16:tasks:reverse --max_records=64",
        "understudy evaluate --model=runs/sft --task=choice:arc.jsonl --task=perplexity:x.txt --output=results.json",
        "understudy evaluate --model=runs/fim --task=infill,span=1,name=word:x.txt --task=infill,span=5:x.txt",
    ),
    renamed={"checkpoint": "model", "limit": "max_records", "tasks": "task"},
)


def main(argv: Sequence[str]) -> int:
    return COMMAND.run(argv, _evaluate)


def _evaluate(args: SimpleNamespace) -> None:
    if not args.task and not args.lm_eval:
        raise InputError("--task: is missing. Give --task=KIND:DATA, or --lm_eval=TASK.")
    if args.output and not args.output.endswith(".json"):
        raise InputError(f"--output = {args.output}: must be a .json. Name another file.")
    outputs = (Path(args.output), Path(args.output).with_suffix(".samples.jsonl")) if args.output else ()

    # Late: jax and the models take 1 s, which --help and a wrong flag needn't wait for.
    import jax

    from research import loading
    from research.devices import compilation, sharding
    from research.evals import lm_eval_adapter, results, tasks
    from research.evals import served as serving

    data = [tasks.parse(spec)[2] for spec in args.task]
    _check_served(args)
    for output in outputs:
        files.check_apart(output, data)
    for output in outputs:
        files.check_output(output, overwrite=args.overwrite)
    if args.lm_eval:
        lm_eval_adapter.import_lm_eval()
    compilation.use_compilation_cache()
    loaded = loading.load_model(
        args.model,
        step=args.step,
        ema=args.ema,
        mesh=sharding.make_mesh(args.mesh),
        adapter=args.adapter,
        check=functools.partial(_check_kind, args),
    ).with_adapter()
    common = {"limit": args.max_records, "batch_tokens": args.batch_tokens}
    with jax.set_mesh(loaded.mesh):
        template = loaded.template_for(args.template)
        served = {"make": serving.Servers(args.servers).make_generate} if args.servers else {}
        measured = results.evaluate_tasks(loaded, args.task, template=template, **common, **served)
        if args.lm_eval:
            # The harness's own default is no template, and its published figures are without.
            harness = results.Harness(args.lm_eval, args.include_path, args.num_fewshot)
            measured |= results.evaluate_harness(loaded, harness, template=args.template or "plain", **common)
    print(results.table(measured))
    if args.output:
        results.write(
            Path(args.output),
            args.model,
            {name: getattr(args, name) for name in vars(args) if name not in ("given", "overwrite")},
            measured,
        )


def _check_served(args: SimpleNamespace) -> None:
    """Raises InputError where servers would have nothing to do with a task."""
    from research.evals import tasks  # late, as above

    unserved = [spec for spec in args.task if tasks.parse(spec)[0] not in tasks.SERVED]
    unserved += [f"--lm_eval={','.join(args.lm_eval)}"] if args.lm_eval else []
    if args.servers and unserved:
        raise InputError(
            f"--servers = {','.join(args.servers)}: write answers, and {unserved[0]} is computed here, with all of the "
            f"model. Servers are for tasks of the kind {', '.join(tasks.SERVED)}; evaluate the others by themselves."
        )


def _check_kind(args: SimpleNamespace, config: Any, name: str) -> None:
    """Raises InputError where the model is of another kind than a task's."""
    from research.evals import tasks  # late, as above

    for spec in args.task:
        tasks.check_kind(spec, config, f"--task={spec}: {name}")
    if args.lm_eval:
        config.check_language_model(name)
