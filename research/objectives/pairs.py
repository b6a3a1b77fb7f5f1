"""Losses of pairs of answers; see preference.py."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from research import ranges
from research.errors import InputError, did_you_mean
from research.objectives import answers
from research.objectives.answers import SIDES, Places
from research.objectives.types import Batch, Context, Forward, LossOut, Objective
from research.ops import preferences
from research.ops.losses import TargetLogProbs
from research.ops.preferences import DIVERGENCES, LOSSES, Options
from research.ranges import NotNegative, Share


@dataclasses.dataclass(frozen=True)
class Shaping:
    """How log-probabilities become scores; see `make` for each."""

    divergence: str = "reverse_kl"
    divergence_alpha: NotNegative | None = None
    length_normalized: bool = False
    ld_alpha: Share | None = None
    wpo: bool = False

    def check(self, kind: str) -> None:
        """Raises InputError where one is out of its range, or a loss doesn't take it."""
        ranges.check(self)
        loss = LOSSES[kind]
        if self.divergence not in DIVERGENCES:
            raise InputError(
                f"divergence = {self.divergence!r}: no such choice.{did_you_mean(self.divergence, DIVERGENCES)}"
            )
        if self.divergence_alpha is not None and self.divergence != "alpha":
            raise InputError(
                f"divergence_alpha = {self.divergence_alpha}: is of divergence = 'alpha'. Leave it out of "
                f"{self.divergence!r}."
            )
        shaped = [other for other, row in LOSSES.items() if row.divergence]
        summed = [other for other, row in LOSSES.items() if row.reference and not (row.labels or row.mean)]
        weighted = [other for other, row in LOSSES.items() if not (row.labels or row.matched)]
        for name, taken, kinds in (
            ("divergence", self.divergence != "reverse_kl", shaped),
            ("length_normalized", self.length_normalized, [other for other in shaped if not LOSSES[other].mean]),
            ("ld_alpha", self.ld_alpha is not None, summed),
            ("wpo", self.wpo, weighted),
        ):
            if taken and kind not in kinds:
                why = " (its scores are means already)" if name == "length_normalized" and loss.mean else ""
                raise InputError(
                    f"{name} = {getattr(self, name)!r}: isn't of kind = {kind!r}{why}. Leave it out, or use one of "
                    f"{', '.join(kinds)}."
                )


class Tables(NamedTuple):
    """What a batch's pairs are to a loss. The last axis has the chosen answer and the rejected one.

    Attributes:
      scores: what the loss reads; -1 where there is no pair, which any loss can take.
      policy, reference: log-probabilities, as `ld_alpha` weights them; without a reference the latter are 0.
      log_probs: log-probabilities of the policy.
      lengths: tokens of each answer.
      present: whether there is a pair.
      weights: of wpo; else 1. 0 where there is no pair.
    """

    scores: Float[Array, "B P 2"]
    policy: Float[Array, "B P 2"]
    reference: Float[Array, "B P 2"]
    log_probs: Float[Array, "B P 2"]
    lengths: Float[Array, "B P 2"]
    present: Bool[Array, "B P"]
    weights: Float[Array, "B P"]


@dataclasses.dataclass(frozen=True)
class Pairs:
    """A loss of pairs; see `make`.

    Attributes:
      kind: of LOSSES.
      options: of the loss.
      reference: "role", "cached", or "" for none.
      shaping: how scores come about.
      shift_decay: of bco.
      sft: weight of the chosen answers' cross-entropy.
    """

    kind: str
    options: Options
    reference: str
    shaping: Shaping = Shaping()
    shift_decay: float = 1.0
    sft: float = 0.0

    @property
    def row(self) -> preferences.Loss:
        """Of LOSSES."""
        return LOSSES[self.kind]

    def objective(self) -> Objective:
        """This as an objective."""
        return Objective(
            loss=self.loss,
            fields=(*answers.TEXT, "pair", "side", *answers.cached_fields(self.reference)),
            frozen=("reference",) if self.reference == "role" else (),
            annotations={"kind": "reference"} if self.reference == "cached" else {},
            gather=self.gather if self.sft or self.row.matched else None,
            bits_per_byte=False,
            init_carry=lambda batch: answers.no_start(("chosen", "rejected", "shift")),
            update=self.update,
            notices=functools.partial(answers.notices, self.kind, self.options.beta),
        )

    def loss(self, forward: Forward, batch: Batch, context: Context) -> LossOut:
        """The sum over pairs, and their number."""
        places, policy, reference = self._read(forward, batch)
        out = self.of_answers(places, policy, reference, context, answers.is_synced(forward, self.reference))
        unused = jnp.sum((batch["side"] >= SIDES) & (batch["positions"] == 0)).astype(jnp.float32)
        documents = jnp.sum((batch["side"] >= 0) & (batch["positions"] == 0)).astype(jnp.float32)
        return out._replace(metrics=out.metrics | {"unused": (unused, documents)})

    def gather(self, forward: Forward, batch: Batch) -> dict[str, Array]:
        """Of each row: how many pairs and tokens of chosen answers there are, and what is matched over the batch."""
        if not self.row.matched:
            return _counts(_by_side(answers.compared(forward, batch, self.reference).lengths))
        return self.gathered(self.tables(*self._read(forward, batch)))

    def gathered(self, tables: Tables) -> dict[str, Array]:
        """The same, from tables."""
        if not self.row.matched:
            return _counts(tables.lengths)
        values, others = self._matched(tables)
        return {**_counts(tables.lengths), "values": values, "others": others, "present": tables.present}

    def update(self, carry: dict[str, Array], sums: dict[str, Array]) -> dict[str, Array]:
        """The next carry, from sums over the pairs of a batch."""
        shift = sums["rewards"] / jnp.maximum(sums["count"], 1.0)
        shift = self.shift_decay * carry["shift"] + (1 - self.shift_decay) * shift
        return {**answers.with_start(carry, sums, ("chosen", "rejected")), "shift": shift}

    def _read(self, forward: Forward, batch: Batch) -> tuple[Places, TargetLogProbs, Float[Array, "B T"] | None]:
        places = answers.compared(forward, batch, self.reference)
        policy = answers.log_probs(forward, places, collision=self.shaping.wpo)
        return places, policy, answers.reference_log_probs(forward, batch, places, self.reference)

    def of_answers(
        self,
        places: Places,
        policy: TargetLogProbs,
        reference: Float[Array, "B T"] | None,
        context: Context,
        synced: bool = False,
    ) -> LossOut:
        """The loss, from what policy and reference say of each token. `synced`: the reference follows the policy."""
        tables = self.tables(places, policy, reference)
        values = jnp.where(tables.present, self._values(tables, context) * tables.weights, 0.0)
        loss_sum, count = jnp.sum(values), jnp.sum(tables.present).astype(jnp.float32)
        metrics = {"preference_loss": (loss_sum, count)}
        if self.row.at_start is not None:
            metrics["start_loss"] = self.row.at_start(self.options) * jnp.sum(tables.weights), count
        if self.sft:
            # Its divisor is another than the pairs': the tokens of chosen answers in the whole batch.
            nll = -tables.log_probs[:, :, 0]
            share = jnp.sum(context.gathered["pairs"]) / jnp.maximum(jnp.sum(context.gathered["tokens"]), 1.0)
            values += self.sft * share * nll
            loss_sum += self.sft * share * jnp.sum(nll)
            metrics["sft_nll"] = jnp.sum(nll), jnp.sum(tables.lengths[:, :, 0])
        rewards = self._rewards(tables)
        base = tables.policy - tables.reference if self.row.reference and not synced else tables.log_probs
        sums = {"chosen": jnp.sum(base[:, :, 0]), "rejected": jnp.sum(base[:, :, 1]), "count": count}
        hashes = _by_side(places.hashes())
        same = (hashes[:, :, 0] == hashes[:, :, 1]) & (tables.lengths[:, :, 0] == tables.lengths[:, :, 1])
        metrics |= _pair_metrics(tables, rewards) | answers.since_start(context.carry, sums, ("chosen", "rejected"))
        metrics["identical"] = jnp.sum(same & tables.present).astype(jnp.float32), count
        if self.kind == "bco":
            metrics["shift"] = context.carry["shift"] * count, count
        sums["rewards"] = jnp.sum(rewards) / SIDES
        each = jnp.repeat(values[:, :, None], SIDES, axis=2).reshape(values.shape[0], -1)
        weights = places.counted * places.spread(_share(places.lengths, tables.present))
        return LossOut(loss_sum, count, metrics, jax.lax.stop_gradient(sums), (places.spread(each), weights))

    def tables(self, places: Places, policy: TargetLogProbs, reference: Float[Array, "B T"] | None) -> Tables:
        """From what policy and reference say of each token."""
        lengths = _by_side(places.lengths)
        present = jnp.all(lengths > 0, axis=2)
        log_probs = _by_side(places.sums(policy.target))
        weigh = self._token_weights(places, lengths)
        sums = _by_side(places.sums(policy.target * weigh))
        reference_sums = jnp.zeros_like(sums) if reference is None else _by_side(places.sums(reference * weigh))
        reference_sums = jax.lax.stop_gradient(reference_sums)
        alpha = 0.5 if self.shaping.divergence_alpha is None else self.shaping.divergence_alpha
        scores = preferences.shape(sums - reference_sums, self.shaping.divergence, alpha)
        if self.row.mean or self.shaping.length_normalized:
            scores = scores / jnp.maximum(lengths, 1.0)
        there = present[:, :, None]
        weights = present.astype(jnp.float32)
        if self.shaping.wpo:
            aligned = _by_side(places.sums(policy.target - policy.collision)) / jnp.maximum(lengths, 1.0)
            weights *= jax.lax.stop_gradient(jnp.exp(jnp.sum(jnp.where(there, aligned, 0.0), axis=2)))
        cleared = (jnp.where(there, x, 0.0) for x in (sums, reference_sums, log_probs, lengths))
        return Tables(jnp.where(there, scores, -1.0), *cleared, present, weights)

    def _token_weights(self, places: Places, lengths: Float[Array, "B P 2"]) -> Float[Array, "B T"] | float:
        if self.shaping.ld_alpha is None:
            return 1.0
        shared = jnp.broadcast_to(jnp.min(lengths, axis=2, keepdims=True), lengths.shape)
        is_shared = places.order <= places.spread(shared.reshape(shared.shape[0], -1))
        return jnp.where(is_shared, 1.0, self.shaping.ld_alpha)

    def _values(self, tables: Tables, context: Context) -> Float[Array, "B P"]:
        """The losses of the pairs, without weights."""
        chosen, rejected, function = tables.scores[:, :, 0], tables.scores[:, :, 1], self.row.function
        if self.kind == "bco":
            return function(chosen, rejected, self.options, context.carry["shift"])
        if not self.row.matched:
            return function(chosen, rejected, self.options)
        of_batch = [context.gathered[name].reshape(-1) for name in ("values", "others", "present")]
        pairs = chosen.shape[1]
        index = context.rows[:, None] * pairs + jnp.arange(pairs, dtype=context.rows.dtype)[None]
        values, others = self._matched(tables)
        first = function(values, preferences.partners(*of_batch, index), self.options)
        if self.kind == "aot":  # the reference's numbers are constants
            return first
        of_batch[:2] = of_batch[1::-1]
        second = function(preferences.partners(*of_batch, index), others, self.options)
        # Each matched couple is there twice, once for the gradient of either side.
        return first + second - jax.lax.stop_gradient(first + second) / 2

    def _matched(self, tables: Tables) -> tuple[Float[Array, "B P"], Float[Array, "B P"]]:
        """The numbers that are matched by rank over the whole batch."""
        if self.kind == "aot":
            return tuple(x[:, :, 0] - x[:, :, 1] for x in (tables.policy, tables.reference))
        return tables.scores[:, :, 0], tables.scores[:, :, 1]

    def _rewards(self, tables: Tables) -> Float[Array, "B P 2"]:
        """The implicit rewards; without a reference beta times the scores."""
        scores = tables.policy - tables.reference if self.row.reference else tables.scores
        return jax.lax.stop_gradient(self.options.beta * jnp.where(tables.present[:, :, None], scores, 0.0))


def _by_side(values: Array) -> Array:
    """[B, N] -> [B, P, 2]."""
    return values.reshape(values.shape[0], -1, SIDES)


def _counts(lengths: Float[Array, "B P 2"]) -> dict[str, Float[Array, " B"]]:
    """Of each row: how many pairs there are, and how many tokens of chosen answers."""
    present = jnp.all(lengths > 0, axis=2)
    tokens = jnp.sum(jnp.where(present, lengths[:, :, 0], 0.0), axis=1)
    return {"pairs": jnp.sum(present, axis=1).astype(tokens.dtype), "tokens": tokens}


def _share(lengths: Float[Array, "B N"], present: Bool[Array, "B P"]) -> Float[Array, "B N"]:
    """What each token of an answer weighs, so that the tokens of a pair weigh 1."""
    there = jnp.repeat(present, SIDES, axis=1)
    return jnp.where(there, 1 / (SIDES * jnp.maximum(lengths, 1.0)), 0.0)


def _pair_metrics(tables: Tables, rewards: Float[Array, "B P 2"]) -> dict[str, tuple[Array, Array]]:
    count = jnp.sum(tables.present).astype(jnp.float32)
    margins = rewards[:, :, 0] - rewards[:, :, 1]
    metrics = {
        "accuracy": (jnp.sum((margins > 0) & tables.present).astype(jnp.float32), count),
        "margin": (jnp.sum(margins), count),
    }
    for name, values in (("reward", rewards), ("log_prob", tables.log_probs), ("length", tables.lengths)):
        for side, answer in enumerate(("chosen", "rejected")):
            metrics[f"{name}_{answer}"] = jnp.sum(values[:, :, side]), count
    return metrics
