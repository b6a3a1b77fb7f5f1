"""Weak-to-strong generalisation: a classifier, or a reward model, learns from a weaker one's labels, and isn't to copy
its mistakes.

Burns et al., arXiv:2312.09390. The losses and their sources are in ops/class_losses.py. The class of a pair of answers
is which of them is the better one.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from research import options as option_types
from research import ranges
from research.errors import InputError, did_you_mean
from research.objectives import classify, reward
from research.objectives.classify import HEADS, Predictions
from research.objectives.types import Batch, Context, Forward, LossOut, Objective
from research.ops import class_losses
from research.ops.class_losses import RunningThresholds, ThresholdSums
from research.ranges import Count, Fraction, Part, Positive, Range, Share
from research.sources.tokenizers import Tokenizer

_NAMES = {"accuracy": "agreement"}  # labels are the weaker model's: who predicts them agrees, and may be wrong
OWN_LABELS = ("batch", "running", "argmax", "soft")
PAIRS = "pairs"
_OF_FREQUENCIES = {"own_labels": ("batch", "running"), "balance": (True,)}


def make(
    loss: str = "cross_entropy",
    head: str = "linear",
    words: Sequence[str] = (),
    tokenizer: Tokenizer | None = None,
    **options: Any,
) -> Objective:
    """Mean loss over the documents with a label; weak labels come with the batch (`label_probs`, as in classify). Of
    pairs it is the mean over pairs, and the weak label how probably the chosen answer is the better one (`preference`).

    Args:
      loss: one of LOSSES.
      head: see classify; or "pairs": the logits are the rewards of two answers, as the objective reward reads them, so
        that the first is the better one with the probability sigmoid of their difference.
      words: see classify.
      tokenizer: the run's.
      options: of the loss: the fields of its class in LOSSES, which has their defaults.

    Raises:
      InputError: an option that isn't known, isn't the loss's, or is out of its range.
    """
    if loss not in LOSSES:
        raise InputError(f"loss = {loss!r}: no such loss.{did_you_mean(str(loss), LOSSES)}")
    if head not in (*HEADS, PAIRS):
        raise InputError(f"head = {head!r}: no such head.{did_you_mean(str(head), (*HEADS, PAIRS))}")
    _check_options(loss, options)
    if head == PAIRS:
        if words:
            raise InputError(f"head = 'pairs' with words = {list(words)}: words are for head = 'words'.")
        kind = LOSSES[loss](**_of_pairs(loss, options))
        return WeakToStrong(kind, read_pairs, (*reward.FIELDS, "preference"), labels=1).objective()
    return WeakToStrong(LOSSES[loss](**options), classify.make_reader(head, words, tokenizer)).objective()


def read_pairs(forward: Forward, batch: Batch) -> Predictions:
    """The compared answers: two classes, of which the first is that the chosen answer is the better one. The logits are
    the rewards of both. The axes are those of Answers.better, and the weights Answers.pair_weights.

    Raises:
      InputError: the policy's head doesn't give one number.
    """
    read = reward.read(forward, batch)
    members = read.rewards.shape[-1]
    if members > 1:
        raise InputError(f"model.num_labels = {members}: head = 'pairs' is about one reward. Set it to 1.")
    scores = read.rewards[..., 0]
    logits = jnp.stack(jnp.broadcast_arrays(scores[:, :, None], scores[:, None]), axis=-1)
    better = jnp.broadcast_to(read.answers.read(batch["preference"])[:, :, None], logits.shape[:-1])
    return Predictions(logits, jnp.stack([better, 1 - better], axis=-1), read.answers.pair_weights())


def _of_pairs(loss: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a loss of pairs.

    Raises:
      InputError: one is about how frequent classes are. Which answer of a pair stands first says nothing, so that
        either class is as frequent as the other, and a threshold that makes it so is at a probability of 1/2.
    """
    for name, values in _OF_FREQUENCIES.items():
        if options.get(name) in values:
            raise InputError(
                f"{name} = {options[name]!r}: is about how frequent classes are, and of pairs either answer is as "
                "likely to be the better one. Leave it out: own labels are hardened at a probability of 1/2."
            )
    of_own = loss == AuxiliaryConfidence.name
    return ({"own_labels": "argmax"} if of_own else {}) | dict(options)


class Result(NamedTuple):
    """What a loss makes of a batch.

    Attributes:
      loss_sum: over the labelled documents, or over the pairs.
      metrics: name -> values at each of them, or one for all; reported as means over them.
      statistics: see LossOut.
    """

    loss_sum: Float[Array, ""]
    metrics: Mapping[str, Float[Array, "..."]]
    statistics: Any = ()


@dataclasses.dataclass(frozen=True)
class Loss:
    """A loss of ops.class_losses, which says what it is, by the same name. Its fields are its options."""

    name: ClassVar[str]

    def __call__(self, read: Predictions, context: Context) -> Result:
        return Result(getattr(class_losses, self.name)(*read, **dataclasses.asdict(self)), {})

    def gathers(self) -> bool:
        """Whether `gather` says anything, and context.gathered has it."""
        return False

    def gather(self, read: Predictions) -> Any:
        """What the loss must know of all rows."""
        return ()


@dataclasses.dataclass(frozen=True)
class CrossEntropy(Loss):
    name = "cross_entropy"
    label_smoothing: Fraction = 0.0


@dataclasses.dataclass(frozen=True)
class HardCrossEntropy(Loss):
    name = "hard_cross_entropy"


@dataclasses.dataclass(frozen=True)
class ForwardKL(Loss):
    name = "forward_kl"


@dataclasses.dataclass(frozen=True)
class ReverseKL(Loss):
    name = "reverse_kl"
    log_zero: Annotated[float, Range(below=0)] = class_losses.LOG_ZERO


@dataclasses.dataclass(frozen=True)
class ReverseCrossEntropy(Loss):
    name = "reverse_cross_entropy"
    log_zero: Annotated[float, Range(below=0)] = class_losses.LOG_ZERO


@dataclasses.dataclass(frozen=True)
class SymmetricCrossEntropy(Loss):
    name = "symmetric_cross_entropy"
    alpha: Positive = 0.1
    beta: Positive = 1.0
    log_zero: Annotated[float, Range(below=0)] = class_losses.LOG_ZERO


@dataclasses.dataclass(frozen=True)
class ProductOfConfidence(Loss):
    name = "product_of_confidence"
    alpha: Positive = 1.0
    beta: Positive = 1.0


@dataclasses.dataclass(frozen=True)
class ConfidenceWindow(Loss):
    name = "confidence_window"
    radius: Positive = 0.15


@dataclasses.dataclass(frozen=True)
class AdaptiveConfidence(Loss):
    name = "adaptive_confidence"
    scale: Positive = 1.0
    temperature: Positive = 1.0


@dataclasses.dataclass(frozen=True)
class AugmentedConfidence(Loss):
    """`coefficient` is the weight of the model's own predictions, after `warmup_steps` in which it rises from 0 (an
    evaluation is at step 0)."""

    name = "augmented_confidence"
    coefficient: Share = 0.5
    warmup_steps: Count = 0
    temperature: Positive = 1.0

    def __call__(self, read: Predictions, context: Context) -> Result:
        coefficient = class_losses.warmup(context.step, self.coefficient, self.warmup_steps)
        total = class_losses.augmented_confidence(*read, coefficient=coefficient, temperature=self.temperature)
        return Result(total, {"coefficient": coefficient})


@dataclasses.dataclass(frozen=True)
class Bootstrap(Loss):
    """`coefficient` is 1 - beta of the paper, whose values are 0.05, and 0.2 where `hard`: own labels are then the most
    likely classes. It rises from 0 over `warmup_steps`."""

    name = "bootstrap"
    coefficient: Share = 0.05
    warmup_steps: Count = 0
    hard: bool = False

    def __call__(self, read: Predictions, context: Context) -> Result:
        function = class_losses.auxiliary_confidence if self.hard else class_losses.bootstrap
        coefficient = class_losses.warmup(context.step, self.coefficient, self.warmup_steps)
        return Result(function(*read, coefficient=coefficient), {"coefficient": coefficient})


@dataclasses.dataclass(frozen=True)
class AuxiliaryConfidence(Loss):
    """Cross-entropy with weak labels and the model's own.

    Attributes:
      coefficient: the weight of own labels, after `warmup_steps` in which it rises from 0.
      warmup_steps: see coefficient.
      own_labels: how predictions become labels: hardened so that classes are as frequent as in the weak labels, with
        thresholds from the "batch" (as published) or "running" ones, which follow from step to step; hardened without
        thresholds ("argmax"); or as they are ("soft").
      rate: of the running thresholds, by how much they move in a step at most. They must move faster than the model's
        probabilities do: where they lag, all own labels are of one class, which drives the model further there, and it
        swings from class to class (metric own_class_0 against weak_class_0).
      balance: weak labels are shifted so that no class of the batch is favoured, and thresholds made for classes of
        equal frequency.
    """

    name = "auxiliary_confidence"
    coefficient: Share = 0.5
    warmup_steps: Count = 0
    own_labels: str = "batch"
    rate: Part = 0.3
    balance: bool = False

    def __call__(self, read: Predictions, context: Context) -> Result:
        logits, labels, weights = read
        weak = self.balanced(labels, weights, context.gathered) if self.balance else labels
        wanted = jnp.full_like(weak, 1 / weak.shape[-1]) if self.balance else weak
        p, thresholds, statistics = None, None, ()
        if self.own_labels == "batch":
            p = jnp.take(context.gathered.p, context.rows, axis=0)
            thresholds = self.batch_thresholds(context.gathered)
        elif self.own_labels == "running":
            thresholds = context.carry.thresholds
            statistics = class_losses.threshold_sums(context.carry, logits, wanted, weights)
        coefficient = class_losses.warmup(context.step, self.coefficient, self.warmup_steps)
        soft = self.own_labels == "soft"
        total = class_losses.auxiliary_confidence(
            logits, weak, weights, coefficient=coefficient, thresholds=thresholds, soft=soft, p=p
        )
        own = jax.lax.stop_gradient(jax.nn.softmax(logits)) if p is None else p
        own = own if soft else class_losses.harden(own, thresholds)
        metrics = {"coefficient": coefficient, "own_class_0": own[..., 0], "weak_class_0": weak[..., 0]}
        if thresholds is not None:
            metrics["threshold_0"] = thresholds[0]
        return Result(total, metrics, statistics)

    def gathers(self) -> bool:
        return self.balance or self.own_labels == "batch"

    def gather(self, read: Predictions) -> "Gathered":
        return Gathered(jax.nn.softmax(read.logits), read.labels, read.weights)

    def balanced(
        self, labels: Float[Array, "B T C"], weights: Float[Array, "B T"], gathered: "Gathered"
    ) -> Float[Array, "B T C"]:
        """Labels of which no class is favoured in the whole batch."""
        return class_losses.balance(labels, weights, mean=class_losses.mean_log(gathered.labels, gathered.weights))

    def batch_thresholds(self, gathered: "Gathered") -> Float[Array, " C"]:
        """Those with which own labels are as frequent as weak ones in the whole batch."""
        p, labels, weights = gathered
        wanted = jnp.full_like(labels, 1 / labels.shape[-1]) if self.balance else labels
        return class_losses.quantile_thresholds(p, class_losses.mean_label(wanted, weights), weights)


class Gathered(NamedTuple):
    """Of all rows of the whole batch: the model's probabilities, the weak labels, and which positions have one."""

    p: Float[Array, "B T C"]
    labels: Float[Array, "B T C"]
    weights: Float[Array, "B T"]


LOSSES: dict[str, type[Loss]] = {
    kind.name: kind
    for kind in (
        CrossEntropy,
        HardCrossEntropy,
        ForwardKL,
        ReverseKL,
        ReverseCrossEntropy,
        SymmetricCrossEntropy,
        AuxiliaryConfidence,
        ProductOfConfidence,
        ConfidenceWindow,
        AdaptiveConfidence,
        AugmentedConfidence,
        Bootstrap,
    )
}


@dataclasses.dataclass(frozen=True)
class WeakToStrong:
    """A loss on the classes that a reader finds in a batch.

    Attributes:
      kind: the loss.
      reader: (forward, batch) -> Predictions.
      fields: of the batch, which the reader needs.
      labels: see Objective.
    """

    kind: Loss
    reader: Callable[[Forward, Batch], Predictions]
    fields: tuple[str, ...] = classify.FIELDS
    labels: int = 0

    def objective(self) -> Objective:
        """This as an objective."""
        running = getattr(self.kind, "own_labels", "") == "running"
        return Objective(
            loss=self.loss,
            fields=self.fields,
            labels=self.labels,
            gather=self.gather if self.kind.gathers() else None,
            init_carry=_first_thresholds if running else None,
            update=self.next_thresholds if running else None,
        )

    def loss(self, forward: Forward, batch: Batch, context: Context) -> LossOut:
        read = self.reader(forward, batch)
        result, count = self.kind(read, context), jnp.sum(read.weights)
        sums = {
            name: (jnp.sum(read.weights * jnp.broadcast_to(x, read.weights.shape)), count)
            for name, x in result.metrics.items()
        }
        metrics = {_NAMES.get(name, name): value for name, value in classify.metrics(read).items()}
        return LossOut(result.loss_sum, count, metrics | sums, result.statistics)

    def gather(self, forward: Forward, batch: Batch) -> Any:
        return self.kind.gather(self.reader(forward, batch))

    def next_thresholds(self, carry: RunningThresholds, statistics: ThresholdSums) -> RunningThresholds:
        return class_losses.update_thresholds(carry, statistics, self.kind.rate)


def _first_thresholds(batch: Mapping[str, jax.ShapeDtypeStruct]) -> RunningThresholds:
    return class_losses.init_thresholds(batch["label_probs"].shape[-1])


def _check_options(loss: str, options: Mapping[str, Any]) -> None:
    """Raises InputError where an option isn't the loss's, or out of its range."""
    defaults = {field.name: field.default for field in dataclasses.fields(LOSSES[loss])}
    every = {field.name for kind in LOSSES.values() for field in dataclasses.fields(kind)}
    for name, value in options.items():
        if name not in every:
            raise InputError(f"{name}: no such option.{did_you_mean(name, every)}")
        if name not in defaults:
            there = f"It has {', '.join(defaults)}." if defaults else "It has none."
            raise InputError(f"{name} = {value!r}: loss = {loss!r} has no such option. {there}")
        if name == "own_labels" and value not in OWN_LABELS:
            raise InputError(f"{name} = {value!r}: no such choice.{did_you_mean(str(value), OWN_LABELS)}")
        option_types.convert(ranges.hints(LOSSES[loss])[name], value, name)
    own_labels = options.get("own_labels", defaults.get("own_labels"))
    if "rate" in options and own_labels != "running":
        raise InputError(
            f"rate = {options['rate']}: is of running thresholds, and own_labels = {own_labels!r}. Leave it out, or "
            "set own_labels = 'running'."
        )
