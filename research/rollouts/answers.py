"""Answers by the policy itself in place of the data's, for on-policy distillation and reinforcement learning."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from research.errors import InputError
from research.models.generation import make_generate
from research.models.sampling import SamplingConfig
from research.models.transformer import Model

Batch = Mapping[str, jax.Array]
Rollout = Callable[[Any, Batch, jax.Array], dict[str, jax.Array]]


@dataclasses.dataclass(frozen=True)
class RolloutSpec:
    """How the policy answers.

    Attributes:
      share: of the rows, by chance anew at each step; the others keep the data's answer. 0: none. GKD's lambda
        (arXiv:2306.13649, algorithm 1) is this share.
      max_new_tokens: the longest answer. A row whose prompt leaves less room keeps the data's answer.
      temperature: logits are divided by it; 0 takes the likeliest token.
      top_k: only this many of the likeliest tokens are sampled; 0 is all.
      top_p: only the fewest of the likeliest tokens whose probabilities add up to this (arXiv:1904.09751).
      slots: how many rows are decoded at once, for less memory; others follow as these end. 0: all.
    """

    share: float = 0.0
    max_new_tokens: int = 64
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    slots: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise InputError(f"rollout.share = {self.share}: must be in [0, 1].")
        if self.slots < 0:
            raise InputError(f"rollout.slots = {self.slots}: must be at least 0, which decodes all rows at once.")
        try:
            self.sampling(())
        except InputError as error:
            raise InputError(str(error).replace("sampling.", "rollout.", 1)) from error

    def sampling(self, stop_tokens: tuple[int, ...]) -> SamplingConfig:
        """How the tokens of an answer are chosen."""
        return SamplingConfig(self.max_new_tokens, self.temperature, self.top_k, self.top_p, stop_tokens=stop_tokens)


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
