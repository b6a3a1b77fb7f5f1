"""How much sources of data weigh, learned while a model trains on them.

Axes: B batch, T time, S sources.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Domains(NamedTuple):
    """What DoReMi's proxy remembers.

    Attributes:
      weights: alpha, how much each source weighs; they add up to 1.
      scores: the excess loss of each when it was last in a batch.
      total: the sum of the weights of all steps.
      steps: how many those were.
    """

    weights: Float[Array, " S"]
    scores: Float[Array, " S"]
    total: Float[Array, " S"]
    steps: Float[Array, ""]

    @property
    def average(self) -> Float[Array, " S"]:
        """The mean of the weights over all steps: what the method is for. Before the first step the first weights."""
        return jnp.where(self.steps > 0, self.total / jnp.maximum(self.steps, 1), self.weights)


def next_domains(
    domains: Domains, excess: Float[Array, " S"], tokens: Float[Array, " S"], *, eta: float, epsilon: float
) -> Domains:
    """One step of DoReMi's weights (arXiv:2305.10429, algorithm 1), as its authors' trainer has it.

    w <- (1 - epsilon) softmax(log w + eta s) + epsilon / S, s being the mean excess loss of each source's tokens in the
    batch; a source without tokens keeps the score that it had.

    Args:
      domains: before the step.
      excess: the sum over each source's tokens of max(loss of the proxy - loss of the reference, 0).
      tokens: how many those are.
      eta, epsilon: the step, and the part that is shared equally.
    """
    scores = jnp.where(tokens > 0, excess / jnp.maximum(tokens, 1), domains.scores)
    weights = jax.nn.softmax(jnp.log(domains.weights) + eta * scores)
    weights = (1 - epsilon) * weights + epsilon / weights.shape[0]
    return Domains(weights, scores, domains.total + weights, domains.steps + 1)


def by_source(values: Float[Array, "B T"], source: Int[Array, "B T"], count: int) -> Float[Array, "B S"]:
    """The sum of each row's values by source."""
    numbers = jnp.arange(count, dtype=source.dtype)
    return jnp.sum(jnp.where(source[:, :, None] == numbers[None, None, :], values[:, :, None], 0), axis=1)


class Arms(NamedTuple):
    """What a bandit over sources remembers.

    Attributes:
      weights: pi, the chance of each source to be drawn; they add up to 1.
      rewards: the running mean of each one's loss over its chance.
      epsilon: of the last step.
      steps: how many there were.
    """

    weights: Float[Array, " S"]
    rewards: Float[Array, " S"]
    epsilon: Float[Array, ""]
    steps: Float[Array, ""]


def first_arms(count: int) -> Arms:
    """Of so many sources, all as likely."""
    even = jnp.asarray(1 / count, jnp.float32)
    return Arms(jnp.full(count, even), jnp.zeros(count), even, jnp.zeros(()))


def next_arms(arms: Arms, losses: Float[Array, " S"], tokens: Float[Array, " S"], *, smoothing: float) -> Arms:
    """One step of EXP3 (Auer et al., SIAM J. Comput. 32(1), 2002) over sources, as Online Data Mixing has it
    (arXiv:2312.02406, algorithm 1): a source that is hard to predict is drawn more often.

    R <- smoothing R + (1 - smoothing) L / pi of the sources in the batch, epsilon <- min(1 / S, sqrt(ln S / (S t))),
    pi <- (1 - S epsilon) softmax(epsilon of the step before R) + epsilon.

    Args:
      arms: before the step, by whose weights the batch was drawn.
      losses: the sum of each source's losses in the batch.
      tokens: over how many tokens.
      smoothing: in [0, 1).
    """
    count, steps = arms.weights.shape[0], arms.steps + 1
    reward = losses / jnp.maximum(tokens, 1) / arms.weights
    rewards = jnp.where(tokens > 0, smoothing * arms.rewards + (1 - smoothing) * reward, arms.rewards)
    epsilon = jnp.minimum(1 / count, jnp.sqrt(jnp.log(jnp.asarray(count, jnp.float32)) / (count * steps)))
    weights = (1 - count * epsilon) * jax.nn.softmax(arms.epsilon * rewards) + epsilon
    return Arms(weights, rewards, epsilon, steps)
