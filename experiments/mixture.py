"""Mixture weights: how much should each source of data count, and can a small model tell?

    python -m research.main --config=experiments/mixture.py     # a study
    python -m research.main --config=experiments/mixture.py:bandit --config.data.examples=20000   # one run

Five generated tasks of which some are learned at once and some hardly. `uniform` draws them equally often. `doremi`
draws them at the weights that DoReMi finds in two stages with small models: a reference at equal weights, then a proxy
that weighs what it is worse at. `bandit` learns while it trains which of them to draw. All train a larger model for as
many steps of as many tokens.
"""

import functools

from ml_collections import ConfigDict

from experiments import base, select
from research.errors import InputError
from research.studies import compare_report
from research.studies.stages import finished

SOURCES = {
    "copy": "tasks:copy/2",
    "reverse": "tasks:reverse/1",
    "sort": "tasks:sort_letters/2",
    "sum": "tasks:addition/2",
    "upper": "tasks:upper/1",
}


def get_config(arg: str = ""):
    chosen = base.variants(arg, "bandit")
    config = base.get_config()
    config.steps, config.batch_size, config.seq_len = 200, 8, 64
    config.objective = {"terms": {"sft": 1.0}}
    config.data.path, config.data.examples = "", 4_000
    config.data.sources = _at({name: 1.0 for name in SOURCES})
    config.tokenizer.kind = "byte"
    config.model.update(select.LARGE)
    config.optimizer.update(name="muon", learning_rate=5e-3, warmup_steps=20, weight_decay=0.1)
    config.eval.update(every=200, batches=40)
    config.checkpoint.update(every=0, keep_last=1)
    config.log.tensorboard = False
    if "bandit" in chosen:
        config.objective = {"terms": {"bandit": {"names": tuple(SOURCES)}}}
    else:
        with config.unlocked():
            config.study = ConfigDict({"seeds": 3, "small_steps": 200, "store": ""})
    if "debug" in chosen:
        base.debug(config)
        if "bandit" not in chosen:
            config.study.update(seeds=2, small_steps=2)
    return config


def study(config, add):
    s = config.study
    if s.seeds < 1:
        raise InputError(f"--config.study.seeds = {s.seeds}: must be at least 1.")
    even = {name: 1.0 for name in SOURCES}

    def run(name, seed, weights, objective=None, **fields):
        values = config.copy_and_resolve_references()
        values.seed = seed
        values.data.sources = _at(weights)
        if objective:
            values.objective = {"terms": objective}
        values.update_from_flattened_dict(fields)
        return add.train(f"{name}-s{seed}", values)

    small = {"steps": s.small_steps, "eval.every": s.small_steps}
    small |= {f"model.{name}": value for name, value in select.SMALL.items()}
    reference = run("reference", 0, even, **small).workdir
    roles = {"reference": {"init_from": reference}}
    proxy = run("proxy", 0, even, {"doremi": {"weights": even}}, roles=ConfigDict(roles), **small)
    seeds = range(s.seeds)
    runs = {"uniform": [run("uniform", seed, even).workdir for seed in seeds]}
    bandit = {"bandit": {"names": tuple(SOURCES)}}
    runs["bandit"] = [run("bandit", seed, even, bandit).workdir for seed in seeds]
    yield  # until the proxy has its weights
    found = {name: round(finished(proxy)["metrics"][f"eval/average/{name}"], 4) for name in SOURCES}
    runs["doremi"] = [run("doremi", seed, found).workdir for seed in seeds]
    print("weights by doremi: " + ", ".join(f"{name} {weight:.3f}" for name, weight in found.items()))
    metrics = ["eval/nll", *(f"eval/loss/{name}" for name in SOURCES)]
    return functools.partial(compare_report.report, runs, metrics, base="uniform")


def _at(weights):
    """data.sources at some weights."""
    return {name: {"path": SOURCES[name], "weight": float(weight)} for name, weight in weights.items()}
