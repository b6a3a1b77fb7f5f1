"""DoReMi's proxy: learns how much each source of data should weigh, by what a reference shows is left to learn."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from research.errors import InputError
from research.objectives import excess
from research.objectives.types import Batch, Context, Forward, LossOut, Objective
from research.ops.domains import Domains, by_source, next_domains
from research.ops.losses import cross_entropy
from research.ranges import Fraction, Positive
from research.sources.tokenizers import Tokenizer


class Gathered(NamedTuple):
    """Of all rows of the batch, by source.

    Attributes:
      excess: [B, S], the sum of each row's excess losses, each at least 0.
      tokens: [B, S], of how many.
    """

    excess: Float[Array, "B S"]
    tokens: Float[Array, "B S"]


def make(
    tokenizer: Tokenizer, weights: Mapping[str, Positive] | None = None, eta: Positive = 1.0, epsilon: Fraction = 1e-3
) -> Objective:
    """Group distributionally robust training of a small model (DoReMi, arXiv:2305.10429, algorithm 1).

    The loss is sum_i alpha_i (mean loss of source i's tokens), over the sources of the batch. alpha grows where the
    policy is worse than the role `reference`, which was trained on data at the first weights. The mean of alpha over
    all steps, the metrics `average/NAME`, are the weights to train a larger model at.

    Args:
      tokenizer: the run's. As in the authors' trainer, a source that no batch had yet is as bad as guessing.
      weights: of each of data.sources, the first alpha: any positive numbers, of which the shares count.
      eta, epsilon: see ops.domains.next_domains.
    """
    names = tuple(sorted(weights or {}))
    _check(weights or {})
    first = jnp.asarray([weights[name] for name in names], jnp.float32)
    first = first / jnp.sum(first)

    def gather(forward: Forward, batch: Batch) -> Gathered:
        read = excess.read(forward, batch)
        above = jnp.maximum(read.values, 0) * read.weights
        return Gathered(*(by_source(x, batch["source"], len(names)) for x in (above, read.weights)))

    def loss(forward: Forward, batch: Batch, context: Context) -> LossOut:
        whole = jax.tree.map(lambda x: jnp.sum(x, axis=0), context.gathered)
        after = next_domains(context.carry, *whole, eta=eta, epsilon=epsilon)
        read = excess.read(forward, batch)
        each = jnp.where(whole.tokens > 0, after.weights / jnp.maximum(whole.tokens, 1), 0)
        weights = read.weights * each[batch["source"]]
        out = cross_entropy(forward.hidden(), forward.next_token_head(), read.targets, weights)
        nll = jnp.sum(jnp.where(read.counted, out.nll * read.weights, 0))
        metrics = {"nll": (nll, jnp.sum(read.weights)), "accuracy": (out.correct_sum, out.weight_sum)}
        metrics |= _named("weight", names, after.weights) | _named("average", names, context.carry.average)
        own = jax.tree.map(lambda x: jnp.sum(x[context.rows], axis=0), context.gathered)
        return LossOut(out.loss_sum, out.weight_sum, metrics, own, per_token=(out.loss, weights))

    def init_carry(batch: Mapping[str, jax.ShapeDtypeStruct]) -> Domains:
        del batch
        scores = jnp.full(first.shape, math.log(tokenizer.size), jnp.float32)
        return Domains(first, scores, jnp.zeros_like(first), jnp.zeros((), jnp.float32))

    def update(carry: Domains, sums: Gathered) -> Domains:
        return next_domains(carry, *sums, eta=eta, epsilon=epsilon)

    return Objective(
        loss=loss,
        fields=(*excess.FIELDS, "source"),
        frozen=(excess.REFERENCE,),
        gather=gather,
        init_carry=init_carry,
        update=update,
        sources=names,
    )


def _named(kind: str, names: tuple[str, ...], values: Float[Array, " S"]) -> dict[str, tuple[Any, Any]]:
    """A metric of each source; one that has a value in every part of a batch."""
    one = jnp.ones((), jnp.float32)
    return {f"{kind}/{name}": (values[i], one) for i, name in enumerate(names)}


def _check(weights: Mapping[str, float]) -> None:
    """Raises InputError where the options can't work."""
    if len(weights) < 2:
        raise InputError(
            f"weights = {dict(weights)}: names the sources of data.sources, two or more, and what they weigh at first, "
            'as in {"code": 1.0, "prose": 1.0}.'
        )
