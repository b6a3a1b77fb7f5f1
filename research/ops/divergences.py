"""Divergences between a student's and a teacher's next-token distributions, without the logits of either.

No array of size [B, T, V] is ever held. As in the cross-entropy (losses.py), logits are made a chunk of time at a time,
once for each model, and the gradient in the forward pass while they are there, in closed form.

With p the teacher's probabilities and q the student's, every divergence here is a sum of f(p_v, q_v) over the
vocabulary, and so its gradient by the student's logits is g_v - q_v * sum(g), with g_v = q_v * df/dq_v. A new one is a
line of `_terms`.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from research.errors import InputError, did_you_mean
from research.ops.chunks import (
    chunk_size,
    chunk_tokens,
    chunks,
    kernel_gradient,
    no_gradient,
    token_shards,
    total,
    whole_width,
)
from research.ops.losses import Head

KINDS = (
    "forward_kl",
    "reverse_kl",
    "cross_entropy",
    "reverse_cross_entropy",
    "jsd",
    "skewed_forward_kl",
    "skewed_reverse_kl",
    "total_variation",
)
LOGIT_MSE = "logit_mse"
TAILS = ("bucket", "renormalize", "truncate")


class Divergence(NamedTuple):
    """Sums over tokens, each times its weight: float32 scalars. Only `divergence_sum` has a gradient.

    Attributes:
      divergence_sum: the divergence, in nats (total variation: in [0, 1]; ULD: in [0, 2]).
      teacher_entropy_sum, student_entropy_sum: entropies of the distributions compared (at the temperature; of top-k
        ones with their tail), in nats.
      agreement_sum: 1 where both have their highest logit at the same token, and neither at two. None for ULD.
      weight_sum: the weights.
    """

    divergence_sum: jax.Array
    teacher_entropy_sum: jax.Array
    student_entropy_sum: jax.Array
    agreement_sum: jax.Array | None
    weight_sum: jax.Array


class _Options(NamedTuple):
    kind: str
    skew: float  # beta of jsd, alpha of the skewed ones
    temperature: float
    vocab_size: int | None
    softcap: float
    teacher_softcap: float
    tail: str
    chunk: int
    axes: str
    teacher_axes: str = "dv"


class TopK(NamedTuple):
    """Some of a distribution over tokens; see `topk_divergence`.

    Attributes:
      ids: [B, T, K] int32.
      log_probs: [B, T, K] float32.
      rest: [B, T] float32, the log of the mass of all other tokens.
    """

    ids: jax.Array
    log_probs: jax.Array
    rest: jax.Array


class _Tokens(NamedTuple):
    """Per-token values, [B, T]."""

    divergence: jax.Array
    teacher_entropy: jax.Array
    student_entropy: jax.Array
    agreement: jax.Array | None


@jax.named_scope("loss")
def divergence(
    student_hidden: jax.Array,
    student_head: Head,
    teacher_hidden: jax.Array,
    teacher_head: Head,
    weights: jax.Array,
    *,
    kind: str,
    temperature: float = 1.0,
    beta: float = 0.5,
    alpha: float = 0.1,
    vocab_size: int | None = None,
    chunk: int | None = None,
) -> Divergence:
    """Weighted sum over tokens of a divergence between the teacher's and the student's distributions.

    With p = softmax(teacher's logits / temperature), q the student's, and KL(a || b) = sum a log(a / b):

      forward_kl: KL(p || q).
      reverse_kl: KL(q || p).
      cross_entropy: -sum p log q = forward_kl + the teacher's entropy; the same gradient.
      reverse_cross_entropy: -sum q log p = reverse_kl + the student's entropy.
      jsd: beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q, beta in [0, 1], and by definition
        forward_kl at beta = 0 and reverse_kl at 1 (generalized JSD of GKD, arXiv:2306.13649, eq. 1; beta as in TRL's
        GKDTrainer). DistiLLM's js_distance has 1 - beta for its lam.
      skewed_forward_kl: KL(p || alpha p + (1 - alpha) q), alpha in [0, 1) (DistiLLM, arXiv:2402.03898, section 3.1).
      skewed_reverse_kl: KL(q || (1 - alpha) p + alpha q) (the same).
      total_variation: sum |p - q| / 2.
      logit_mse: no divergence of probabilities: the mean over the vocabulary of the squared difference of the logits /
        temperature (as TextBrewer's kd_mse_loss).

    DistiLLM's published code leaves the teacher's entropy in its forward_kl and skewed_forward_kl: `divergence_sum +
    teacher_entropy_sum` here, with the same gradient. The factor temperature^2 of Hinton et al. (arXiv:1503.02531,
    section 2) isn't applied.

    The matrix products run in the dtype of each model's hidden states and accumulate in float32; all else is in float32
    (float64 where the student's hidden states are). A position of weight 0 is left out: nothing in it is read, NaN
    included. Differentiable once, in reverse mode, with respect to student_hidden, student_head and weights; the
    teacher is frozen.

    Args:
      student_hidden: [B, T, D].
      student_head: the student's unembedding, with kernel [D, V].
      teacher_hidden: [B, T, E].
      teacher_head: the teacher's unembedding, with kernel [E, V], or another V with `vocab_size`.
      weights: [B, T] float32.
      kind: one of KINDS, or logit_mse.
      temperature: divides both models' logits; above 0.
      beta: of jsd.
      alpha: of the skewed ones.
      vocab_size: tokens from this id on are padding: they have probability 0 in both models.
      chunk: positions per chunk; by default what ops.chunks finds fit for each device, of both models' logits.

    Raises:
      InputError: an unknown kind, a value out of its range, vocabularies of different sizes without a vocab_size that
        fits in both.
    """
    check(kind, temperature, beta, alpha)
    kind, skew = _mixture(kind, beta, alpha)
    sizes = student_head.kernel.shape[1], teacher_head.kernel.shape[1]
    if vocab_size is None and sizes[0] != sizes[1]:
        raise InputError(
            f"vocabularies: the student's logits have {sizes[0]} entries, the teacher's {sizes[1]}. If they differ by "
            "padding rows only, give vocab_size; with different tokenizers use the ULD loss."
        )
    if vocab_size is not None and not 0 < vocab_size <= min(sizes):
        raise InputError(f"vocab_size={vocab_size}: must be in 1..{min(sizes)}, the smaller of the two models' logits.")
    options = _Options(
        kind,
        skew,
        temperature,
        vocab_size,
        student_head.softcap,
        teacher_head.softcap,
        "",
        chunk or _chunk_size(student_hidden, sum(sizes)),
        student_head.axes,
        teacher_head.axes,
    )
    student_head, teacher_head = _cut(student_head, min(sizes)), _cut(teacher_head, min(sizes))
    return _sums(options, student_hidden, student_head, teacher_hidden, teacher_head, weights)


@jax.named_scope("loss")
def topk_divergence(
    student_hidden: jax.Array,
    student_head: Head,
    ids: jax.Array,
    log_probs: jax.Array,
    rest: jax.Array,
    weights: jax.Array,
    *,
    kind: str = "forward_kl",
    tail: str = "bucket",
    temperature: float = 1.0,
    beta: float = 0.5,
    alpha: float = 0.1,
    vocab_size: int | None = None,
    chunk: int | None = None,
) -> Divergence:
    """`divergence` from K of the teacher's log-probs per token, and the mass of all other tokens.

    The K tokens are most often the teacher's most likely ones, but any will do. What is made of the others:

      bucket: they count as one more token, in the teacher and the student. A lower bound of the whole forward_kl.
      renormalize: they are left out, and both distributions made to sum to 1 over the K (`rest` isn't read). With these
        two, as in TRL's top-k self-distillation losses (add_tail true, false).
      truncate: their terms are left out of the sum, without normalizing anew: sum over the K of p log(p / q), which may
        be negative (as in verl's forward_kl_topk, before it clamps that at 0). For forward_kl and cross_entropy only.

    Args, raises, and the gradient: see `divergence`, and
      ids: [B, T, K] int32, distinct for each token.
      log_probs: [B, T, K] float32; -inf marks an unused entry, whose id isn't read.
      rest: [B, T] float32, the log of the mass of all other tokens; -inf where there is none.
      tail: one of TAILS.
      temperature: divides the student's logits alone; log_probs and rest must be those of the teacher at it already.
        (With tail=renormalize, log_probs / temperature will do.)
    """
    check(kind, temperature, beta, alpha)
    kind, skew = _mixture(kind, beta, alpha)
    if kind == LOGIT_MSE:
        raise InputError(f"kind={kind!r}: needs all of the teacher's logits, and these are its top k.")
    if tail not in TAILS:
        raise InputError(f"tail={tail!r}: no such treatment of the tokens beyond the top k.{did_you_mean(tail, TAILS)}")
    if tail == "truncate" and kind not in ("forward_kl", "cross_entropy"):
        raise InputError(f"tail='truncate' with kind={kind!r}: is for forward_kl and cross_entropy. Use tail='bucket'.")
    V = student_head.kernel.shape[1]
    if vocab_size is not None and not 0 < vocab_size <= V:
        raise InputError(f"vocab_size={vocab_size}: must be in 1..{V}, the size of the student's logits.")
    chunk = chunk or _chunk_size(student_hidden, V)
    softcap, axes = student_head.softcap, student_head.axes
    options = _Options(kind, skew, temperature, vocab_size, softcap, 0.0, tail, chunk, axes)
    return _sums(options, student_hidden, student_head, TopK(ids, log_probs, rest), None, weights)


@jax.named_scope("loss")
def uld(
    student_hidden: jax.Array,
    student_head: Head,
    teacher_hidden: jax.Array,
    teacher_head: Head,
    weights: jax.Array,
    *,
    temperature: float = 1.0,
    chunk: int | None = None,
) -> Divergence:
    """Universal logit distillation, between different vocabularies (arXiv:2402.12030, eq. 5; as in TRL's ULDLoss).

    Of each token, sum |p_(i) - q_(i)| over the ranks i, both distributions sorted and the shorter padded with zeros.
    Which of the teacher's positions goes with which of the student's is the caller's to settle.

    Args and the gradient: see `divergence`. Both models' kernels may have any number of tokens.
    """
    check("uld", temperature)
    chunk = chunk or _chunk_size(student_hidden, student_head.kernel.shape[1] + teacher_head.kernel.shape[1])
    heads = student_head, teacher_head
    softcaps, axes = [head.softcap for head in heads], [head.axes for head in heads]
    options = _Options("uld", 0.0, temperature, None, *softcaps, "", chunk, *axes)
    return _sums(options, student_hidden, student_head, teacher_hidden, teacher_head, weights)


def top_k(
    hidden: jax.Array,
    head: Head,
    k: int,
    *,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    chunk: int | None = None,
) -> TopK:
    """The k likeliest tokens of softmax(logits / temperature), the likeliest first, without holding the logits.

    Args:
      hidden: [B, T, D].
      head: the unembedding, with kernel [D, V].
      k: at most `vocab_size`.
      temperature, vocab_size, chunk: see `divergence`.

    Raises:
      InputError: k or vocab_size don't fit the logits.
    """
    T, V = hidden.shape[1], head.kernel.shape[1]
    if not 0 < (vocab_size or V) <= V:
        raise InputError(f"vocab_size={vocab_size}: must be in 1..{V}, the size of the logits.")
    if not 0 < k <= (vocab_size or V):
        raise InputError(f"k={k}: must be in 1..{vocab_size or V}, the size of the vocabulary.")
    check("uld", temperature)
    dtype, kernel = _dtype(hidden), head.stored.astype(hidden.dtype)

    def one(x: jax.Array) -> TopK:
        logits = _logits(x, kernel, head.bias, head.softcap, dtype, head.axes)
        log_probs = jax.nn.log_softmax(_mask(logits / temperature, vocab_size))
        values, ids = jax.lax.top_k(log_probs, k)
        others = jnp.put_along_axis(log_probs, ids, -jnp.inf, axis=-1, inplace=False)
        return TopK(ids, values, jax.nn.logsumexp(others, axis=-1))

    split, join = chunks(T, chunk or _chunk_size(hidden, V))
    return jax.tree.map(join, jax.lax.map(one, split(hidden)))


def check(kind: str, temperature: float, beta: float = 0.5, alpha: float = 0.1) -> None:
    """Raises InputError for an unknown kind, or a value out of its range; kind "uld" is known too."""
    known = (*KINDS, LOGIT_MSE, "uld")
    if kind not in known:
        raise InputError(f"kind={kind!r}: no such divergence.{did_you_mean(kind, known)}")
    if not temperature > 0:
        raise InputError(f"temperature={temperature}: must be above 0.")
    if kind == "jsd" and not 0 <= beta <= 1:
        raise InputError(f"beta={beta}: must be in [0, 1]; 0 is forward_kl, 1 is reverse_kl.")
    if kind.startswith("skewed") and not 0 <= alpha < 1:
        raise InputError(f"alpha={alpha}: must be in [0, 1); at 1 the two distributions would be one.")


def _mixture(kind: str, beta: float, alpha: float) -> tuple[str, float]:
    """The kind and the coefficient of its mixture; the kind is a plain KL where the mixture is one of its parts."""
    if kind == "uld":
        raise InputError("kind='uld': is a function of its own, `uld`.")
    if kind == "jsd":
        return {0: "forward_kl", 1: "reverse_kl"}.get(beta, kind), beta
    return kind.removeprefix("skewed_") if alpha == 0 else kind, alpha


def _cut(head: Head, size: int) -> Head:
    if head.kernel.shape[1] == size:
        return head
    return head._replace(kernel=head.kernel[:, :size], bias=None if head.bias is None else head.bias[:size])


def _sums(options, hidden, head, teacher, teacher_head, weights) -> Divergence:
    teacher_head = None if teacher_head is None else (teacher_head.stored, teacher_head.bias)
    teacher, teacher_head = jax.lax.stop_gradient((teacher, teacher_head))
    total, tokens = _divergence(options, hidden, (head.stored, head.bias), teacher, teacher_head, weights)
    weights = jax.lax.stop_gradient(weights)
    metrics = jax.tree.map(lambda x: jnp.sum(weights.astype(x.dtype) * x), tokens)
    return Divergence(total, *metrics[1:], jnp.sum(weights))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _divergence(options, hidden, head, teacher, teacher_head, weights):
    tokens, _ = _scan(options, hidden, head, teacher, teacher_head, weights, with_gradient=False)
    return jnp.sum(weights.astype(tokens.divergence.dtype) * tokens.divergence), tokens


def _divergence_forward(options, hidden, head, teacher, teacher_head, weights):
    tokens, gradient = _scan(options, hidden, head, teacher, teacher_head, weights, with_gradient=True)
    total = jnp.sum(weights.astype(tokens.divergence.dtype) * tokens.divergence)
    return (total, tokens), (*gradient, tokens.divergence.astype(weights.dtype))


def _divergence_backward(options, residuals, cotangents):
    scale = lambda x: (cotangents[0] * x.astype(cotangents[0].dtype)).astype(x.dtype)  # noqa: E731
    g_hidden, g_head, g_weights = jax.tree.map(scale, residuals)
    return g_hidden, g_head, None, None, g_weights


_divergence.defvjp(_divergence_forward, _divergence_backward)


def _scan(options, hidden, head, teacher, teacher_head, weights, *, with_gradient):
    """Runs over chunks of time. Returns _Tokens, and the gradients of the divergence's sum by hidden and head."""
    split, join = chunks(hidden.shape[1], options.chunk)

    def body(sums, x):
        tokens, g_hidden, g_head = _one_chunk(options, compute_head, teacher_head, *x, with_gradient, shards)
        return jax.tree.map(jnp.add, sums, g_head), (tokens, g_hidden)

    axes, teacher_axes = options.axes, options.teacher_axes
    shards, dtype = token_shards(hidden), _dtype(hidden)
    compute_head = whole_width(head[0].astype(hidden.dtype), axes), head[1]
    if teacher_head is not None:
        teacher_head = whole_width(teacher_head[0].astype(teacher.dtype), teacher_axes), teacher_head[1]
    zeros = None
    if with_gradient:
        g_bias = None if head[1] is None else jnp.zeros(head[1].shape, dtype)
        zeros = no_gradient(head[0], axes, shards, dtype), g_bias
    sums, (tokens, g_hidden) = jax.lax.scan(body, zeros, jax.tree.map(split, (hidden, teacher, weights)))
    tokens = jax.tree.map(join, tokens)
    if not with_gradient:
        return tokens, None
    sums = total(sums[0]), sums[1]
    return tokens, (join(g_hidden), jax.tree.map(lambda g, x: g.astype(x.dtype), sums, head))


def _one_chunk(options, head, teacher_head, hidden, teacher, weights, with_gradient, shards):
    """A chunk of [B, t, ...] arrays -> _Tokens of [B, t], and the gradients by hidden and head (None unless wanted)."""
    kernel, bias = head
    dtype, temperature = _dtype(hidden), options.temperature
    present = weights != 0
    hidden = jnp.where(present[:, :, None], hidden, 0)  # NaN times a gradient of 0 would be NaN
    logits = _logits(hidden, kernel, bias, options.softcap, dtype, options.axes)
    student = _mask(logits / temperature, options.vocab_size)
    if isinstance(teacher, TopK):
        tokens, g = _topk_tokens(options, student, teacher)
    else:
        teacher = _logits(teacher, *teacher_head, options.teacher_softcap, dtype, options.teacher_axes)
        teacher = _mask(teacher / temperature, options.vocab_size)
        compare = {"uld": _uld_tokens, LOGIT_MSE: _mse_tokens}.get(options.kind, _whole_tokens)
        tokens, g = compare(options, student, teacher)
    tokens = jax.tree.map(lambda x: jnp.where(present, x, 0), tokens)
    if not with_gradient:
        return tokens, None, None

    g = jnp.where(present[:, :, None], g * (weights.astype(dtype) / temperature)[:, :, None], 0)
    if options.softcap:
        g *= 1 - jnp.square(logits / options.softcap)
    g_bias = None if bias is None else jnp.sum(g, axis=(0, 1))
    g = g.astype(hidden.dtype)
    axes = options.axes
    g_hidden = jnp.einsum(f"btv,{axes}->btd", g, kernel, preferred_element_type=dtype).astype(hidden.dtype)
    g_kernel = kernel_gradient(hidden, g, axes, shards, dtype)
    return tokens, g_hidden, (g_kernel, g_bias)


def _logits(hidden, kernel, bias, softcap, dtype, axes):
    logits = jnp.einsum(f"btd,{axes}->btv", hidden, kernel, preferred_element_type=dtype)
    if bias is not None:
        logits += bias.astype(dtype)[None, None, :]
    return softcap * jnp.tanh(logits / softcap) if softcap else logits


def _mask(logits, vocab_size):
    if vocab_size is None or vocab_size == logits.shape[-1]:
        return logits
    return jnp.where(jnp.arange(logits.shape[-1])[None, None, :] < vocab_size, logits, -jnp.inf)


def _whole_tokens(options, student, teacher):
    """Logits of both, [B, t, V] -> _Tokens, and the gradient by the student's logits."""
    tokens, g = _compare(options, jax.nn.log_softmax(student), jax.nn.log_softmax(teacher))
    return tokens._replace(agreement=_agreement(student, teacher)), g


def _mse_tokens(options, student, teacher):
    """As _whole_tokens, of the logits themselves."""
    size = options.vocab_size or student.shape[-1]
    gap = jnp.where(student == -jnp.inf, 0, student - teacher)
    entropies = (_entropy(jnp.exp(x), x) for x in (jax.nn.log_softmax(teacher), jax.nn.log_softmax(student)))
    tokens = _Tokens(jnp.sum(jnp.square(gap), axis=-1) / size, *entropies, _agreement(student, teacher))
    return tokens, 2 * gap / size


def _topk_tokens(options, student, teacher):
    """The student's logits [B, t, V] and a TopK -> _Tokens, and the gradient by the student's logits.

    The distributions compared are over K + 1 classes: the K tokens, and all others in one.
    """
    V, dtype = student.shape[-1], student.dtype
    used = teacher.log_probs != -jnp.inf
    at = jnp.take_along_axis(student, jnp.where(used, teacher.ids, 0), axis=-1, mode="clip")
    at = jnp.where(used, at, -jnp.inf)
    ids = jnp.where(used, teacher.ids, V)  # writes to V are dropped
    write = jax.vmap(jax.vmap(lambda x, i, values: x.at[i].set(values, mode="drop")))
    others = write(student, ids, jnp.full_like(at, -jnp.inf))
    rest = jax.nn.logsumexp(others, axis=-1)  # rather than 1 - the mass of the K, which rounding would eat
    classes = jnp.concatenate([at, rest[:, :, None]], axis=-1)
    log_p = jnp.concatenate([teacher.log_probs, teacher.rest[:, :, None]], axis=-1).astype(dtype)
    is_rest = jnp.arange(classes.shape[-1])[None, None, :] == classes.shape[-1] - 1
    if options.tail == "renormalize":
        classes, log_p = jnp.where(is_rest, -jnp.inf, classes), jax.nn.log_softmax(jnp.where(is_rest, -jnp.inf, log_p))
    counted = ~is_rest if options.tail == "truncate" else None
    tokens, g = _compare(options, jax.nn.log_softmax(classes), log_p, counted)

    share = jnp.where(others != -jnp.inf, jnp.exp(others - rest[:, :, None]), 0)  # each one's of the rest
    g = write(share * g[:, :, -1:], ids, g[:, :, :-1])
    likeliest = jnp.argmax(teacher.log_probs, axis=-1, keepdims=True)
    highest = student >= jnp.take_along_axis(at, likeliest, axis=-1)
    return tokens._replace(agreement=_is_one(highest, dtype)), g


def _uld_tokens(options, student, teacher):
    """Logits [B, t, V] and [B, t, W] -> _Tokens, and the gradient by the student's logits."""
    q, p = jax.nn.softmax(student), jnp.sort(jax.nn.softmax(teacher), descending=True)
    order = jnp.argsort(q, descending=True)
    size = max(q.shape[-1], p.shape[-1])
    pad = lambda x: jnp.pad(x, [(0, 0), (0, 0), (0, size - x.shape[-1])])  # noqa: E731
    gap = pad(jnp.take_along_axis(q, order, axis=-1)) - pad(p)
    sign = jnp.take_along_axis(jnp.sign(gap), jnp.argsort(order), axis=-1)
    g = q * sign
    g -= q * jnp.sum(g, axis=-1, keepdims=True)
    return _Tokens(jnp.sum(jnp.abs(gap), axis=-1), _entropy(p, jnp.log(p)), _entropy(q, jnp.log(q)), None), g


def _compare(options, log_q, log_p, counted=None):
    """Log-probs of student and teacher [B, t, N] -> _Tokens less the agreement, and the gradient by the logits of q.

    `counted` [1, 1, N] says which of the classes the divergence sums over; by default all.
    """
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    f, g = _terms(options.kind, options.skew, p, q, log_p, log_q)
    if counted is not None:
        f, g = jnp.where(counted, f, 0), jnp.where(counted, g, 0)
    tokens = _Tokens(jnp.sum(f, axis=-1), _entropy(p, log_p), _entropy(q, log_q), None)
    return tokens, g - q * jnp.sum(g, axis=-1, keepdims=True)


def _terms(kind, c, p, q, log_p, log_q):
    """The terms f of a divergence, and q * df/dq; in df/dq any constant may be left out, as it cancels."""

    def log_mixture(a, b):  # where it underflows, so have p and q: a floor keeps log(q / m) finite
        return jnp.log(jnp.maximum(a * p + b * q, jnp.finfo(p.dtype).tiny))

    match kind:
        case "forward_kl":
            return _times(p, log_p - log_q), -p
        case "cross_entropy":
            return -_times(p, log_q), -p
        case "reverse_kl":
            f = _times(q, log_q - log_p)
            return f, f
        case "reverse_cross_entropy":
            f = -_times(q, log_p)
            return f, f
        case "jsd":
            log_m = log_mixture(c, 1 - c)
            g = (1 - c) * _times(q, log_q - log_m)
            return c * _times(p, log_p - log_m) + g, g
        case "skewed_forward_kl":
            log_m = log_mixture(c, 1 - c)
            return _times(p, log_p - log_m), (c - 1) * p * jnp.exp(log_q - log_m)
        case "skewed_reverse_kl":
            log_m = log_mixture(1 - c, c)
            f = _times(q, log_q - log_m)
            return f, f - c * q * jnp.exp(log_q - log_m)
        case "total_variation":
            return jnp.abs(p - q) / 2, q * jnp.sign(q - p) / 2


def _times(p, x):
    """p * x, and 0 where p is 0, whatever x is."""
    return jnp.where(p > 0, p * x, 0)


def _entropy(p, log_p):
    return -jnp.sum(_times(p, log_p), axis=-1)


def _agreement(student, teacher):
    highest = (student == jnp.max(student, -1, keepdims=True)) | (teacher == jnp.max(teacher, -1, keepdims=True))
    return _is_one(highest, student.dtype)


def _is_one(highest, dtype):
    return (jnp.sum(highest.astype(dtype), axis=-1) == 1).astype(dtype)


def _dtype(hidden):
    return jnp.float64 if hidden.dtype == jnp.float64 else jnp.float32


def _chunk_size(hidden: jax.Array, logits_per_token: int) -> int:
    """Half the tokens that one model's logits get: there are two."""
    tokens = max(hidden.shape[2], chunk_tokens()) // 2
    return chunk_size(hidden, logits_per_token, tokens)
