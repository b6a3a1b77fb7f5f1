"""Answers by the policy itself in place of the data's, for on-policy distillation."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from research.errors import InputError
from research.models.generation import make_generate
from research.models.transformer import Model
from research.rollouts.spec import RolloutSpec

Batch = Mapping[str, jax.Array]
Rollout = Callable[[Any, Batch, jax.Array], dict[str, jax.Array]]


def make_rollout(
    model: Model, spec: RolloutSpec, *, seq_len: int, stop_tokens: tuple[int, ...], vocab_size: int
) -> Rollout:
    """Returns rollout(params, batch, key) -> batch: what comes after each row's prompt is sampled.

    A row's prompt is what precedes its first token with loss_mask 1; rows are to hold one conversation each. The answer
    gets loss_mask 1, its stop token included.

    Args:
      model: the policy.
      spec: share above 0.
      seq_len: T of the batches.
      stop_tokens: ids that end an answer.
      vocab_size: of the tokenizer; ids from here on are never sampled.

    Raises:
      InputError: no prompt fits beside the longest answer.
    """
    ahead = model.virtual_tokens  # generate puts them in front by itself
    room = seq_len - ahead - spec.max_new_tokens
    if room < 1:
        raise InputError(
            f"rollout.max_new_tokens = {spec.max_new_tokens} leaves no room for a prompt in seq_len = {seq_len}. Lower "
            "the one or raise the other."
        )
    generate = make_generate(model, spec.sampling(stop_tokens), vocab_size)

    def rollout(params: Any, batch: Batch, key: jax.Array) -> dict[str, jax.Array]:
        choose_key, sample_key = jax.random.split(key)
        tokens = batch["tokens"]
        answers = (batch["loss_mask"] > 0) & (batch["segment_ids"] == 1)
        start = jnp.argmax(answers, axis=1).astype(jnp.int32) - ahead  # 0 or less: no answer, or nothing before it
        mine = jax.random.uniform(choose_key, start.shape) < spec.share
        mine &= (start > 0) & (start <= room)
        length = jnp.where(mine, start, 0)
        shift = jnp.arange(room, dtype=jnp.int32)[None] - (room - length[:, None])
        prompts = jnp.where(shift >= 0, _at(tokens, shift + ahead), 0)
        out = generate(params, prompts, length, sample_key, slots=spec.slots or None)

        return _answered(batch, mine, length + ahead, out)

    return rollout


def _answered(batch: Batch, mine: Bool[Array, " B"], length: Int[Array, " B"], answers: Any) -> dict[str, jax.Array]:
    """The batch in which the rows that are `mine` hold a prompt of so many tokens and the answer generated for it."""
    t = jnp.arange(batch["tokens"].shape[1], dtype=jnp.int32)[None]
    since, here = t - length[:, None], mine[:, None]
    answer = (since >= 0) & (since < answers.lengths[:, None])
    real = (since < 0) | answer
    tokens = jnp.where(answer, _at(answers.tokens, since), jnp.where(real, batch["tokens"], 0))
    fields = {
        "tokens": tokens,
        "segment_ids": real.astype(jnp.int32),
        "positions": jnp.where(real, t, 0),
        "loss_mask": answer.astype(jnp.float32),
    }
    if "source" in batch:  # an answer is of its prompt's source, and may be longer than the data's
        fields["source"] = jnp.where(real, batch["source"][:, :1], 0)
    if "prefix" in batch:  # the prompt was shown whole to a prefix LM
        fields["prefix"] = (since < 0).astype(jnp.int32)
    return {**batch, **{name: jnp.where(here, value, batch[name]) for name, value in fields.items()}}


def _at(x: jax.Array, index: jax.Array) -> jax.Array:
    """x [B, S] at index [B, N], clipped into it."""
    return jnp.take_along_axis(x, jnp.clip(index, 0, x.shape[1] - 1), axis=1)
