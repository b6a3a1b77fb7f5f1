"""Signals that are made of others: ratios and differences, so that causes compare with plain numbers."""

import math
from collections.abc import Mapping

Signals = Mapping[str, float]


def derived(signals: Signals) -> dict[str, float]:
    """The signals below, as far as what they are made of was measured.

    Returns, with loss and the like as in the metrics of training:
      rate_of_peak: the highest learning rate so far, over that of the config.
      idle_groups: how many groups of parameters have a learning rate of 0 throughout.
      clip_of_norm: optimizer.clip_norm over the median of the gradient's norm.
      eps_of_gradient: optimizer.eps over the root mean square of a parameter's gradient, clipped.
      decay_of_run: learning rate times weight decay, summed over the steps: what decay alone would take is 1 - exp of
        minus that.
      norms_of_gradient: the norm of the gradient by scales and biases of norms, over the whole.
      loss_fall: how much lower the loss is at the end, as a share of its start; loss_drop: in its own unit.
      loss_risen: how far the last losses are above the first one, as a share; where they are no better than single
        targets' entropy, how far the highest loss is above it.
      loss_noise: standard deviation of the last losses, over their mean.
      loss_of_ce: the loss over the cross-entropy that is computed again, from the logits.
      offset_gap_K: how far the loss is from the cross-entropy of the tokens K places on, as a share of that,
        or in nats below 1.
      train_mode_gap: how much higher the loss of a batch is in training than in evaluation, as a share.
      base_of_uniform: cross-entropy of the parameters as they began, over the logarithm of the vocabulary.
      loss_of_base: the last losses over the cross-entropy of the parameters as they began.
      loss_of_unigram: the last losses over the entropy of single targets.
      tokens_of_base: setup/tokens_of_base; 0 where the model that the run begins with has no tokenizer to compare.
      gap_grown: held-out loss over training loss at the end, over that at the start.
      teacher_of_uniform, teacher_gap: the teacher's cross-entropy over the logarithm of the vocabulary, and less the
        student's as it began.
      gradient_left: optimizer/gradient_left; where that wasn't measured, 1 where the gradient's norm grows steadily.
      epochs: how many times the run has gone over its data.
      eval_rise, eval_fall: of the held-out loss from the first to the last evaluation.
      eval_gap: how much higher the held-out loss is than that of training, before training, as a share.
      chosen_fell: by how much the chosen answers became less likely, as a share of their first log-probability.
      accuracy_told: in how many comparisons the better one is told at the end: the mean over training and evaluation.
      start_gap: how far the first loss is from that of a policy that is its reference.
      average_horizon: of the moving average: steps times (1 - decay), how many times it has turned over.
      reward_failed: the share of answers on which the worst reward fails.
      sampler_gap: nats a token between the engine's log-probabilities and the trainer's.
    """
    pairs = (*_optimizer(signals), *_losses(signals), *_models(signals), *_answers(signals))
    return {name: value for name, value in pairs if value is not None and not math.isnan(value)}


def _optimizer(s: Signals) -> list[tuple[str, float | None]]:
    clip, norm, count = s.get("config/optimizer.clip_norm"), s.get("grad_norm.median"), s.get("setup/trained")
    seen = min(norm, clip) if clip and norm is not None else norm
    eps = s.get("config/optimizer.eps") if s.get("setup/adam") else None
    rate, decay, steps = s.get("learning_rate.mean"), s.get("config/optimizer.weight_decay"), s.get("steps")
    groups = [v for k, v in s.items() if k.startswith("learning_rate/") and k.endswith(".max")]
    average = s.get("config/ema_decay")
    return [
        ("rate_of_peak", _ratio(s.get("learning_rate.max"), s.get("config/optimizer.learning_rate"))),
        ("idle_groups", float(sum(v == 0 for v in groups)) if s.get("learning_rate.max") else None),
        ("clip_of_norm", _ratio(clip, norm) if clip else None),
        ("eps_of_gradient", _ratio(eps and count and eps * math.sqrt(count), seen)),
        ("decay_of_run", None if None in (rate, decay, steps) else rate * decay * steps),
        ("norms_of_gradient", _ratio(s.get("grad_norm/norms.median"), norm)),
        ("gradient_left", s.get("optimizer/gradient_left", _grows(s))),
        ("epochs", _ratio(s.get("setup/rows_read"), s.get("setup/rows"))),
        ("average_horizon", (1 - average) * steps if average and steps is not None else None),
    ]


def _grows(s: Signals) -> float | None:
    """Whether the gradient's norm has grown fivefold, and steadily: by eight times its noise."""
    change, trend = s.get("grad_norm.last_over_first"), s.get("grad_norm.trend")
    if change is None or trend is None or s.get("steps", 0.0) < 20:
        return None
    return float(change > 5 and trend > 8)


def _losses(s: Signals) -> list[tuple[str, float | None]]:
    first, last, loss = s.get("loss.first"), s.get("loss.last"), s.get("probe/loss")
    drop = _less(first, last)
    lost = (_ratio(last, s.get("probe/unigram")) or 0.0) > 0.9
    start = s.get("loss.start")
    offsets = [(f"offset_gap_{k}", _away(loss, s.get(f"probe/offset_{k}"))) for k in (0, 2)]
    return [
        ("loss_drop", drop),
        ("loss_fall", _ratio(drop, first)),
        ("loss_risen", _ratio(_less(s.get("loss.max") if lost else last, start), start)),
        ("loss_noise", _ratio(s.get("loss.std_last"), last)),
        ("loss_of_ce", _ratio(loss, s.get("probe/ce_recomputed"))),
        ("offset_gap_1", _away(loss, s.get("probe/ce_recomputed"))),
        *offsets,
        ("train_mode_gap", _ratio(_less(s.get("probe/loss_train_mode"), loss), loss)),
        ("loss_of_base", _ratio(last, s.get("probe/base_ce"))),
        ("loss_of_unigram", _ratio(last, s.get("probe/unigram"))),
        ("eval_rise", _less(s.get("eval/loss.end"), s.get("eval/loss.start"))),
        ("eval_fall", _less(s.get("eval/loss.start"), s.get("eval/loss.end"))),
        ("gap_grown", _ratio(_ratio(s.get("eval/loss.end"), last), _ratio(s.get("eval/loss.start"), start))),
        ("eval_gap", _ratio(_less(s.get("eval/loss.start"), start), start)),
    ]


def _models(s: Signals) -> list[tuple[str, float | None]]:
    base, uniform = s.get("probe/base_ce"), s.get("probe/uniform")
    return [
        ("base_of_uniform", _ratio(base, uniform)),
        ("tokens_of_base", s.get("setup/tokens_of_base", 0.0) if s.get("setup/init_from") else None),
        ("teacher_of_uniform", _ratio(s.get("teacher/ce"), uniform)),
        ("teacher_gap", _less(s.get("teacher/ce"), base)),
    ]


def _answers(s: Signals) -> list[tuple[str, float | None]]:
    failed = [v for k, v in s.items() if k.startswith("reward/") and k.endswith("/failed.mean")]
    chosen, told = s.get("log_prob_chosen.first"), [s.get("accuracy.last"), s.get("eval/accuracy.last")]
    return [
        ("chosen_fell", _ratio(_less(chosen, s.get("log_prob_chosen.last")), chosen and abs(chosen))),
        ("accuracy_told", None if None in told else sum(told) / 2),
        ("start_gap", _less(s.get("preference_loss.start"), s.get("start_loss.start"))),
        ("reward_failed", max(failed) if failed else None),
        ("sampler_gap", s.get("rollout/log_prob_gap.median", s.get("old_kl.start") and abs(s["old_kl.start"]))),
    ]


def _ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None


def _less(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def _away(a: float | None, b: float | None) -> float | None:
    """How far a is from b, as a share of b; in its own unit where b is less than 1."""
    return None if a is None or b is None else abs(a - b) / max(abs(b), 1.0)
