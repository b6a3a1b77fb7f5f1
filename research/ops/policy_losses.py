"""Losses of policy gradients: pure functions of the log-probabilities of sampled tokens.

`LOSSES` has a row for each loss, `KL` for each estimate of the KL to a reference that may stand in a loss, and
`AGGREGATIONS` for each way to make one number of the losses of tokens. All losses are to be minimised.

The ratio of a token is p(token) / p_old(token). Its logarithm is held within -20 and 20, so that exp of it is finite;
beyond, it has no gradient (as in verl). What the mask leaves out is read nowhere.

Axes: B rows, each with one answer; T tokens.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

_MOST_LOG_RATIO = 20.0
_LEAST_LOG_WEIGHT = -18.42  # of vespo: log 1e-8

Tokens = Float[Array, "B T"]
Numbers = TypeVar("Numbers", Array, np.ndarray)


@dataclasses.dataclass(frozen=True)
class Options:
    """What the losses may depend on besides log-probabilities and advantages; each reads those its row names.

    Attributes:
      clip_low, clip_high: the ratio is held within 1 - clip_low and 1 + clip_high; of gmpo its logarithm within
        -clip_low and clip_high.
      dual_clip: where the advantage is negative the ratio counts for no more than this: verl's clip_ratio_c, TRL's
        delta. None for no bound.
      tau_pos, tau_neg: of sapo: how fast the gradient fades as the ratio leaves 1, where the advantage is positive, and
        where it is not.
      k_pos, k_neg, lambda_pos, lambda_neg: of vespo: the shape of an answer's weight, likewise.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    tau_pos: float = 1.0
    tau_neg: float = 1.05
    k_pos: float = 2.0
    k_neg: float = 3.0
    lambda_pos: float = 3.0
    lambda_neg: float = 2.0


class Samples(NamedTuple):
    """Sampled tokens, as a loss sees them. Outside of the mask all is 0: see `of`.

    Attributes:
      log_prob: log p of each; the only one with a gradient.
      old: log p by the policy that the ratio is against.
      advantage: of each.
      mask: 1 at the tokens that count, else 0.
    """

    log_prob: Tokens
    old: Tokens
    advantage: Tokens
    mask: Tokens

    @classmethod
    def of(cls, log_prob: Tokens, old: Tokens, advantage: Tokens, mask: Tokens) -> "Samples":
        """The same with 0 outside of the mask, whatever stands there."""
        clean = (jnp.where(mask > 0, x, 0) for x in (log_prob, old, advantage))
        return cls(*clean, mask)

    def log_ratio(self) -> Tokens:
        """log(p / p_old) of each token."""
        return _bounded(self.log_prob - self.old)

    def row_mean(self, values: Tokens) -> Float[Array, "B 1"]:
        """The mean over the answer's tokens; 0 without any."""
        return _row_sum(self.mask * values) / jnp.maximum(_row_sum(self.mask), 1)


class TokenLosses(NamedTuple):
    """What a loss makes of each token.

    Attributes:
      values: the loss. Of a loss of whole answers, at each token that of its answer.
      ratio: what the loss made of p / p_old; 1 where it reads none.
      low, high, dual: 1 where a bound held the ratio and so took the gradient; None where the loss has no such bound.
    """

    values: Tokens
    ratio: Tokens
    low: Tokens | None = None
    high: Tokens | None = None
    dual: Tokens | None = None


@dataclasses.dataclass(frozen=True)
class Loss:
    """A loss of sampled tokens.

    Attributes:
      function: (samples, options) -> TokenLosses.
      source: the paper, and the equation.
      takes: the Options that it reads.
      defaults: option -> its default, where that isn't the one of Options.
      ratio: it compares with p_old.
      aggregation: of AGGREGATIONS, what it was published with.
      rows: an answer has one loss, so that only a mean over answers makes sense.
      by_token: the loss of a token reads nothing of the answer's others.
    """

    function: Callable[[Samples, Options], TokenLosses]
    source: str
    takes: tuple[str, ...] = ()
    defaults: dict[str, float | None] = dataclasses.field(default_factory=dict)
    ratio: bool = True
    aggregation: str = "token-mean"
    rows: bool = False
    by_token: bool = False


def reinforce(samples: Samples, options: Options) -> TokenLosses:
    """-A log p. It knows nothing of p_old: right where the policy is the one that sampled."""
    return TokenLosses(-samples.advantage * samples.log_prob, jnp.ones_like(samples.log_prob))


def ppo(samples: Samples, options: Options) -> TokenLosses:
    """-min(r A, clip(r) A) of the token's ratio r; with a dual clip no more than -c A where A < 0."""
    return _clipped(jnp.exp(samples.log_ratio()), samples, options)


def gspo(samples: Samples, options: Options) -> TokenLosses:
    """`ppo` of the answer's ratio: the geometric mean of its tokens' ratios.

    It is GSPO-token: the value of each token's ratio is the answer's, its gradient that of its own log p. Where the
    answer's tokens have one advantage and one weight, the sum is GSPO's.
    """
    mean = jax.lax.stop_gradient(samples.row_mean(samples.log_ratio()))
    own = samples.log_prob - jax.lax.stop_gradient(samples.log_prob)
    return _clipped(jnp.exp(mean + own), samples, options)


def ppo_sequence(samples: Samples, options: Options) -> TokenLosses:
    """`ppo` of the answer's probability ratio, the product of its tokens' ratios; one loss an answer."""
    ratio = jnp.exp(_bounded(_row_sum(samples.log_prob - samples.old)))
    spread = functools.partial(jnp.broadcast_to, shape=samples.mask.shape)
    return _clipped(spread(ratio), samples._replace(advantage=spread(samples.row_mean(samples.advantage))), options)


def cispo(samples: Samples, options: Options) -> TokenLosses:
    """-clip(r) A log p: a bound on the ratio as a constant weight, so that no token loses its gradient."""
    ratio = jax.lax.stop_gradient(jnp.exp(samples.log_ratio()))
    low, high = 1 - options.clip_low, 1 + options.clip_high
    values = -jnp.clip(ratio, low, high) * samples.advantage * samples.log_prob
    return TokenLosses(values, ratio, _flag(ratio < low), _flag(ratio > high))


def gmpo(samples: Samples, options: Options) -> TokenLosses:
    """-A times the geometric mean of the tokens' ratios, each held on the side where A would drive it too far; one loss
    an answer."""
    log_ratio, advantage = samples.log_ratio(), samples.row_mean(samples.advantage)
    held = jnp.clip(log_ratio, -options.clip_low, options.clip_high)
    held = jnp.where(advantage > 0, jnp.minimum(log_ratio, held), jnp.maximum(log_ratio, held))
    ratio = jnp.broadcast_to(jnp.exp(samples.row_mean(held)), samples.mask.shape)
    low = (log_ratio < -options.clip_low) & (advantage <= 0)
    high = (log_ratio > options.clip_high) & (advantage > 0)
    return TokenLosses(-advantage * ratio, jax.lax.stop_gradient(ratio), _flag(low), _flag(high))


def sapo(samples: Samples, options: Options) -> TokenLosses:
    """-A (4 / tau) s(tau (r - 1)): a soft clip, with the gradient of r A at r = 1 and less the further r is from it."""
    ratio = jnp.exp(samples.log_ratio())
    tau = jnp.where(samples.advantage > 0, options.tau_pos, options.tau_neg)
    values = -samples.advantage * jax.nn.sigmoid(tau * (ratio - 1)) * 4 / tau
    return TokenLosses(values, jax.lax.stop_gradient(ratio))


def vespo(samples: Samples, options: Options) -> TokenLosses:
    """-phi(w) A log p, where w is the answer's probability ratio and phi(w) = w^k exp(lambda (1 - w)), a constant that
    is 1 at w = 1."""
    log_w = jnp.clip(_row_sum(samples.log_ratio()), _LEAST_LOG_WEIGHT, _MOST_LOG_RATIO)
    log_w = jax.lax.stop_gradient(log_w)
    good = samples.advantage >= 0
    k = jnp.where(good, options.k_pos, options.k_neg)
    scale = jnp.where(good, options.lambda_pos, options.lambda_neg)
    phi = jnp.exp(k * log_w + scale * (1 - jnp.exp(log_w)))
    ratio = jnp.broadcast_to(jnp.exp(log_w), samples.mask.shape)
    return TokenLosses(-phi * samples.advantage * samples.log_prob, ratio)


_CLIPS = ("clip_low", "clip_high")

LOSSES: dict[str, Loss] = {
    "reinforce": Loss(
        reinforce,
        "REINFORCE, Williams 1992, doi:10.1007/BF00992696; GPG's too, arXiv:2504.02546",
        ratio=False,
        by_token=True,
    ),
    "ppo": Loss(
        ppo,
        "PPO, arXiv:1707.06347, equation 7; dual clip arXiv:1912.09729; different bounds above and below DAPO, "
        "arXiv:2503.14476, equation 8",
        takes=(*_CLIPS, "dual_clip"),
        by_token=True,
    ),
    "ppo_sequence": Loss(
        ppo_sequence,
        "RLOO, arXiv:2402.14740, of whole answers, with PPO's clip as in TRL's RLOOTrainer",
        takes=(*_CLIPS, "dual_clip"),
        aggregation="seq-mean-token-mean",
        rows=True,
    ),
    "gspo": Loss(
        gspo,
        "GSPO, arXiv:2507.18071, equations 5 to 7; as GSPO-token, equations 13 and 14; with seq-mean-token-sum LUSPO, "
        "arXiv:2602.05261",
        takes=(*_CLIPS, "dual_clip"),
        defaults={"clip_low": 3e-4, "clip_high": 4e-4},
        aggregation="seq-mean-token-mean",
    ),
    "cispo": Loss(
        cispo,
        "CISPO, MiniMax-M1, arXiv:2506.13585, equations 4 and 5, without a lower bound",
        takes=_CLIPS,
        defaults={"clip_low": 1.0, "clip_high": 4.0},
        by_token=True,
    ),
    "gmpo": Loss(
        gmpo,
        "GMPO, arXiv:2507.20673",
        takes=_CLIPS,
        defaults={"clip_low": 0.4, "clip_high": 0.4},
        aggregation="seq-mean-token-mean",
        rows=True,
    ),
    "sapo": Loss(
        sapo,
        "SAPO, arXiv:2511.20347",
        takes=("tau_pos", "tau_neg"),
        aggregation="seq-mean-token-mean",
        by_token=True,
    ),
    "vespo": Loss(
        vespo,
        "VESPO, arXiv:2602.10693, as in TRL's GRPOTrainer",
        takes=("k_pos", "k_neg", "lambda_pos", "lambda_neg"),
    ),
}


@dataclasses.dataclass(frozen=True)
class Kl:
    """An estimate of the KL to a reference that stands in a loss.

    Attributes:
      function: (log p, log p_ref, log p - log p_old) -> estimates of each token. Only its gradient teaches.
      follows: the divergence whose gradient it has in expectation.
      on_policy: that holds only where the policy is the one that sampled.
      source: where from.
    """

    function: Callable[[Tokens, Tokens, Tokens], Tokens]
    follows: str
    on_policy: bool
    source: str


def kl_estimate(kind: str, d: Numbers, exp: Callable[[Numbers], Numbers]) -> Numbers:
    """An estimate of KL(p || p_ref) of each sampled token (joschu.net/blog/kl-approx.html).

    Args:
      kind: "k1" is d, "k2" d^2 / 2, "k3" e^-d - 1 + d, which has the mean of k1 and is never negative.
      d: log p - log p_ref, of NumPy or JAX.
      exp: of the same library, with what bounds it is to have.
    """
    match kind:
        case "k1":
            return d
        case "k2":
            return d * d / 2
        case "k3":
            return exp(-d) - 1 + d
    raise ValueError(kind)


def k1(log_prob: Tokens, reference: Tokens) -> Tokens:
    """See kl_estimate."""
    return kl_estimate("k1", _bounded(log_prob - reference), jnp.exp)


def k2(log_prob: Tokens, reference: Tokens) -> Tokens:
    """See kl_estimate."""
    return kl_estimate("k2", _bounded(log_prob - reference), jnp.exp)


def k3(log_prob: Tokens, reference: Tokens) -> Tokens:
    """See kl_estimate."""
    return kl_estimate("k3", _bounded(log_prob - reference), jnp.exp)


def _k3_straight_through(log_prob: Tokens, reference: Tokens) -> Tokens:
    gradient = k2(log_prob, reference)
    return gradient + jax.lax.stop_gradient(k3(log_prob, reference) - gradient)


_SCHULMAN = "Schulman 2020, joschu.net/blog/kl-approx.html"
_REVERSE, _FORWARD = "KL(policy || reference)", "KL(reference || policy)"

# k1 alone isn't here: the mean of its gradient, that of log p, is 0.
KL: dict[str, Kl] = {
    "k2": Kl(lambda p, ref, r: k2(p, ref), _REVERSE, True, _SCHULMAN),
    "k3": Kl(lambda p, ref, r: k3(p, ref), _FORWARD, True, f"{_SCHULMAN}; GRPO, arXiv:2402.03300, equation 4"),
    "k3_straight_through": Kl(
        lambda p, ref, r: _k3_straight_through(p, ref),
        _REVERSE,
        True,
        "verl's k3+: the value of k3, the gradient of k2",
    ),
    "k1_ratio": Kl(
        lambda p, ref, r: jnp.exp(_bounded(r)) * k1(p, ref), _REVERSE, False, "importance sampling of KL(policy || ...)"
    ),
    "k3_ratio": Kl(
        lambda p, ref, r: jnp.exp(_bounded(r)) * k3(p, ref),
        _REVERSE,
        False,
        "DeepSeek-V3.2, arXiv:2512.02556, equation 7; TRL's use_bias_correction_kl",
    ),
}


class Shares(NamedTuple):
    """How the losses of tokens become one number: sum(weights * losses) / weight.

    Attributes:
      weights: of each token; 0 outside of the mask.
      weight: what to divide by. It adds up over parts of a batch.
    """

    weights: Tokens
    weight: Float[Array, ""]


def _token_mean(mask: Tokens, rows: Float[Array, " B"], budget: float) -> Shares:
    return Shares(mask, jnp.sum(mask))


def _seq_mean_token_sum(mask: Tokens, rows: Float[Array, " B"], budget: float) -> Shares:
    return Shares(mask, jnp.sum(_row_sum(mask) > 0).astype(mask.dtype))


def _seq_mean_token_mean(mask: Tokens, rows: Float[Array, " B"], budget: float) -> Shares:
    return Shares(mask / jnp.maximum(_row_sum(mask), 1), jnp.sum(_row_sum(mask) > 0).astype(mask.dtype))


def _fixed_budget(mask: Tokens, rows: Float[Array, " B"], budget: float) -> Shares:
    return Shares(mask, jnp.sum(rows) * budget)


# By verl's names: (mask, whether a row holds an answer at all, budget) -> Shares. A mean over answers is over those of
# which a token counts; the fixed budget, Dr. GRPO's (arXiv:2503.20783), over all.
AGGREGATIONS: dict[str, Callable[[Tokens, Float[Array, " B"], float], Shares]] = {
    "token-mean": _token_mean,
    "seq-mean-token-sum": _seq_mean_token_sum,
    "seq-mean-token-mean": _seq_mean_token_mean,
    "seq-mean-token-sum-norm": _fixed_budget,
}


def importance(
    old: Tokens, sampler: Tokens, mask: Tokens, *, sequence: bool, bounds: tuple[float, float], drop: bool
) -> Tokens:
    """What samples weigh that another distribution than the trainer's has made: a constant for each token, 0 outside of
    the mask.

    Args:
      old: log-probabilities by the trainer as it was when the samples were drawn.
      sampler: those that they were drawn with.
      mask: 1 at the tokens that count.
      sequence: an answer's tokens all have the product of their ratios; else each has its own.
      bounds: the least and the greatest weight.
      drop: a weight beyond the bounds becomes 0 (masked importance sampling), and not the bound (truncated,
        Espeholt et al., arXiv:1802.01561).
    """
    log_weights = jnp.where(mask > 0, old - sampler, 0)  # of the batch's fields, whatever stands outside
    if sequence:
        log_weights = jnp.broadcast_to(_row_sum(log_weights), mask.shape)
    weights = jnp.exp(_bounded(log_weights))
    low, high = bounds
    inside = (weights >= low) & (weights <= high)
    weights = jnp.where(inside, weights, 0) if drop else jnp.clip(weights, low, high)
    return jax.lax.stop_gradient(mask * weights)


def near_policy(samples: Samples, sampler: Tokens, most: float) -> Tokens:
    """0 at the tokens with a negative advantage of an answer that the policy has left: the mean over its tokens of
    log p_sampler - log p is above `most`. Else 1 (DeepSeek-V3.2, arXiv:2512.02556, section 3.1)."""
    gap = samples.row_mean(jnp.where(samples.mask > 0, sampler - samples.log_prob, 0))
    return jax.lax.stop_gradient(_flag((samples.advantage >= 0) | (gap <= most)))


def high_entropy(entropies: Tokens, of_batch: Float[Array, "N T"], share: float) -> Tokens:
    """1 at the tokens of the highest entropies of a batch, this share of all, else 0 (arXiv:2506.01939).

    Args:
      entropies: of each token.
      of_batch: those of the whole batch; NaN where no token counts.
      share: above 0. The threshold is interpolated as a quantile.
    """
    return jax.lax.stop_gradient(_flag(entropies >= jnp.nanquantile(of_batch, 1 - share)))


def _clipped(ratio: Tokens, samples: Samples, options: Options) -> TokenLosses:
    advantage, low, high = samples.advantage, 1 - options.clip_low, 1 + options.clip_high
    values = -jnp.minimum(ratio * advantage, jnp.clip(ratio, low, high) * advantage)
    dual = None
    if options.dual_clip is not None:
        values = jnp.where(advantage < 0, jnp.minimum(values, -options.dual_clip * advantage), values)
        dual = _flag((advantage < 0) & (ratio > options.dual_clip))
    ratio = jax.lax.stop_gradient(ratio)
    held = (advantage < 0) & (ratio < low), (advantage > 0) & (ratio > high)
    return TokenLosses(values, ratio, *(_flag(x) for x in held), dual)


def _bounded(log_ratio: Float[Array, "*N"]) -> Float[Array, "*N"]:
    return jnp.clip(log_ratio, -_MOST_LOG_RATIO, _MOST_LOG_RATIO)


def _row_sum(values: Tokens) -> Float[Array, "B 1"]:
    return jnp.sum(values, axis=1, keepdims=True)


def _flag(condition: Array) -> Tokens:
    return condition.astype(jnp.float32)
