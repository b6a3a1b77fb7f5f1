"""Reward models: one number for an answer, learned from which of two answers was preferred.

    python -m research.main --config=experiments/reward.py           # a tenth of the labels is the wrong way round
    python -m research.main --config=experiments/reward.py:noisy     # three tenths are
    python -m research.main --config=experiments/reward.py:plain     # a loss that doesn't know; or :smoothed
    python -m research.main --config=experiments/reward.py:compare   # a study of all these, over seeds
    python -m research.main --config=experiments/reward.py:smollm2 --config.model.init_from=MODEL \\
        --config.data.path=pairs.jsonl

on generated preferences, whose utility is planted: `eval/accuracy` and `eval/calibration_error` are of held-out labels,
of which as many are the wrong way round as in training, and `eval/utility/accuracy` is of labels that are all right.

Cost: 0.13 M parameters, 0.82 M tokens; 25 s of CPU time. Expect: accuracy 0.90 (more can't be expected of labels
of which a tenth is wrong), of right labels 0.998, calibration error 0.01; `:plain` learns as much, with a
calibration error of 0.11. docs/preferences.md says why.
"""

import functools

from ml_collections import ConfigDict

from experiments import base
from research.errors import InputError
from research.studies import compare_report

TASK = "preferences:reverse"
FEW, MANY = 0.1, 0.3  # the shares of labels that are the wrong way round
MODEL = {"num_layers": 2, "d_model": 64, "num_heads": 4, "num_kv_heads": 4, "d_ff": 192}
METRICS = ("eval/accuracy", "eval/utility/accuracy", "eval/calibration_error")
# The ways of the study: the share of labels that is the wrong way round, and the options of reward.
WAYS: dict[str, tuple[float, dict[str, float]]] = {
    "10-flipped": (FEW, {"flipped": FEW}),
    "10-plain": (FEW, {}),
    "30-plain": (MANY, {}),
    "30-smoothed": (MANY, {"label_smoothing": MANY}),
    "30-flipped": (MANY, {"flipped": MANY}),
}


def get_config(arg: str = ""):
    chosen = base.variants(arg, "noisy", "plain", "smoothed", "compare", "smollm2")
    alone, others = chosen & {"compare", "smollm2"}, chosen & {"noisy", "plain", "smoothed"}
    if len(alone) > 1 or (alone and others) or {"plain", "smoothed"} <= chosen:
        clash = ",".join(sorted(chosen))
        raise InputError(
            f"--config=...:{clash}: compare and smollm2 stand alone, and plain and smoothed are two losses."
        )
    config = base.get_config()
    config.steps, config.batch_size, config.seq_len = 400, 16, 128
    config.tokenizer.kind = "byte"
    config.model.num_labels = 1
    config.optimizer.update(name="muon", learning_rate=6e-3, warmup_steps=20, schedule="cosine", weight_decay=0.01)
    config.eval.update(every=200, batches=100)
    config.checkpoint.update(every=0, keep_last=1)
    config.log.tensorboard = False
    flip = MANY if "noisy" in chosen else FEW
    if "smollm2" in chosen:
        _set_larger(config)
    else:
        config.model.update(MODEL)
        config.data.examples = 12_000
        limit = 40 if "debug" in chosen else 1000
        config.eval.tasks = (f"best_of,limit={limit},name=utility:{TASK}/0",)
        option = "label_smoothing" if "smoothed" in chosen else "flipped"
        _set_way(config, flip, {} if "plain" in chosen else {option: flip})
    if "debug" in chosen:
        base.debug(config)
    if "compare" in chosen:
        with config.unlocked():
            config.study = ConfigDict({"seeds": 2 if "debug" in chosen else 3, "store": ""})
    return config


def finish(config, arg, overrides):
    base.finish(config, arg, overrides)
    if "smollm2" in base.variants(arg, *arg.split(",")):
        for section, name in (("model", "init_from"), ("data", "path")):
            if not config[section][name]:
                raise InputError(f"--config.{section}.{name}: is missing. Give it; see the experiment's docstring.")


def study(config, add):
    def run(way, seed):
        values = config.copy_and_resolve_references()
        values.seed = seed
        _set_way(values, *WAYS[way])
        return add.train(f"{way}-s{seed}", values).workdir

    runs = {way: [run(way, seed) for seed in range(config.study.seeds)] for way in WAYS}
    return functools.partial(compare_report.report, runs, METRICS)


def _set_way(config: ConfigDict, flip: float, options: dict[str, float]) -> None:
    """Sets what a small model learns: pairs, of whose labels a share is flipped, likewise in its evaluation."""
    path = f"{TASK}/{flip}"
    config.data.update(path=path, eval_path=path)
    config.objective = {"terms": {"reward": options}}


def _set_larger(config: ConfigDict) -> None:
    """A model that is named, on pairs that are named."""
    config.objective = {"terms": {"reward": {"centering": 0.01}}}
    config.steps, config.batch_size, config.seq_len = 100, 4, 512
    config.tokenizer.kind, config.data.path = "auto", ""
    config.optimizer.update(name="adamw", learning_rate=2e-5, warmup_steps=10, weight_decay=0.0)
    config.eval.update(every=50, batches=40)
