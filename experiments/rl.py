"""Reinforcement learning: a policy that is right in two fifths of its answers learns from a verifier of them.

    python -m research.main --config=experiments/rl.py:start --workdir=runs/start
    python -m research.main --config=experiments/rl.py:grpo --config.model.init_from=runs/start
    python -m research.main --config=experiments/rl.py:compare  # a study of grpo, rloo, ppo and reinforce
    python -m research.main --config=experiments/rl.py:smollm2,grpo --config.model.init_from=MODEL \\
        --config.data.path=sums.jsonl --config.data.eval_path=held_out.jsonl

`:start` learns to sort letters from demonstrations of which most repeat the question in place of an answer. It sorts as
well as it has learned to, and answers as seldom as they do. More of the same can't mend that, and a reward for right
answers can. The others begin there: `:grpo`, `:dr_grpo`, `:dapo`, `:rloo`, `:ppo` with a critic, `:reinforce` without a
baseline, and `:online_dpo`, which compares the best and the worst answer to each prompt. The study, of grpo, rloo, ppo
and reinforce, has beside them the start trained on with as many tokens (sft).

Cost: a minute of CPU time for `:start`, half a minute to one for the others. Expect, of one seed: 0.42 of the start's
answers are right, 0.43 after more demonstrations, and 0.97 to 0.98 after 100 updates by any of grpo, rloo, ppo and
reinforce (0.955 to 0.978 after 50). The critic's explained variance is 0.72 when the policy begins to move.

Evaluations draw 4 answers to each of 256 new prompts: eval/right/avg@4 is the share that is right, and
eval/greedy/exact_match that of the likeliest answers.
"""

import functools
from typing import Any

from ml_collections import ConfigDict

from experiments import base
from research import config as config_lib
from research.errors import InputError
from research.rollouts.presets import ONLINE_DPO, PRESETS
from research.studies import compare_report

TASK = "tasks:sort_letters"
REPEATED = 0.6  # of the demonstrations
START = 1000  # steps
LONGEST = 20  # tokens of an answer: the question and its end
LARGER_LONGEST = 32  # of a model that is named: a sentence with a number
MODEL = {"num_layers": 3, "d_model": 96, "num_heads": 4, "num_kv_heads": 4, "d_ff": 256}
WAYS = ("grpo", "dr_grpo", "dapo", "rloo", "ppo", "reinforce", "online_dpo")
COMPARED = ("grpo", "rloo", "ppo", "reinforce")
METRICS = ("eval/right/avg@4", "eval/greedy/exact_match")
AS_IT_BEGAN = {"of": "policy", "sync_every": 1_000_000}  # the reference where no model is named: in the debug form


def get_config(arg: str = ""):
    chosen = base.variants(arg, *WAYS, "start", "compare", "smollm2")
    alone = [name for name in ("start", "compare", *WAYS) if name in chosen]
    if len(alone) > 1 or ("smollm2" in chosen and chosen & {"start", "compare"}):
        clash = ",".join(sorted(chosen))
        raise InputError(f"--config=...:{clash}: a run has one way to learn; compare and start stand alone.")
    config = base.get_config()
    config.seq_len, config.tokenizer.kind = 48, "byte"
    config.data.update(examples=20_000, pack=False)
    right = f"exact_match,name=right,samples=4,limit=256,max_new_tokens={LONGEST}:{TASK}"
    greedy = f"exact_match,name=greedy,limit=256,max_new_tokens={LONGEST}:{TASK}"
    config.eval.update(every=50, batches=5, show=0, tasks=(right, greedy))
    config.checkpoint.update(every=0, keep_last=1)
    config.log.tensorboard = False
    if "start" in chosen:
        config = _start(config, START)
    else:
        _set_way(config, alone[0] if alone and alone[0] in WAYS else "grpo")
    if "smollm2" in chosen:
        _set_larger(config)
    if "debug" in chosen:
        base.debug(config)
        config.eval.tasks = ()
        config.rollout.update(answers=4, max_new_tokens=LARGER_LONGEST if "smollm2" in chosen else LONGEST)
        config.rollout.prompts = 0 if config.rollout.pairs else 2
        config.seq_len = 160 if "smollm2" in chosen and config.rollout.pairs else config.seq_len
        if config.optimizer.groups:
            config.optimizer.groups = _groups(delay=1)
    if "compare" in chosen:
        study = {"seeds": 3, "start_steps": START, "sft_steps": 300, "store": ""}
        with config.unlocked():
            config.study = ConfigDict(
                study | ({"seeds": 2, "start_steps": 2, "sft_steps": 2} if "debug" in chosen else {})
            )
    return config


def finish(config, arg, overrides):
    base.finish(config, arg, overrides)
    chosen = base.variants(arg, *arg.split(","))
    needed = {"model.init_from"} if not chosen & {"start", "compare", "debug"} else set()
    needed |= {"model.init_from", "data.path", "data.eval_path"} if "smollm2" in chosen else set()
    for field in sorted(needed, key=("model.init_from", "data.path", "data.eval_path").index):
        section, name = field.split(".")
        if not config[section][name]:
            first = " `--config=rl:start --workdir=runs/start` makes one." if field == "model.init_from" else ""
            raise InputError(f"--config.{field}: is missing. Give it; see the experiment's docstring.{first}")
    if "smollm2" in chosen and not {"eval", "eval.tasks"} & set(overrides):
        longest = config.rollout.max_new_tokens
        greedy = f"exact_match,name=greedy,verifier=number,max_new_tokens={longest}:{config.data.eval_path}"
        config.eval.tasks = (greedy,)
    if config.model.init_from and not chosen & {"start", "smollm2"}:
        _begin_with(config, config.model.init_from, overrides)


def study(config, add):
    s, runs = config.study, {name: [] for name in ("start", "sft", *COMPARED)}
    for seed in range(s.seeds):
        values = _start(config, s.start_steps)
        values.seed = seed
        start = config.model.init_from or add.train(f"start-s{seed}", values).workdir
        runs["start"].append(start)
        for way in ("sft", *COMPARED):
            values = _start(config, s.sft_steps) if way == "sft" else config.copy_and_resolve_references()
            values.seed = seed
            if way != "sft":
                _set_way(values, way)
            _begin_with(values, start)
            runs[way].append(add.train(f"{way}-s{seed}", values).workdir)
    return functools.partial(compare_report.report, runs, METRICS, base="sft")


def _start(config: ConfigDict, steps: int) -> ConfigDict:
    """A run that learns from the demonstrations, from the config of any of these."""
    run = config.copy_and_resolve_references()
    run.steps, run.batch_size, run.objective, run.roles, run.rewards = steps, 32, {"terms": {"sft": 1.0}}, {}, {}
    defaults = config_lib.defaults()
    run.rollout.update(defaults["rollout"])
    run.advantage.update(defaults["advantage"])
    run.model.update(MODEL)
    source = {"path": TASK, "eval_path": TASK}
    run.data.update(path="", eval_path="", pack=True)
    run.data.sources = {
        "answered": {**source, "weight": 1 - REPEATED},
        "repeated": {**source, "weight": REPEATED, "fields": {"response": "prompt"}},
    }
    run.optimizer.update(defaults["optimizer"])
    run.optimizer.update(name="muon", learning_rate=3e-3, warmup_steps=min(20, steps // 2))
    run.eval.every = steps
    return run


def _set_way(config: ConfigDict, way: str) -> None:
    """Sets how a run learns from rewards."""
    if way == "online_dpo":
        _set_pairs(config)
        return
    preset = PRESETS[way]
    loss: dict[str, Any] = dict(preset.loss)
    if way == "dr_grpo":
        loss["budget"] = LONGEST
    config.steps, config.batch_size = 100, 128
    config.data.update(path=TASK, eval_path=TASK)
    config.model.update(MODEL)
    config.rewards = {"exact_match": 1.0}
    config.rollout.update(prompts=32, answers=8, max_new_tokens=LONGEST, **preset.rollout)
    config.advantage.update(preset.advantage)
    config.roles, config.objective = {}, {"terms": {"policy_gradient": loss}}
    if "kl_coef" in loss or "kl" in preset.advantage:
        config.roles = {"reference": AS_IT_BEGAN}
    config.optimizer.update(name="adamw", learning_rate=1e-4, warmup_steps=10, schedule="constant", weight_decay=0.0)
    if way == "ppo":
        config.objective = {"terms": {"policy_gradient": loss, "value": 0.5}}
        config.roles = {**config.roles, "critic": {**MODEL, "num_labels": 1}}
        config.optimizer.groups = _groups(delay=20)


def _set_pairs(config: ConfigDict) -> None:
    """The same of pairs of answers: a row has two, and `batch_size` counts rows."""
    _set_way(config, "grpo")
    config.seq_len, config.batch_size = 2 * config.seq_len, 32
    config.advantage.update(config_lib.defaults()["advantage"])
    config.rollout.update(prompts=64, **ONLINE_DPO.rollout)
    config.roles = {"reference": AS_IT_BEGAN}
    config.objective = {"terms": {"preference": dict(ONLINE_DPO.loss)}}


def _groups(delay: int) -> dict[str, dict[str, Any]]:
    """The critic learns for some steps before the policy moves, and faster."""
    return {
        "policy": {"match": "policy/.*", "delay_steps": delay},
        "critic": {"match": "critic/.*", "learning_rate": 5e-4},
    }


def _set_larger(config: ConfigDict) -> None:
    """A model that is named, on prompts that are named and ask for a number, with LoRA: the reference is the model
    without it."""
    pairs = config.rollout.pairs
    config.steps, config.batch_size, config.seq_len = 100, 8 if pairs else 32, 192 if pairs else 96
    config.tokenizer.kind, config.data.path, config.data.eval_path = "auto", "", ""
    config.rewards = {"exact_match": {"verifier": "number"}}
    config.adapter = {"kind": "lora", "rank": 16}
    config.optimizer.learning_rate = 2e-4
    config.rollout.update(prompts=8, answers=8, max_new_tokens=LARGER_LONGEST)
    if "budget" in config.objective["terms"].get("policy_gradient", {}):
        config.objective["terms"]["policy_gradient"]["budget"] = LARGER_LONGEST
    config.eval.update(every=50, batches=5, generate=0, tasks=())
    defaults = config_lib.defaults()["model"]
    config.model.update({name: defaults[name] for name in MODEL})
    if "reference" in config.roles:
        config.roles = {**config.roles, "reference": {"of": "policy", "adapter": False}}
    if "critic" in config.roles:
        config.roles = {**config.roles, "critic": {"of": "policy", "num_labels": 1}}


def _begin_with(config: ConfigDict, start: str, overrides=()) -> None:
    """Has the policy, and the reference where there is one, begin with a model."""
    defaults = config_lib.defaults()["model"]
    config.model.init_from = start
    config.model.update({name: defaults[name] for name in MODEL if f"model.{name}" not in overrides})
    for role, labels in (("reference", 0), ("critic", 1)):
        if role in config.roles:
            config.roles = {**config.roles, role: {"init_from": start, "num_labels": labels}}
