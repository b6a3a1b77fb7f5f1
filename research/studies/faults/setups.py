"""The kinds of runs that faults are planted in, as values of a config: of small models, some dozens of steps."""

import copy
from collections.abc import Mapping
from typing import Any

from research import config as config_lib
from research.config import Config
from research.studies.faults.files import KNOWN

STEPS = 60  # of a run that is diagnosed
PLANNED = 75  # that its schedule is for: it is diagnosed before its end, where the learning rate is 0
SHAPES = {
    "dev": {"num_layers": 2, "d_model": 64, "num_heads": 4, "num_kv_heads": 4, "d_ff": 128},
    "test": {"num_layers": 3, "d_model": 48, "num_heads": 4, "num_kv_heads": 2, "d_ff": 160},
}
SEEDS = {"dev": 0, "test": 1000}
LONGEST = 12  # tokens of an answer
# What runs begin with: the file that it learns from, the objective, and how many steps.
STARTS: dict[str, tuple[str, str, int]] = {
    "text": ("before", "next_token", 400),
    "tasks": ("known", "sft", 250),
    "weak": ("known", "sft", 30),
    "teacher": ("tasks", "sft", 300),
    "pairs": ("pairs", "sft", 150),
    "skilled": ("known", "sft", 250),
}
# Answers that are rewarded are to be right now and then, not always; the model of `test` learns more slowly.
SKILLED_STEPS = {"dev": 250, "test": 350}
Values = dict[str, Any]


def parse(values: Values) -> Config:
    """A config of the fields that are set, by dotted names; the others have their defaults."""
    whole = config_lib.defaults()
    for name, value in values.items():
        *sections, field = name.split(".")
        section = whole
        for each in sections:
            section = section[each]
        section[field] = copy.deepcopy(value)
    return config_lib.parse(whole)


def start(name: str, part: str, folder: str) -> Values:
    """The run of a model that others begin with.

    Args:
      name: of STARTS.
      part: "dev" or "test".
      folder: of the data.
    """
    file, objective, steps = STARTS[name]
    steps = SKILLED_STEPS[part] if name == "skilled" else steps
    values = _common(part, folder) | {
        "steps": steps,
        "objective": {"terms": {objective: 1.0}},
        "data.path": f"{folder}/{file}.jsonl",
        "data.eval_path": "",
        "optimizer.learning_rate": 5e-3,
        "optimizer.warmup_steps": max(1, steps // 20),
        "optimizer.name": "muon",
        "eval.every": steps,
        **{f"model.{field}": value for field, value in SHAPES[part].items()},
    }
    if name == "pairs":
        values |= {"seq_len": 128, "batch_size": 8}
    return values


def setup(name: str, part: str, folder: str, starts: Mapping[str, str]) -> Values:
    """The config of a healthy run.

    Args:
      name: of SETUPS.
      part: "dev" or "test".
      folder: of the data.
      starts: of STARTS -> the workdir of that run.
    """
    return _common(part, folder) | SETUPS[name](folder, starts, part)


def _common(part: str, folder: str) -> Values:
    return {
        "seed": SEEDS[part],
        "steps": PLANNED,
        "batch_size": 16,
        "seq_len": 64,
        "tokenizer.kind": "byte",
        "mesh.data": 1,
        "optimizer.name": "adamw",
        "optimizer.learning_rate": 1e-3,
        "optimizer.warmup_steps": 5,
        "optimizer.weight_decay": 0.1,
        "eval.every": 0,
        "checkpoint.every": 0,
        "checkpoint.keep_last": 1,
        "log.tensorboard": False,
        "log.every": 1,
        "data.cache_dir": f"{folder}/cache",
    }


def _begin(starts: Mapping[str, str], name: str) -> Values:
    return {"model.init_from": starts[name], "tokenizer.kind": "auto"}


def _text(folder: str, starts: Mapping[str, str], part: str) -> Values:
    return {"objective": {"terms": {"next_token": 1.0}}, "data.path": f"{folder}/text.jsonl", **_begin(starts, "text")}


def _sft(folder: str, starts: Mapping[str, str], part: str) -> Values:
    data = {"data.path": f"{folder}/tasks.jsonl", "data.eval_path": f"{folder}/eval.jsonl"}
    return {"objective": {"terms": {"sft": 1.0}}, **data, **_begin(starts, "tasks")}


def _scratch(folder: str, starts: Mapping[str, str], part: str) -> Values:
    shape = {f"model.{field}": value for field, value in SHAPES[part].items()}
    terms = {"objective": {"terms": {"next_token": 1.0}}, "data.path": f"{folder}/text.jsonl"}
    return {**terms, **shape, "optimizer.learning_rate": 3e-3}


def _lora(folder: str, starts: Mapping[str, str], part: str) -> Values:
    adapter = {"adapter": {"kind": "lora", "rank": 8, "alpha": 16.0}, "optimizer.learning_rate": 3e-3}
    return {**_sft(folder, starts, part), **adapter, "optimizer.weight_decay": 0.0}


def _distill(folder: str, starts: Mapping[str, str], part: str) -> Values:
    terms = {"distill": {"weight": 0.5, "kind": "forward_kl"}, "sft": 0.5}
    return {
        **_sft(folder, starts, part),
        "objective": {"terms": terms},
        "roles": {"teacher": {"init_from": starts["teacher"]}},
    }


def _preference(folder: str, starts: Mapping[str, str], part: str) -> Values:
    return {
        "objective": {"terms": {"preference": {"kind": "sigmoid", "beta": 0.1}}},
        "data.path": f"{folder}/pairs.jsonl",
        "data.eval_path": f"{folder}/pairs_eval.jsonl",
        "seq_len": 128,
        "batch_size": 8,
        "roles": {"reference": {"init_from": starts["pairs"]}},
        "optimizer.learning_rate": 1e-4,
        "optimizer.weight_decay": 0.0,
        **_begin(starts, "pairs"),
    }


def _reward(folder: str, starts: Mapping[str, str], part: str) -> Values:
    values = _preference(folder, starts, part)
    reward = {"objective": {"terms": {"reward": 1.0}}, "roles": {}, "model.num_labels": 1}
    return {**values, **reward, "optimizer.learning_rate": 1e-3}


def _rl(folder: str, starts: Mapping[str, str], part: str) -> Values:
    task = f"tasks:{KNOWN[part][1]}"
    policy = {"kind": "ppo", "clip_low": 0.2, "clip_high": 0.2}
    return {
        "objective": {"terms": {"policy_gradient": policy}},
        "rewards": {"exact_match": 1.0},
        "data.path": task,
        "data.eval_path": task,
        "data.examples": 2000,
        "data.pack": False,
        "seq_len": 48,
        "batch_size": 64,
        "rollout.prompts": 16,
        "rollout.answers": 8,
        "rollout.max_new_tokens": LONGEST,
        "optimizer.learning_rate": 3e-4,
        "optimizer.weight_decay": 0.0,
        "optimizer.schedule": "constant",
        **_begin(starts, "skilled"),
    }


def _critic(folder: str, starts: Mapping[str, str], part: str) -> Values:
    policy = {"kind": "ppo", "clip_low": 0.2, "clip_high": 0.2}
    groups = {
        "policy": {"match": "policy/.*", "delay_steps": 10},
        "critic": {"match": "critic/.*", "learning_rate": 2e-3},
    }
    return {
        **_rl(folder, starts, part),
        "objective": {"terms": {"policy_gradient": policy, "value": 0.5}},
        "advantage.kind": "critic",
        "advantage.scale": "none",
        "roles": {"critic": {"init_from": starts["skilled"], "num_labels": 1}},
        "optimizer.groups": groups,
    }


SETUPS = {
    "text": _text,
    "sft": _sft,
    "scratch": _scratch,
    "lora": _lora,
    "distill": _distill,
    "preference": _preference,
    "reward": _reward,
    "rl": _rl,
    "critic": _critic,
}
