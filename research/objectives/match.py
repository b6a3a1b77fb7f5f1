"""Matching what goes on inside: the student's hidden states and attention are to be the teacher's."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from research.errors import InputError, did_you_mean
from research.models.config import ModelConfig
from research.objectives.types import Batch, Context, Forward, LossOut, Objective, next_token_targets
from research.ops import matching
from research.params import ParamSpec
from research.ranges import Count, NotNegative, Whole

Pairs = tuple[tuple[int, int], ...]

PROJECTIONS = ("linear", "none")
# Relation -> which of (queries, keys, values) it compares with which.
RELATIONS = {"attention": (0, 1), "queries": (0, 0), "keys": (1, 1), "values": (2, 2)}
SCOPES = ("all", "supervised")


def make(
    layers: Sequence[Sequence[Whole]] = ((-1, -1),),
    distance: str = "mse",
    projection: str = "linear",
    attention: Sequence[Sequence[Whole]] = (),
    relations: Sequence[str] = ("values",),
    relation_heads: Count = 0,
    attention_weight: NotNegative = 1.0,
    on: str = "all",
    teacher: str = "teacher",
) -> Objective:
    """Mean over tokens of the distances between states of the student and the teacher, summed over pairs of layers.

    Layers are numbered from 1; 0 is the embedding, and negative ones count from the end: (-1, -1) are the last of both,
    before the final norm.

    Args:
      layers: pairs (student's, teacher's) whose hidden states are compared.
      distance: "mse" or "cosine"; see ops.matching.hidden_distance.
      projection: "linear": a learned matrix for each pair takes the student's states to the teacher's width (FitNets,
        arXiv:1412.6550); "none" compares them as they are.
      attention: pairs whose attention is compared, by ops.matching.relation_divergence.
      relations: which: "attention" (queries with keys), "queries", "keys" or "values" (each with themselves).
      relation_heads: 0: as many as both models' heads have in common (their greatest common divisor).
      attention_weight: of all the latter, against the hidden states.
      on: "all" tokens, or "supervised": the positions that predict a token of loss_mask.
      teacher: the teacher's role.

    Raises:
      InputError: an option that isn't known, or nothing to compare.
    """
    layers, attention = _pairs("layers", layers), _pairs("attention", attention)
    relations = (relations,) if isinstance(relations, str) else tuple(relations)
    for name, values, known in (
        ("distance", (distance,), matching.DISTANCES),
        ("projection", (projection,), PROJECTIONS),
        ("relations", relations, tuple(RELATIONS)),
        ("on", (on,), SCOPES),
    ):
        for value in values:
            if value not in known:
                raise InputError(f"{name} = {value!r}: no such choice.{did_you_mean(str(value), known)}")
    if not layers and not (attention and relations):
        raise InputError("layers, attention: name no pair of layers. For example: layers = ((-1, -1),).")
    return Match(
        hidden=Hidden(layers, distance, projection == "linear"),
        attention=Attention(attention, relations, relation_heads, attention_weight),
        supervised=on == "supervised",
        teacher=teacher,
    ).objective()


@dataclasses.dataclass(frozen=True)
class Hidden:
    """Which hidden states are compared, and how; see `make`."""

    layers: Pairs
    distance: str
    projected: bool

    def specs(self, student: ModelConfig, teacher: ModelConfig) -> dict[str, ParamSpec]:
        """The matrices that take the student's states to the teacher's width, by pair of layers."""
        if not self.projected:
            return {}
        shape, init = (student.d_model, teacher.d_model), jax.nn.initializers.normal(student.d_model**-0.5)
        axes = ("embed", "embed_replicated")
        return {_name(pair): ParamSpec(shape, axes, init, ("embed",)) for pair in self.layers}

    def loss(
        self, forward: Forward, teacher: str, pair: tuple[int, int], params: Any, weights: Float[Array, "B T"]
    ) -> Float[Array, ""]:
        """The sum over tokens for a pair of layers."""
        x = forward.hidden_at(pair[0])
        if self.projected:
            x = x @ params[_name(pair)].astype(x.dtype)
        return matching.hidden_distance(x, forward.hidden_at(pair[1], teacher), weights, self.distance)


@dataclasses.dataclass(frozen=True)
class Attention:
    """Which layers' attention is compared, and how; see `make`."""

    layers: Pairs
    relations: tuple[str, ...]
    heads: int
    weight: float

    def loss(
        self, forward: Forward, teacher: str, pair: tuple[int, int], batch: Batch, weights: Float[Array, "B T"]
    ) -> Float[Array, ""]:
        """The sum over tokens and relations for a pair of layers."""
        roles, total = ("policy", teacher), jnp.zeros(())
        models = [forward.models[role] for role in roles]
        student, other = (
            model.attention_inputs(forward.params[role], forward.hidden_at(before(layer), role), batch, layer)
            for model, role, layer in zip(models, roles, pair, strict=True)
        )
        for i, j in (RELATIONS[name] for name in self.relations):
            total += matching.relation_divergence(
                (student[i], student[j]),
                (other[i], other[j]),
                batch["segment_ids"],
                weights,
                heads=self.heads or math.gcd(student[i].shape[2], other[i].shape[2]),
                causal=all(model.config.causal for model in models),
                prefix=batch.get("prefix") if all(model.config.prefix for model in models) else None,
                rules=models[0].rules,
            )
        return total


@dataclasses.dataclass(frozen=True)
class Match:
    """Distances between states of the policy and a teacher; see `make`."""

    hidden: Hidden
    attention: Attention
    supervised: bool
    teacher: str

    def objective(self) -> Objective:
        """This as an objective."""
        student, teacher = (
            tuple({*(pair[i] for pair in self.hidden.layers), *(before(pair[i]) for pair in self.attention.layers)})
            for i in (0, 1)
        )
        return Objective(
            loss=self.loss,
            fields=("tokens", "segment_ids", "positions") + (("loss_mask",) if self.supervised else ()),
            frozen=(self.teacher,),
            states={"policy": student, self.teacher: teacher},
            params=self.specs,
        )

    def specs(self, models: Mapping[str, Any]) -> dict[str, ParamSpec]:
        """The objective's own parameters. Raises InputError where the models don't have the layers."""
        student, teacher = models["policy"].config, models[self.teacher].config
        _check_layers("layers", self.hidden.layers, student, teacher, least=0)
        _check_layers("attention", self.attention.layers, student, teacher, least=1)
        if self.hidden.layers and not self.hidden.projected and student.d_model != teacher.d_model:
            raise InputError(
                f"projection = 'none': the student is {student.d_model} wide, and the teacher {teacher.d_model}. "
                "Use 'linear'."
            )
        return self.hidden.specs(student, teacher)

    def loss(self, forward: Forward, batch: Batch, context: Context) -> LossOut:
        """The sum over pairs of layers, and the metrics of each."""
        if self.supervised:
            _, weights = next_token_targets(batch, batch["loss_mask"])
        else:
            weights = (batch["segment_ids"] > 0).astype(jnp.float32)
        if (seen := forward.seen_by_all([self.teacher])) is not None:
            weights = weights * seen
        weight, total, metrics = jnp.sum(weights), jnp.zeros(()), {}
        for pair in self.hidden.layers:
            value = self.hidden.loss(forward, self.teacher, pair, context.params, weights)
            total, metrics[f"hidden_{_name(pair)}"] = total + value, (value, weight)
        for pair in self.attention.layers:
            value = self.attention.loss(forward, self.teacher, pair, batch, weights)
            total, metrics[f"attention_{_name(pair)}"] = total + self.attention.weight * value, (value, weight)
        return LossOut(total, weight, metrics)


def before(layer: int) -> int:
    """The layer whose state is what this one reads."""
    return layer - 1


def _name(pair: tuple[int, int]) -> str:
    return f"{pair[0]}_{pair[1]}"


def _pairs(option: str, pairs: Sequence[Sequence[int]]) -> Pairs:
    pairs = tuple(pairs)
    if len(pairs) == 2 and all(isinstance(p, int) for p in pairs):
        pairs = (pairs,)
    for pair in pairs:
        if isinstance(pair, int) or len(pair) != 2 or not all(isinstance(x, int) for x in pair):
            raise InputError(f"{option} = {pairs}: must be pairs of layers (student's, teacher's): ((2, 4), (-1, -1)).")
    return tuple(tuple(pair) for pair in pairs)


def _check_layers(option: str, pairs: Pairs, student: ModelConfig, teacher: ModelConfig, *, least: int) -> None:
    """Raises InputError where a model hasn't the layers of a pair, numbered from `least`."""
    for pair in pairs:
        for model, layer, whose in zip((student, teacher), pair, ("student", "teacher"), strict=True):
            number = layer if layer >= 0 else model.num_layers + 1 + layer
            if not least <= number <= model.num_layers:
                raise InputError(
                    f"{option}: has {pair}, and the {whose} has layers 1 to {model.num_layers}. Choose from them."
                )
