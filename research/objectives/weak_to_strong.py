"""Weak-to-strong generalisation: a classifier learns from a weaker one's labels, and isn't to copy its mistakes.

Burns et al., arXiv:2312.09390. The losses and their sources are in ops/class_losses.py.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from research.errors import InputError, did_you_mean
from research.objectives import classify
from research.objectives.types import Batch, Forward, LossOut, Objective
from research.ops import class_losses
from research.ops.class_losses import RunningThresholds, ThresholdSums
from research.sources.tokenizers import Tokenizer

_FIELD = "objective.weak_to_strong"
# Loss -> its options and their defaults; it is the function of this name in ops/class_losses.py.
LOSSES: dict[str, dict[str, Any]] = {
    "cross_entropy": {"label_smoothing": 0.0},
    "hard_cross_entropy": {},
    "forward_kl": {},
    "reverse_kl": {"log_zero": class_losses.LOG_ZERO},
    "reverse_cross_entropy": {"log_zero": class_losses.LOG_ZERO},
    "symmetric_cross_entropy": {"alpha": 0.1, "beta": 1.0, "log_zero": class_losses.LOG_ZERO},
    "auxiliary_confidence": {
        "coefficient": 0.5,
        "warmup_steps": 0,
        "own_labels": "batch",
        "rate": 0.3,
        "balance": False,
    },
    "product_of_confidence": {"alpha": 1.0, "beta": 1.0},
    "confidence_window": {"radius": 0.15},
    "adaptive_confidence": {"scale": 1.0, "temperature": 1.0},
    "augmented_confidence": {"coefficient": 0.5, "warmup_steps": 0, "temperature": 1.0},
    "bootstrap": {"coefficient": 0.05, "warmup_steps": 0, "hard": False},
}
# Those that aren't arguments of the function.
_OURS = ("warmup_steps", "own_labels", "rate", "balance", "hard")
OWN_LABELS = ("batch", "running", "argmax", "soft")

_UNIT = (lambda x: 0 <= x <= 1, "in [0, 1]")
_POSITIVE = (lambda x: x > 0, "above 0")
_RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "label_smoothing": (lambda x: 0 <= x < 1, "in [0, 1)"),
    "log_zero": (lambda x: x < 0, "below 0"),
    "coefficient": _UNIT,
    "warmup_steps": (lambda x: x >= 0 and x == int(x), "that is whole, 0 or more"),
    "rate": (lambda x: 0 < x <= 1, "in (0, 1]"),
    "alpha": _POSITIVE,
    "beta": _POSITIVE,
    "radius": _POSITIVE,
    "scale": _POSITIVE,
    "temperature": _POSITIVE,
}


def make(
    loss: str = "cross_entropy",
    head: str = "linear",
    words: Sequence[str] = (),
    *,
    label_smoothing: float | None = None,
    log_zero: float | None = None,
    coefficient: float | None = None,
    warmup_steps: int | None = None,
    own_labels: str | None = None,
    rate: float | None = None,
    balance: bool | None = None,
    hard: bool | None = None,
    alpha: float | None = None,
    beta: float | None = None,
    radius: float | None = None,
    scale: float | None = None,
    temperature: float | None = None,
    tokenizer: Tokenizer | None = None,
) -> Objective:
    """Mean loss over the documents with a label; weak labels come with the batch (`label_probs`, as in classify).

    An option that isn't given has the default that LOSSES has for the loss.

    Args:
      loss: one of LOSSES, each a function of ops.class_losses, which says what it is.
      head, words: see classify.
      label_smoothing, log_zero, alpha, beta, radius, scale, temperature: see the loss.
      coefficient: the weight of the model's own predictions, after `warmup_steps` in which it rises from 0 (an
        evaluation is at step 0). Of bootstrap it is 1 - beta of the paper, whose values are 0.05, and 0.2 where hard.
      own_labels: how the model's predictions become labels in auxiliary_confidence: hardened so that classes are as
        frequent as in the weak labels, with thresholds from the "batch" (as published; no microbatches) or "running"
        ones, which follow from step to step; hardened without thresholds ("argmax"); or as they are ("soft").
      rate: of the running thresholds, by how much they move in a step at most. They must move faster than the model's
        probabilities do: where they lag, all own labels are of one class, which drives the model further there, and it
        swings from class to class (metric own_class_0 against weak_class_0).
      balance: of auxiliary_confidence: weak labels are shifted so that no class is favoured, and thresholds made for
        classes of equal frequency (no microbatches).
      hard: of bootstrap: own labels are the most likely classes.
      tokenizer: the run's.

    Raises:
      InputError: an option that isn't known, isn't the loss's, or is out of its range.
    """
    given = {
        "label_smoothing": label_smoothing,
        "log_zero": log_zero,
        "coefficient": coefficient,
        "warmup_steps": warmup_steps,
        "own_labels": own_labels,
        "rate": rate,
        "balance": balance,
        "hard": hard,
        "alpha": alpha,
        "beta": beta,
        "radius": radius,
        "scale": scale,
        "temperature": temperature,
    }
    options = _options(loss, {name: value for name, value in given.items() if value is not None})
    own_labels, balance, hard = (options.get(name) for name in ("own_labels", "balance", "hard"))
    read = classify.reader(_FIELD, head, words, tokenizer)
    function = getattr(class_losses, "auxiliary_confidence" if hard else loss)

    def total(forward: Forward, batch: Batch, key: jax.Array, step: jax.Array, carry: Any = None) -> LossOut:
        del key
        logits, labels, weights = read(forward, batch)
        weak = class_losses.balance(labels, weights) if balance else labels
        arguments = {name: value for name, value in options.items() if name not in _OURS}
        metrics, statistics = {}, ()
        if "warmup_steps" in options:
            arguments["coefficient"] = class_losses.warmup(step, options["coefficient"], options["warmup_steps"])
            metrics["coefficient"] = arguments["coefficient"]
        if own_labels is not None:
            p = jax.lax.stop_gradient(jax.nn.softmax(logits))
            wanted = jnp.full_like(weak, 1 / weak.shape[-1]) if balance else weak
            thresholds = None
            if own_labels == "batch":
                thresholds = class_losses.quantile_thresholds(p, class_losses.mean_label(wanted, weights), weights)
            elif own_labels == "running":
                thresholds, statistics = carry.thresholds, class_losses.threshold_sums(carry, logits, wanted, weights)
            soft = own_labels == "soft"
            arguments |= {"thresholds": thresholds, "soft": soft}
            own = p if soft else class_losses.harden(p, thresholds)
            metrics |= {"own_class_0": own[..., 0], "weak_class_0": weak[..., 0]}
            if thresholds is not None:
                metrics["threshold_0"] = thresholds[0]
        count = jnp.sum(weights)
        sums = {k: (jnp.sum(weights * jnp.broadcast_to(x, weights.shape)), count) for k, x in metrics.items()}
        return LossOut(
            function(logits, weak, weights, **arguments),
            count,
            classify.metrics(logits, labels, weights) | sums,
            statistics,
        )

    def init_carry(batch: Mapping[str, jax.ShapeDtypeStruct]) -> RunningThresholds:
        return class_losses.init_thresholds(batch["label_probs"].shape[-1])

    def update(carry: RunningThresholds, statistics: ThresholdSums) -> RunningThresholds:
        return class_losses.update_thresholds(carry, statistics, options["rate"])

    running = own_labels == "running"
    return Objective(
        loss=total,
        fields=classify.FIELDS,
        batch_coupled=own_labels == "batch" or bool(balance),
        init_carry=init_carry if running else None,
        update=update if running else None,
    )


def _options(loss: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The loss's options, with defaults for those that aren't given."""
    if loss not in LOSSES:
        raise InputError(f"{_FIELD}.loss = {loss!r}: no such loss.{did_you_mean(str(loss), LOSSES)}")
    for name, value in given.items():
        field = f"{_FIELD}.{name}"
        if name not in LOSSES[loss]:
            there = f"It has {', '.join(LOSSES[loss])}." if LOSSES[loss] else "It has none."
            raise InputError(f"{field} = {value!r}: loss = {loss!r} has no such option. {there}")
        if name == "own_labels":
            if value not in OWN_LABELS:
                raise InputError(f"{field} = {value!r}: no such choice.{did_you_mean(str(value), OWN_LABELS)}")
        elif name in ("balance", "hard"):
            if not isinstance(value, bool):
                raise InputError(f"{field} = {value!r}: must be True or False.")
        else:
            within, range_ = _RANGES[name]
            if isinstance(value, bool) or not isinstance(value, int | float) or not within(value):
                raise InputError(f"{field} = {value!r}: must be a number {range_}.")
    options = LOSSES[loss] | given
    if "rate" in given and options["own_labels"] != "running":
        raise InputError(
            f"{_FIELD}.rate = {given['rate']}: is of running thresholds, and own_labels = {options['own_labels']!r}. "
            "Leave it out, or set own_labels = 'running'."
        )
    return options
