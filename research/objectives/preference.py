"""Preference optimisation: the policy learns from comparisons of answers, or from verdicts on them."""

import math
from collections.abc import Mapping

from research.errors import InputError, did_you_mean
from research.objectives.pairs import Pairs, Shaping
from research.objectives.types import Objective
from research.objectives.verdicts import Verdicts
from research.ops.preferences import LOSSES, Options

_SHIFT_DECAY = 0.9


def make(
    kind: str = "sigmoid",
    beta: float | None = None,
    label_smoothing: float | None = None,
    gamma: float | None = None,
    alpha: float | None = None,
    tau: float | None = None,
    desirable_weight: float | None = None,
    undesirable_weight: float | None = None,
    shift_decay: float | None = None,
    divergence: str = "reverse_kl",
    divergence_alpha: float | None = None,
    length_normalized: bool = False,
    ld_alpha: float | None = None,
    wpo: bool = False,
    sft: float | None = None,
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
    if sft is not None and not 0 <= sft < math.inf:
        raise InputError(f"sft = {sft}: must be 0 or more, and finite.")
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
    if not 0 < options.beta < math.inf:
        raise InputError(f"beta = {options.beta}: must be above 0, and finite.")
    share, needed = options.label_smoothing, kind in ("cdpo", "robust", "exo")
    if not 0 <= share < 0.5 or (needed and share == 0):
        raise InputError(
            f"label_smoothing = {share}: is the share of labels that is flipped, below 0.5 and "
            f"{'above 0, which kind = ' + repr(kind) + ' needs' if needed else '0 or more'}."
        )
    for name in ("alpha", "gamma", "desirable_weight", "undesirable_weight"):
        if not 0 <= getattr(options, name) < math.inf:
            raise InputError(f"{name} = {getattr(options, name)}: must be 0 or more, and finite.")
    if not 0 < options.tau < math.inf:
        raise InputError(f"tau = {options.tau}: must be above 0, and finite.")
    if not 0 <= decay <= 1:
        raise InputError(f"shift_decay = {decay}: must be from 0 to 1.")
    return options, decay
