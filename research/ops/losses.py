"""Cross-entropy, log-probabilities and entropies over a large vocabulary: no array of size [B, T, V] is ever held.

Logits are made a chunk of time at a time. Where a gradient is wanted it is made in the forward pass, chunk by chunk
while the logits are there, and only scaled in the backward pass: nothing is stored for it but the gradient itself, and
nothing computed twice.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from research.ops.chunks import chunk_size, chunks, kernel_gradient, no_gradient, token_shards, total, whole_width

_LOWEST = float(np.finfo(np.float32).min)


class Head(NamedTuple):
    """What turns hidden states into logits: softcap * tanh((hidden @ kernel + bias) / softcap).

    Attributes:
      kernel: [D, V]; the transpose of the embedding where the two are tied.
      bias: [V], or None.
      softcap: a python float; 0 means that logits aren't capped (Gemma 2, arXiv:2408.00118, section 2).
      by_token: the kernel is the transpose of an array [V, D]. Loops over chunks may carry that one, as XLA would write
        out the other.
    """

    kernel: jax.Array
    bias: jax.Array | None
    softcap: float
    by_token: bool = False

    @property
    def axes(self) -> str:
        """Of the kernel as it lies in memory: "dv" for [D, V], "vd" for [V, D]."""
        return "vd" if self.by_token else "dv"

    @property
    def stored(self) -> jax.Array:
        """The kernel as it lies in memory."""
        return self.kernel.T if self.by_token else self.kernel


class CrossEntropy(NamedTuple):
    """Sums over tokens, each times its weight: float32 scalars. Only `loss_sum` has a gradient.

    Attributes:
      loss_sum: the loss, label smoothing and z-loss included.
      nll_sum: -log p(target).
      z_sum: logsumexp(logits)^2.
      correct_sum: 1 where the target's logit is above all others, else 0.
      weight_sum: the weights.
    """

    loss_sum: jax.Array
    nll_sum: jax.Array
    z_sum: jax.Array
    correct_sum: jax.Array
    weight_sum: jax.Array


class LogProbs(NamedTuple):
    """Of each token, [B, T] float32; both have gradients.

    Attributes:
      target: log p(target).
      entropy: -sum p log p, in nats.
    """

    target: jax.Array
    entropy: jax.Array


class _Options(NamedTuple):
    softcap: float
    axes: str
    chunk: int
    z_loss: float = 0.0
    label_smoothing: float = 0.0
    entropy: bool = False


class _Tokens(NamedTuple):
    """Per-token values, [B, T] float32."""

    loss: jax.Array
    nll: jax.Array
    logsumexp: jax.Array
    correct: jax.Array
    entropy: jax.Array | None


@jax.named_scope("loss")
def cross_entropy(
    hidden: jax.Array,
    head: Head,
    targets: jax.Array,
    weights: jax.Array,
    *,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    chunk: int | None = None,
) -> CrossEntropy:
    """Weighted sum over tokens of the cross-entropy of softmax(logits) with the smoothed target, plus the z-loss.

    With e = label_smoothing, the target has probability 1 - e + e / V and every other token e / V (arXiv:1512.00567,
    section 7, as in torch). The z-loss of a token is z_loss * logsumexp(logits)^2 (PaLM, arXiv:2204.02311, section 5).
    The matrix product runs in the dtype of `hidden` and accumulates in float32; all else is in float32.

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
    chunk = chunk or chunk_size(hidden, head.kernel.shape[1])
    options = _Options(head.softcap, head.axes, chunk, z_loss, label_smoothing)
    loss_sum, tokens = _cross_entropy(options, hidden, head.stored, head.bias, targets, weights)
    weights = jax.lax.stop_gradient(weights)
    return CrossEntropy(
        loss_sum=loss_sum,
        nll_sum=jnp.sum(weights * tokens.nll),
        z_sum=jnp.sum(weights * jnp.square(tokens.logsumexp)),
        correct_sum=jnp.sum(weights * tokens.correct),
        weight_sum=jnp.sum(weights),
    )


@jax.named_scope("loss")
def log_probs(hidden: jax.Array, head: Head, targets: jax.Array, *, chunk: int | None = None) -> LogProbs:
    """log p(target) and the entropy of p = softmax(logits); their gradient computes each chunk's logits again.

    By the logit of v they are [v = target] - p_v and -p_v (log p_v + entropy).

    Args: see `cross_entropy`. Where the target isn't in [0, V) its value means nothing, and must not be used.
    """
    options = _Options(head.softcap, head.axes, chunk or chunk_size(hidden, head.kernel.shape[1]), entropy=True)
    return _log_probs(options, hidden, head.stored, head.bias, targets)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cross_entropy(options, hidden, kernel, bias, targets, weights):
    tokens, _ = _scan(options, hidden, kernel, bias, targets, (weights,), with_gradient=False)
    return jnp.sum(weights * tokens.loss), tokens


def _cross_entropy_forward(options, hidden, kernel, bias, targets, weights):
    tokens, gradient = _scan(options, hidden, kernel, bias, targets, (weights,), with_gradient=True)
    return (jnp.sum(weights * tokens.loss), tokens), (*gradient, tokens.loss)


def _cross_entropy_backward(options, residuals, cotangents):
    scale = lambda x: (cotangents[0] * x.astype(jnp.float32)).astype(x.dtype)  # noqa: E731
    g_hidden, g_kernel, g_bias, g_weights = jax.tree.map(scale, residuals)
    return g_hidden, g_kernel, g_bias, None, g_weights


_cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _log_probs(options, hidden, kernel, bias, targets):
    weights = (jnp.ones(targets.shape, jnp.float32),) * 2
    tokens, _ = _scan(options, hidden, kernel, bias, targets, weights, with_gradient=False)
    return LogProbs(-tokens.nll, tokens.entropy)


def _log_probs_forward(options, hidden, kernel, bias, targets):
    return _log_probs(options, hidden, kernel, bias, targets), (hidden, kernel, bias, targets)


def _log_probs_backward(options, residuals, cotangents):
    # The gradient of sum(g * log p) is that of the cross-entropy with weights -g.
    _, gradient = _scan(options, *residuals, (-cotangents.target, cotangents.entropy), with_gradient=True)
    return *gradient, None


_log_probs.defvjp(_log_probs_forward, _log_probs_backward)


def _scan(options, hidden, kernel, bias, targets, weights, *, with_gradient):
    """Runs over chunks of time. Returns _Tokens, and the gradients of the sum of the loss times weights[0] (and of the
    entropy times weights[1]) by hidden, kernel and bias."""
    split, join = chunks(hidden.shape[1], options.chunk)

    def body(sums, x):
        tokens, g_hidden, *more = _one_chunk(options, compute_kernel, bias, *x, with_gradient, shards)
        return jax.tree.map(jnp.add, sums, tuple(more)), (tokens, g_hidden)

    compute_kernel, shards = whole_width(kernel.astype(hidden.dtype), options.axes), token_shards(hidden)
    zeros = None, None
    if with_gradient:
        g_bias = None if bias is None else jnp.zeros(bias.shape, jnp.float32)
        zeros = no_gradient(kernel, options.axes, shards, jnp.float32), g_bias
    sums, (tokens, g_hidden) = jax.lax.scan(body, zeros, jax.tree.map(split, (hidden, targets, weights)))
    tokens = jax.tree.map(join, tokens)
    if not with_gradient:
        return tokens, None
    sums = total(sums[0]), sums[1]
    g_kernel, g_bias = jax.tree.map(lambda g, x: g.astype(x.dtype), sums, (kernel, bias))
    return tokens, (join(g_hidden), g_kernel, g_bias)


def _one_chunk(options, kernel, bias, hidden, targets, weights, with_gradient, shards):
    """hidden [B, t, D], targets and weights [B, t] -> _Tokens of [B, t], and the gradients (None unless wanted)."""
    e, axes = options.label_smoothing, options.axes
    V = kernel.shape[axes.index("v")]
    logits = jnp.einsum(f"btd,{axes}->btv", hidden, kernel, preferred_element_type=jnp.float32)
    if bias is not None:
        logits += bias.astype(jnp.float32)[None, None, :]
    if options.softcap:
        logits = options.softcap * jnp.tanh(logits / options.softcap)
    # A comparison rather than a gather, so that the vocabulary may be sharded.
    at_target = jnp.arange(V, dtype=targets.dtype)[None, None, :] == targets[:, :, None]
    target_logit = jnp.sum(jnp.where(at_target, logits, 0.0), axis=-1)
    not_below = jnp.sum((logits >= target_logit[:, :, None]).astype(jnp.float32), axis=-1)
    lse = jax.nn.logsumexp(logits, axis=-1)
    loss = lse - (1 - e) * target_logit + options.z_loss * jnp.square(lse)
    if e:
        loss -= e * jnp.mean(logits, axis=-1)
    log_p = logits - lse[:, :, None]
    # 0 and not NaN where a token can't come.
    entropy = -jnp.sum(jnp.exp(log_p) * jnp.maximum(log_p, _LOWEST), axis=-1) if options.entropy else None
    tokens = _Tokens(loss, lse - target_logit, lse, (not_below == 1).astype(jnp.float32), entropy)
    if not with_gradient:
        return tokens, None, None, None

    g = jnp.exp(log_p) * (1 + 2 * options.z_loss * lse)[:, :, None]
    g -= jnp.where(at_target, 1 - e + e / V, e / V)
    g *= weights[0][:, :, None]
    if options.entropy:
        more = jnp.exp(log_p) * (jnp.maximum(log_p, _LOWEST) + entropy[:, :, None])
        g -= weights[1][:, :, None] * more
    if options.softcap:
        g *= 1 - jnp.square(logits / options.softcap)
    g_bias = None if bias is None else jnp.sum(g, axis=(0, 1))
    g = g.astype(hidden.dtype)
    g_hidden = jnp.einsum(f"btv,{axes}->btd", g, kernel, preferred_element_type=jnp.float32).astype(hidden.dtype)
    g_kernel = kernel_gradient(hidden, g, axes, shards, jnp.float32)
    return tokens, g_hidden, g_kernel, g_bias
