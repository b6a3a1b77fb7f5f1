"""Reinforcement learning: the policy's own answers become more probable the better they are than was to be expected."""

import dataclasses
import functools
import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from research import ranges
from research.errors import InputError, did_you_mean
from research.objectives.policy_options import BUDGET, Averaging, Extras, Ratios, Settings, loss_options
from research.objectives.types import Batch, Context, Forward, LossOut, Objective, Sampler, next_token_targets
from research.ops import losses, policy_losses
from research.ops.policy_losses import KL, LOSSES, Options, Samples, TokenLosses

_NAMES = {"sampler": "sampler_log_prob", "trainer": "old_log_prob"}
_OFF_START = 0.05  # so far from 1 the mean ratio of the first update may be


def make(**options: Any) -> Objective:
    """A loss of ops.policy_losses.LOSSES of the answers' tokens, plus the KL to the reference, less the entropy bonus.

    Args:
      options: see Settings.

    Raises:
      InputError: an option that isn't known, is out of its range, has no effect, or doesn't go with another.
    """
    settings = Settings(**options)
    ranges.check(settings)
    kind, kl = settings.kind, settings.kl
    if kind not in LOSSES:
        raise InputError(f"kind = {kind!r}: no such loss.{did_you_mean(kind, LOSSES)}")
    of_loss = loss_options(kind, settings.of_loss())
    shares = Averaging(
        LOSSES[kind].aggregation if settings.aggregation is None else settings.aggregation, settings.budget
    )
    shares.check(kind)
    extras = Extras(
        settings.kl_coef,
        "k3_ratio" if kl is None else kl,
        settings.entropy_coef,
        settings.top_entropy,
        settings.off_policy_mask,
    )
    extras.check(kind, kl)
    bounds = tuple(settings.bounds) if isinstance(settings.bounds, list | tuple) else (settings.bounds,)
    ratios = Ratios(settings.old, settings.correction, bounds, settings.drop)
    ratios.check(kind)
    policy_gradient = PolicyGradient(kind, of_loss, shares, extras, ratios, settings.sampler)
    policy_gradient.check_old()
    policy_gradient.check_sampler()
    return policy_gradient.objective()


# What a config may set, with its types: the fields of Settings.
make.__signature__ = inspect.signature(Settings)
make.__annotations__ = {field.name: field.type for field in dataclasses.fields(Settings)}


class Facts(NamedTuple):
    """What a batch says of its tokens; constants.

    Attributes:
      old: log-probs by the policy that ratios are against.
      sampler: log-probs that the tokens were drawn with.
      advantage: of each.
      mask: 1 at the tokens that count.
      reference: log-probs by the role `reference`; None where it isn't read.
      correction: what each token weighs for having been drawn by a sampler that isn't the trainer; None for 1.
    """

    old: Float[Array, "B T"]
    sampler: Float[Array, "B T"]
    advantage: Float[Array, "B T"]
    mask: Float[Array, "B T"]
    reference: Float[Array, "B T"] | None
    correction: Float[Array, "B T"] | None


@dataclasses.dataclass(frozen=True)
class PolicyGradient:
    """A loss of the policy's own answers; see `Settings`."""

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
        self._check_ahead()

    def _check_ahead(self) -> None:
        """Raises InputError where answers are an earlier policy's, and nothing corrects for that."""
        if not self.sampler.ahead:
            return
        against_sampler = self.ratios.old == "sampler"
        if self.ratios.correction == "none" and not (LOSSES[self.kind].ratio and against_sampler):
            what = f"kind = {self.kind!r}: has no ratio" if against_sampler else "old = 'trainer': isn't who answered"
            raise InputError(
                f"{what}, and with rollout.ahead = True the answers are an earlier policy's from the first update on. "
                "Take a kind with a ratio and old = 'sampler', or old = 'trainer' with a correction; or leave "
                "rollout.ahead out."
            )
        if self.extras.kl_coef and (KL[self.extras.kl].on_policy or not against_sampler):
            raise InputError(
                f"kl = {self.extras.kl!r}: has the right gradient only with the ratio to who answered, which with "
                "rollout.ahead = True is an earlier policy. Take kl = 'k3_ratio' or 'k1_ratio' with old = 'sampler', "
                "or leave rollout.ahead out."
            )

    def objective(self) -> Objective:
        """This as an objective."""
        fields = ["tokens", "segment_ids", "positions", "loss_mask", "advantage", "sampler_log_prob"]
        fields += ["old_log_prob"] if self.ratios.old == "trainer" else []
        fields += ["reference_log_prob"] if self.extras.kl_coef else []
        gathers = self.extras.top_entropy < 1 or self.shares.aggregation == BUDGET
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
        facts, shares = self._facts(batch, mask), self.shares.of(mask, batch, context)
        if self._by_token:
            args = (forward.hidden(), forward.next_token_head(), targets, shares.weights, facts)
            total, values, details = losses.sampled_loss(self._values, *args, **self._drawn())
        else:
            values, details = self._values(self._log_probs(forward, targets), facts, context)
            total = jnp.sum(shares.weights * values)
        values, details = jax.lax.stop_gradient((values, details))
        metrics = {name: (jnp.sum(mask * x), jnp.sum(mask)) for name, x in details.items()}
        return LossOut(total, shares.weight, metrics, per_token=(values, shares.weights))

    @property
    def _by_token(self) -> bool:
        """Whether the loss of a token reads nothing of what the policy makes of others."""
        whole = self.extras.top_entropy < 1 or self.extras.off_policy_mask is not None
        return LOSSES[self.kind].by_token and not whole

    def _drawn(self) -> dict[str, Any]:
        """Of which distribution log-probs are: that answers are drawn from."""
        return {
            "temperature": self.sampler.temperature,
            "vocab_size": self.sampler.vocab_size,
            "frozen_entropy": not self.extras.entropy_coef,
        }

    def _log_probs(self, forward: Forward, targets: Int[Array, "B T"]) -> losses.LogProbs:
        """The policy's."""
        return losses.log_probs(forward.hidden(), forward.next_token_head(), targets, **self._drawn())

    def _facts(self, batch: Batch, mask: Float[Array, "B T"]) -> Facts:
        """What the batch says."""
        old, sampler = batch[_NAMES[self.ratios.old]], batch["sampler_log_prob"]
        correction = None
        if self.ratios.corrects:
            correction = policy_losses.importance(
                jnp.where(mask > 0, old, 0),
                sampler,
                mask,
                sequence=self.ratios.correction == "sequence",
                bounds=self.ratios.bounds,
                drop=self.ratios.drop,
            )
        reference = batch["reference_log_prob"] if self.extras.kl_coef else None
        return Facts(old, sampler, batch["advantage"], mask, reference, correction)

    def _values(
        self, probs: losses.LogProbs, facts: Facts, context: Context | None = None
    ) -> tuple[Float[Array, "B T"], dict[str, Float[Array, "B T"]]]:
        """The loss of each token, and what is reported of it.

        Args:
          probs: of the policy; of a part of the tokens, where each token's loss is its own.
          facts: of these.
          context: where some tokens are left out.
        """
        mask, extras = facts.mask, self.extras
        samples = Samples.of(probs.target, facts.old, facts.advantage, mask)
        out = LOSSES[self.kind].function(samples, self.options)
        weights = self._weights(samples, probs.entropy, facts, context)
        values = out.values * functools.reduce(jnp.multiply, weights.values(), mask)
        if extras.entropy_coef:
            learned = weights.get("high_entropy", mask)
            values -= extras.entropy_coef * jnp.where(learned > 0, probs.entropy, 0)
        details = self._details(samples, probs.entropy, out) | weights
        if extras.kl_coef:
            reference = jnp.where(mask > 0, facts.reference, 0)
            details["kl"] = KL[extras.kl].function(samples.log_prob, reference, samples.log_prob - samples.old)
            values += extras.kl_coef * details["kl"]
        return values, details

    def _weights(
        self, samples: Samples, entropy: Float[Array, "B T"], facts: Facts, context: Context | None
    ) -> dict[str, Float[Array, "B T"]]:
        """What tokens count in the policy's loss, constants, by what it is for."""
        parts = {} if facts.correction is None else {"correction": facts.correction}
        if self.extras.off_policy_mask is not None:
            parts["near_policy"] = policy_losses.near_policy(samples, facts.sampler, self.extras.off_policy_mask)
        if self.extras.top_entropy < 1:
            of_batch = context.gathered["entropies"]
            parts["high_entropy"] = policy_losses.high_entropy(entropy, of_batch, self.extras.top_entropy)
        return parts

    def _details(
        self, samples: Samples, entropy: Float[Array, "B T"], out: TokenLosses
    ) -> dict[str, Float[Array, "B T"]]:
        """What is reported of each token."""
        details: dict[str, Any] = {"old_kl": -samples.log_ratio(), "entropy": entropy}
        if LOSSES[self.kind].ratio:
            details["ratio"] = out.ratio
        flags = {"clip_low": out.low, "clip_high": out.high, "clip_dual": out.dual}
        return details | {name: flag for name, flag in flags.items() if flag is not None}


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
