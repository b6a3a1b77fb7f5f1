"""Healthy runs of other settings: sizes, rates, batch sizes, optimizers, schedules, objectives, data and seeds."""

from collections.abc import Iterator, Mapping
from typing import Any

from research.studies.faults.setups import SEEDS

Values = Mapping[str, Any]
_SGD = {
    "optimizer.name": "sgd",
    "optimizer.learning_rate": 0.05,
    "optimizer.momentum": 0.9,
    "optimizer.weight_decay": 0.0,
    "batch_size": 32,
}
_TEXT: tuple[Values, ...] = (
    {"optimizer.name": "muon", "optimizer.learning_rate": 2e-3, "batch_size": 8},
    {"optimizer.name": "lion", "optimizer.learning_rate": 1e-4, "optimizer.schedule": "linear"},
    {"seq_len": 128, "batch_size": 8, "ema_decay": 0.8, "optimizer.clip_norm": 0.0},
    {"microbatches": 2, "optimizer.schedule": "constant", "trainable": "layers/.*|final_norm/.*"},
    _SGD,
)
_WIDE = {"model.d_ff": 192, "model.d_model": 96, "model.num_heads": 6, "model.num_kv_heads": 6}
_DEEP = {"model.num_layers": 5, "model.d_model": 32, "model.num_heads": 2, "model.num_kv_heads": 1, "model.d_ff": 96}
_EXPERTS = {"model.num_experts": 4, "model.experts_per_token": 2}


def _lora(**options: Any) -> Values:
    return {"adapter": {"kind": "lora", **options}}


def _term(name: str, **options: Any) -> Values:
    return {"objective": {"terms": {name: options}}}


def _policy(**options: Any) -> Values:
    return _term("policy_gradient", **options)


# Of each kind of run settings that need programs of their own, beside the kind's.
VARIATIONS: dict[str, tuple[Values, ...]] = {
    "text": _TEXT,
    "sft": (
        *_TEXT[:2],
        {"data.pack": False, "batch_size": 32},
        *_TEXT[3:],
        _TEXT[2],
        _term("sft", label_smoothing=0.1),
        {"optimizer.schedule": "wsd", "optimizer.weight_decay": 0.0, "optimizer.b2": 0.99, "optimizer.clip_norm": 0.3},
        {"optimizer.name": "adafactor", "batch_size": 8, "seq_len": 96},
        {"optimizer.mu_dtype": "bfloat16", "optimizer.schedule": "inverse_sqrt", "batch_size": 12},
    ),
    "lora": (
        _lora(rank=4, alpha=8.0, targets="q|v"),
        _lora(rank=2, alpha=4.0),
        _lora(rank=16, alpha=16.0, dropout=0.1),
        _lora(rank=16, alpha=16.0, rslora=True) | {"optimizer.learning_rate": 1e-3},
        _lora(rank=8, alpha=16.0, dora=True) | {"batch_size": 8},
        _lora(rank=8, alpha=8.0, init="pissa") | {"optimizer.learning_rate": 1e-3, "optimizer.schedule": "linear"},
        _lora(rank=8, alpha=16.0, targets="mlp/.*") | {"seq_len": 128, "batch_size": 8, "optimizer.clip_norm": 0.0},
    ),
    "scratch": (
        {**_WIDE, "optimizer.name": "muon", "optimizer.learning_rate": 5e-3},
        _DEEP,
        _EXPERTS,
        {"model.mlp": "gelu", "model.norm": "layernorm", "batch_size": 32},
        {"seq_len": 128, "batch_size": 8, "optimizer.schedule": "wsd"},
        {"model.num_layers": 1, "optimizer.name": "lion", "optimizer.learning_rate": 5e-4},
        {"model.logit_softcap": 30.0, "model.tie_embeddings": False, "optimizer.weight_decay": 0.0},
    ),
    "distill": (
        _term("distill", kind="jsd"),
        _term("distill", kind="reverse_kl"),
        _term("distill", kind="forward_kl", temperature=2.0, scale_by_temperature=True),
        {"objective": {"terms": {"distill": {"weight": 0.8, "kind": "skewed_forward_kl"}, "sft": 0.2}}},
        _term("distill", kind="forward_kl") | {"optimizer.name": "muon", "batch_size": 8},
        _term("distill", kind="total_variation") | {"optimizer.schedule": "constant"},
    ),
    "preference": (
        _term("preference", kind="ipo", beta=0.1),
        _term("preference", kind="sigmoid", beta=0.3, label_smoothing=0.1),
        _term("preference", kind="hinge", beta=0.1),
        _term("preference", kind="sigmoid", beta=0.05) | {"batch_size": 16},
        _term("preference", kind="sigmoid", beta=0.1, sft=0.2) | {"optimizer.name": "lion"},
        {"optimizer.schedule": "linear", "optimizer.weight_decay": 0.1, "microbatches": 2},
    ),
    "reward": (
        {"batch_size": 16},
        _term("reward", centering=0.01),
        _term("reward", label_smoothing=0.1) | {"optimizer.schedule": "constant"},
        {"optimizer.name": "muon", "optimizer.weight_decay": 0.1},
        _lora(rank=8, alpha=16.0, also="head") | {"optimizer.learning_rate": 3e-3},
    ),
    "rl": (
        {"advantage.kind": "leave_one_out", "advantage.scale": "none", "optimizer.name": "muon"},
        {"rollout.temperature": 0.8, "rollout.answers": 4, "rollout.prompts": 32},
        _policy(kind="cispo") | {"advantage.scale": "batch", "batch_size": 32},
        {"advantage.kind": "batch", "advantage.whiten": "answers", "optimizer.clip_norm": 0.3},
    ),
    "critic": (
        {"advantage.lam": 0.9, "rollout.temperature": 0.9},
        {"advantage.whiten": "tokens", "batch_size": 32},
    ),
}
# How many runs there are of the kind's own settings, and of each of the others.
_COUNTS = {
    "text": (8, 8),
    "sft": (8, 3),
    "lora": (10, 2),
    "scratch": (4, 2),
    "distill": (10, 2),
    "preference": (9, 2),
    "reward": (8, 2),
    "rl": (4, 2),
    "critic": (4, 2),
}
_RATES = (1.0, 0.5, 2.0, 1.0, 0.3)  # times the setting's


def runs(setup: str, part: str, base_rate: float) -> Iterator[tuple[str, dict[str, Any]]]:
    """The (title, values) of the healthy runs of one kind; at most a third as many to choose thresholds on as to test
    them.

    Args:
      setup: of setups.SETUPS.
      part: "dev" or "test".
      base_rate: the learning rate of the kind.
    """
    for number, values in enumerate(({}, *VARIATIONS[setup])):
        rate = values.get("optimizer.learning_rate", base_rate)
        count = _COUNTS[setup][number > 0]
        for i in range(count if part == "test" else count // 3):
            own = {"seed": SEEDS[part] + 10 + i, "optimizer.learning_rate": rate * _RATES[(number + i) % len(_RATES)]}
            yield f"healthy-{number}-{i}", {**values, **own}
