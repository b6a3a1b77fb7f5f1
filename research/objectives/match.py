"""Matching what goes on inside: the student's hidden states and attention are to be the teacher's."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from research.errors import InputError, did_you_mean
from research.objectives.types import Batch, Forward, LossOut, Objective, next_token_targets
from research.ops import matching
from research.params import ParamSpec

PROJECTIONS = ("linear", "none")
RELATIONS = ("attention", "queries", "keys", "values")
SCOPES = ("all", "supervised")


def make(
    layers: Sequence[Sequence[int]] = ((-1, -1),),
    distance: str = "mse",
    projection: str = "linear",
    attention: Sequence[Sequence[int]] = (),
    relations: Sequence[str] = ("values",),
    relation_heads: int = 0,
    attention_weight: float = 1.0,
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
    field = "objective.match"
    layers, attention = _pairs(f"{field}.layers", layers), _pairs(f"{field}.attention", attention)
    relations = (relations,) if isinstance(relations, str) else tuple(relations)
    for name, values, known in (
        ("distance", (distance,), matching.DISTANCES),
        ("projection", (projection,), PROJECTIONS),
        ("relations", relations, RELATIONS),
        ("on", (on,), SCOPES),
    ):
        for value in values:
            if value not in known:
                raise InputError(f"{field}.{name} = {value!r}: no such choice.{did_you_mean(str(value), known)}")
    if not layers and not (attention and relations):
        raise InputError(
            f"{field}.layers, {field}.attention: name no pair of layers. For example: layers = ((-1, -1),)."
        )

    def specs(models: Mapping[str, Any]) -> dict[str, ParamSpec]:
        _check(field, models["policy"].config, models[teacher].config, layers, attention, projection)
        if projection == "none":
            return {}
        D, E = models["policy"].config.d_model, models[teacher].config.d_model
        init = jax.nn.initializers.normal(D**-0.5)
        return {_name(*pair): ParamSpec((D, E), ("embed", "embed_replicated"), init, ("embed",)) for pair in layers}

    def hidden(forward: Forward, student: int, theirs: int, weights: jax.Array) -> jax.Array:
        x = forward.hidden_at(student)
        if projection == "linear":
            x = x @ forward.params["objectives"]["match"][_name(student, theirs)].astype(x.dtype)
        return matching.hidden_distance(x, forward.hidden_at(theirs, teacher), weights, distance)

    def related(forward: Forward, batch: Batch, student: int, theirs: int, weights: jax.Array) -> jax.Array:
        models = forward.models["policy"], forward.models[teacher]
        ours, others = (
            model.attention_inputs(forward.params[role], forward.hidden_at(before(layer), role), batch, layer)
            for model, role, layer in zip(models, ("policy", teacher), (student, theirs), strict=True)
        )
        total = jnp.zeros(())
        for name in relations:
            i, j = {"attention": (0, 1), "queries": (0, 0), "keys": (1, 1), "values": (2, 2)}[name]
            total += matching.relation_divergence(
                (ours[i], ours[j]),
                (others[i], others[j]),
                batch["segment_ids"],
                weights,
                heads=relation_heads or math.gcd(ours[i].shape[2], others[i].shape[2]),
                causal=models[0].config.causal and models[1].config.causal,
            )
        return total

    def loss(forward: Forward, batch: Batch, key: jax.Array, step: jax.Array) -> LossOut:
        del key, step
        if on == "all":
            weights = (batch["segment_ids"] > 0).astype(jnp.float32)
        else:
            _, weights = next_token_targets(batch, batch["loss_mask"])
        weight, total, metrics = jnp.sum(weights), jnp.zeros(()), {}
        for pair in layers:
            value = hidden(forward, *pair, weights)
            total, metrics[f"hidden_{_name(*pair)}"] = total + value, (value, weight)
        for pair in attention:
            value = related(forward, batch, *pair, weights)
            total, metrics[f"attention_{_name(*pair)}"] = total + attention_weight * value, (value, weight)
        return LossOut(total, weight, metrics)

    states = [tuple({*(p[i] for p in layers), *(before(p[i]) for p in attention)}) for i in (0, 1)]
    return Objective(
        loss=loss,
        fields=("tokens", "segment_ids", "positions") + (("loss_mask",) if on == "supervised" else ()),
        frozen=(teacher,),
        states={"policy": states[0], teacher: states[1]},
        params=specs,
    )


def before(layer: int) -> int:
    """The layer whose state is what this one reads."""
    return layer - 1


def _name(student: int, teacher: int) -> str:
    return f"{student}_{teacher}"


def _pairs(field: str, pairs: Sequence[Sequence[int]]) -> tuple[tuple[int, int], ...]:
    pairs = tuple(pairs)
    if len(pairs) == 2 and all(isinstance(p, int) for p in pairs):
        pairs = (pairs,)
    for pair in pairs:
        if isinstance(pair, int) or len(pair) != 2 or not all(isinstance(x, int) for x in pair):
            raise InputError(f"{field} = {pairs}: must be pairs of layers (student's, teacher's): ((2, 4), (-1, -1)).")
    return tuple(tuple(pair) for pair in pairs)


def _check(field, student, teacher, layers, attention, projection) -> None:
    for name, pairs, least in (("layers", layers, 0), ("attention", attention, 1)):
        for pair in pairs:
            for c, layer, whose in zip((student, teacher), pair, ("student", "teacher"), strict=True):
                number = layer if layer >= 0 else c.num_layers + 1 + layer
                if not least <= number <= c.num_layers:
                    raise InputError(
                        f"{field}.{name}: has {pair}, and the {whose} has layers 1 to {c.num_layers}. Choose from them."
                    )
    if layers and projection == "none" and student.d_model != teacher.d_model:
        raise InputError(
            f"{field}.projection = 'none': the student is {student.d_model} wide, and the teacher {teacher.d_model}. "
            "Use 'linear'."
        )
