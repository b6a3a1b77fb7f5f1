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
