"""Prefix language modelling: the first part of each document is read whole, and the rest is predicted from it.

Section 3.2.3 of T5 (arXiv:1910.10683), the S-denoiser of UL2 (arXiv:2205.05131), and how UL2R (arXiv:2210.11399) makes
a prefix LM of a causal one.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from research.errors import InputError, did_you_mean
from research.models.blocks import document_lengths
from research.objectives.types import (
    Batch,
    Context,
    Forward,
    LossOut,
    Objective,
    good_answers,
    next_token_targets,
    token_loss,
)
from research.ranges import Fraction, NotNegative, Share

SPLITS = ("random", "given")


def make(
    split: str = "random",
    share: Sequence[Share] = (0.0, 1.0),
    z_loss: NotNegative = 0.0,
    label_smoothing: Fraction = 0.0,
) -> Objective:
    """Cross-entropy of the tokens that follow each document's prefix. It needs a model with model.prefix = True.

    Args:
      split: where prefixes end. "random": each document is split anew at each step, wherever the data has its prompts;
        a prefix has at least one token, and leaves one. "given": where the data says (the batch field `prefix`, as a
        view of denoising gives it), else before the first token of `loss_mask` (as prompts end); only tokens of
        loss_mask are predicted.
      share: of "random": the least and the greatest share of a document that is its prefix; uniform between them.
        UL2's S-denoiser has suffixes of 25 % on average: (0.5, 1.0).
      z_loss, label_smoothing: as in next_token.

    Raises:
      InputError: an option can't be used.
    """
    if split not in SPLITS:
        raise InputError(f"split = {split!r}: no such choice.{did_you_mean(str(split), SPLITS)}")
    share = tuple(share) if isinstance(share, list | tuple) else (share,)
    if len(share) != 2 or share[0] > share[1]:
        raise InputError(f"share = {share}: must be the least and the greatest share, as in (0.0, 1.0).")
    if split == "given" and share != (0.0, 1.0):
        raise InputError(f"share = {share}: is of split = 'random'. Leave it out.")
    objective = PrefixLM(share if split == "random" else None, z_loss, label_smoothing)
    fields = ("tokens", "segment_ids", "positions") + (("loss_mask",) if split == "given" else ())
    return Objective(loss=objective.loss, fields=fields, gives=("prefix",))


@dataclasses.dataclass(frozen=True)
class PrefixLM:
    """See `make`.

    Attributes:
      share: the least and the greatest share of a random prefix; None where prefixes are given.
    """

    share: tuple[float, float] | None
    z_loss: float
    label_smoothing: float

    def loss(self, forward: Forward, batch: Batch, context: Context) -> LossOut:
        """The sum over suffixes. Metrics of a random split are called suffix_..., for its tokens are no fixed set."""
        if not forward.models["policy"].config.causal:
            raise InputError(
                "model.causal = False: every token sees those after it, and so what prefix_lm has it predict. Train on "
                "masked alone, or set model.causal = True and model.prefix = True and leave masked out."
            )
        if not forward.models["policy"].config.prefix:
            raise InputError(
                "model.prefix = False: this model reads from left to right, and prefix_lm is about one that reads "
                "prefixes whole. Set model.prefix = True (over a checkpoint too), or use next_token or sft."
            )
        if self.share is not None:
            prefix = random_prefix(context, forward.batch, self.share)
        else:
            prefix = batch["prefix"] if "prefix" in batch else prompt_prefix(forward.batch)
        if self.share is not None or "prefix" not in batch:
            forward = forward.on({**forward.batch, "prefix": prefix})
        after = 1.0 - prefix.astype(jnp.float32)
        targets, weights = next_token_targets(batch, after if self.share is not None else after * good_answers(batch))
        out = token_loss(forward, targets, weights, z_loss=self.z_loss, label_smoothing=self.label_smoothing)
        metrics = out.metrics if self.share is None else {f"suffix_{name}": x for name, x in out.metrics.items()}
        real = batch["segment_ids"] > 0
        share = jnp.sum(jnp.where(real, prefix, 0)).astype(jnp.float32), jnp.sum(real).astype(jnp.float32)
        return out._replace(metrics={**metrics, "prefix_share": share})


def random_prefix(context: Context, batch: Batch, share: tuple[float, float]) -> Int[Array, "B T"]:
    """1 at the first tokens of each document: 1 to n - 1 of its n, uniformly within the shares."""
    segments, positions = batch["segment_ids"], batch["positions"]
    draws = jax.vmap(lambda key: jax.random.uniform(key, (segments.shape[1] + 1,)))(context.row_keys())
    drawn = share[0] + (share[1] - share[0]) * jnp.take_along_axis(draws, segments, axis=1)  # of each token's document
    choices = document_lengths(segments, positions) - 1
    length = 1 + jnp.minimum((drawn * choices.astype(jnp.float32)).astype(jnp.int32), choices - 1)
    return ((positions < length) & (segments > 0)).astype(jnp.int32)


def prompt_prefix(batch: Batch) -> Int[Array, "B T"]:
    """1 at the tokens before the first of their document that is in `loss_mask`."""

    def first_of_row(segments: Int[Array, " T"], positions: Int[Array, " T"]) -> Int[Array, " T"]:
        return jax.ops.segment_min(positions, segments, num_segments=len(positions) + 1)[segments]

    segments, positions = batch["segment_ids"], batch["positions"]
    supervised = jnp.where(batch["loss_mask"] > 0, positions, segments.shape[1])
    return ((positions < jax.vmap(first_of_row)(segments, supervised)) & (segments > 0)).astype(jnp.int32)
