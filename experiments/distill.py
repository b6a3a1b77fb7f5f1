"""Distillation: does a small model learn more from a larger one than from the data alone?

    python -m research.main --config=experiments/distill.py         # on text
    python -m research.main --config=experiments/distill.py:tasks   # on prompts; also on the teacher's answers
                                                                    # ("sequence") and on its own ("on_policy")
    python -m research.main --config=experiments/distill.py:tasks,weak  # weak to strong: the teacher is the smaller one

A study: a teacher is trained, then students, each way over seeds. It ends with held-out loss (and exact match) of each
way to train; where the teacher is the weaker one, with the share of the gap recovered as well. `study.teacher` may name
a model that exists instead, with the student's tokenizer.

Expect: on text, held-out loss 4.94 alone, 4.68 from the teacher (4.21); on prompts, exact match 0.87 alone, 0.92 on
policy.
"""

import functools

from ml_collections import ConfigDict

from experiments import base
from research.studies import compare_report

TEACHER = {"num_layers": 4, "d_model": 192, "num_heads": 6, "num_kv_heads": 6, "d_ff": 576}
STUDENT = {"num_layers": 2, "d_model": 64, "num_heads": 4, "num_kv_heads": 4, "d_ff": 192}

# Each way to train a student: the terms of its objective, their options, and what else differs.
TEXT_STUDENTS = {
    "alone": {"terms": {"next_token": 1.0}},
    "forward_kl": {"terms": {"distill": 1.0}, "distill": {"kind": "forward_kl", "on": "all"}},
    "mixed": {"terms": {"distill": 0.5, "next_token": 0.5}, "distill": {"kind": "forward_kl", "on": "all"}},
    "jsd": {"terms": {"distill": 1.0}, "distill": {"kind": "jsd", "beta": 0.5, "on": "all"}},
}
TASK_STUDENTS = {
    "alone": {"terms": {"sft": 1.0}},
    "forward_kl": {"terms": {"distill": 1.0}, "distill": {"kind": "forward_kl"}},
    "sequence": {"terms": {"sft": 1.0}},  # on the teacher's answers, those that end
    "on_policy": {
        "terms": {"distill": 1.0},
        "distill": {"kind": "reverse_kl"},
    },  # from `alone`; half of the rows its own
}


def get_config(arg: str = ""):
    variants = base.variants(arg, "tasks", "weak")
    tasks, weak = "tasks" in variants, "weak" in variants
    config = base.get_config()  # of a student
    config.batch_size = 16
    config.seq_len = 64 if tasks else 128
    config.steps = 600 if tasks else 300
    config.model.update(TEACHER if weak else STUDENT)
    config.optimizer.update(name="muon", learning_rate=3e-3, warmup_steps=30, weight_decay=0.1)
    config.eval.update(every=100, batches=1)
    config.checkpoint.update(every=0, keep_last=1)
    config.log.tensorboard = False
    if tasks:
        config.data.update(template="chat", pack=False)
    study = {
        "data": "tasks:copy,tasks:reverse,tasks:upper,tasks:sort_letters" if tasks else "builtin:python_docs",
        "test_records": 256 if tasks else 50,
        "teacher": "",  # a model that exists, with the student's tokenizer
        "teacher_model": STUDENT if weak else TEACHER,
        "teacher_steps": 200 if weak else 600,
        "teacher_learning_rate": 3e-3,
        "students": tuple(TASK_STUDENTS if tasks else TEXT_STUDENTS),
        "seeds": 3,
        "tasks": tasks,
        "weak": weak,
        "store": "",
    }
    with config.unlocked():
        config.study = ConfigDict(study)
    if "debug" in variants:
        config.steps, config.eval.every, config.optimizer.warmup_steps, config.data.max_records = 2, 1, 1, 50
        config.study.update(teacher_steps=2, seeds=1, test_records=8)
        config.study.students = tuple(
            way for way in config.study.students if way != "sequence"
        )  # nothing would be left
    return config


def study(config, add):
    s, ways = config.study, TASK_STUDENTS if config.study.tasks else TEXT_STUDENTS
    flags = {"data": s.data, "parts": f"test:{s.test_records},train", "examples": 2000, "output": "{workdir}"}
    files = add.command("split", "split", flags).workdir
    train, test = f"{files}/train.jsonl", f"{files}/test.jsonl"
    evals = (f"perplexity,name=test:{test}",)
    metrics = ["eval/test/loss"]
    if s.tasks:
        evals += (f"exact_match,name=answers,max_new_tokens=16:{test}",)
        metrics.append("eval/answers/exact_match")

    def run(seed, data, objective, **changes):
        values = config.copy_and_resolve_references()
        values.seed, values.data.path, values.eval.tasks, values.objective = seed, data, evals, objective
        values.update_from_flattened_dict(changes)
        return values

    # The tokenizer is the teacher's: whoever is to be compared with it, or to learn from it, has it.
    teacher = s.teacher
    if not teacher:
        terms = {"terms": {"sft" if s.tasks else "next_token": 1.0}}
        values = run(0, train, terms, **{f"model.{k}": v for k, v in s.teacher_model.items()}, steps=s.teacher_steps)
        values.optimizer.learning_rate = s.teacher_learning_rate
        values.tokenizer.update(kind="byte" if s.tasks else "bpe", vocab_size=2048)
        teacher = add.train("teacher", values).workdir
    runs = {} if s.teacher else {"teacher": [teacher]}
    for way in s.students:
        data, changes = train, {"tokenizer.kind": teacher}
        if way == "sequence":
            data = _answers(add, teacher, train)
        if "distill" in ways[way]["terms"]:
            changes["roles"] = {"teacher": {"init_from": teacher}}
        runs[way] = []
        for seed in range(s.seeds):
            if way == "on_policy":  # what it writes must be worth judging: it begins where `alone` ends
                alone = add.train(f"alone-s{seed}", run(seed, train, ways["alone"], **{"tokenizer.kind": teacher}))
                changes |= {"model.init_from": alone.workdir, "steps": max(1, config.steps // 2)}
                changes |= {"optimizer.learning_rate": 1e-3, "rollout.share": 0.5, "rollout.max_new_tokens": 16}
            runs[way].append(add.train(f"{way}-s{seed}", run(seed, data, ways[way], **changes)).workdir)
    gap = ("teacher", "alone") if s.weak and "alone" in s.students and not s.teacher else None
    return functools.partial(compare_report.report, runs, metrics, gap=gap)


def _answers(add, teacher, prompts):
    """What the teacher answers to each prompt, without what was cut off."""
    flags = {"model": teacher, "data": prompts, "max_new_tokens": 16, "batch_size": 64}
    answers = add.command("generate", "generate", {**flags, "output": "{workdir}/completions.jsonl"}).workdir
    flags = {"data": f"{answers}/completions.jsonl", "ended": 16, "output": "{workdir}/pairs.jsonl"}
    return f"{add.command('filter', 'filter', flags).workdir}/pairs.jsonl"
