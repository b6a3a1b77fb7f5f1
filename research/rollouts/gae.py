"""What a critic is for: rewards of tokens, and advantages and returns by generalized advantage estimation.

All arrays are [N, T] of N answers, and hold something at the tokens of answers alone, where `mask` is 1: what is of a
token is of its choice. Its value is the critic's of what precedes it. Computed on the host, in float64.
"""

import math

import numpy as np
from jaxtyping import Float

from research.errors import InputError

Tokens = Float[np.ndarray, "N T"]


def token_rewards(scores: Float[np.ndarray, " N"], penalties: Tokens, mask: Tokens) -> Tokens:
    """The reward of each token: less its penalty, and at the last token of an answer the answer's score more
    (arXiv:1909.08593, equation 2). An answer without tokens has none."""
    after = np.cumsum(mask[:, ::-1], axis=1)[:, ::-1]
    last = (mask > 0) & (after == 1)
    return np.where(last, scores[:, None], 0.0) - np.where(mask > 0, penalties, 0.0)


def gae(
    rewards: Tokens, values: Tokens, mask: Tokens, *, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tokens, Tokens]:
    """Advantages A_t = sum_k (gamma lam)^k (r_(t+k) + gamma V_(t+k+1) - V_(t+k)) and returns A_t + V_t, over the tokens
    of the mask as if no others lay between them; after the last the value is 0 (arXiv:1506.02438, equation 16). Both
    are 0 elsewhere.

    Raises:
      InputError: gamma or lam is outside [0, 1].
    """
    for name, x in (("gamma", gamma), ("lam", lam)):
        if not 0 <= x <= 1:
            raise InputError(f"{name} = {x}: must be in [0, 1].")
    rewards, values = (np.where(mask > 0, x, 0.0) for x in (rewards, values))
    advantages = np.zeros_like(values)
    advantage, value = np.zeros(len(mask)), np.zeros(len(mask))  # of the token that follows
    for t in reversed(range(mask.shape[1])):
        real = mask[:, t] > 0
        now = rewards[:, t] + gamma * value - values[:, t] + gamma * lam * advantage
        advantage, value = np.where(real, now, advantage), np.where(real, values[:, t], value)
        advantages[:, t] = np.where(real, now, 0.0)
    return advantages, np.where(mask > 0, advantages + values, 0.0)


def explained_variance(values: Tokens, returns: Tokens, mask: Tokens) -> float:
    """1 - (mean squared error of the values) / (variance of the returns) at the tokens of the mask: 1 where the critic
    knows the returns, 0 where it knows no more than their mean, and less where it is worse. NaN where the returns are
    all the same."""
    here = mask > 0
    spread = float(np.var(returns[here], dtype=np.float64)) if here.any() else 0.0
    error = float(np.mean(np.square(returns[here] - values[here]), dtype=np.float64)) if here.any() else 0.0
    return 1 - error / spread if spread else math.nan
