"""Distillation: the student's next-token distribution is to be the teacher's (Hinton et al., arXiv:1503.02531)."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from research.errors import InputError, did_you_mean
from research.objectives.types import Batch, Forward, LossOut, Objective, next_token_targets
from research.ops import divergences
from research.sources import parallel
from research.sources.tokenizers import Tokenizer

CACHED_FIELDS = ("teacher_ids", "teacher_log_probs", "teacher_rest")
SCOPES = ("supervised", "all")


def make(
    kind: str = "forward_kl",
    temperature: float = 1.0,
    scale_by_temperature: bool = False,
    beta: float = 0.5,
    alpha: float = 0.1,
    on: str = "supervised",
    teachers: Mapping[str, float] | None = None,
    cached: bool = False,
    tail: str = "bucket",
    tokenizer: Tokenizer | None = None,
) -> Objective:
    """Mean over tokens of a divergence from the teacher, which sees the same batch.

    It composes with a loss on labels as any two terms: {"distill": 0.5, "sft": 0.5}.

    Args:
      kind, temperature, beta, alpha: see ops.divergences.divergence. "uld" compares sorted probabilities, for a teacher
        of another tokenizer (ops.divergences.uld): it reads the same documents in its own tokens, and the two are
        compared where both have read the same text. (The paper pairs the k-th tokens of both, which drift apart.)
      scale_by_temperature: multiply by temperature^2, so that gradients keep their size (the paper's section 2).
      on: "supervised", the positions that predict a token of loss_mask, or "all" those that predict one.
      teachers: role -> weight, for several teachers; the loss is their weighted sum. By default {"teacher": 1}.
      cached: no teacher runs: its likeliest tokens come with the batch (data.annotations; research/annotate.py).
      tail: of cached ones: what is made of the other tokens; see ops.divergences.topk_divergence.
      tokenizer: the run's: its size says which logits are padding.

    Raises:
      InputError: an option that isn't known or is out of its range, or two that don't go together.
    """
    field = "objective.distill"
    for name, value, known in (
        ("kind", kind, (*divergences.KINDS, divergences.LOGIT_MSE, "uld")),
        ("on", on, SCOPES),
        ("tail", tail, divergences.TAILS),
    ):
        if value not in known:
            raise InputError(f"{field}.{name} = {value!r}: no such choice.{did_you_mean(str(value), known)}")
    try:
        divergences.check(kind, temperature, beta, alpha)
    except InputError as error:
        raise InputError(f"{field}.{error}") from error
    if cached and (teachers or kind in ("uld", divergences.LOGIT_MSE)):
        what = f"teachers = {dict(teachers)}" if teachers else f"kind = {kind!r}"
        raise InputError(
            f"{field}.{what}: needs live models, and {field}.cached = True. Set it to False, and name them in roles."
        )
    if cached and tail == "truncate" and kind not in ("forward_kl", "cross_entropy"):
        raise InputError(f"{field}.tail = 'truncate': goes with forward_kl and cross_entropy, not {kind}.")
    teachers = dict(teachers or {"teacher": 1.0})
    if sum(teachers.values()) <= 0 or min(teachers.values()) < 0:
        raise InputError(f"{field}.teachers = {teachers}: weights must be positive.")
    factor = temperature**2 if scale_by_temperature else 1.0
    mixture = {"kind": kind, "temperature": temperature, "beta": beta, "alpha": alpha}

    def stored(forward: Forward, batch: Batch, weights: jax.Array) -> divergences.Divergence:
        fields = (batch[name] for name in CACHED_FIELDS)
        return divergences.topk_divergence(
            forward.hidden(), forward.head(), *fields, weights, tail=tail, vocab_size=_size(tokenizer), **mixture
        )

    def live(forward: Forward, role: str, weights: jax.Array) -> divergences.Divergence:
        student, teacher = forward.head(), forward.head(role)
        size = _size(tokenizer) or min(student.kernel.shape[1], teacher.kernel.shape[1])
        return divergences.divergence(
            forward.hidden(), student, forward.hidden(role), teacher, weights, vocab_size=size, **mixture
        )

    def other_tokens(forward: Forward, role: str, batch: Batch, weights: jax.Array) -> divergences.Divergence:
        own = {name: batch[f"teacher_{name}"] for name in ("tokens", "segment_ids", "positions")}
        hidden, at = forward.models[role].hidden(forward.params[role], own), batch["teacher_at"]
        hidden = jnp.take_along_axis(hidden, jnp.maximum(at, 0)[:, :, None], axis=1)
        weights = jnp.where(at < 0, 0.0, weights)
        return divergences.uld(
            forward.hidden(), forward.head(), hidden, forward.head(role), weights, temperature=temperature
        )

    def loss(forward: Forward, batch: Batch, key: jax.Array, step: jax.Array) -> LossOut:
        del key, step
        _, weights = next_token_targets(batch, batch["loss_mask"] if on == "supervised" else None)
        total, metrics = jnp.zeros(()), {}
        for role, share in teachers.items():
            if cached:
                out = stored(forward, batch, weights)
            elif kind == "uld":
                out = other_tokens(forward, role, batch, weights)
            else:
                out = live(forward, role, weights)
            total = total + share * factor * out.divergence_sum
            name = "" if len(teachers) == 1 else f"{role}/"
            metrics |= {
                f"{name}divergence": (out.divergence_sum, out.weight_sum),
                f"{name}teacher_entropy": (out.teacher_entropy_sum, out.weight_sum),
            }
            if out.agreement_sum is not None:
                metrics[f"{name}agreement"] = (out.agreement_sum, out.weight_sum)
        return LossOut(total, out.weight_sum, metrics)

    fields = ("tokens", "segment_ids", "positions") + (("loss_mask",) if on == "supervised" else ())
    fields += CACHED_FIELDS if cached else parallel.FIELDS if kind == "uld" else ()
    return Objective(
        loss=loss,
        fields=fields,
        frozen=() if cached else tuple(teachers),
        own_tokens=tuple(teachers) if kind == "uld" else (),
        annotations=({"temperature": temperature} | ({"on": "all"} if on == "all" else {})) if cached else {},
    )


def _size(tokenizer: Tokenizer | None) -> int | None:
    return None if tokenizer is None else tokenizer.size
