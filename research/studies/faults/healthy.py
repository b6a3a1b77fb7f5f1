"""Healthy runs of other settings: sizes, rates, batch sizes, optimizers, schedules, objectives, data and seeds."""

from collections.abc import Iterator, Mapping
from typing import Any

from research.studies.faults.setups import SEEDS

# Of each kind of run: settings that need programs of their own, and how many runs of each.
_WIDE = {"model.d_ff": 192, "model.d_model": 96, "model.num_heads": 6, "model.num_kv_heads": 6}
_TEXT: tuple[Mapping[str, Any], ...] = (
    {},
    {"optimizer.name": "muon", "optimizer.learning_rate": 2e-3, "batch_size": 8},
    {"optimizer.name": "lion", "optimizer.learning_rate": 1e-4, "optimizer.schedule": "linear"},
    {"seq_len": 128, "batch_size": 8, "ema_decay": 0.8, "optimizer.clip_norm": 0.0},
    {"microbatches": 2, "optimizer.schedule": "constant", "trainable": "layers/.*|final_norm/.*"},
    {
        "optimizer.name": "sgd",
        "optimizer.learning_rate": 0.05,
        "optimizer.momentum": 0.9,
        "optimizer.weight_decay": 0.0,
        "batch_size": 32,
    },
)
VARIATIONS: dict[str, tuple[tuple[Mapping[str, Any], ...], int]] = {
    "text": (_TEXT, 8),
    "sft": ((*_TEXT[:3], {"data.pack": False, "batch_size": 32}, _TEXT[4], _TEXT[5]), 8),
    "lora": (({}, {"adapter": {"kind": "lora", "rank": 4, "alpha": 8.0, "targets": "q|v"}}), 10),
    "scratch": (({}, {**_WIDE, "optimizer.name": "muon", "optimizer.learning_rate": 5e-3}), 8),
    "distill": (({}, {"objective": {"terms": {"distill": {"kind": "jsd"}}}}), 10),
    "preference": (({}, {"objective": {"terms": {"preference": {"kind": "ipo", "beta": 0.1}}}}), 9),
    "reward": (({}, {"batch_size": 16}), 8),
    "rl": (({},), 6),
    "critic": (({},), 4),
}
_RATES = (1.0, 0.5, 2.0, 1.0, 0.3)  # times the setting's


def runs(setup: str, part: str, base_rate: float) -> Iterator[tuple[str, dict[str, Any]]]:
    """The (title, values) of the healthy runs of one kind; a third as many to choose thresholds on as to test them.

    Args:
      setup: of setups.SETUPS.
      part: "dev" or "test".
      base_rate: the learning rate of the kind.
    """
    settings, count = VARIATIONS[setup]
    count = count if part == "test" else -(-count // 3)
    for number, values in enumerate(settings):
        rate = values.get("optimizer.learning_rate", base_rate)
        for i in range(count):
            own = {"seed": SEEDS[part] + 10 + i, "optimizer.learning_rate": rate * _RATES[(number + i) % len(_RATES)]}
            yield f"healthy-{number}-{i}", {**values, **own}
