"""The options of policy_gradient.py, and which of them go together."""

import dataclasses
import math
from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Array, Float

from research.errors import InputError, did_you_mean
from research.objectives.types import Batch, Context, Sampler
from research.ops import policy_losses
from research.ops.policy_losses import AGGREGATIONS, KL, LOSSES, Options
from research.ranges import NotNegative, Part, Positive, Size

OLD = ("sampler", "trainer")
CORRECTIONS = ("none", "token", "sequence")
BUDGET = "seq-mean-token-sum-norm"
_ALL_TOKENS = Sampler()


@dataclasses.dataclass(frozen=True)
class Settings:
    """The options of the term.

    Attributes:
      kind: of ops.policy_losses.LOSSES.
      clip_low, clip_high, dual_clip, tau_pos, tau_neg, k_pos, k_neg, lambda_pos, lambda_neg: see
        ops.policy_losses.Options; by default those of the kind's paper.
      aggregation: how tokens and answers are averaged, of ops.policy_losses.AGGREGATIONS; by default the kind's own.
      budget: of "seq-mean-token-sum-norm": the tokens that each answer's sum is divided by, such as the longest answer.
      old: whose log-probs ratios are against: "sampler", those that the tokens were drawn with; or "trainer", the
        policy's own before the rollout's first update.
      kl: of ops.policy_losses.KL: the estimate of the KL to the role `reference`, by default "k3_ratio".
      kl_coef: its weight.
      entropy_coef: weight of the entropy, which the loss is lowered by. It is averaged as the loss is.
      top_entropy: only this share of the batch's tokens is learned, those of the highest entropy (arXiv:2506.01939).
      correction: with old = "trainer", what a sampler that isn't the trainer is corrected by: nothing, the ratio
        trainer / sampler of each "token", or of the whole "sequence" (TRL's vllm_importance_sampling_mode, verl's
        rollout correction).
      bounds: the least and the greatest such ratio.
      drop: a ratio beyond them becomes 0, and not the bound.
      off_policy_mask: nothing is learned from an answer with a negative advantage that the policy has left by more nats
        a token than this (DeepSeek-V3.2, arXiv:2512.02556, section 3.1); None: from all.
      sampler: of the run.
    """

    kind: str = "ppo"
    clip_low: Positive | None = None
    clip_high: Positive | None = None
    dual_clip: Positive | None = None
    tau_pos: Positive | None = None
    tau_neg: Positive | None = None
    k_pos: Positive | None = None
    k_neg: Positive | None = None
    lambda_pos: Positive | None = None
    lambda_neg: Positive | None = None
    aggregation: str | None = None
    budget: Size | None = None
    old: str = "sampler"
    kl: str | None = None
    kl_coef: NotNegative = 0.0
    entropy_coef: NotNegative = 0.0
    top_entropy: Part = 1.0
    correction: str = "none"
    bounds: tuple[NotNegative, NotNegative] = (0.0, 2.0)
    drop: bool = False
    off_policy_mask: Positive | None = None
    sampler: Sampler = _ALL_TOKENS

    def of_loss(self) -> dict[str, float]:
        """The options of the kind that are set."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(Options)}
        return {name: value for name, value in values.items() if value is not None}


@dataclasses.dataclass(frozen=True)
class Averaging:
    """How tokens and answers are averaged; see `Settings`."""

    aggregation: str
    budget: int | None

    def check(self, kind: str) -> None:
        """Raises InputError where one isn't known, or doesn't go with the loss."""
        if self.aggregation not in AGGREGATIONS:
            hint = did_you_mean(self.aggregation, AGGREGATIONS)
            raise InputError(f"aggregation = {self.aggregation!r}: must be one of {', '.join(AGGREGATIONS)}.{hint}")
        if LOSSES[kind].rows and self.aggregation != LOSSES[kind].aggregation:
            raise InputError(
                f"aggregation = {self.aggregation!r}: an answer has one loss of kind = {kind!r}, whose mean over "
                "answers is taken. Leave it out."
            )
        if (self.budget is None) == (self.aggregation == BUDGET):
            of_other = f"Leave it out of {self.aggregation!r}."
            remedy = "Set it, to rollout.max_new_tokens." if self.budget is None else of_other
            raise InputError(
                f"budget = {self.budget}: is what aggregation = {BUDGET!r} divides an answer's sum by. {remedy}"
            )

    def of(self, mask: Float[Array, "B T"], batch: Batch, context: Context) -> policy_losses.Shares:
        """What the batch's tokens weigh."""
        rows = jnp.any(batch["segment_ids"] > 0, axis=1).astype(jnp.float32)
        shares = AGGREGATIONS[self.aggregation](mask, rows, float(self.budget or 0))
        if self.aggregation != BUDGET:
            return shares
        anything = jnp.sum(context.gathered["tokens"]) > 0  # else the update is to be skipped, as of the others
        return shares._replace(weight=jnp.where(anything, shares.weight, 0))


@dataclasses.dataclass(frozen=True)
class Extras:
    """What the loss has besides the policy's; see `Settings`."""

    kl_coef: float
    kl: str
    entropy_coef: float
    top_entropy: float
    off_policy_mask: float | None

    def check(self, kind: str, kl: str | None) -> None:
        """Raises InputError where one is out of its range, has no effect, or doesn't go with the loss. `kl`: as the
        config has it."""
        if kl == "k1":
            raise InputError(
                "kl = 'k1': as a part of the loss it teaches nothing, since the mean of its gradient is 0. Take "
                "'k1_ratio' or 'k3_ratio', or have it in the reward."
            )
        if self.kl not in KL:
            raise InputError(f"kl = {self.kl!r}: must be one of {', '.join(KL)}.{did_you_mean(self.kl, KL)}")
        if kl is not None and not self.kl_coef:
            raise InputError(f"kl = {kl!r}: has no effect with kl_coef = 0. Set that, or leave it out.")
        if self.top_entropy < 1 and LOSSES[kind].rows:
            raise InputError(
                f"top_entropy = {self.top_entropy}: leaves tokens out, and an answer has one loss of kind = {kind!r}. "
                "Leave it out, or take kind = 'ppo' or 'gspo'."
            )


@dataclasses.dataclass(frozen=True)
class Ratios:
    """Against whom the policy is compared; see `Settings`."""

    old: str
    correction: str
    bounds: tuple[float, ...]
    drop: bool

    @property
    def corrects(self) -> bool:
        """Whether tokens are weighed by the ratio of trainer to sampler."""
        return self.correction != "none"

    def check(self, kind: str) -> None:
        """Raises InputError where one isn't known, has no effect, or doesn't go with the loss."""
        for name, known in (("old", OLD), ("correction", CORRECTIONS)):
            value = getattr(self, name)
            if value not in known:
                raise InputError(f"{name} = {value!r}: must be one of {', '.join(known)}.{did_you_mean(value, known)}")
        if not self.corrects:
            default = Ratios("sampler", "none", (0.0, 2.0), False)
            for name in ("bounds", "drop"):
                if getattr(self, name) != getattr(default, name):
                    raise InputError(
                        f"{name} = {getattr(self, name)}: is of a correction, and correction = 'none'. Set that, or "
                        "leave it out."
                    )
            return
        if self.old == "sampler":
            raise InputError(
                f"correction = {self.correction!r}: is the ratio of trainer to sampler, and with old = 'sampler' the "
                "loss's own ratio has it already. Set old = 'trainer', or leave it out."
            )
        if kind == "vespo" or (LOSSES[kind].rows and self.correction == "token"):
            remedy = "old = 'sampler', whose ratio is whole" if kind == "vespo" else "'sequence'"
            raise InputError(
                f"correction = {self.correction!r}: an answer has one weight with kind = {kind!r}. Take {remedy}."
            )
        if not (len(self.bounds) == 2 and self.bounds[0] < self.bounds[1]):
            raise InputError(f"bounds = {self.bounds}: must be (least, greatest) of a ratio.")


def loss_options(kind: str, values: Mapping[str, float]) -> Options:
    """The options of a kind.

    Raises:
      InputError: one is of another kind, or out of its range.
    """
    loss = LOSSES[kind]
    for name, value in values.items():
        if name not in loss.takes:
            kinds = ", ".join(other for other, row in LOSSES.items() if name in row.takes)
            raise InputError(f"{name} = {value}: is of {kinds}. Leave it out of kind = {kind!r}.")
    options = Options(**{**loss.defaults, **values})
    most_low = math.inf if kind == "gmpo" else 1.0  # of gmpo they bound the logarithm
    if options.clip_low > most_low:
        raise InputError(f"clip_low = {options.clip_low}: must be at most {most_low:g}.")
    if options.dual_clip is not None and options.dual_clip <= 1 + options.clip_high:
        raise InputError(f"dual_clip = {options.dual_clip}: must be above 1 + clip_high = {1 + options.clip_high:g}.")
    return options
