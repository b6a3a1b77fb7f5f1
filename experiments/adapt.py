"""Adaptation: which way of changing a model suits a task, and what does it cost?

    python -m research.main --config=experiments/adapt.py:compare   # a study: all ways, over seeds
    python -m research.main --config=experiments/adapt.py:base --workdir=runs/base
    python -m research.main --config=experiments/adapt.py:dora --config.model.init_from=runs/base
    python -m research.main --config=experiments/adapt.py:smollm2,lora --config.model.init_from=MODEL \\
        --config.data.path=pairs.jsonl

A small model that has learned other tasks, to reverse words of 3 to 5 letters among them, is adapted to reverse those
of 6 to 11, in which it fails. The study looks for the best of three learning rates of each way with one seed, by the
loss of held-out rows, and compares all ways at theirs over seeds. With `:smollm2` a model that is named is adapted to
data that is named; `:smollm2,compare` does so in some ways.

Cost of `:compare`: 66 small runs, 9:30 of CPU time; 23:01 on 2 cores that others were using too. Expect, of new words
of 6 to 8 letters: full and LoRA all right; IA3, biases and a prefix from a text 0.7 to 0.8; norms 0.5; a prefix from 0
and prompts 0.1; a head none. docs/adaptation.md has the table, and one of `:smollm2,compare`: 15 runs of 16 steps of
4 x 64 tokens took 8:23 of CPU time, and show that it works, not which way is the best.
"""

import functools
import math
from typing import Any

from ml_collections import ConfigDict

from experiments import base
from research import config as config_lib
from research.errors import InputError
from research.studies import adapt_report
from research.studies.stages import finished

# Each way to adapt: what config.adapter is.
WAYS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"kind": "lora"},
    "lora_attention": {"kind": "lora", "targets": "attention/.*"},
    "dora": {"kind": "lora", "dora": True},
    "rslora": {"kind": "lora", "rslora": True},
    "ia3": {"kind": "ia3"},
    "prefix": {"kind": "prefix", "init": "zero"},
    "prefix_text": {"kind": "prefix", "init": "text"},
    "prompt": {"kind": "prompt"},
    "prompt_text": {"kind": "prompt", "init": "text"},
    "bias": {"kind": "bias"},
    "norms": {"kind": "norms"},
    "head": {"kind": "head"},
}
# The learning rates to look among; one run alone takes the middle one.
RATES = {
    "full": (3e-4, 1e-3, 3e-3),
    "lora": (3e-3, 1e-2, 3e-2),
    "lora_attention": (3e-3, 1e-2, 3e-2),
    "dora": (3e-3, 1e-2, 3e-2),
    "rslora": (1e-3, 3e-3, 1e-2),
    "ia3": (3e-2, 1e-1, 3e-1),
    "prefix": (3e-2, 1e-1, 3e-1),
    "prefix_text": (3e-2, 1e-1, 3e-1),
    "prompt": (1e-1, 3e-1, 1.0),
    "prompt_text": (1e-2, 3e-2, 1e-1),
    "bias": (1e-2, 3e-2, 1e-1),
    "norms": (3e-2, 1e-1, 3e-1),
    "head": (1e-2, 3e-2, 1e-1),
}
# The same for a model of 135 M parameters.
LARGER = {
    "full": (1e-5, 3e-5, 1e-4),
    "lora": (1e-4, 3e-4, 1e-3),
    "lora_attention": (1e-4, 3e-4, 1e-3),
    "dora": (1e-4, 3e-4, 1e-3),
    "rslora": (3e-5, 1e-4, 3e-4),
    "ia3": (1e-3, 3e-3, 1e-2),
    "prefix": (1e-3, 3e-3, 1e-2),
    "prefix_text": (1e-3, 3e-3, 1e-2),
    "prompt": (1e-2, 3e-2, 1e-1),
    "prompt_text": (1e-2, 3e-2, 1e-1),
    "bias": (3e-4, 1e-3, 3e-3),
    "norms": (3e-4, 1e-3, 3e-3),
    "head": (3e-5, 1e-4, 3e-4),
}
MODEL = {"num_layers": 3, "d_model": 128, "num_heads": 4, "num_kv_heads": 4, "d_ff": 256, "tie_embeddings": False}
SHORT, LONG = "tasks:reverse/2", "tasks:reverse/3"
OTHERS = "tasks:copy/2,tasks:upper/2,tasks:sort_letters/2,tasks:delete_letter/2,tasks:reverse/1"
METRICS = ("eval/short/exact_match", "eval/long/exact_match", "eval/loss")


def get_config(arg: str = ""):
    chosen = base.variants(arg, *WAYS, "base", "compare", "smollm2")
    alone = [name for name in ("base", "compare", *WAYS) if name in chosen]
    if len(alone) > 1 or {"base", "smollm2"} <= chosen:
        clash = ",".join(sorted(chosen))
        raise InputError(f"--config=...:{clash}: a run has one way to adapt, compare has its own, and base has none.")
    config = base.get_config()
    config.objective = {"terms": {"sft": 1.0}}
    config.data.pack = False  # a row is an example, whatever stands in front of it: all ways see the same
    config.optimizer.update(name="adamw", schedule="cosine", warmup_steps=10, weight_decay=0.0)
    config.checkpoint.update(every=0, keep_last=1)
    config.log.tensorboard = False
    larger = "smollm2" in chosen
    (_set_larger if larger else _set_small)(config)
    ways = ("full", "lora", "prefix_text", "prompt_text", "norms") if larger else tuple(WAYS)
    study = {
        "ways": ways,
        "seeds": 1 if larger else 3,
        "metrics": ("eval/accuracy", "eval/loss") if larger else METRICS,
        "text": "Answer the question." if larger else "reverse: abcdef",  # what prefix_text and prompt_text begin with
        "tokens": 20 if larger else 16,  # of prefixes and prompts
        "longer_rows": larger,  # rows have room for a prompt besides, so that it displaces no example that is as long
        "rates": ConfigDict(LARGER if larger else RATES),
        "base_steps": 500,
        "store": "",
    }
    with config.unlocked():
        config.study = ConfigDict(study)
    if "base" in chosen:
        config = _base(config)
    elif "compare" not in chosen:
        way = (alone or ["lora"])[0]
        _set_way(config, way, config.study.rates[way][1])
    if "debug" in chosen:
        base.debug(config)
        config.eval.tasks = tuple(task.replace("limit=128", "limit=8") for task in config.eval.tasks)
        config.study.update(base_steps=2, seeds=2)
    if "compare" not in chosen:
        with config.unlocked():
            del config.study
    return config


def finish(config, arg, overrides):
    chosen = base.variants(arg, *arg.split(","))
    needed = {"model.init_from"} if not chosen & {"base", "compare", "debug"} else set()
    needed |= {"model.init_from", "data.path"} if "smollm2" in chosen else set()
    for field in sorted(needed):
        section, name = field.split(".")
        if not config[section][name]:
            raise InputError(f"--config.{field}: is missing. Give it; see the experiment's docstring.")
    if config.model.init_from:
        _leave_shape(config, overrides)


def study(config, add):
    s = config.study
    start = config.model.init_from or add.train("base", _base(config)).workdir

    def run(way, rate, seed, **options):
        values = config.copy_and_resolve_references()
        values.seed, values.model.init_from = seed, start
        _leave_shape(values)
        _set_way(values, way, rate)
        return add.train(f"{way}-{rate:g}-s{seed}", values, **options)

    tried = {way: {rate: run(way, rate, 0, may_diverge=True) for rate in s.rates[way]} for way in s.ways}
    yield  # until it is known which rate is the best
    ways = []
    for way, stages in tried.items():
        losses = {rate: _held_out_loss(stage) for rate, stage in stages.items()}
        rate = min(losses, key=losses.__getitem__)
        if losses[rate] == math.inf:
            raise InputError(f"--config.study.rates.{way} = {s.rates[way]}: diverges at each. Give lower ones.")
        ways.append(adapt_report.Way(way, rate, losses, [run(way, rate, seed).workdir for seed in range(s.seeds)]))
    return functools.partial(adapt_report.report, ways, s.metrics)


def _held_out_loss(stage) -> float:
    """Of a run in the search; infinite where it diverged, which is the worst."""
    end = finished(stage)
    loss = math.inf if "diverged" in end else end["metrics"]["eval/loss"]
    return loss if math.isfinite(loss) else math.inf


def _set_small(config: ConfigDict) -> None:
    """The small model and its task."""
    config.steps, config.batch_size, config.seq_len = 200, 16, 56
    config.data.path, config.data.examples = f"{SHORT},{LONG}", 4_000
    config.tokenizer.kind = "byte"
    config.model.update(MODEL)
    config.eval.update(every=200, batches=8)
    words = {"short": SHORT, "long": LONG}
    config.eval.tasks = tuple(f"exact_match,limit=128,max_new_tokens=16,name={name}:{words[name]}" for name in words)


def _set_larger(config: ConfigDict) -> None:
    """A model that is named, on data that is named."""
    config.steps, config.batch_size, config.seq_len = 100, 4, 256
    config.data.path = ""
    config.eval.update(every=100, batches=20)


def _base(config: ConfigDict) -> ConfigDict:
    """The run that makes the model to be adapted, from the config of what adapts it."""
    run = config.copy_and_resolve_references()
    run.steps, run.batch_size, run.seq_len = config.study.base_steps, 16, 128
    run.data.update(path=OTHERS, pack=True, examples=40_000)
    run.optimizer.update(name="muon", learning_rate=6e-3, warmup_steps=max(1, run.steps // 10), weight_decay=0.1)
    run.eval.every = run.steps
    return run


def _set_way(config: ConfigDict, way: str, rate: float) -> None:
    """Sets how a run adapts."""
    adapter = dict(WAYS[way])
    if adapter.get("kind") in ("prefix", "prompt"):
        adapter["tokens"] = config.study.tokens
    if adapter.get("kind") == "prompt" and config.study.longer_rows:
        config.seq_len += config.study.tokens
    if adapter.get("init") == "text":
        adapter["text"] = config.study.text
    config.adapter = adapter
    config.optimizer.learning_rate = rate


def _leave_shape(config: ConfigDict, overrides=()) -> None:
    """Leaves the architecture to the model that a run begins with."""
    defaults = config_lib.defaults()["model"]
    config.model.update({name: defaults[name] for name in MODEL if f"model.{name}" not in overrides})
