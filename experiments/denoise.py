"""Self-supervision: a model guesses hidden words, restores corrupted text, or fills in middles.

    python -m research.main --config=experiments/denoise.py:mlm     # masked words, seen from both sides
    python -m research.main --config=experiments/denoise.py:prefix  # what follows a prefix that is read whole
    python -m research.main --config=experiments/denoise.py:span    # T5's span corruption, by a prefix LM
    python -m research.main --config=experiments/denoise.py:ul2     # UL2's mixture of denoisers
    python -m research.main --config=experiments/denoise.py:fim     # next tokens, with half of the middles moved last

on the English inside Python. Without a variant it is next-token prediction, to compare with. `grammar` beside one takes
generated programs, whose middles are determined by what is around them, and a smaller model over bytes:

    python -m research.main --config=experiments/denoise.py:fim,grammar
    python -m research.main --config=experiments/denoise.py:compare  # a study: all six on these programs, over seeds
"""

import functools
from typing import Any

from ml_collections import ConfigDict

from experiments import base
from research.errors import InputError
from research.studies import compare_report

finish = base.finish

# Each way to learn from a text: what differs in the config.
WAYS: dict[str, dict[str, Any]] = {
    "next_token": {"terms": {"next_token": 1.0}},
    "mlm": {"terms": {"masked": 1.0}, "model": {"causal": False}},
    "prefix": {"terms": {"prefix_lm": 1.0}, "model": {"prefix": True}},
    "span": {
        "terms": {"prefix_lm": {"split": "given"}},
        "model": {"prefix": True},
        "view": {"kind": "denoise", "form": "spans"},
    },
    "ul2": {
        "terms": {"prefix_lm": {"split": "given"}},
        "model": {"prefix": True},
        "view": {"kind": "denoise", "mixture": "ul2", "modes": False},  # an infilling prompt names no mode
    },
    "fim": {"terms": {"next_token": 1.0}, "view": {"kind": "fim", "rate": 0.5}},
}
# How each is asked for a middle of the grammar.
FORMS = {"next_token": "left", "prefix": "left", "mlm": "mask", "span": "sentinel", "ul2": "sentinel", "fim": "spm"}
METRICS = ("eval/text/loss", "eval/middle/exact_match", "eval/character/exact_match")


def get_config(arg: str = ""):
    chosen = base.variants(arg, *WAYS, "grammar", "compare")
    ways = [way for way in WAYS if way in chosen]
    if len(ways) > 1 or (ways and "compare" in chosen):
        clash = ",".join([*ways, *chosen & {"compare"}])
        raise InputError(f"--config=...:{clash}: a run has one way to learn, and compare has all. Leave one.")
    config = base.get_config()
    config.steps = 400
    config.batch_size = 8
    config.seq_len = 256
    config.data.path = ""
    config.data.sources = {"text": {"path": "builtin:python_docs"}}
    config.tokenizer.update(kind="bpe", vocab_size=2048)
    config.model.update(num_layers=4, d_model=128, num_heads=4, num_kv_heads=4, d_ff=384)
    config.optimizer.update(name="muon", learning_rate=3e-3, warmup_steps=50, schedule="cosine", weight_decay=0.1)
    config.eval.update(every=200, batches=20)
    config.checkpoint.update(every=0, keep_last=1)
    if chosen & {"grammar", "compare"}:
        config.steps = 1000
        config.data.examples = 20_000
        config.data.sources = {"text": {"path": "grammar:functions"}}
        config.tokenizer.kind = "byte"
        config.model.update(num_layers=3, d_ff=256)
        config.optimizer.learning_rate = 6e-3
        config.eval.every = 500
    limit = 8 if "debug" in chosen else 256
    _set_way(config, ways[0] if ways else "next_token", limit)
    if "debug" in chosen:
        base.debug(config)
    if "compare" in chosen:
        config.log.tensorboard = False
        with config.unlocked():
            config.study = ConfigDict({"ways": tuple(WAYS), "seeds": 3, "limit": limit, "store": ""})
    return config


def study(config, add):
    def run(way, seed):
        values = config.copy_and_resolve_references()
        values.seed = seed
        _set_way(values, way, config.study.limit)
        return values

    runs = {
        way: [add.train(f"{way}-s{seed}", run(way, seed)).workdir for seed in range(config.study.seeds)]
        for way in config.study.ways
    }
    return functools.partial(compare_report.report, runs, METRICS)


def _set_way(config: ConfigDict, way: str, limit: int) -> None:
    """Sets how a run learns; and of grammars, what it is asked of so many programs that it hasn't seen: to predict them
    from left to right, and to fill in middles of any length and of one character."""
    config.objective = {"terms": WAYS[way]["terms"]}
    config.model.update(WAYS[way].get("model", {}))
    path = config.data.sources["text"]["path"]
    config.data.sources = {"text": {"path": path, "view": WAYS[way].get("view", {})}}
    if path.startswith("grammar:"):
        infill = f"infill,limit={limit},form={FORMS[way]}"
        tasks = (f"{infill},name=middle:{path}", f"{infill},name=character:{path}/1")
        read = f"perplexity,limit={limit},name=text:{path}"
        config.eval.tasks = tasks if way == "mlm" else (read, *tasks)
