"""Reinforcement learning: the policy's own answers become more probable the better they are than was to be expected."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from research.errors import InputError, did_you_mean
from research.objectives.types import Batch, Context, Forward, LossOut, Objective, Sampler, next_token_targets
from research.ops import losses, policy_losses
from research.ops.policy_losses import AGGREGATIONS, KL, LOSSES, Options, Samples, TokenLosses

OLD = ("sampler", "trainer")
CORRECTIONS = ("none", "token", "sequence")
_BUDGET = "seq-mean-token-sum-norm"
_NAMES = {"sampler": "sampler_log_prob", "trainer": "old_log_prob"}
_ALL_TOKENS = Sampler()
_OFF_START = 0.05  # so far from 1 the mean ratio of the first update may be


def make(
    kind: str = "ppo",
    clip_low: float | None = None,
    clip_high: float | None = None,
    dual_clip: float | None = None,
    tau_pos: float | None = None,
    tau_neg: float | None = None,
    k_pos: float | None = None,
    k_neg: float | None = None,
    lambda_pos: float | None = None,
    lambda_neg: float | None = None,
    aggregation: str | None = None,
    budget: int | None = None,
    old: str = "sampler",
    kl: str | None = None,
    kl_coef: float = 0.0,
    entropy_coef: float = 0.0,
    top_entropy: float = 1.0,
    correction: str = "none",
    bounds: tuple[float, float] = (0.0, 2.0),
    drop: bool = False,
    off_policy_mask: float | None = None,
    sampler: Sampler = _ALL_TOKENS,
) -> Objective:
    """A loss of ops.policy_losses.LOSSES of the answers' tokens, plus the KL to the reference, less the entropy bonus.

    Args:
      kind: of LOSSES.
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

    Raises:
      InputError: an option that isn't known, is out of its range, has no effect, or doesn't go with another.
    """
    if kind not in LOSSES:
        raise InputError(f"kind = {kind!r}: no such loss.{did_you_mean(kind, LOSSES)}")
    values = {
        "clip_low": clip_low,
        "clip_high": clip_high,
        "dual_clip": dual_clip,
        "tau_pos": tau_pos,
        "tau_neg": tau_neg,
        "k_pos": k_pos,
        "k_neg": k_neg,
        "lambda_pos": lambda_pos,
        "lambda_neg": lambda_neg,
    }
    options = _options(kind, {name: value for name, value in values.items() if value is not None})
    shares = Averaging(LOSSES[kind].aggregation if aggregation is None else aggregation, budget)
    shares.check(kind)
    extras = Extras(kl_coef, "k3_ratio" if kl is None else kl, entropy_coef, top_entropy, off_policy_mask)
    extras.check(kind, kl)
    pair = tuple(bounds) if isinstance(bounds, list | tuple) else (bounds,)
    ratios = Ratios(old, correction, pair, drop)
    ratios.check(kind)
    policy_gradient = PolicyGradient(kind, options, shares, extras, ratios, sampler)
    policy_gradient.check_old()
    policy_gradient.check_sampler()
    return policy_gradient.objective()


@dataclasses.dataclass(frozen=True)
class Averaging:
    """How tokens and answers are averaged; see `make`."""

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
        if (self.budget is None) == (self.aggregation == _BUDGET):
            of_other = f"Leave it out of {self.aggregation!r}."
            remedy = "Set it, to rollout.max_new_tokens." if self.budget is None else of_other
            raise InputError(
                f"budget = {self.budget}: is what aggregation = {_BUDGET!r} divides an answer's sum by. {remedy}"
            )
        if self.budget is not None and self.budget < 1:
            raise InputError(f"budget = {self.budget}: must be 1 or more.")

    def of(self, mask: Float[Array, "B T"], batch: Batch, context: Context) -> policy_losses.Shares:
        """What the batch's tokens weigh."""
        rows = jnp.any(batch["segment_ids"] > 0, axis=1).astype(jnp.float32)
        shares = AGGREGATIONS[self.aggregation](mask, rows, float(self.budget or 0))
        if self.aggregation != _BUDGET:
            return shares
        anything = jnp.sum(context.gathered["tokens"]) > 0  # else the update is to be skipped, as of the others
        return shares._replace(weight=jnp.where(anything, shares.weight, 0))


@dataclasses.dataclass(frozen=True)
class Extras:
    """What the loss has besides the policy's; see `make`."""

    kl_coef: float
    kl: str
    entropy_coef: float
    top_entropy: float
    off_policy_mask: float | None

    def check(self, kind: str, kl: str | None) -> None:
        """Raises InputError where one is out of its range, has no effect, or doesn't go with the loss. `kl`: as the
        config has it."""
        for name in ("kl_coef", "entropy_coef"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"{name} = {getattr(self, name)}: must be 0 or more, and finite.")
        if kl == "k1":
            raise InputError(
                "kl = 'k1': as a part of the loss it teaches nothing, since the mean of its gradient is 0. Take "
                "'k1_ratio' or 'k3_ratio', or have it in the reward."
            )
        if self.kl not in KL:
            raise InputError(f"kl = {self.kl!r}: must be one of {', '.join(KL)}.{did_you_mean(self.kl, KL)}")
        if kl is not None and not self.kl_coef:
            raise InputError(f"kl = {kl!r}: has no effect with kl_coef = 0. Set that, or leave it out.")
        if not 0 < self.top_entropy <= 1:
            raise InputError(f"top_entropy = {self.top_entropy}: must be above 0, and at most 1, which is all tokens.")
        if self.top_entropy < 1 and LOSSES[kind].rows:
            raise InputError(
                f"top_entropy = {self.top_entropy}: leaves tokens out, and an answer has one loss of kind = {kind!r}. "
                "Leave it out, or take kind = 'ppo' or 'gspo'."
            )
        if self.off_policy_mask is not None and not 0 < self.off_policy_mask < math.inf:
            raise InputError(f"off_policy_mask = {self.off_policy_mask}: must be above 0, and finite; or None.")


@dataclasses.dataclass(frozen=True)
class Ratios:
    """Against whom the policy is compared; see `make`."""

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
        if not (len(self.bounds) == 2 and 0 <= self.bounds[0] < self.bounds[1] < math.inf):
            raise InputError(f"bounds = {self.bounds}: must be (least, greatest) of a ratio, 0 or more and finite.")


class SampledTokens(NamedTuple):
    """The sampled tokens of a batch.

    Attributes:
      samples: as the loss sees them.
      sampler: log-probs that they were drawn with.
      entropy: of the policy where each was drawn.
    """

    samples: Samples
    sampler: Float[Array, "B T"]
    entropy: Float[Array, "B T"]


@dataclasses.dataclass(frozen=True)
class PolicyGradient:
    """A loss of the policy's own answers; see `make`."""

    kind: str
    options: Options
    shares: Averaging
    extras: Extras
    ratios: Ratios
    sampler: Sampler

    def check_old(self) -> None:
        """Raises InputError where nothing that is learned would be compared with the trainer as it was."""
        by_ratio = self.extras.kl_coef and not KL[self.extras.kl].on_policy
        if self.ratios.old == "trainer" and not (LOSSES[self.kind].ratio or by_ratio) and not self.ratios.corrects:
            raise InputError(
                f"old = 'trainer': kind = {self.kind!r} reads no ratio, so that it would only cost a pass. Leave it "
                "out, or set a correction, which weighs tokens by the ratio of trainer to sampler."
            )

    def check_sampler(self) -> None:
        """Raises InputError where a ratio would compare another distribution than the one that was sampled from."""
        against_sampler = {
            f"kind = {self.kind!r}": LOSSES[self.kind].ratio and self.ratios.old == "sampler",
            f"kl = {self.extras.kl!r}": self.extras.kl_coef
            and not KL[self.extras.kl].on_policy
            and self.ratios.old == "sampler",
            f"correction = {self.ratios.correction!r}": self.ratios.corrects,
            f"off_policy_mask = {self.extras.off_policy_mask}": self.extras.off_policy_mask is not None,
        }
        for what, reads in against_sampler.items():
            if reads and self.sampler.truncated:
                raise InputError(
                    f"{what}: compares the policy with what the answers were drawn from, and {self.sampler.truncated} "
                    "leaves tokens out of that. Sample from all tokens, or set old = 'trainer' without correction and "
                    "mask."
                )

    def objective(self) -> Objective:
        """This as an objective."""
        fields = ["tokens", "segment_ids", "positions", "loss_mask", "advantage", "sampler_log_prob"]
        fields += ["old_log_prob"] if self.ratios.old == "trainer" else []
        fields += ["reference_log_prob"] if self.extras.kl_coef else []
        gathers = self.extras.top_entropy < 1 or self.shares.aggregation == _BUDGET
        return Objective(
            loss=self.loss,
            fields=tuple(fields),
            gather=self.gather if gathers else None,
            bits_per_byte=False,
            notices=notices,
        )

    def gather(self, forward: Forward, batch: Batch) -> dict[str, Float[Array, "..."]]:
        """How many tokens of each row count; and, where only some are learned, their entropies, NaN elsewhere."""
        targets, mask = next_token_targets(batch, batch["loss_mask"])
        values = {"tokens": jnp.sum(mask, axis=1)}
        if self.extras.top_entropy < 1:
            values["entropies"] = jnp.where(mask > 0, self._log_probs(forward, targets).entropy, jnp.nan)
        return values

    def loss(self, forward: Forward, batch: Batch, context: Context) -> LossOut:
        """The weighted sum of the tokens' losses, and what it is divided by."""
        targets, mask = next_token_targets(batch, batch["loss_mask"])
        policy = self._log_probs(forward, targets)
        old = batch[_NAMES[self.ratios.old]]
        tokens = SampledTokens(
            Samples.of(policy.target, old, batch["advantage"], mask), batch["sampler_log_prob"], policy.entropy
        )
        out = LOSSES[self.kind].function(tokens.samples, self.options)
        weights, more = self._weights(tokens, context)
        values, count = out.values * weights, jnp.sum(mask)
        if self.extras.entropy_coef:
            learned = more.get("high_entropy", mask)
            values -= self.extras.entropy_coef * jnp.where(learned > 0, tokens.entropy, 0)
        if self.extras.kl_coef:
            reference = jnp.where(mask > 0, batch["reference_log_prob"], 0)
            log_ratio = tokens.samples.log_prob - tokens.samples.old
            kl = KL[self.extras.kl].function(tokens.samples.log_prob, reference, log_ratio)
            values += self.extras.kl_coef * kl
            more["kl"] = kl
        shares = self.shares.of(mask, batch, context)
        metrics = {
            name: (jax.lax.stop_gradient(jnp.sum(mask * x)), count)
            for name, x in (self._metrics(tokens, out) | more).items()
        }
        per_token = (jax.lax.stop_gradient(values), shares.weights)
        return LossOut(jnp.sum(shares.weights * values), shares.weight, metrics, per_token=per_token)

    def _log_probs(self, forward: Forward, targets: Int[Array, "B T"]) -> losses.LogProbs:
        """The policy's, of the distribution that answers are drawn from."""
        return losses.log_probs(
            forward.hidden(),
            forward.next_token_head(),
            targets,
            temperature=self.sampler.temperature,
            vocab_size=self.sampler.vocab_size,
            frozen_entropy=not self.extras.entropy_coef,
        )

    def _weights(
        self, tokens: SampledTokens, context: Context
    ) -> tuple[Float[Array, "B T"], dict[str, Float[Array, "B T"]]]:
        """What tokens count in the policy's loss, constants; and of that what is reported."""
        samples, parts = tokens.samples, {}
        if self.ratios.corrects:
            parts["correction"] = policy_losses.importance(
                samples.old,
                tokens.sampler,
                samples.mask,
                sequence=self.ratios.correction == "sequence",
                bounds=self.ratios.bounds,
                drop=self.ratios.drop,
            )
        if self.extras.off_policy_mask is not None:
            parts["near_policy"] = policy_losses.near_policy(samples, tokens.sampler, self.extras.off_policy_mask)
        if self.extras.top_entropy < 1:
            of_batch = context.gathered["entropies"]
            parts["high_entropy"] = policy_losses.high_entropy(tokens.entropy, of_batch, self.extras.top_entropy)
        return functools.reduce(jnp.multiply, parts.values(), samples.mask), parts

    def _metrics(self, tokens: SampledTokens, out: TokenLosses) -> dict[str, Float[Array, "B T"]]:
        """What is reported of each token."""
        metrics: dict[str, Any] = {"old_kl": -tokens.samples.log_ratio(), "entropy": tokens.entropy}
        if LOSSES[self.kind].ratio:
            metrics["ratio"] = out.ratio
        flags = {"clip_low": out.low, "clip_high": out.high, "clip_dual": out.dual}
        return metrics | {name: flag for name, flag in flags.items() if flag is not None}


def notices(metrics: Mapping[str, float], first: bool) -> dict[str, str]:
    """See Objective.notices."""
    ratio = metrics.get("ratio", 1.0)
    if not first or abs(ratio - 1) <= _OFF_START:
        return {}
    return {
        "ratio": f"the mean ratio to the policy that sampled is {ratio:.3g} before the first update, and would be 1: "
        "sampler and trainer don't give one answer the same probability. Compare their dtypes and temperatures, or set "
        "old = 'trainer' with correction = 'token'."
    }


def _options(kind: str, values: Mapping[str, float]) -> Options:
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
    if not 0 < options.clip_low <= most_low:
        raise InputError(f"clip_low = {options.clip_low}: must be above 0, and at most {most_low:g}.")
    for name in ("clip_high", "tau_pos", "tau_neg", "k_pos", "k_neg", "lambda_pos", "lambda_neg"):
        if not 0 < getattr(options, name) < math.inf:
            raise InputError(f"{name} = {getattr(options, name)}: must be above 0, and finite.")
    if options.dual_clip is not None and not 1 + options.clip_high < options.dual_clip < math.inf:
        raise InputError(
            f"dual_clip = {options.dual_clip}: must be above 1 + clip_high = {1 + options.clip_high:g}, and finite."
        )
    return options
