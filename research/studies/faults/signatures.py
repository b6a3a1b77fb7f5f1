"""Signatures of faults: in which direction a fault moves what is measured, beside a healthy run.

They are of runs of another program, a character model in PyTorch (docs/planted_faults.md), and are looked for in ours.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

# Columns of those measurements -> our signal of the same.
SIGNALS = {
    "train_loss_first": "loss.first",
    "train_loss_last10": "loss.last",
    "eval_ce_after": "eval/loss.end",
    "grad_norm_median": "grad_norm.median",
    "grad_norm_max_over_median": "grad_norm.max_over_median",
    "grad_norm_last_over_first": "grad_norm.last_over_first",
    "update_ratio_median": "update_ratio.median",
    "fraction_params_changed": "parameters/changed",
    "param_norm_ratio": "param_norm.last_over_first",
    "trainable_fraction": "setup/trained_share",
    "labelled_fraction": "supervised_fraction.mean",
    "lr_max": "learning_rate.max",
    "nonfinite_grad_steps": "nonfinite.mean",
    "unique_batches": "unique_batches",
    "clipped_steps_fraction": "clipped.mean",
    "logit_entropy_last": "probe/entropy",
    "future_leak": "probe/future_leak",
}
# Where the objective of a faulty run isn't the cross-entropy of the next token, that is computed again.
AGAIN = ("label_shift_double", "label_no_shift", "teacher_worse_than_student")
# Faults whose healthy run is of another kind: there all was trained, as in the healthy run of the measurements.
BESIDE = {"lora_both_zero": "sft"}
# Beside the healthy run: "zero"; "low", at most 0.8 of it; "high", at least 1.2 times it; "same", from a third to three
# times it; "all", at least 0.95 of all.
Direction = str
SIGNATURES: dict[str, dict[str, Direction]] = {
    "lr_zero_schedule": {"lr_max": "zero", "update_ratio_median": "zero", "grad_norm_median": "same"},
    "warmup_longer_than_run": {"lr_max": "low", "update_ratio_median": "low", "grad_norm_median": "same"},
    "lr_too_small": {"lr_max": "low", "update_ratio_median": "low", "grad_norm_median": "same"},
    "lr_too_high": {"train_loss_last10": "high", "update_ratio_median": "high", "param_norm_ratio": "high"},
    "frozen_all": {"grad_norm_median": "zero", "update_ratio_median": "zero", "fraction_params_changed": "zero"},
    "optimizer_holds_stale_params": {
        "grad_norm_median": "same",
        "update_ratio_median": "zero",
        "fraction_params_changed": "zero",
        "lr_max": "same",
    },
    "only_norms_trainable": {"trainable_fraction": "low", "grad_norm_median": "low", "update_ratio_median": "low"},
    "all_labels_masked": {"labelled_fraction": "zero", "grad_norm_median": "zero", "fraction_params_changed": "zero"},
    "almost_all_labels_masked": {"labelled_fraction": "low", "grad_norm_median": "high"},
    "label_shift_double": {"train_loss_first": "high", "train_loss_last10": "high", "eval_ce_after": "high"},
    "label_no_shift": {"train_loss_first": "high", "train_loss_last10": "low", "eval_ce_after": "high"},
    "grad_not_zeroed": {"grad_norm_last_over_first": "high", "grad_norm_median": "high", "train_loss_last10": "high"},
    "clip_too_small_sgd": {"update_ratio_median": "low", "clipped_steps_fraction": "all", "grad_norm_median": "same"},
    "bf16_underflow": {"fraction_params_changed": "low", "update_ratio_median": "low", "grad_norm_median": "same"},
    "adam_eps_too_big": {"update_ratio_median": "low", "grad_norm_median": "same", "lr_max": "same"},
    "weight_decay_too_big": {"param_norm_ratio": "low", "train_loss_last10": "high", "update_ratio_median": "high"},
    "sorted_data_order": {"eval_ce_after": "high"},
    "same_batch_every_step": {"unique_batches": "low", "train_loss_last10": "low", "grad_norm_last_over_first": "low"},
    "contradictory_duplicates": {"train_loss_last10": "high", "eval_ce_after": "high"},
    "random_labels": {"train_loss_first": "high", "train_loss_last10": "high", "logit_entropy_last": "high"},
    "dropout_too_high": {"train_loss_first": "high", "train_loss_last10": "high"},
    "saturated_attention": {"grad_norm_max_over_median": "high", "update_ratio_median": "low"},
    "dead_mlp_zero_init_both": {"train_loss_first": "high", "fraction_params_changed": "low"},
    "lora_both_zero": {"grad_norm_median": "zero", "fraction_params_changed": "zero", "trainable_fraction": "low"},
    "tokenizer_mismatch": {"train_loss_first": "high", "train_loss_last10": "high"},
    "no_causal_mask": {"future_leak": "high", "train_loss_last10": "low", "train_loss_first": "high"},
    "nan_batches_skipped": {"nonfinite_grad_steps": "high", "fraction_params_changed": "zero"},
    "one_exploding_batch": {"grad_norm_max_over_median": "high", "train_loss_last10": "high"},
    "teacher_worse_than_student": {"eval_ce_after": "high", "train_loss_last10": "low"},
    "loss_divided_twice": {"train_loss_first": "low", "grad_norm_median": "low", "update_ratio_median": "low"},
}


def moved(value: float, healthy: float, direction: Direction) -> bool:
    """Whether a number lies in a direction from that of a healthy run. NaN lies in none."""
    if math.isnan(value):
        return False
    if direction == "zero":
        return abs(value) <= 1e-12
    if direction == "all":
        return value >= 0.95
    if direction == "low":
        return value <= 0.8 * healthy
    if direction == "high":
        return value > 0 if healthy == 0 else value >= 1.2 * healthy
    return healthy / 3 <= value <= healthy * 3


def signal_of(column: str, fault: str) -> str:
    """Our signal of what a column measured."""
    return "probe/ce_recomputed" if column == "eval_ce_after" and fault in AGAIN else SIGNALS[column]


def directions(signals: Mapping[str, float], healthy: Mapping[str, float], fault: str) -> dict[str, bool | None]:
    """For each column of a fault's signature, whether our signals lie in its direction; None where one is missing."""
    made: dict[str, bool | None] = {}
    for column, direction in SIGNATURES[fault].items():
        name = signal_of(column, fault)
        known = name in signals and (name in healthy or direction in ("zero", "all"))
        made[column] = moved(signals[name], healthy.get(name, math.nan), direction) if known else None
    return made


def table(lines: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """For each run of a fault with a signature: where each column should lie, where ours does, and whether it does so.

    Args:
      lines: of trials.jsonl, healthy runs among them: a fault is compared with the first of its kind and part.
    """
    healthy = {}
    for line in lines:
        if line["cause"] == "healthy":
            healthy.setdefault((line["part"], line["setup"]), signals(line))
    rows = [["planted", "run", "signature", "ours (healthy)", "reproduced"]]
    for line in lines:
        beside = healthy.get((line["part"], BESIDE.get(line["cause"], line["setup"])))
        if line["cause"] not in SIGNATURES or beside is None:
            continue
        own, columns = signals(line), SIGNATURES[line["cause"]]
        found = directions(own, beside, line["cause"])
        ours = [f"{_shown(own.get(name))} ({_shown(beside.get(name))})" for name in _names(line["cause"])]
        expected = [f"{column} {direction}" for column, direction in columns.items()]
        share = f"{sum(map(bool, found.values()))} of {len(found)}"
        rows.append([line["cause"], f"{line['setup']}-{line['part']}", "; ".join(expected), "; ".join(ours), share])
    return rows


def signals(line: Mapping[str, Any]) -> dict[str, float]:
    """What was measured of a run after its last step."""
    return {name: float(value) for name, value in line["after"].items()}


def _names(fault: str) -> list[str]:
    return [signal_of(column, fault) for column in SIGNATURES[fault]]


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
