"""Cross-entropy, log-probabilities and entropies over a large vocabulary, by the scan of ops/head.py."""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from research.ops.head import Comparison, Head, detached_values, token_values, weighted_sum

_LOWEST = float(np.finfo(np.float32).min)


class CrossEntropy(NamedTuple):
    """Sums over tokens, each times its weight: float32 scalars; and values of each. Only `loss_sum` has a gradient.

    Attributes:
      loss_sum: the loss, label smoothing and z-loss included.
      nll_sum: -log p(target).
      z_sum: logsumexp(logits)^2.
      correct_sum: 1 where the target's logit is above all others, else 0.
      weight_sum: the weights.
      loss, nll: the loss and -log p(target) of each token, whatever its weight.
    """

    loss_sum: Float[Array, ""]
    nll_sum: Float[Array, ""]
    z_sum: Float[Array, ""]
    correct_sum: Float[Array, ""]
    weight_sum: Float[Array, ""]
    loss: Float[Array, "B T"]
    nll: Float[Array, "B T"]


class LogProbs(NamedTuple):
    """Of each token, [B, T] float32; both have gradients.

    Attributes:
      target: log p(target).
      entropy: -sum p log p, in nats.
    """

    target: Float[Array, "B T"]
    entropy: Float[Array, "B T"]


@jax.named_scope("loss")
def cross_entropy(
    hidden: Float[Array, "B T D"],
    head: Head,
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    *,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    chunk: int | None = None,
) -> CrossEntropy:
    """Weighted sum over tokens of the cross-entropy of softmax(logits) with the smoothed target, plus the z-loss.

    With e = label_smoothing, the target has probability 1 - e + e / V and every other token e / V (arXiv:1512.00567,
    section 7, as in torch). The z-loss of a token is z_loss * logsumexp(logits)^2 (PaLM, arXiv:2204.02311, section 5).
    The matrix product runs in the dtype of `hidden` and accumulates in float32; all else is in float32 (float64 where
    `hidden` is).

    Differentiable once, in reverse mode, with respect to hidden, head and weights.

    Args:
      hidden: [B, T, D].
      head: the unembedding.
      targets: [B, T] int32. Where the weight is 0, any value will do, -100 as well.
      weights: [B, T] float32.
      z_loss: coefficient of the z-loss.
      label_smoothing: e above, in [0, 1).
      chunk: positions per chunk; by default what ops.chunks finds fit for each device.
    """
    compare = functools.partial(_compare_target, z_loss, label_smoothing)
    loss_sum, loss, details = weighted_sum(compare, hidden, head, weights, targets, chunk=chunk)
    weights = jax.lax.stop_gradient(weights)
    return CrossEntropy(
        loss_sum=loss_sum,
        nll_sum=jnp.sum(weights * details.nll),
        z_sum=jnp.sum(weights * jnp.square(details.logsumexp)),
        correct_sum=jnp.sum(weights * details.correct),
        weight_sum=jnp.sum(weights),
        loss=loss,
        nll=details.nll,
    )


@jax.named_scope("loss")
def log_probs(
    hidden: Float[Array, "B T D"],
    head: Head,
    targets: Int[Array, "B T"],
    *,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    frozen_entropy: bool = False,
    chunk: int | None = None,
) -> LogProbs:
    """log p(target) and the entropy of p = softmax(logits / temperature); their gradient computes each chunk's logits
    again. Where the target isn't in [0, V) its value means nothing, and must not be used.

    Args:
      hidden, head, targets, chunk: see `cross_entropy`.
      temperature: above 0.
      vocab_size: p is over the ids below it, as a sampler's is that never chooses the others; None: over all V.
      frozen_entropy: the entropy has no gradient, and costs none.
    """
    compare = functools.partial(_compare_log_probs, _Sampled(temperature, vocab_size), frozen_entropy)
    out = token_values(compare, hidden, head, targets, chunk=chunk)
    return out._replace(entropy=jax.lax.stop_gradient(out.entropy)) if frozen_entropy else out


@jax.named_scope("loss")
def sampled_loss(
    function: Callable[[LogProbs, PyTree], tuple[Float[Array, "B t"], PyTree]],
    hidden: Float[Array, "B T D"],
    head: Head,
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    extras: PyTree = (),
    *,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    frozen_entropy: bool = False,
    chunk: int | None = None,
) -> tuple[Float[Array, ""], Float[Array, "B T"], PyTree]:
    """The sum over tokens of weight times function(LogProbs, extras): see head.weighted_sum.

    For losses of which each token's reads no other token's log-probability. A function of what `log_probs` returns may
    read all, and its gradient computes the logits again: four products with the head, where these are three.

    Args:
      function: of the tokens of a chunk; returns the loss of each and details, a pytree of arrays [B, t].
      hidden, head, targets, temperature, vocab_size, frozen_entropy, chunk: see `log_probs`.
      weights, extras: see head.weighted_sum.

    Returns:
      The sum, the loss of each token and the details. Only the sum has a gradient.
    """
    compare = functools.partial(_compare_sampled, function, _Sampled(temperature, vocab_size), frozen_entropy)
    return weighted_sum(compare, hidden, head, weights, (targets, extras), chunk=chunk)


class TargetLogProbs(NamedTuple):
    """Of each token, [B, T] float32.

    Attributes:
      target: log p(target).
      collision: log sum_v p(v)^2, the chance that two draws are one token. It takes no gradient; None unless asked for.
    """

    target: Float[Array, "B T"]
    collision: Float[Array, "B T"] | None = None


@jax.named_scope("loss")
def target_log_probs(
    hidden: Float[Array, "B T D"],
    head: Head,
    targets: Int[Array, "B T"],
    *,
    collision: bool = False,
    frozen: bool = False,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    chunk: int | None = None,
) -> TargetLogProbs:
    """log p(target) of p = softmax(logits / temperature), whose gradient computes each chunk's logits again.

    Args:
      hidden, head, targets, temperature, vocab_size, chunk: see `log_probs`.
      collision: whether log sum p^2 is wanted too.
      frozen: nothing has a gradient.
    """
    run = detached_values if frozen else token_values
    compare = functools.partial(_compare_targets, _Sampled(temperature, vocab_size), collision)
    out = run(compare, hidden, head, targets, chunk=chunk)
    return out._replace(collision=jax.lax.stop_gradient(out.collision))


class _Details(NamedTuple):
    """Of each token, [B, t] float32."""

    nll: Float[Array, "B t"]
    logsumexp: Float[Array, "B t"]
    correct: Float[Array, "B t"]


class _Sampled(NamedTuple):
    """The distribution that tokens are drawn from: see `log_probs`."""

    temperature: float
    vocab_size: int | None

    def logits(self, logits: Float[Array, "B t V"]) -> Float[Array, "B t V"]:
        """Those whose softmax is the distribution."""
        logits = logits if self.temperature == 1 else logits / self.temperature
        if self.vocab_size is None or self.vocab_size >= logits.shape[-1]:
            return logits
        return jnp.where(jnp.arange(logits.shape[-1])[None, None, :] < self.vocab_size, logits, -jnp.inf)

    def gradient(self, g: Float[Array, "B t V"]) -> Float[Array, "B t V"]:
        """By the model's logits, of `g` by these."""
        return g if self.temperature == 1 else g / self.temperature


@dataclasses.dataclass(frozen=True)
class _Chunk:
    """What all here compute of a chunk's logits."""

    logits: Float[Array, "B t V"]
    targets: Int[Array, "B t"]

    @functools.cached_property
    def at_target(self) -> Bool[Array, "B t V"]:
        # A comparison rather than a gather, so that the vocabulary may be sharded.
        tokens = jnp.arange(self.logits.shape[2], dtype=self.targets.dtype)
        return tokens[None, None, :] == self.targets[:, :, None]

    @functools.cached_property
    def target_logit(self) -> Float[Array, "B t"]:
        return jnp.sum(jnp.where(self.at_target, self.logits, 0.0), axis=-1)

    @functools.cached_property
    def logsumexp(self) -> Float[Array, "B t"]:
        return jax.nn.logsumexp(self.logits, axis=-1)

    @functools.cached_property
    def log_p(self) -> Float[Array, "B t V"]:
        return self.logits - self.logsumexp[:, :, None]


def _compare_target(
    z_loss: float, smoothing: float, logits: Float[Array, "B t V"], targets: Int[Array, "B t"]
) -> Comparison:
    """The loss of `cross_entropy`, with _Details."""
    chunk = _Chunk(logits, targets)
    lse, target_logit = chunk.logsumexp, chunk.target_logit
    not_below = jnp.sum((logits >= target_logit[:, :, None]).astype(logits.dtype), axis=-1)
    loss = lse - (1 - smoothing) * target_logit + z_loss * jnp.square(lse)
    if smoothing:
        loss -= smoothing * jnp.mean(logits, axis=-1)
    details = _Details(lse - target_logit, lse, (not_below == 1).astype(logits.dtype))
    return Comparison(loss, details, functools.partial(_target_gradient, z_loss, smoothing, chunk))


def _target_gradient(
    z_loss: float, smoothing: float, chunk: _Chunk, weights: Float[Array, "B t"]
) -> Float[Array, "B t V"]:
    """p (1 + 2 z_loss logsumexp) less the smoothed target, times the weight."""
    each = smoothing / chunk.logits.shape[2]
    g = jnp.exp(chunk.log_p) * (1 + 2 * z_loss * chunk.logsumexp)[:, :, None]
    g -= jnp.where(chunk.at_target, 1 - smoothing + each, each)
    return g * weights[:, :, None]


def _compare_log_probs(
    sampled: _Sampled, frozen_entropy: bool, logits: Float[Array, "B t V"], targets: Int[Array, "B t"]
) -> Comparison:
    """LogProbs."""
    chunk = _Chunk(sampled.logits(logits), targets)
    log_p = chunk.log_p
    # 0 and not NaN where a token can't come.
    entropy = -jnp.sum(jnp.exp(log_p) * jnp.maximum(log_p, _LOWEST), axis=-1)
    values = LogProbs(-(chunk.logsumexp - chunk.target_logit), entropy)

    def gradient(weights: LogProbs) -> Float[Array, "B t V"]:
        of_entropy = None if frozen_entropy else entropy
        return sampled.gradient(_log_probs_gradient(chunk, of_entropy, weights))

    return Comparison(values, None, gradient)


def _compare_sampled(
    function: Callable,
    sampled: _Sampled,
    frozen_entropy: bool,
    logits: Float[Array, "B t V"],
    extras: tuple[Int[Array, "B t"], PyTree],
) -> Comparison:
    """What `function` makes of LogProbs."""
    targets, others = extras
    of_probs = _compare_log_probs(sampled, frozen_entropy, logits, targets)
    values, pullback, details = jax.vjp(lambda probs: function(probs, others), of_probs.values, has_aux=True)
    return Comparison(values, details, lambda weights: of_probs.gradient(*pullback(weights)))


def _log_probs_gradient(chunk: _Chunk, entropy: Float[Array, "B t"] | None, weights: LogProbs) -> Float[Array, "B t V"]:
    """By the logit of v they are [v = target] - p_v and -p_v (log p_v + entropy); without `entropy` the first alone."""
    p = jnp.exp(chunk.log_p)
    g = (p - jnp.where(chunk.at_target, 1.0, 0.0)) * -weights.target[:, :, None]
    if entropy is None:
        return g
    return g - weights.entropy[:, :, None] * (p * (jnp.maximum(chunk.log_p, _LOWEST) + entropy[:, :, None]))


def _compare_targets(
    sampled: _Sampled, collision: bool, logits: Float[Array, "B t V"], targets: Int[Array, "B t"]
) -> Comparison:
    """TargetLogProbs."""
    chunk = _Chunk(sampled.logits(logits), targets)
    pairs = jax.nn.logsumexp(2 * chunk.logits, axis=-1) - 2 * chunk.logsumexp if collision else None
    values = TargetLogProbs(-(chunk.logsumexp - chunk.target_logit), pairs)
    return Comparison(values, None, lambda weights: sampled.gradient(_targets_gradient(chunk, weights)))


def _targets_gradient(chunk: _Chunk, weights: TargetLogProbs) -> Float[Array, "B t V"]:
    """By the logit of v: [v = target] - p_v."""
    return (jnp.where(chunk.at_target, 1.0, 0.0) - jnp.exp(chunk.log_p)) * weights.target[:, :, None]
