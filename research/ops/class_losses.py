"""Losses on the logits of a few classes: supervised ones, and those made to learn from a weaker model's labels.

A loss takes logits [..., C], labels as probabilities [..., C] (a weak model's, or one-hot) and weights [...], and
returns a scalar: the sum over positions of weight times loss. A position of weight 0 is left out: nothing in it is
read, NaN included. All is in float32, or in float64 where the logits are. p is softmax(logits).

Most of them are a cross-entropy, with labels that mix the weak ones with the model's own predictions; what differs is
how. Own labels are made by `harden`, whose thresholds come from the whole batch (`quantile_thresholds`) or from the
steps before (`RunningThresholds`).
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import xlogy
from jaxtyping import Array, Bool, Float, Int

Classes = Float[Array, "*N C"]
Positions = Float[Array, "*N"]
Scalar = Float[Array, ""]

LOG_ZERO = math.log(1e-4)


class Scores(NamedTuple):
    """Sums over positions, each times its weight: float32 scalars (float64 where the logits are).

    Attributes:
      nll_sum: cross-entropy of the labels, in nats.
      correct_sum: 1 where the logit of the label's most likely class is above all others, else 0.
      brier_sum: sum over classes of (probability - label)^2 (Brier 1950).
      confidence_sum: the highest of the probabilities.
      weight_sum: the weights.
    """

    nll_sum: Scalar
    correct_sum: Scalar
    brier_sum: Scalar
    confidence_sum: Scalar
    weight_sum: Scalar


class RunningThresholds(NamedTuple):
    """What `harden` needs to know of the steps before this one; a carry of a training loop.

    Attributes:
      thresholds: [C] float32.
      prior: [C] float32, the mean label so far.
      seen: scalar float32, over how many positions.
    """

    thresholds: Float[Array, " C"]
    prior: Float[Array, " C"]
    seen: Scalar


class ThresholdSums(NamedTuple):
    """Sums over the positions of a batch, or of a part of one: they add up.

    Attributes:
      above: [C] float32, how many probabilities lie above their class's threshold.
      labels: [C] float32, of the labels.
      count: scalar float32, how many positions there are.
    """

    above: Float[Array, " C"]
    labels: Float[Array, " C"]
    count: Scalar


def cross_entropy(
    logits: Classes,
    labels: Classes,
    weights: Positions,
    *,
    label_smoothing: float = 0.0,
) -> Scalar:
    """-sum_c y_c log p_c, with y = (1 - label_smoothing) label + label_smoothing / C (arXiv:1512.00567, section 7)."""
    return _sum(
        weights.astype(_dtype(logits)), cross_entropies(logits, labels, weights, label_smoothing=label_smoothing)
    )


def cross_entropies(logits: Classes, labels: Classes, weights: Positions, *, label_smoothing: float = 0.0) -> Positions:
    """`cross_entropy` of each position, before it is weighted."""
    log_p, labels, _ = _prepare(logits, labels, weights)
    y = (1 - label_smoothing) * labels + label_smoothing / logits.shape[-1]
    return -jnp.sum(y * log_p, axis=-1)


def hard_cross_entropy(logits: Classes, labels: Classes, weights: Positions) -> Scalar:
    """-log p_k, k the label's most likely class (the first, where several are)."""
    return cross_entropy(logits, harden(labels), weights)


def forward_kl(logits: Classes, labels: Classes, weights: Positions) -> Scalar:
    """KL(label || p): the cross-entropy less the labels' entropy, with the same gradient."""
    log_p, labels, weights = _prepare(logits, labels, weights)
    return _sum(weights, _kl(labels, log_p))


def reverse_kl(
    logits: Classes,
    labels: Classes,
    weights: Positions,
    *,
    log_zero: float = LOG_ZERO,
) -> Scalar:
    """KL(p || label) = sum_c p_c (log p_c - log label_c), where log label_c is at least `log_zero`."""
    log_p, labels, weights = _prepare(logits, labels, weights)
    return _sum(weights, jnp.sum(jnp.exp(log_p) * (log_p - _clipped_log(labels, log_zero)), axis=-1))


def reverse_cross_entropy(
    logits: Classes,
    labels: Classes,
    weights: Positions,
    *,
    log_zero: float = LOG_ZERO,
) -> Scalar:
    """-sum_c p_c log label_c, where log label_c is at least `log_zero`.

    Wang et al. 2019, arXiv:1908.06112, equation 6. With one-hot labels `log_zero` is the paper's A, -4 there in most
    experiments; the published code clips labels at 1e-4 from below, as we do.
    """
    log_p, labels, weights = _prepare(logits, labels, weights)
    return _sum(weights, -jnp.sum(jnp.exp(log_p) * _clipped_log(labels, log_zero), axis=-1))


def symmetric_cross_entropy(
    logits: Classes,
    labels: Classes,
    weights: Positions,
    *,
    alpha: float = 0.1,
    beta: float = 1.0,
    log_zero: float = LOG_ZERO,
) -> Scalar:
    """alpha * cross_entropy + beta * reverse_cross_entropy (arXiv:1908.06112, equation 8; its CIFAR-10 values)."""
    reverse = reverse_cross_entropy(logits, labels, weights, log_zero=log_zero)
    return alpha * cross_entropy(logits, labels, weights) + beta * reverse


def auxiliary_confidence(
    logits: Classes,
    labels: Classes,
    weights: Positions,
    *,
    coefficient: jax.typing.ArrayLike,
    thresholds: Float[Array, " C"] | None = None,
    soft: bool = False,
    p: Classes | None = None,
) -> Scalar:
    """(1 - coefficient) CE(label, p) + coefficient CE(own label, p): own labels say what the model believes itself.

    Burns et al., arXiv:2312.09390, equation 1 and appendix A.4. Own labels are constants without a gradient. For the
    loss of openai/weak-to-strong the thresholds are `quantile_thresholds` of the batch; for EleutherAI/w2s's
    log-confidence loss those of a buffer of earlier probabilities, with labels from `balance` where it balances.

    Args:
      logits, labels, weights: as everywhere here.
      coefficient: scalar, in [0, 1]; see `warmup`.
      thresholds: [C], of `harden`; None takes the most likely class.
      soft: the own label is p itself, not hardened.
      p: [..., C] probabilities of which own labels are made, by default those of the logits. A position that decides a
        threshold is on the right side of it only with the very p that the threshold was made of.
    """
    if p is None:
        log_p, _, _ = _prepare(logits, labels, weights)
        p = jax.lax.stop_gradient(jnp.exp(log_p))
    own = p if soft else harden(p, thresholds)
    return _mixed(logits, labels, weights, own, coefficient)


def bootstrap(
    logits: Classes,
    labels: Classes,
    weights: Positions,
    *,
    coefficient: jax.typing.ArrayLike,
) -> Scalar:
    """-sum_c ((1 - coefficient) label_c + coefficient p_c) log p_c, with the gradient of both factors p.

    Soft bootstrapping of Reed et al., arXiv:1412.6596, section 3.2, whose beta is 1 - coefficient: cross-entropy with
    the entropy of p to be small as well. Their hard bootstrapping is `auxiliary_confidence` without thresholds.
    """
    log_p, _, _ = _prepare(logits, labels, weights)
    return _mixed(logits, labels, weights, jnp.exp(log_p), coefficient)


def product_of_confidence(
    logits: Classes,
    labels: Classes,
    weights: Positions,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
) -> Scalar:
    """Cross-entropy with labels in proportion to p^beta label^alpha, held constant; alpha > 0.

    product_loss_fn of openai/weak-to-strong (weak_to_strong/loss.py).
    """
    log_p, clean, _ = _prepare(logits, labels, weights)
    target = jax.nn.softmax(beta * jax.lax.stop_gradient(log_p) + alpha * jnp.log(clean), axis=-1)
    return cross_entropy(logits, target, weights)


def confidence_window(logits: Classes, labels: Classes, weights: Positions, *, radius: float = 0.15) -> Scalar:
    """Cross-entropy where the model is unsure: where max_c p_c < 1 / C + radius; 0 elsewhere.

    confidence_window_loss of EleutherAI/w2s (w2s/loss.py), which has 0.5 for two classes. It divides by the number of
    all positions, those outside of the window included: the sum of all weights.
    """
    log_p, labels, weights = _prepare(logits, labels, weights)
    unsure = jnp.max(jnp.exp(log_p), axis=-1) < 1 / logits.shape[-1] + radius
    return _sum(jnp.where(unsure, weights, 0.0), -jnp.sum(labels * log_p, axis=-1))


def adaptive_confidence(
    logits: Classes,
    labels: Classes,
    weights: Positions,
    *,
    scale: float = 1.0,
    temperature: float = 1.0,
) -> Scalar:
    """(1 - a) T^2 KL(label_T || p_T) - a log p_k, with a weight a of its own for every position, held constant.

    AdaptConf of Guo et al., arXiv:2402.03749, as in its published code (classification/distillers/adaptconf.py): with k
    the model's most likely class and j the label's, a = sigmoid((log p_j - log p_k) / scale), which is at most 1/2.
    p_T = softmax(logits / T), and label_T is in proportion to label^(1/T).

    Args:
      logits, labels, weights: as everywhere here.
      scale: the published superalignment_threshold.
      temperature: T.
    """
    log_p, clean, _ = _prepare(logits, labels, weights)
    nearer = jnp.sum(harden(clean) * log_p, axis=-1) - jnp.max(log_p, axis=-1)
    share = jax.lax.stop_gradient(jax.nn.sigmoid(nearer / scale))
    return _distilled(logits, labels, weights, share, temperature)


def augmented_confidence(
    logits: Classes,
    labels: Classes,
    weights: Positions,
    *,
    coefficient: jax.typing.ArrayLike,
    temperature: float = 1.0,
) -> Scalar:
    """(1 - coefficient) T^2 KL(label_T || p_T) - coefficient log p_k: `adaptive_confidence` with one weight for all.

    AugConf of the code published with arXiv:2402.03749, whose coefficient rises linearly (`warmup`).
    """
    share = jnp.full(weights.shape, coefficient, _dtype(logits))
    return _distilled(logits, labels, weights, share, temperature)


def scores(logits: Classes, labels: Classes, weights: Positions) -> Scores:
    """What to report of predictions; no gradient."""
    log_p, labels, weights = jax.lax.stop_gradient(_prepare(logits, labels, weights))
    p, at_label = jnp.exp(log_p), harden(labels)
    label_log_p = jnp.sum(at_label * log_p, axis=-1, keepdims=True)
    return Scores(
        nll_sum=_sum(weights, -jnp.sum(labels * log_p, axis=-1)),
        correct_sum=_sum(weights, (jnp.sum(log_p >= label_log_p, axis=-1) == 1).astype(p.dtype)),
        brier_sum=_sum(weights, jnp.sum(jnp.square(p - labels), axis=-1)),
        confidence_sum=_sum(weights, jnp.max(p, axis=-1)),
        weight_sum=jnp.sum(weights),
    )


def warmup(step: Int[Array, ""], coefficient: float, steps: int) -> Scalar:
    """coefficient * min(1, step / steps), as in EleutherAI/w2s; `coefficient` throughout where steps is 0. float32.

    In openai/weak-to-strong it rises by the fraction of all training that is done, not of the warm-up, and then jumps:
    with a warm-up of a tenth of training, from 0.1 * coefficient to coefficient.
    """
    return coefficient * jnp.minimum(1.0, step.astype(jnp.float32) / steps) if steps else jnp.float32(coefficient)


def harden(p: Classes, thresholds: Float[Array, " C"] | None = None) -> Classes:
    """[..., C] probabilities -> one-hot: class argmax_c (p_c - thresholds_c), the first where several are equal.

    With two classes only the first threshold is read, since it says all: class 0 where p_0 >= thresholds_0, as in
    openai/weak-to-strong. (With thresholds_1 = 1 - thresholds_0 the two rules are the same but for rounding.)
    """
    C = p.shape[-1]
    if thresholds is None:
        index = jnp.argmax(p, axis=-1)
    elif C == 2:
        index = (p[..., 0] < thresholds[0].astype(p.dtype)).astype(jnp.int32)
    else:
        thresholds = thresholds.astype(p.dtype).reshape((1,) * (p.ndim - 1) + (C,))
        index = jnp.argmax(p - thresholds, axis=-1)
    return jax.nn.one_hot(index, C, dtype=p.dtype)


def quantile_thresholds(p: Classes, prior: Float[Array, " C"], weights: Positions) -> Float[Array, " C"]:
    """[C] thresholds of `harden` with which classes become about as frequent as `prior` says.

    Threshold c is the (1 - prior_c)-quantile of p_c over the positions of weight > 0, linearly interpolated (as
    torch.quantile): a share of prior_c lies above it. With two classes this is the rule of openai/weak-to-strong, and
    classes have these frequencies up to one position. With more, the share of p_c above its threshold is right for
    every class, but a position may have several classes above, or none: frequencies are right only roughly (random
    logits, 3 to 10 classes: 1 to 4 % of the positions are in another class than they should be).

    Args:
      p: [..., C] probabilities, or logits' softmax of earlier batches as well, as EleutherAI/w2s keeps them.
      prior: [C], the wanted frequencies: see `mean_label`.
      weights: [...].
    """
    C = p.shape[-1]
    p, prior, here = p.reshape(-1, C), prior.astype(p.dtype), weights.reshape(-1) > 0
    if C == 2:
        first = _quantile(p[:, 0], prior[1], here)
        return jnp.stack([first, 1 - first])
    return jax.vmap(_quantile, in_axes=(1, 0, None))(p, 1 - prior, here)


def mean_label(labels: Classes, weights: Positions) -> Float[Array, " C"]:
    """Mean of labels [..., C] over the positions of weight > 0, each counted once: [C]."""
    C = labels.shape[-1]
    here = (weights > 0).reshape(-1, 1)
    total = jnp.sum(jnp.where(here, labels.reshape(-1, C), 0.0), axis=0)
    return total / jnp.maximum(jnp.sum(here), 1).astype(labels.dtype)


def balance(labels: Classes, weights: Positions, mean: Float[Array, " C"] | None = None) -> Classes:
    """Labels of which no class is favoured on the whole: softmax(l - mean l) with l = log(label + 1e-7).

    With two classes: the log-odds less their mean, as in EleutherAI/w2s (w2s/loss.py, log_confidence_loss with
    balance_batch), where own labels then have a prior of 1/2.

    Args:
      labels, weights: as everywhere here.
      mean: of l; by default that of these labels. Where they are a part of a batch, `mean_log` of the whole one.
    """
    mean = mean_log(labels, weights) if mean is None else mean
    return jax.nn.softmax(_logs(labels, weights) - mean.reshape((1,) * (labels.ndim - 1) + (-1,)), axis=-1)


def mean_log(labels: Classes, weights: Positions) -> Float[Array, " C"]:
    """Mean of log(label + 1e-7) over the positions of weight > 0."""
    return mean_label(_logs(labels, weights), weights)


def init_thresholds(classes: int) -> RunningThresholds:
    """Begins with equal thresholds, under which own labels are the most likely classes."""
    equal = jnp.full((classes,), 1 / classes, jnp.float32)
    return RunningThresholds(thresholds=equal, prior=equal, seen=jnp.zeros((), jnp.float32))


def threshold_sums(running: RunningThresholds, logits: Classes, labels: Classes, weights: Positions) -> ThresholdSums:
    """What `update_thresholds` needs to know of a batch, or of each of its parts."""
    C = logits.shape[-1]
    log_p, labels, weights = jax.lax.stop_gradient(_prepare(logits, labels, weights))
    here = (weights > 0).reshape(-1, 1)
    above = here & (jnp.exp(log_p).reshape(-1, C) > running.thresholds.astype(log_p.dtype)[None, :])
    return ThresholdSums(
        above=jnp.sum(above, axis=0).astype(jnp.float32),
        labels=jnp.sum(jnp.where(here, labels.reshape(-1, C), 0.0), axis=0).astype(jnp.float32),
        count=jnp.sum(here).astype(jnp.float32),
    )


def update_thresholds(running: RunningThresholds, sums: ThresholdSums, rate: float) -> RunningThresholds:
    """A step of stochastic quantile tracking: thresholds_c += rate * (share of p_c above - prior_c).

    It is gradient descent on the quantile's pinball loss (Robbins and Monro 1951), and comes to rest where
    `quantile_thresholds` would be. The prior is the mean of all labels so far.
    """
    n = jnp.maximum(sums.count, 1.0)
    seen = running.seen + sums.count
    # where count is 0, so are the sums, and nothing moves
    prior = running.prior + (sums.labels - sums.count * running.prior) / jnp.maximum(seen, 1.0)
    moved = running.thresholds + rate * (sums.above - sums.count * prior) / n
    return RunningThresholds(thresholds=moved, prior=prior, seen=seen)


def _prepare(logits, labels, weights):
    """(log probabilities, labels, weights), with harmless values where the weight is 0: a NaN there would reach the
    gradient even through a product with 0."""
    dtype = _dtype(logits)
    here = (weights > 0)[..., None]
    log_p = jax.nn.log_softmax(jnp.where(here, logits.astype(dtype), 0.0), axis=-1)
    labels = jnp.where(here, labels.astype(dtype), 1 / logits.shape[-1])
    return log_p, labels, weights.astype(dtype)


def _dtype(logits: Classes) -> jnp.dtype:
    return logits.dtype if logits.dtype == jnp.float64 else jnp.dtype(jnp.float32)


def _logs(labels: Classes, weights: Positions) -> Classes:
    return jnp.log(jnp.where((weights > 0)[..., None], labels, 1.0) + 1e-7)


def _sum(weights: Positions, values: Positions) -> Scalar:
    return jnp.sum(weights * values)


def _kl(labels: Classes, log_p: Classes) -> Positions:
    return jnp.sum(xlogy(labels, labels) - labels * log_p, axis=-1)


def _clipped_log(labels: Classes, log_zero: float) -> Classes:
    return jnp.maximum(jnp.log(labels), log_zero)


def _mixed(
    logits: Classes, labels: Classes, weights: Positions, own: Classes, coefficient: jax.typing.ArrayLike
) -> Scalar:
    log_p, labels, weights = _prepare(logits, labels, weights)
    coefficient = jnp.asarray(coefficient, log_p.dtype)
    return _sum(weights, -jnp.sum(((1 - coefficient) * labels + coefficient * own) * log_p, axis=-1))


def _distilled(logits: Classes, labels: Classes, weights: Positions, share: Positions, temperature: float) -> Scalar:
    log_p, clean, weights = _prepare(logits, labels, weights)
    # softmax doesn't see the constant by which log p differs from the logits
    tempered = jax.nn.log_softmax(log_p / temperature, axis=-1)
    divergence = temperature**2 * _kl(jax.nn.softmax(jnp.log(clean) / temperature, axis=-1), tempered)
    return _sum(weights, (1 - share) * divergence - share * jnp.sum(harden(log_p) * log_p, axis=-1))


def _quantile(x: Float[Array, " N"], q: Scalar, here: Bool[Array, " N"]) -> Scalar:
    """The q-quantile of those x [N] that are `here`; 0 where none is."""
    n = jnp.sum(here, dtype=jnp.int32)
    ordered = jnp.sort(jnp.where(here, x, jnp.inf))
    rank = q * (n - 1).astype(x.dtype)
    below = jnp.floor(rank)
    low, high = (ordered[jnp.clip(i.astype(jnp.int32), 0, n - 1)] for i in (below, jnp.ceil(rank)))
    value = low + (rank - below) * (high - low)
    return jnp.where(n > 0, value, 0.0)
