"""Reward models: one number for an answer, learned from which answers people preferred, or from scores."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Annotated, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from research.errors import InputError, did_you_mean
from research.objectives.classes import class_logits
from research.objectives.types import Batch, Context, Forward, LossOut, Objective
from research.ops import rewards
from research.ops.rewards import Answers
from research.ranges import NotNegative, Part, Range

_OFF_START = 0.1
_TEXT = ("tokens", "segment_ids", "positions")
FIELDS = (*_TEXT, "pair", "side")  # by which compared answers are known
LOSSES = ("bradley_terry", "plackett_luce", "regression")


def make(
    loss: str = "bradley_terry",
    margin: bool = False,
    centering: NotNegative = 0.0,
    label_smoothing: Annotated[float, Range(0, below=0.5)] = 0.0,
    flipped: Annotated[float, Range(0, below=0.5)] = 0.0,
    share: Part = 1.0,
) -> Objective:
    """Mean loss over the comparisons of a batch, or over its scores. The reward of an answer is the logit at its last
    token, of a head with one (model.num_labels = 1). A head with several is an ensemble, whose reward is their mean.

    Args:
      loss: "bradley_terry" of each pair of answers of which one was preferred; "plackett_luce" of whole rankings;
        "regression" on the scores of answers, by the squared error. See ops.rewards.
      margin: of "bradley_terry": the reward of the preferred answer is to be higher by the data's margin.
      centering: the weight of the squared sum of two compared rewards.
      label_smoothing: of "bradley_terry", in [0, 0.5): how likely a preference is the wrong way round.
      flipped: of "bradley_terry", in [0, 0.5): the share of preferences that are the wrong way round, as a part of the
        model of them; the metrics are those of this model.
      share: the share of the comparisons, or scores, that each member of an ensemble learns from: its own, the same
        ones in each epoch.

    Raises:
      InputError: an option out of its range, or one that the loss hasn't.
    """
    if loss not in LOSSES:
        raise InputError(f"loss = {loss!r}: no such loss.{did_you_mean(loss, LOSSES)}")
    if flipped and label_smoothing:
        raise InputError(f"flipped = {flipped}, and label_smoothing = {label_smoothing}: give one of them.")
    others = (
        {"margin": margin, "label_smoothing": label_smoothing, "flipped": flipped} if loss != "bradley_terry" else {}
    )
    others |= {"centering": centering} if loss == "regression" else {}
    for name, value in others.items():
        if value:
            raise InputError(f"{name} = {value}: loss = {loss!r} has no such option. Leave it out.")
    return Reward(loss, margin, centering, label_smoothing, flipped, share).objective()


class Read(NamedTuple):
    """The rewards of a batch.

    Attributes:
      answers: where they are.
      rewards: of each member.
      weights: 1 where a member learns from an answer, else 0.
    """

    answers: Answers
    rewards: Float[Array, "B S M"]
    weights: Float[Array, "B S M"]


def read(forward: Forward, batch: Batch, share: float = 1.0) -> Read:
    """The policy's rewards of the batch's answers; where no answers are compared, of its documents.

    Args:
      forward, batch: see Objective.loss.
      share: see `make`.

    Raises:
      InputError: its head predicts tokens; or `share` is of an ensemble, and there is none.
    """
    if not forward.models["policy"].config.num_labels:
        raise InputError(
            "model.num_labels = 0: the model's head predicts tokens, and a reward is one number. Set it to 1, or "
            "to the number of an ensemble's members."
        )
    logits = class_logits(forward)
    members = logits.shape[-1]
    if share < 1 and members < 2:
        raise InputError(
            f"share = {share}: is of an ensemble, and the model has one reward. Set model.num_labels to the "
            "number of members, or leave it out."
        )
    text = (batch[name] for name in _TEXT)
    none = jnp.zeros_like(batch["tokens"])
    answers = rewards.find_answers(*text, batch.get("pair", none), batch.get("side", none - 1))
    learned = jnp.ones((*answers.at.shape, members), jnp.float32)
    if share < 1:
        learned = answers.members(members, share)
    return Read(answers, answers.read(logits), learned)


Sums = dict[str, tuple[Float[Array, "..."], Float[Array, ""]]]


@dataclasses.dataclass(frozen=True)
class Reward:
    """The losses of a reward model. The attributes are the options of `make`."""

    kind: str
    margin: bool
    centering: float
    label_smoothing: float
    flipped: float
    share: float

    def objective(self) -> Objective:
        """This as an objective."""
        compared = () if self.kind == "regression" else ("pair", "side")
        graded = ("score",) if self.kind == "regression" else ("margin",) if self.margin else ()
        warnings = None if self.kind == "regression" else notices
        return Objective(loss=self.loss, fields=(*_TEXT, *compared, *graded), notices=warnings, labels=1)

    def loss(self, forward: Forward, batch: Batch, context: Context) -> LossOut:
        of_batch = read(forward, batch, self.share)
        return self._regression(of_batch, batch) if self.kind == "regression" else self._preference(of_batch, batch)

    def _preference(self, read: Read, batch: Batch) -> LossOut:
        """The loss of comparisons, each of which counts as one."""
        pairs, answers = _Pairs.of(read), read.answers
        if self.kind == "bradley_terry":
            margin = answers.read(batch["margin"])[:, :, None, None] if self.margin else 0.0
            options = {"label_smoothing": self.label_smoothing, "flipped": self.flipped}
            each = rewards.bradley_terry(pairs.chosen, pairs.rejected, margin, **options)
            losses, weights = pairs.sum(each, read.weights), jnp.sum(pairs.weights, axis=2)
        else:
            each = rewards.plackett_luce(read.rewards, answers.not_better())
            losses = jnp.where(answers.decided(), jnp.mean(read.weights * each, axis=-1), 0)
            weights = jnp.where(answers.decided(), 1 / jnp.maximum(answers.rivals(), 1).astype(jnp.float32), 0)
        weights = weights * jnp.mean(read.weights, axis=-1)
        weight, metrics = jnp.sum(weights), pairs.metrics(self.flipped)
        if self.centering:
            squares = self.centering * pairs.sum(rewards.centering(pairs.chosen, pairs.rejected), read.weights)
            losses = losses + squares
            metrics["centering"] = jnp.sum(squares), weight
        values = losses / jnp.where(weights > 0, weights, 1)
        T = batch["tokens"].shape[1]
        return LossOut(jnp.sum(losses), weight, metrics, per_token=(answers.put(values, T), answers.put(weights, T)))

    def _regression(self, read: Read, batch: Batch) -> LossOut:
        """The squared error of scores; where answers are compared too, the metrics say how these go."""
        answers, score = read.answers, read.answers.read(batch["score"])
        scored = answers.real & ~jnp.isnan(score)
        error = jnp.where(scored[..., None], read.rewards - jnp.where(scored, score, 0)[..., None], 0)
        weights = jnp.where(scored, jnp.mean(read.weights, axis=-1), 0)
        losses = jnp.mean(read.weights * jnp.square(error), axis=-1)
        count, mean = jnp.sum(scored).astype(jnp.float32), jnp.mean(error, axis=-1)
        sums = {"squared_error": jnp.square(mean), "absolute_error": jnp.abs(mean)}
        sums["reward"] = jnp.where(scored, jnp.mean(read.rewards, axis=-1), 0)
        if read.rewards.shape[-1] > 1:
            sums["spread_of_rewards"] = jnp.std(error, axis=-1)
        metrics: Sums = {name: (jnp.sum(value), count) for name, value in sums.items()}
        if "pair" in batch:
            metrics |= _Pairs.of(read).metrics()
        values, T = losses / jnp.where(weights > 0, weights, 1), batch["tokens"].shape[1]
        return LossOut(
            jnp.sum(losses), jnp.sum(weights), metrics, per_token=(answers.put(values, T), answers.put(weights, T))
        )


def notices(metrics: Mapping[str, float], first: bool) -> dict[str, str]:
    """See Objective.notices: of a new head that doesn't begin near 0, and of answers that are one."""
    lines, loss = {}, metrics.get("log_loss", math.log(2))
    if first and abs(loss - math.log(2)) > _OFF_START * math.log(2):
        lines["start"] = (
            f"-log sigmoid of the difference of rewards begins at {loss:.4g}, and a new head has ln 2 = 0.6931, since "
            "its rewards are all about equal. That is right where model.init_from names a reward model; else lower "
            "model.init_std."
        )
    if metrics.get("identical"):
        lines["identical"] = (
            f"{metrics['identical']:.1%} of the compared answers are one and the same: nothing is learned from them."
        )
    return lines


class _Pairs(NamedTuple):
    """Preferred answers and those they were preferred to.

    Attributes:
      chosen, rejected: their rewards.
      weights: see Answers.pair_weights.
      lengths: by how many tokens the preferred one is longer.
      identical: whether both are one answer.
    """

    chosen: Float[Array, "B S 1 M"]
    rejected: Float[Array, "B 1 S M"]
    weights: Float[Array, "B S S"]
    lengths: Int[Array, "B S S"]
    identical: Bool[Array, "B S S"]

    @classmethod
    def of(cls, read: Read) -> "_Pairs":
        lengths, hashes = read.answers.lengths, read.answers.hashes
        return cls(
            read.rewards[:, :, None],
            read.rewards[:, None],
            read.answers.pair_weights(),
            lengths[:, :, None] - lengths[:, None],
            hashes[:, :, None] == hashes[:, None],
        )

    def sum(self, values: Float[Array, "B S S M"], members: Float[Array, "B S M"]) -> Float[Array, "B S"]:
        """Over the pairs that each answer wins, of what the members learn from; of the members the mean."""
        weights = self.weights[..., None] * members[:, :, None]
        return jnp.sum(jnp.where(weights > 0, weights * values, 0), axis=(2, 3)) / members.shape[-1]

    def metrics(self, flipped: float = 0.0) -> Sums:
        """Of the ensemble's mean reward, over all comparisons: `accuracy`, also of those in which the longer answer was
        preferred and of those in which the shorter was; `log_loss`, -log p of the preferences; `margin`, the
        difference, `chosen` and `rejected`; `identical`, the share with one answer on both sides; `calibration_error`;
        of several members `agreement` and the standard deviation of their margins, `spread`."""
        weights, each = self.weights, self.chosen - self.rejected
        difference = jnp.mean(each, axis=-1)
        count, correct = jnp.sum(weights), rewards.right(difference)
        sums = {
            "accuracy": correct,
            "margin": difference,
        }
        sums["log_loss"] = rewards.bradley_terry(difference, jnp.zeros_like(difference), flipped=flipped)
        sums["identical"] = self.identical.astype(jnp.float32)
        sums |= {"chosen": jnp.mean(self.chosen, axis=-1), "rejected": jnp.mean(self.rejected, axis=-1)}
        if each.shape[-1] > 1:
            sums |= {"agreement": rewards.agreement(each), "spread": jnp.std(each, axis=-1)}
        metrics: Sums = {name: (jnp.sum(weights * value), count) for name, value in sums.items()}
        for name, here in (("longer", self.lengths > 0), ("shorter", self.lengths < 0)):
            own = jnp.where(here, weights, 0)
            metrics[f"accuracy_where_{name}_wins"] = jnp.sum(own * correct), jnp.sum(own)
        return metrics | {"calibration_error": (rewards.calibration_sums(difference, weights, flipped), count)}
