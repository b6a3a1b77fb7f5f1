"""What a critic is for: rewards of tokens, and advantages and returns by generalized advantage estimation.

All arrays are [N, T], float32, and hold something at the tokens of answers alone, where `mask` is 1: what stands at a
token is of the choice of that token. Its value is the critic's of what precedes it.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from research.errors import InputError


def token_rewards(
    scores: Float[Array, " N"], penalties: Float[Array, "N T"], mask: Float[Array, "N T"]
) -> Float[Array, "N T"]:
    """The reward of each token: less its penalty, and at the last token of an answer the answer's score more
    (arXiv:1909.08593, equation 2). An answer without tokens has none."""
    last = (mask > 0) & (jnp.cumsum(mask[:, ::-1], axis=1)[:, ::-1] == 1)
    return jnp.where(last, scores[:, None], 0) - jnp.where(mask > 0, penalties, 0)


def gae(
    rewards: Float[Array, "N T"],
    values: Float[Array, "N T"],
    mask: Float[Array, "N T"],
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
) -> tuple[Float[Array, "N T"], Float[Array, "N T"]]:
    """Advantages A_t = sum_k (gamma lam)^k (r_{t+k} + gamma V_{t+k+1} - V_t+k) and returns A_t + V_t, over the tokens
    of the mask as if no others lay between them; after the last the value is 0 (arXiv:1506.02438, equation 16). Both
    are 0 elsewhere.

    Raises:
      InputError: gamma or lam is outside [0, 1].
    """
    for name, x in (("gamma", gamma), ("lam", lam)):
        if not 0 <= x <= 1:
            raise InputError(f"{name} = {x}: must be in [0, 1].")

    def step(  # backward in time
        after: tuple[Float[Array, " N"], Float[Array, " N"]],
        now: tuple[Float[Array, " N"], Float[Array, " N"], Float[Array, " N"]],
    ) -> tuple[tuple[Float[Array, " N"], Float[Array, " N"]], Float[Array, " N"]]:
        (next_advantage, next_value), (reward, value, real) = after, now
        advantage = reward + gamma * next_value - value + gamma * lam * next_advantage
        kept = jnp.where(real > 0, advantage, next_advantage), jnp.where(real > 0, value, next_value)
        return kept, jnp.where(real > 0, advantage, 0)

    none = jnp.zeros_like(values[:, 0])
    _, advantages = jax.lax.scan(step, (none, none), (rewards.T, values.T, mask.T), reverse=True)
    return advantages.T, jnp.where(mask > 0, advantages.T + values, 0)


def explained_variance(
    values: Float[Array, "N T"], returns: Float[Array, "N T"], mask: Float[Array, "N T"]
) -> Float[Array, ""]:
    """1 - (mean squared error of the values) / (variance of the returns) at the tokens of the mask: 1 where the critic
    knows the returns, 0 where it knows no more than their mean, and less where it is worse. NaN where the returns are
    all the same."""
    count = jnp.maximum(jnp.sum(mask), 1)
    mean = jnp.sum(jnp.where(mask > 0, returns, 0)) / count
    spread = jnp.sum(jnp.where(mask > 0, jnp.square(returns - mean), 0))
    error = jnp.sum(jnp.where(mask > 0, jnp.square(returns - values), 0))
    return jnp.where(spread > 0, 1 - error / jnp.where(spread > 0, spread, 1), math.nan)
