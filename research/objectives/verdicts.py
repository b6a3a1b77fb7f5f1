"""Losses of answers that are judged alone; see preference.py."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from research.objectives import answers
from research.objectives.answers import Places
from research.objectives.types import Batch, Context, Forward, LossOut, Objective
from research.ops import preferences
from research.ops.losses import TargetLogProbs
from research.ops.preferences import Options


@dataclasses.dataclass(frozen=True)
class Verdicts:
    """A loss of answers that are judged alone; see `make`, and Pairs for the attributes."""

    kind: str
    options: Options
    reference: str

    def objective(self) -> Objective:
        """This as an objective."""
        mismatched = ("mismatched",) if self.kind == "kto" else ()
        return Objective(
            loss=self.loss,
            fields=(*answers.TEXT, "desirable", *mismatched, *answers.cached_fields(self.reference)),
            frozen=("reference",) if self.reference == "role" else (),
            annotations={"kind": "reference"} if self.reference == "cached" else {},
            gather=self.gather if self.kind == "kto" else None,
            bits_per_byte=False,
            init_carry=lambda batch: answers.no_start(("desirable", "undesirable")),
            update=lambda carry, sums: answers.with_start(carry, sums, ("desirable", "undesirable")),
            notices=functools.partial(answers.notices, self.kind, self.options.beta),
        )

    def gather(self, forward: Forward, batch: Batch) -> Float[Array, "B 2"]:
        """Of each row: the sum of log-ratios of mismatched answers, and how many there are."""
        places, policy, reference = self._read(forward, batch)
        _, mismatched = verdicts(batch, places)
        ratios = places.sums(policy.target) - places.sums(reference)
        sums = jnp.sum(jnp.where(mismatched, ratios, 0.0), axis=1), jnp.sum(mismatched, axis=1).astype(ratios.dtype)
        return jnp.stack(sums, axis=1)

    def loss(self, forward: Forward, batch: Batch, context: Context) -> LossOut:
        """The sum over answers, and their number."""
        places, policy, reference = self._read(forward, batch)
        judged, _ = verdicts(batch, places)
        kl = jnp.zeros(())
        if self.kind == "kto":
            total, count = jnp.sum(context.gathered, axis=0)
            kl = jnp.maximum(total / jnp.maximum(count, 1.0), 0.0)
        said = policy.target, reference
        return self.of_answers(places, judged, kl, said, context, answers.is_synced(forward, self.reference))

    def _read(self, forward: Forward, batch: Batch) -> tuple[Places, TargetLogProbs, Float[Array, "B T"]]:
        places = answers.judged(forward, batch, self.reference)
        reference = answers.reference_log_probs(forward, batch, places, self.reference)
        return places, answers.log_probs(forward, places), reference

    def of_answers(
        self,
        places: Places,
        judged: Float[Array, "B N"],
        kl: Float[Array, ""],
        said: tuple[Float[Array, "B T"], Float[Array, "B T"]],
        context: Context,
        synced: bool = False,
    ) -> LossOut:
        """The loss, from what policy and reference say of each token.

        Args:
          places: of the answers.
          judged: 1 or 0 of each answer, -1 of none.
          kl: between policy and reference.
          said: by the two.
          context: of the loss.
          synced: the reference follows the policy.
        """
        present, desirable = judged >= 0, judged == 1
        log_probs, options = places.sums(said[0]), self.options
        ratios = jnp.where(present, log_probs - jax.lax.stop_gradient(places.sums(said[1])), 0.0)
        base = log_probs if synced else ratios
        values = jnp.where(present, preferences.kto(ratios, desirable, kl, options), 0.0)
        at_start = jnp.where(present, preferences.kto(jnp.zeros_like(ratios), desirable, 0.0, options), 0.0)
        count = jnp.sum(present).astype(jnp.float32)
        metrics = {"preference_loss": (jnp.sum(values), count), "start_loss": (jnp.sum(at_start), count)}
        sums = {}
        for name, which in (("desirable", desirable), ("undesirable", present & ~desirable)):
            number = jnp.sum(which).astype(jnp.float32)
            sums |= {name: jnp.sum(jnp.where(which, base, 0.0)), f"{name}_count": number}
            for metric, x in (
                ("reward", options.beta * ratios),
                ("log_prob", log_probs),
                ("length", places.lengths),
            ):
                metrics[f"{metric}_{name}"] = jnp.sum(jnp.where(which, x, 0.0)), number
        metrics |= answers.since_start(context.carry, sums, ("desirable", "undesirable"))
        metrics["desirable"] = sums["desirable_count"], count
        if self.kind == "kto":
            metrics["kl"] = kl * count, count
        weights = places.counted * places.spread(jnp.where(present, 1 / jnp.maximum(places.lengths, 1.0), 0.0))
        per_token = places.spread(values), weights
        return LossOut(jnp.sum(values), count, metrics, jax.lax.stop_gradient(sums), per_token)


def verdicts(batch: Batch, places: Places) -> tuple[Float[Array, "B N"], Bool[Array, "B N"]]:
    """Of each answer: 1 if it is desirable, 0 if it isn't, -1 where nothing is said of it or it is mismatched; and
    whether it is mismatched."""
    mismatched = jnp.zeros(places.lengths.shape, bool)
    if "mismatched" in batch:
        mismatched = places.sums(jnp.roll(batch["mismatched"], -1, axis=1).astype(jnp.float32)) > 0
    judged = places.sums((batch["desirable"] >= 0).astype(jnp.float32)) > 0
    desirable = places.sums((batch["desirable"] > 0).astype(jnp.float32)) > 0
    return jnp.where(judged & ~mismatched, desirable.astype(jnp.float32), -1.0), mismatched
