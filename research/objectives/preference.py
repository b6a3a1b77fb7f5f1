"""Preference optimisation: the policy learns from comparisons of answers, or from verdicts on them."""

from collections.abc import Mapping
from typing import Annotated

from research import ranges
from research.errors import InputError, did_you_mean
from research.objectives.pairs import Pairs, Shaping
from research.objectives.types import Objective
from research.objectives.verdicts import Verdicts
from research.ops.preferences import LOSSES, Options
from research.ranges import NotNegative, Positive, Range, Share

_SHIFT_DECAY = 0.9


def make(
    kind: str = "sigmoid",
    beta: Positive | None = None,
    label_smoothing: Annotated[float, Range(0, below=0.5)] | None = None,
    gamma: NotNegative | None = None,
    alpha: NotNegative | None = None,
    tau: Positive | None = None,
    desirable_weight: NotNegative | None = None,
    undesirable_weight: NotNegative | None = None,
    shift_decay: Share | None = None,
    divergence: str = "reverse_kl",
    divergence_alpha: NotNegative | None = None,
    length_normalized: bool = False,
    ld_alpha: Share | None = None,
    wpo: bool = False,
    sft: NotNegative | None = None,
    cached: bool = False,
) -> Objective:
    """Mean over comparisons of a loss of ops.preferences.LOSSES; of kto and apo_zero_unpaired over answers.

    The reference of those that have one is the role `reference`.

    Args:
      kind: of LOSSES.
      beta, label_smoothing, gamma, alpha, tau, desirable_weight, undesirable_weight: see ops.preferences.Options.
      shift_decay: of bco: the running mean of rewards, its shift, keeps this share at each step; 1 for no shift.
      divergence, divergence_alpha: see ops.preferences.shape.
      length_normalized: scores are means over an answer's tokens, and not sums.
      ld_alpha: weight of the tokens beyond the length of the shorter answer (LD-DPO, arXiv:2409.06411).
      wpo: a pair counts as much as its answers are probable to the policy (WPO, arXiv:2406.11827, equation 2).
      sft: weight of the chosen answers' cross-entropy, a mean over tokens (RPO, arXiv:2404.19733). By default 1 for
        orpo and cpo, whose papers have it, and else 0.
      cached: no reference runs: its log-probs come with the batch (data.annotations, by `understudy annotate`).

    Raises:
      InputError: an option that isn't known, is out of its range, or is of another kind.
    """
    if kind not in LOSSES:
        raise InputError(f"kind = {kind!r}: no such loss.{did_you_mean(kind, LOSSES)}")
    loss = LOSSES[kind]
    values = {
        "beta": beta,
        "label_smoothing": label_smoothing,
        "gamma": gamma,
        "alpha": alpha,
        "tau": tau,
        "desirable_weight": desirable_weight,
        "undesirable_weight": undesirable_weight,
        "shift_decay": shift_decay,
    }
    options, decay = _options(kind, {name: value for name, value in values.items() if value is not None})
    shaping = Shaping(divergence, divergence_alpha, length_normalized, ld_alpha, wpo)
    shaping.check(kind)
    if sft is not None and loss.labels:
        raise InputError(f"sft = {sft}: is about chosen answers, and kind = {kind!r} has none. Leave it out.")
    if cached and not loss.reference:
        raise InputError(f"cached = True: kind = {kind!r} has no reference. Leave it out.")
    if cached and kind == "kto":
        raise InputError(
            "cached = True: kind = 'kto' asks about answers to other prompts too, which annotations don't "
            "hold. Use a live one (roles.reference), or kind = 'apo_zero_unpaired'."
        )
    reference = ("cached" if cached else "role") if loss.reference else ""
    if loss.labels:
        return Verdicts(kind, options, reference).objective()
    return Pairs(kind, options, reference, shaping, decay, loss.sft if sft is None else sft).objective()


def _options(kind: str, values: Mapping[str, float]) -> tuple[Options, float]:
    """The options of a kind, and bco's decay.

    Raises:
      InputError: one is of another kind, or out of its range.
    """
    loss = LOSSES[kind]
    for name, value in values.items():
        if name not in ("beta", *loss.takes):
            kinds = ", ".join(other for other, row in LOSSES.items() if name in row.takes)
            raise InputError(f"{name} = {value}: is of {kinds}. Leave it out of kind = {kind!r}.")
    known = {**loss.defaults, **values}
    decay = known.pop("shift_decay", _SHIFT_DECAY)
    options = Options(**known)
    ranges.check(options)
    if kind in ("cdpo", "robust", "exo") and not options.label_smoothing:
        raise InputError(
            f"label_smoothing = 0: is the share of labels that is flipped, of which kind = {kind!r} needs one above 0."
        )
    return options, decay
