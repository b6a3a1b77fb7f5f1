"""How much a step on a record would help with target records, by gradients at the checkpoints of a run: LESS."""

import dataclasses
import functools
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from research import loading, params
from research.errors import InputError, did_you_mean
from research.evals import gradients, record_scores
from research.evals.scorers.inputs import Compared, Encoder, Inputs
from research.evals.scorers.types import Chunk, Scorer
from research.evals.scoring import Example
from research.loading.trained import TrainedPolicy, TrainedRun, open_trained
from research.ops import influence
from research.pretrained import checkpoints

PRECONDITIONERS = ("adam", "none")


def make(
    inputs: Inputs,
    model: str = "",
    target: str = "",
    width: int = 4096,
    preconditioner: str = "adam",
    steps: tuple[int, ...] = (),
    subtask: str = "",
    seed: int = 0,
) -> Scorer:
    """Column `less`: the influence of a record on the target (LESS, arXiv:2402.04333): the sum over a run's
    checkpoints, by their learning rates, of the cosine of the direction of Adam's step on the record and the gradient
    of a target record, both projected at random; of target records the mean, of subtasks the highest.

    Gradients are by what the run trained: of one with an adapter, as in the paper, those of its LoRA. Keep some of its
    checkpoints (checkpoint.keep_last), such as one for each epoch.

    Args:
      inputs: of the command.
      model: the workdir of a run, in the place of --model.
      target: a file of records of the kind that is wanted, in the place of --target.
      width: how many numbers gradients are projected to.
      preconditioner: "adam", or "none" for plain gradients of both sides.
      steps: of the checkpoints; () is all that are there.
      subtask: the field of a target record that says which subtask it is of; "" takes all for one.
      seed: of the projection.
    """
    if preconditioner not in PRECONDITIONERS:
        raise InputError(
            f"preconditioner = {preconditioner!r}: no such.{did_you_mean(preconditioner, PRECONDITIONERS)}"
        )
    if width < 1:
        raise InputError(f"width = {width}: must be at least 1.")
    gradients.check_on_long(inputs.on_long, "less")
    run = open_trained(inputs.name("model", model, "less"), inputs.mesh)
    there = checkpoints.steps(run.workdir)
    for step in steps:
        if step not in there:
            raise InputError(f"steps: {run.workdir} has no checkpoint of step {step}; there are {there}.")
    source = loading.find(run.workdir)
    encoder = Encoder(source.tokenizer(), inputs.template or source.template, run.model.config.vocab_size)
    compared = inputs.records(inputs.name("target", target, "less"), "--target")
    policies = [run.at(step, moments=preconditioner == "adam") for step in (steps or there)]
    if not sum(policy.rate for policy in policies):
        raise InputError(f"{run.workdir}: its learning rate is 0 at each of these checkpoints. Name others in steps.")
    return Less(run, policies, encoder, compared, _Options(width, subtask, seed, inputs.on_long, inputs.batch_tokens))


@dataclasses.dataclass(frozen=True)
class _Options:
    width: int
    subtask: str
    seed: int
    on_long: str
    batch_tokens: int


@dataclasses.dataclass(frozen=True)
class Features:
    """What is made of a gradient: its projection, of length 1; with moments that of the direction of Adam's step.

    Attributes:
      b1, b2: of Adam.
    """

    b1: float
    b2: float

    def __call__(self, gradient: jax.Array, extra: tuple[influence.Sketch, Any]) -> jax.Array:
        sketch, moments = extra
        if moments is not None:
            gradient = influence.adam_direction(gradient, *moments, self.b1, self.b2)
        return influence.normalized(influence.sketched(sketch, gradient)[None])[0]


class Less(Scorer):
    """See `make`."""

    columns = ("less",)

    def __init__(
        self,
        run: TrainedRun,
        policies: Sequence[TrainedPolicy],
        encoder: Encoder,
        target: Compared,
        options: _Options,
    ):
        self.encoder, self._run, self._policies, self._target, self._options = encoder, run, policies, target, options
        size = gradients.size(policies[0].own)
        self._sketch = influence.make_sketch(jax.random.key(options.seed), size, options.width)
        self._goals: list[np.ndarray] = []  # of each checkpoint, [subtasks, width]

    @property
    def identity(self) -> Any:
        weights = [[policy.step, policy.rate, params.checksum(policy.own)] for policy in self._policies]
        content = hashlib.blake2b(repr(self._target.identity).encode(), digest_size=8).hexdigest()
        return [weights, params.checksum(self._run.whole), content, self._options.on_long]

    def observe(self, chunk: Chunk) -> None:
        self._examples(chunk)

    def prepare(self) -> None:
        chunks = list(self._target.chunks(self.encoder))
        examples = [example for chunk in chunks for example in self._examples(chunk)]
        tasks: dict[Any, list[int]] = {}
        for chunk in chunks:
            for number, item in zip(chunk.numbers, chunk.items, strict=True):
                if self._options.subtask and self._options.subtask not in item.record:
                    raise InputError(f"{item.where}: has no field {self._options.subtask!r}, which options.less names.")
                tasks.setdefault(str(item.record.get(self._options.subtask, "")), []).append(number)
        for policy in self._policies:
            features = self._features(policy, examples, None)
            self._goals.append(np.stack([features[numbers].mean(axis=0) for numbers in tasks.values()]))

    def score(self, chunk: Chunk) -> Mapping[str, Sequence[Any]]:
        examples, total = self._examples(chunk), sum(policy.rate for policy in self._policies)
        sums = np.zeros((len(chunk), len(self._goals[0])))
        for policy, goals in zip(self._policies, self._goals, strict=True):
            moments = None if policy.first is None else (policy.first, policy.second)
            features = self._features(policy, examples, moments)
            sums += policy.rate / total * np.asarray(influence.influence(features, goals), np.float64)
        return {"less": sums.max(axis=1)}

    def _examples(self, chunk: Chunk) -> list[Example]:
        longest = self._run.model.max_length
        return [
            record_scores.shorten(item.where, example, longest, self._options.on_long)
            for item, example in zip(chunk.items, chunk.encoded[self.encoder], strict=True)
        ]

    def _features(self, policy: TrainedPolicy, examples: Sequence[Example], moments: Any) -> np.ndarray:
        """[N, width] float32, rows of length 1."""
        with jax.set_mesh(self._run.mesh):
            moments = None if moments is None else tuple(map(self._flat, moments))
            return self._gradients(self._run.whole, policy.own, (self._sketch, moments), examples)

    @functools.cached_property
    def _gradients(self) -> gradients.RecordGradients:
        optimizer = self._run.config.optimizer
        of = Features(optimizer.b1, optimizer.b2)
        return gradients.RecordGradients(self._run.model, of, self._options.width, self._options.batch_tokens)

    @functools.cached_property
    def _flat(self) -> Any:
        return jax.jit(gradients.flat)
