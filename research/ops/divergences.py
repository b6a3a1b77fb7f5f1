"""Divergences between a student's and a teacher's next-token distributions, without the logits of either.

No array of size [B, T, V] is ever held: these are functions `compare` for the scan of ops/head.py. The logits of each
model are computed once, and the gradient in the forward pass while they are there, in closed form.

With p the teacher's probabilities and q the student's, every divergence here is a sum of f(p_v, q_v) over the
vocabulary, and so its gradient by the student's logits is g_v - q_v * sum(g), with g_v = q_v * df/dq_v. A new one is a
line of `_terms`.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from research.errors import InputError, did_you_mean
from research.ops.chunks import chunk_size, chunk_tokens
from research.ops.head import Comparison, Head, detached_values, weighted_sum

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
    """Sums over tokens, each times its weight: float32 scalars; and `divergence` [B, T]. Only `divergence_sum` has a
    gradient.

    Attributes:
      divergence_sum: the divergence, in nats (total variation: in [0, 1]; ULD: in [0, 2]).
      teacher_entropy_sum, student_entropy_sum: entropies of the distributions compared (at the temperature; of top-k
        ones with their tail), in nats.
      agreement_sum: 1 where both have their highest logit at the same token, and neither at two. None for ULD.
      weight_sum: the weights.
      divergence: that of each token; 0 where its weight is.
    """

    divergence_sum: Float[Array, ""]
    teacher_entropy_sum: Float[Array, ""]
    student_entropy_sum: Float[Array, ""]
    agreement_sum: Float[Array, ""] | None
    weight_sum: Float[Array, ""]
    divergence: Float[Array, "B T"]


class _Options(NamedTuple):
    kind: str
    skew: float = 0.0  # beta of jsd, alpha of the skewed ones
    temperature: float = 1.0
    vocab_size: int | None = None
    tail: str = ""
    teacher_temperature: float | None = None


class TopK(NamedTuple):
    """Some of a distribution over tokens; see `topk_divergence`.

    Attributes:
      ids: [B, T, K] int32.
      log_probs: [B, T, K] float32.
      rest: [B, T] float32, the log of the mass of all other tokens.
    """

    ids: Int[Array, "B T K"]
    log_probs: Float[Array, "B T K"]
    rest: Float[Array, "B T"]


class _Details(NamedTuple):
    """Of each token, [B, t]."""

    teacher_entropy: Float[Array, "B t"]
    student_entropy: Float[Array, "B t"]
    agreement: Float[Array, "B t"] | None


@jax.named_scope("loss")
def divergence(
    student_hidden: Float[Array, "B T D"],
    student_head: Head,
    teacher_hidden: Float[Array, "B T E"],
    teacher_head: Head,
    weights: Float[Array, "B T"],
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
    sizes = student_head.size, teacher_head.size
    if vocab_size is None and sizes[0] != sizes[1]:
        raise InputError(
            f"vocabularies: the student's logits have {sizes[0]} entries, the teacher's {sizes[1]}. If they differ by "
            "padding rows only, give vocab_size; with different tokenizers use the ULD loss."
        )
    if vocab_size is not None and not 0 < vocab_size <= min(sizes):
        raise InputError(f"vocab_size={vocab_size}: must be in 1..{min(sizes)}, the smaller of the two models' logits.")
    options = _Options(kind, skew, temperature, vocab_size)
    student_head, teacher_head = student_head.first(min(sizes)), teacher_head.first(min(sizes))
    chunk = chunk or _chunk_size(student_hidden, student_head, sum(sizes))
    return _from_teacher(options, student_hidden, student_head, teacher_hidden, teacher_head, weights, chunk)


@jax.named_scope("loss")
def topk_divergence(
    student_hidden: Float[Array, "B T D"],
    student_head: Head,
    ids: Int[Array, "B T K"],
    log_probs: Float[Array, "B T K"],
    rest: Float[Array, "B T"],
    weights: Float[Array, "B T"],
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
    V = student_head.size
    if vocab_size is not None and not 0 < vocab_size <= V:
        raise InputError(f"vocab_size={vocab_size}: must be in 1..{V}, the size of the student's logits.")
    compare = functools.partial(_compare_top_k, _Options(kind, skew, temperature, vocab_size, tail))
    teacher, chunk = TopK(ids, log_probs, rest), chunk or _chunk_size(student_hidden, student_head, V)
    return _sums(weighted_sum(compare, student_hidden, student_head, weights, teacher, skip=True, chunk=chunk), weights)


@jax.named_scope("loss")
def uld(
    student_hidden: Float[Array, "B T D"],
    student_head: Head,
    teacher_hidden: Float[Array, "B T E"],
    teacher_head: Head,
    weights: Float[Array, "B T"],
    *,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    chunk: int | None = None,
) -> Divergence:
    """Universal logit distillation, between different vocabularies (arXiv:2402.12030, eq. 5; as in TRL's ULDLoss).

    Of each token, sum |p_(i) - q_(i)| over the ranks i, both distributions sorted and the shorter padded with zeros.
    Which of the teacher's positions goes with which of the student's is the caller's to settle.

    Args and the gradient: see `divergence`. Both models' kernels may have any number of tokens, and the teacher a
    temperature of its own; by default it is the student's.
    """
    check("uld", temperature)
    check("uld", temperature if teacher_temperature is None else teacher_temperature)
    chunk = chunk or _chunk_size(student_hidden, student_head, student_head.size + teacher_head.size)
    options = _Options("uld", temperature=temperature, teacher_temperature=teacher_temperature)
    return _from_teacher(options, student_hidden, student_head, teacher_hidden, teacher_head, weights, chunk)


def top_k(
    hidden: Float[Array, "B T D"],
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
    V = head.size
    if not 0 < (vocab_size or V) <= V:
        raise InputError(f"vocab_size={vocab_size}: must be in 1..{V}, the size of the logits.")
    if not 0 < k <= (vocab_size or V):
        raise InputError(f"k={k}: must be in 1..{vocab_size or V}, the size of the vocabulary.")
    check("uld", temperature)
    compare = functools.partial(_likeliest, k, _Options("", temperature=temperature, vocab_size=vocab_size))
    return detached_values(compare, hidden, head, chunk=chunk or _chunk_size(hidden, head, V))


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


def _from_teacher(
    options: _Options,
    hidden: Float[Array, "B T D"],
    head: Head,
    teacher: Float[Array, "B T E"],
    teacher_head: Head,
    weights: Float[Array, "B T"],
    chunk: int,
) -> Divergence:
    """The divergence from a model's logits. A position of weight 0 is left out."""
    compare = functools.partial(_compare_models, options)
    shared = (jax.lax.stop_gradient(teacher_head).gathered(teacher.dtype),)
    return _sums(weighted_sum(compare, hidden, head, weights, teacher, shared=shared, skip=True, chunk=chunk), weights)


def _sums(out: tuple[Float[Array, ""], Float[Array, "B T"], _Details], weights: Float[Array, "B T"]) -> Divergence:
    """From what `weighted_sum` returns."""
    total, tokens, details = out
    weights = jax.lax.stop_gradient(weights)
    sums = jax.tree.map(lambda x: jnp.sum(weights.astype(x.dtype) * x), details)
    return Divergence(total, *sums, jnp.sum(weights), tokens)


def _likeliest(k: int, options: _Options, logits: Float[Array, "B t V"], extras: tuple) -> Comparison:
    """A TopK."""
    log_probs = jax.nn.log_softmax(_scaled(options, logits))
    values, ids = jax.lax.top_k(log_probs, k)
    others = jnp.put_along_axis(log_probs, ids, -jnp.inf, axis=-1, inplace=False)
    return Comparison(TopK(ids, values, jax.nn.logsumexp(others, axis=-1)))


def _compare_models(
    options: _Options, logits: Float[Array, "B t V"], teacher: Float[Array, "B t E"], teacher_head: Head
) -> Comparison:
    """The divergence from the teacher's hidden states, with _Details."""
    each = {"uld": _uld_tokens, LOGIT_MSE: _mse_tokens}.get(options.kind, _whole_tokens)
    own = options.temperature if options.teacher_temperature is None else options.teacher_temperature
    of_teacher = options._replace(temperature=own)
    student, teacher = _scaled(options, logits), _scaled(of_teacher, teacher_head.logits(teacher))
    return _comparison(options, *each(options, student, teacher.astype(student.dtype)))


def _compare_top_k(options: _Options, logits: Float[Array, "B t V"], teacher: TopK) -> Comparison:
    """The divergence from some of the teacher's log-probabilities, with _Details."""
    return _comparison(options, *_topk_tokens(options, _scaled(options, logits), teacher))


def _comparison(
    options: _Options, divergence: Float[Array, "B t"], details: _Details, g: Float[Array, "B t V"]
) -> Comparison:
    """`g` is the gradient by logits / temperature."""
    return Comparison(divergence, details, lambda weights: g * (weights / options.temperature)[:, :, None])


def _scaled(options: _Options, logits: Float[Array, "B t V"]) -> Float[Array, "B t V"]:
    """Logits at the temperature, with -inf for the tokens that are padding."""
    return _mask(logits / options.temperature, options.vocab_size)


def _mask(logits: Float[Array, "B t V"], vocab_size: int | None) -> Float[Array, "B t V"]:
    if vocab_size is None or vocab_size == logits.shape[-1]:
        return logits
    return jnp.where(jnp.arange(logits.shape[-1])[None, None, :] < vocab_size, logits, -jnp.inf)


# What is compared of a chunk: the divergence [B, t], _Details, and the gradient by the student's logits [B, t, V].
_Tokens = tuple[Float[Array, "B t"], _Details, Float[Array, "B t V"]]


def _whole_tokens(options: _Options, student: Float[Array, "B t V"], teacher: Float[Array, "B t V"]) -> _Tokens:
    """Logits of both -> _Tokens."""
    value, details, g = _compare(options, jax.nn.log_softmax(student), jax.nn.log_softmax(teacher))
    return value, details._replace(agreement=_agreement(student, teacher)), g


def _mse_tokens(options: _Options, student: Float[Array, "B t V"], teacher: Float[Array, "B t V"]) -> _Tokens:
    """As _whole_tokens, of the logits themselves."""
    size = options.vocab_size or student.shape[-1]
    gap = jnp.where(student == -jnp.inf, 0, student - teacher)
    entropies = (_entropy(jnp.exp(x), x) for x in (jax.nn.log_softmax(teacher), jax.nn.log_softmax(student)))
    details = _Details(*entropies, _agreement(student, teacher))
    return jnp.sum(jnp.square(gap), axis=-1) / size, details, 2 * gap / size


def _topk_tokens(options: _Options, student: Float[Array, "B t V"], teacher: TopK) -> _Tokens:
    """The distributions compared are over K + 1 classes: the K tokens, and all others in one."""
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
    value, details, g = _compare(options, jax.nn.log_softmax(classes), log_p, counted)

    share = jnp.where(others != -jnp.inf, jnp.exp(others - rest[:, :, None]), 0)  # each one's of the rest
    g = write(share * g[:, :, -1:], ids, g[:, :, :-1])
    likeliest = jnp.argmax(teacher.log_probs, axis=-1, keepdims=True)
    highest = student >= jnp.take_along_axis(at, likeliest, axis=-1)
    return value, details._replace(agreement=_is_one(highest, dtype)), g


def _uld_tokens(options: _Options, student: Float[Array, "B t V"], teacher: Float[Array, "B t W"]) -> _Tokens:
    """Logits over two vocabularies -> _Tokens."""
    q, p = jax.nn.softmax(student), jnp.sort(jax.nn.softmax(teacher), descending=True)
    order = jnp.argsort(q, descending=True)
    size = max(q.shape[-1], p.shape[-1])
    pad = lambda x: jnp.pad(x, [(0, 0), (0, 0), (0, size - x.shape[-1])])  # noqa: E731
    gap = pad(jnp.take_along_axis(q, order, axis=-1)) - pad(p)
    sign = jnp.take_along_axis(jnp.sign(gap), jnp.argsort(order), axis=-1)
    g = q * sign
    g -= q * jnp.sum(g, axis=-1, keepdims=True)
    return jnp.sum(jnp.abs(gap), axis=-1), _Details(_entropy(p, jnp.log(p)), _entropy(q, jnp.log(q)), None), g


def _compare(
    options: _Options,
    log_q: Float[Array, "B t N"],
    log_p: Float[Array, "B t N"],
    counted: Bool[Array, "1 1 N"] | None = None,
) -> _Tokens:
    """Log-probs of student and teacher -> _Tokens less the agreement; the gradient is by the logits of q.

    `counted` says which of the classes the divergence sums over; by default all.
    """
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    f, g = _terms(options.kind, options.skew, p, q, log_p, log_q)
    if counted is not None:
        f, g = jnp.where(counted, f, 0), jnp.where(counted, g, 0)
    details = _Details(_entropy(p, log_p), _entropy(q, log_q), None)
    return jnp.sum(f, axis=-1), details, g - q * jnp.sum(g, axis=-1, keepdims=True)


def _terms(
    kind: str,
    c: float,
    p: Float[Array, "B t N"],
    q: Float[Array, "B t N"],
    log_p: Float[Array, "B t N"],
    log_q: Float[Array, "B t N"],
) -> tuple[Float[Array, "B t N"], Float[Array, "B t N"]]:
    """The terms f of a divergence, and q * df/dq; in df/dq any constant may be left out, as it cancels."""
    log_mixture = functools.partial(_log_mixture, p, q)
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


def _log_mixture(p: Float[Array, "B t N"], q: Float[Array, "B t N"], a: float, b: float) -> Float[Array, "B t N"]:
    """log(a p + b q). Where that underflows, so have p and q: a floor keeps log(q / m) finite."""
    return jnp.log(jnp.maximum(a * p + b * q, jnp.finfo(p.dtype).tiny))


def _times(p: Float[Array, "B t N"], x: Float[Array, "B t N"]) -> Float[Array, "B t N"]:
    """p * x, and 0 where p is 0, whatever x is."""
    return jnp.where(p > 0, p * x, 0)


def _entropy(p: Float[Array, "B t N"], log_p: Float[Array, "B t N"]) -> Float[Array, "B t"]:
    return -jnp.sum(_times(p, log_p), axis=-1)


def _agreement(student: Float[Array, "B t V"], teacher: Float[Array, "B t V"]) -> Float[Array, "B t"]:
    highest = (student == jnp.max(student, -1, keepdims=True)) | (teacher == jnp.max(teacher, -1, keepdims=True))
    return _is_one(highest, student.dtype)


def _is_one(highest: Bool[Array, "B t V"], dtype: Any) -> Float[Array, "B t"]:
    return (jnp.sum(highest.astype(dtype), axis=-1) == 1).astype(dtype)


def _chunk_size(hidden: Float[Array, "B T D"], head: Head, logits_per_token: int) -> int:
    """Half the tokens that one model's logits get: there are two."""
    tokens = max(hidden.shape[2], chunk_tokens()) // 2
    return chunk_size(hidden, logits_per_token, head.rules, tokens)
