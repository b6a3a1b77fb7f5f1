"""Losses of preferences: pure functions of the log-probabilities of answers.

Every loss reads scores. Where there is a reference, an answer's score is log p(answer) - log p_ref(answer), given its
prompt, and its implicit reward is beta times that (DPO, arXiv:2305.18290, equation 5); where there is none, it is
log p(answer). `LOSSES` has a row for each kind: its function, where it was published, which options it takes, and what
it is before the first update, where policy and reference are one model and all scores are 0.

Axes: N comparisons, or answers that are judged alone.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Annotated

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from research.ranges import NotNegative, Positive, Range

DIVERGENCES = ("reverse_kl", "forward_kl", "js", "alpha")
_MOST_EXPONENT = 80.0  # exp of it is finite in float32

Scores = Float[Array, " N"]


@dataclasses.dataclass(frozen=True)
class Options:
    """What the losses may depend on besides scores; each reads those that its row of LOSSES names, and `beta`.

    Attributes:
      beta: how far the policy is held to the reference: the larger the closer. Without a reference, a temperature.
      label_smoothing: the share of labels that is taken to be flipped.
      gamma: the margin by which the chosen answer's reward is to be above the other's.
      alpha: of alphapo: the shape of the reward.
      tau: of discopop: how fast one loss gives way to the other.
      desirable_weight, undesirable_weight: of the answers with either label.
    """

    beta: Positive = 0.1
    label_smoothing: Annotated[float, Range(0, below=0.5)] = 0.0
    gamma: NotNegative = 0.0
    alpha: NotNegative = 0.0
    tau: Positive = 0.05
    desirable_weight: NotNegative = 1.0
    undesirable_weight: NotNegative = 1.0


@dataclasses.dataclass(frozen=True)
class Loss:
    """A loss of preferences.

    Attributes:
      function: (scores of chosen answers, of rejected ones, options) -> losses [N]; where `labels`, (scores, whether an
        answer is desirable, their KL, options) -> losses [N].
      source: the paper, and the equation.
      at_start: options -> what it is where all scores are 0; None where there is no reference, and so no such value.
      takes: the options that it reads besides `beta`.
      defaults: option -> its default, where that isn't the one of Options.
      difference: it is about the difference between the answers of a pair: where they are one, it has no gradient.
      mean: scores are means over an answer's tokens, and not sums.
      divergence: a divergence other than the reverse KL may shape its scores.
      labels: answers are judged alone, each by its label.
      matched: the answers of a whole batch are matched by rank (see `partners`), and what it gets are such couples.
      sft: weight of the chosen answer's cross-entropy that is part of the published loss.
    """

    function: Callable[..., Float[Array, " N"]]
    source: str
    at_start: Callable[[Options], float] | None
    takes: tuple[str, ...] = ()
    defaults: dict[str, float] = dataclasses.field(default_factory=dict)
    difference: bool = True
    mean: bool = False
    divergence: bool = False
    labels: bool = False
    matched: bool = False
    sft: float = 0.0

    @property
    def reference(self) -> bool:
        """Whether it compares with a reference."""
        return self.at_start is not None


def shape(ratios: Float[Array, "*N"], divergence: str = "reverse_kl", alpha: float = 0.5) -> Float[Array, "*N"]:
    """Scores that hold the policy to the reference by another f-divergence (f-DPO, arXiv:2309.16240): f'(p / p_ref)
    from log(p / p_ref), up to a constant that has no part in a difference.

    Args:
      ratios: log p - log p_ref.
      divergence: "reverse_kl", DPO's; "forward_kl"; "js", Jensen-Shannon's; or "alpha".
      alpha: of the last: near 1 it is the reverse KL, near 0 the forward one.
    """
    if divergence == "reverse_kl" or (divergence == "alpha" and alpha == 1):
        return ratios
    if divergence == "js":
        return math.log(2) + jax.nn.log_sigmoid(ratios)
    exponent = -1.0 if divergence == "forward_kl" else alpha - 1
    return jnp.expm1(jnp.minimum(exponent * ratios, _MOST_EXPONENT)) / exponent


def sigmoid(chosen: Scores, rejected: Scores, options: Options) -> Float[Array, " N"]:
    """-(1 - e) log s(beta d) - e log s(-beta d) of the difference d, e being the label smoothing."""
    return _smoothed(options.beta * (chosen - rejected), options.label_smoothing)


def robust(chosen: Scores, rejected: Scores, options: Options) -> Float[Array, " N"]:
    """The loss whose mean over labels of which a share e is flipped is that of `sigmoid` over true labels."""
    margin, e = options.beta * (chosen - rejected), options.label_smoothing
    return (-(1 - e) * jax.nn.log_sigmoid(margin) + e * jax.nn.log_sigmoid(-margin)) / (1 - 2 * e)


def hinge(chosen: Scores, rejected: Scores, options: Options) -> Float[Array, " N"]:
    """max(0, 1 - beta d)."""
    return jax.nn.relu(1 - options.beta * (chosen - rejected))


def ipo(chosen: Scores, rejected: Scores, options: Options) -> Float[Array, " N"]:
    """(d - 1 / (2 beta))^2."""
    return jnp.square(chosen - rejected - 0.5 / options.beta)


def exo(chosen: Scores, rejected: Scores, options: Options) -> Float[Array, " N"]:
    """KL from (s(beta d), s(-beta d)) to the labels (1 - e, e), e being the label smoothing."""
    margin, e = options.beta * (chosen - rejected), options.label_smoothing
    log_p, log_q = jax.nn.log_sigmoid(margin), jax.nn.log_sigmoid(-margin)
    return jnp.exp(log_p) * (log_p - math.log1p(-e)) + jnp.exp(log_q) * (log_q - math.log(e))


def discopop(chosen: Scores, rejected: Scores, options: Options) -> Float[Array, " N"]:
    """(1 - w) times the logistic loss plus w exp(-beta d), where w = s(beta d / tau)."""
    margin = options.beta * (chosen - rejected)
    weight = jax.nn.sigmoid(margin / options.tau)
    exponential = jnp.exp(jnp.minimum(-margin, _MOST_EXPONENT))
    return -jax.nn.log_sigmoid(margin) * (1 - weight) + exponential * weight


def nca(chosen: Scores, rejected: Scores, options: Options) -> Float[Array, " N"]:
    """-log s(r) - log s(-r) / 2 - log s(-r') / 2 of the implicit rewards r of the chosen, r' of the rejected answer."""
    chosen, rejected = options.beta * chosen, options.beta * rejected
    up, down = jax.nn.log_sigmoid(chosen), jax.nn.log_sigmoid(-chosen) + jax.nn.log_sigmoid(-rejected)
    return -up - 0.5 * down


def bco(
    chosen: Scores, rejected: Scores, options: Options, shift: Float[Array, ""] | float = 0.0
) -> Float[Array, " N"]:
    """-log s(r - shift) - log s(-(r' - shift)). The paper's shift is the mean of all rewards so far."""
    chosen, rejected = options.beta * chosen - shift, options.beta * rejected - shift
    return -jax.nn.log_sigmoid(chosen) - jax.nn.log_sigmoid(-rejected)


def sppo(chosen: Scores, rejected: Scores, options: Options) -> Float[Array, " N"]:
    """(score - 1 / (2 beta))^2 + (score' + 1 / (2 beta))^2: the chosen answer wins for sure; 1 / beta is their eta."""
    return jnp.square(chosen - 0.5 / options.beta) + jnp.square(rejected + 0.5 / options.beta)


def apo_zero(chosen: Scores, rejected: Scores, options: Options) -> Float[Array, " N"]:
    """s(-r) + s(r'): the chosen answer is to rise, the rejected one to fall."""
    return jax.nn.sigmoid(-options.beta * chosen) + jax.nn.sigmoid(options.beta * rejected)


def apo_down(chosen: Scores, rejected: Scores, options: Options) -> Float[Array, " N"]:
    """s(r) + s(-(r - r')): both are to fall, the rejected one more."""
    return jax.nn.sigmoid(options.beta * chosen) + jax.nn.sigmoid(-options.beta * (chosen - rejected))


def kto(
    scores: Scores, desirable: Bool[Array, " N"], kl: Float[Array, ""] | float, options: Options
) -> Float[Array, " N"]:
    """w s(-beta (score - kl)) where an answer is desirable, else w' s(beta (score - kl)): w less the paper's value.
    With a KL of 0 it is apo_zero of answers that are judged alone."""
    margin = options.beta * (scores - kl)
    weights = jnp.where(desirable, options.desirable_weight, options.undesirable_weight)
    return weights * jax.nn.sigmoid(jnp.where(desirable, -margin, margin))


def orpo(chosen: Scores, rejected: Scores, options: Options) -> Float[Array, " N"]:
    """-beta log s(log of the ratio of the answers' odds). Scores are mean log-probs."""
    log_odds = chosen - rejected - (_log1mexp(chosen) - _log1mexp(rejected))
    return -options.beta * jax.nn.log_sigmoid(log_odds)


def simpo(chosen: Scores, rejected: Scores, options: Options) -> Float[Array, " N"]:
    """-log s(beta d - gamma), with smoothed labels as `sigmoid`."""
    return _smoothed(options.beta * (chosen - rejected) - options.gamma, options.label_smoothing)


def alphapo(chosen: Scores, rejected: Scores, options: Options) -> Float[Array, " N"]:
    """`simpo` of the reward (1 - p^-alpha) / alpha, p = exp(score); simpo itself as alpha nears 0."""
    if options.alpha == 0:
        return simpo(chosen, rejected, options)
    chosen, rejected = (
        -jnp.expm1(jnp.minimum(-options.alpha * x, _MOST_EXPONENT)) / options.alpha for x in (chosen, rejected)
    )
    return simpo(chosen, rejected, options)


def partners(
    values: Float[Array, " N"], others: Float[Array, " N"], present: Bool[Array, " N"], index: Int[Array, " n"]
) -> Float[Array, " n"]:
    """Of each of the values numbered `index` the one of the others that has the same rank: the k-th smallest belongs to
    the k-th smallest. Optimal transport pairs numbers so (AOT, arXiv:2406.05882, section 3). Equal values are ranked in
    their order.

    Args:
      values, others: of a whole batch.
      present: which of them there are.
      index: what is asked for; where it isn't present the result means nothing.
    """
    first = lambda x: jnp.argsort(jnp.where(present, x, jnp.inf), stable=True)  # noqa: E731
    rank = jnp.argsort(first(values), stable=True)[index]
    return others[first(others)][rank]


def _smoothed(margin: Float[Array, " N"], e: float) -> Float[Array, " N"]:
    loss = -jax.nn.log_sigmoid(margin)
    return (1 - e) * loss - e * jax.nn.log_sigmoid(-margin) if e else loss


def _log1mexp(x: Float[Array, " N"]) -> Float[Array, " N"]:
    """log(1 - exp(x)) of x < 0, precise near 0 and far from it."""
    x = jnp.minimum(x, -jnp.finfo(x.dtype).tiny)
    near = x > -math.log(2)  # both sides of a `where` are differentiated, so that each gets what it can take
    return jnp.where(near, jnp.log(-jnp.expm1(jnp.where(near, x, -1.0))), jnp.log1p(-jnp.exp(jnp.where(near, -1.0, x))))


def _number(value: float) -> Callable[[Options], float]:
    return lambda options: value


_LN2 = math.log(2)

LOSSES: dict[str, Loss] = {
    "sigmoid": Loss(
        sigmoid,
        "DPO, arXiv:2305.18290, equation 7; with smoothed labels see cdpo",
        _number(_LN2),
        takes=("label_smoothing",),
        divergence=True,
    ),
    "cdpo": Loss(
        sigmoid,
        "conservative DPO, Mitchell 2023, ericmitchell.ai/cdpo.pdf",
        _number(_LN2),
        takes=("label_smoothing",),
        divergence=True,
    ),
    "robust": Loss(
        robust,
        "robust DPO, arXiv:2403.00409, section 3.1",
        _number(_LN2),
        takes=("label_smoothing",),
        divergence=True,
    ),
    "hinge": Loss(
        hinge,
        "SLiC-HF, arXiv:2305.10425, section 2; of log-ratios as in RSO, arXiv:2309.06657",
        _number(1.0),
        divergence=True,
    ),
    "ipo": Loss(ipo, "IPO, arXiv:2310.12036, equation 17", lambda options: 1 / (4 * options.beta**2), divergence=True),
    "ipo_mean": Loss(
        ipo,
        "the same of means over tokens, as its authors measured (and TRL's ipo)",
        lambda options: 1 / (4 * options.beta**2),
        mean=True,
        divergence=True,
    ),
    "exo": Loss(
        exo,
        "EXO, arXiv:2402.00856, equation 16",
        lambda options: -_LN2 - 0.5 * math.log(options.label_smoothing * (1 - options.label_smoothing)),
        takes=("label_smoothing",),
        divergence=True,
    ),
    "discopop": Loss(
        discopop,
        "DiscoPOP, arXiv:2406.08414, equation 5",
        _number((1 + _LN2) / 2),
        takes=("tau",),
        divergence=True,
    ),
    "nca": Loss(nca, "NCA, arXiv:2402.05369, section 4.1", _number(2 * _LN2), difference=False),
    "bco": Loss(bco, "BCO, arXiv:2404.04656, section 4", _number(2 * _LN2), takes=("shift_decay",), difference=False),
    "sppo": Loss(
        sppo, "SPPO, arXiv:2405.00675, equation 4.7", lambda options: 1 / (2 * options.beta**2), difference=False
    ),
    "aot": Loss(
        sigmoid,
        "paired AOT, arXiv:2406.05882, section 3",
        _number(_LN2),
        takes=("label_smoothing",),
        matched=True,
    ),
    "aot_unpaired": Loss(
        sigmoid,
        "unpaired AOT, arXiv:2406.05882, section 3",
        _number(_LN2),
        takes=("label_smoothing",),
        difference=False,
        matched=True,
    ),
    "apo_zero": Loss(apo_zero, "APO, arXiv:2408.06266, equation 7", _number(1.0)),
    "apo_down": Loss(apo_down, "APO, arXiv:2408.06266, equation 8", _number(1.0), difference=False),
    "kto": Loss(
        kto,
        "KTO, arXiv:2402.01306, equation 7",
        lambda options: (options.desirable_weight + options.undesirable_weight) / 4,
        takes=("desirable_weight", "undesirable_weight"),
        difference=False,
        labels=True,
    ),
    "apo_zero_unpaired": Loss(
        kto,
        "APO, arXiv:2408.06266, equation 7, of answers that are judged alone",
        lambda options: (options.desirable_weight + options.undesirable_weight) / 4,
        takes=("desirable_weight", "undesirable_weight"),
        difference=False,
        labels=True,
    ),
    "orpo": Loss(orpo, "ORPO, arXiv:2403.07691, equations 6 and 7", None, mean=True, sft=1.0),
    "cpo": Loss(sigmoid, "CPO, arXiv:2401.08417, equation 3", None, takes=("label_smoothing",), sft=1.0),
    "simpo": Loss(
        simpo,
        "SimPO, arXiv:2405.14734, equation 6",
        None,
        takes=("gamma", "label_smoothing"),
        defaults={"beta": 2.0, "gamma": 1.0},
        mean=True,
    ),
    "alphapo": Loss(
        alphapo,
        "AlphaPO, arXiv:2501.03884",
        None,
        takes=("alpha", "gamma", "label_smoothing"),
        defaults={"beta": 2.5, "gamma": 0.1, "alpha": 0.25},
        mean=True,
    ),
}
