"""Preference optimisation: a policy learns from which of two answers was preferred, and answers better.

    python -m research.main --config=experiments/preference.py:start --workdir=runs/start
    python -m research.main --config=experiments/preference.py:dpo --config.model.init_from=runs/start
    python -m research.main --config=experiments/preference.py:compare  # a study of dpo, kto, simpo and orpo
    python -m research.main --config=experiments/preference.py:noise    # a study, where many labels are wrong
    python -m research.main --config=experiments/preference.py:smollm2,dpo --config.model.init_from=MODEL \\
        --config.data.path=pairs.jsonl

on generated preferences, whose utility is planted. `:start` learns to answer as the preferred answers do, a tenth of
which was preferred by mistake; the others begin there. The study draws answers of all at a temperature of 1, and
reports their utility, how many are right, and how far from the start the policy has gone.

Cost: 0.37 M parameters; 39 s of CPU time for `:start`, 10 to 17 s for the others. Expect: answers of the start have a
mean utility of 1.24 and 0.64 are right; after `:dpo` 1.92 and 0.82, at a KL of 1.6 nats an answer.
"""

import functools
from typing import Any

from ml_collections import ConfigDict

from experiments import base
from research import config as config_lib
from research.errors import InputError
from research.studies import compare_report

TASK = "preferences:reverse/1"
FEW, MANY = 0.1, 0.3  # the shares of labels that are the wrong way round
MODEL = {"num_layers": 3, "d_model": 96, "num_heads": 4, "num_kv_heads": 4, "d_ff": 256}
WAYS: dict[str, dict[str, Any]] = {
    "dpo": {"kind": "sigmoid"},
    "kto": {"kind": "kto"},
    "simpo": {"kind": "simpo"},
    "orpo": {"kind": "orpo", "beta": 0.5},
    "cdpo": {"kind": "cdpo", "label_smoothing": MANY},
    "robust": {"kind": "robust", "label_smoothing": MANY},
}
ALONE = ("simpo", "orpo")  # without a reference
COMPARED, NOISY = ("dpo", "kto", "simpo", "orpo"), ("dpo", "cdpo", "robust")
RATES = {"dpo": 1e-4, "kto": 2e-4, "simpo": 1.5e-4, "orpo": 5e-4, "cdpo": 1e-4, "robust": 1e-4}
LARGER_RATE = 5e-6
AS_IT_BEGAN = {"of": "policy", "sync_every": 1_000_000}  # the reference where no model is named: in the debug form
METRICS = ("answers/utility", "answers/exact_match", "answers/kl", "answers/length")
NOISE_METRICS = ("eval/accuracy", "eval/margin", "eval/utility")
ANSWERS = "research.studies.answers"


def get_config(arg: str = ""):
    chosen = base.variants(arg, *WAYS, "start", "compare", "noise", "smollm2")
    alone = [name for name in ("start", "compare", "noise", *WAYS) if name in chosen]
    if len(alone) > 1 or ("smollm2" in chosen and chosen & {"start", "compare", "noise"}):
        clash = ",".join(sorted(chosen))
        raise InputError(f"--config=...:{clash}: a run has one way to learn; compare, noise and start stand alone.")
    config = base.get_config()
    config.steps, config.batch_size, config.seq_len = 100, 16, 128
    config.tokenizer.kind = "byte"
    config.optimizer.update(name="adamw", warmup_steps=10, schedule="cosine", weight_decay=0.0)
    config.checkpoint.update(every=0, keep_last=1)
    config.log.tensorboard = False
    if "smollm2" in chosen:
        _set_larger(config)
    else:
        config.model.update(MODEL)
        config.data.update(examples=12_000, path=f"{TASK}/{FEW}", eval_path=f"{TASK}/0")
        config.eval.update(every=100, batches=20, max_new_tokens=48)
    if "start" in chosen:
        config = _start(config)
    else:
        _set_way(config, alone[0] if alone and alone[0] in WAYS else "dpo", larger="smollm2" in chosen)
    if "debug" in chosen:
        base.debug(config)
    if chosen & {"compare", "noise"}:
        study = {"ways": COMPARED if "compare" in chosen else NOISY, "noise": "noise" in chosen, "seeds": 3}
        study |= {"start_steps": 400, "answers": 256, "store": ""}
        if "debug" in chosen:
            study |= {"seeds": 2, "start_steps": 2, "answers": 8}
        with config.unlocked():
            config.study = ConfigDict(study)
    return config


def finish(config, arg, overrides):
    base.finish(config, arg, overrides)
    chosen = base.variants(arg, *arg.split(","))
    needed = {"model.init_from"} if not chosen & {"start", "compare", "noise", "debug"} else set()
    needed |= {"model.init_from", "data.path"} if "smollm2" in chosen else set()
    for field in sorted(needed):
        section, name = field.split(".")
        if not config[section][name]:
            raise InputError(f"--config.{field}: is missing. Give it; see the experiment's docstring.")
    if config.model.init_from and "start" not in chosen:
        _begin_with(config, config.model.init_from, overrides)


def study(config, add):
    s = config.study

    def answers(name, model, start, seed):
        flags = {"model": model, "start": start, "data": f"{TASK}/0", "output": "{workdir}", "seed": seed}
        flags |= {"limit": s.answers, "max_new_tokens": config.eval.max_new_tokens}
        return add.command(f"answers-{name}-s{seed}", ANSWERS, flags).workdir

    reported: dict[str, list[str]] = {"start": [], **{way: [] for way in s.ways}}
    for seed in range(s.seeds):
        values = _start(config)
        values.seed = seed
        start = config.model.init_from or add.train(f"start-s{seed}", values).workdir
        if not s.noise:
            reported["start"].append(answers("start", start, start, seed))
        for way in s.ways:
            values = config.copy_and_resolve_references()
            values.seed = seed
            _set_way(values, way)
            _begin_with(values, start)
            if s.noise:
                values.data.path = f"{TASK}/{MANY}"
                values.eval.generate = s.answers
            run = add.train(f"{way}{'-noise' if s.noise else ''}-s{seed}", values).workdir
            reported[way].append(run if s.noise else answers(way, run, start, seed))
    runs = {way: workdirs for way, workdirs in reported.items() if workdirs}
    metrics, base = (NOISE_METRICS, "dpo") if s.noise else (METRICS, "start")
    return functools.partial(compare_report.report, runs, metrics, base=base)


def _start(config: ConfigDict) -> ConfigDict:
    """The run that the others begin with, from the config of one of these."""
    run = config.copy_and_resolve_references()
    run.steps = config.study.start_steps if "study" in config else 400
    run.objective, run.roles = {"terms": {"sft": 1.0}}, {}
    run.data.update(path=f"{TASK}/{FEW}", format="auto")
    run.optimizer.update(name="muon", learning_rate=6e-3, warmup_steps=max(1, run.steps // 20), weight_decay=0.1)
    run.eval.update(every=run.steps, generate=0)
    return run


def _set_way(config: ConfigDict, way: str, larger: bool = False) -> None:
    """Sets how a run learns; `larger`: it begins with a model that is named, which takes smaller steps."""
    config.optimizer.learning_rate = LARGER_RATE if larger else RATES[way]
    config.objective = {"terms": {"preference": WAYS[way]}}
    config.data.format = "unpaired" if way == "kto" else "auto"
    config.roles = {} if way in ALONE else {"reference": AS_IT_BEGAN}


def _set_larger(config: ConfigDict) -> None:
    """A model that is named, on pairs that are named."""
    config.steps, config.batch_size, config.seq_len = 100, 4, 512
    config.tokenizer.kind, config.data.path = "auto", ""
    config.eval.update(every=50, batches=40)


def _begin_with(config: ConfigDict, start: str, overrides=()) -> None:
    """Has the policy, and the reference where there is one, begin with a model."""
    defaults = config_lib.defaults()["model"]
    config.model.init_from = start
    config.model.update({name: defaults[name] for name in MODEL if f"model.{name}" not in overrides})
    if config.roles:
        config.roles = {"reference": {"init_from": start}}
