"""What a config alone says, as signals."""

import math
from collections.abc import Mapping
from typing import Any

from research.config import Config

_SCALE_FREE = ("adamw", "muon", "lion", "adafactor")  # whose step doesn't depend on the gradient's scale


def of_config(config: Config) -> dict[str, float]:
    """What a config alone says:
    setup/adapter, setup/init_from, setup/shuffle: 1 or 0.
    setup/adapter_scale: alpha over rank of a LoRA; over the root of the rank with rslora.
    setup/scale_free: 1 where the optimizer's step doesn't depend on the scale of the gradient; setup/adam: where it is
      Adam's.
    setup/logit_softcap: of the policy's logits, where it has one.
    setup/terms: how many the objective has.
    setup/temperature, setup/temperature_scaled, setup/beta, setup/kl_coef: the largest such option of a term; whether
      one is multiplied by the temperature squared.
    """
    options = _options(config.objective)
    signals = {
        "setup/adapter": float(bool(config.adapter)),
        "setup/init_from": float(bool(config.model.init_from)),
        "setup/shuffle": float(config.data.shuffle),
        "setup/scale_free": float(config.optimizer.name in _SCALE_FREE),
        "setup/adam": float(config.optimizer.name == "adamw"),
        "setup/terms": float(len(config.objective.get("terms", {}))),
        "setup/temperature_scaled": float(any(each.get("scale_by_temperature") for each in options)),
    }
    optimizer = config.optimizer
    for name in ("learning_rate", "weight_decay", "clip_norm", "eps", "warmup_steps"):
        signals[f"config/optimizer.{name}"] = float(getattr(optimizer, name))
    signals["config/ema_decay"] = config.ema_decay
    if config.model.logit_softcap:
        signals["setup/logit_softcap"] = config.model.logit_softcap
    for name in ("temperature", "beta", "kl_coef"):
        values = [float(each[name]) for each in options if isinstance(each.get(name), int | float)]
        if values:
            signals[f"setup/{name}"] = max(values)
    if config.adapter.get("kind") == "lora":
        rank, alpha = config.adapter.get("rank", 16), config.adapter.get("alpha", 32.0)
        signals["setup/adapter_scale"] = alpha / (math.sqrt(rank) if config.adapter.get("rslora") else rank)
    return signals


def _options(objective: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The options of each term, wherever they are written, with the kind of the term as `objective`."""
    options = []
    for name, value in objective.get("terms", {}).items():
        own = dict(value) if isinstance(value, Mapping) else {}
        options.append({"objective": name, **dict(objective.get(name, {})), **own})
    return options
