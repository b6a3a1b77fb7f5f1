"""The terms of a composed objective on one batch: their losses, what they gather, and their metrics."""

import dataclasses
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from research.errors import InputError, did_you_mean
from research.objectives.types import Batch, Context, Forward, LossOut, Objective
from research.options import naming_fields
from research.sources import fields

Coefficient = Callable[[jax.Array], jax.Array]  # step -> weight of a term
Carry = dict[str, Any]  # term -> pytree of arrays, for the objectives that have one
Metrics = dict[str, tuple[jax.Array, jax.Array]]  # name -> (sum, weight)
Weights = dict[str, jax.Array]  # term -> what its loss sum is divided by

# The fields that are made of rewards and answers of the policy.
OF_ROLLOUTS = {name for group in ("rollout", "old", "critic") for name in fields.group(group)}
# The fields that say what counts.
_SUPERVISION = ("segment_ids", "loss_mask", "label_probs", "pair", "side", "score", "desirable", "mismatched")


@dataclasses.dataclass(frozen=True)
class Term:
    """One of the losses that a config composes.

    Attributes:
      objective: what it is.
      coefficient: its weight in the sum, as a function of the step.
      sources: the sources of data whose tokens it counts; () for all.
      name: its name in the config.
      options: each option of the objective -> the config's field for it, for errors.
    """

    objective: Objective
    coefficient: Coefficient
    sources: tuple[str, ...] = ()
    name: str = ""
    options: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def specs(self, models: Mapping[str, Any]) -> Any:
        """ParamSpecs of the term's own parameters; an empty dict without any."""
        if self.objective.params is None:
            return {}
        with naming_fields(self.options):
            return self.objective.params(models)

    def source_numbers(self, names: Sequence[str]) -> tuple[int, ...]:
        """The numbers of the term's sources in the batch field `source`, of which `names` are all, in order.

        Raises:
          InputError: there is no such source; or the objective knows of other sources than there are.
        """
        if self.objective.sources and self.objective.sources != tuple(names):
            own, there = ", ".join(self.objective.sources), ", ".join(names) or "none"
            raise InputError(
                f"objective.terms.{self.name}: weighs the sources {own}, and data.sources has {there}. Name the same."
            )
        for source in self.sources:
            if source not in names:
                field = f"objective.terms.{self.name}.sources"
                remedy = did_you_mean(source, names) if names else " Name it in data.sources."
                raise InputError(f"{field}: the data has no source {source!r}.{remedy}")
        return tuple(names.index(source) for source in self.sources)

    def view(self, batch: Batch, names: Sequence[str]) -> Batch:
        """The batch in which tokens of other sources than the term's are padding: nothing of them counts."""
        numbers = self.source_numbers(names)
        if not numbers or len(names) < 2:  # the data is of one source, and the batch doesn't say which
            return batch
        counts = jnp.zeros(batch["source"].shape, bool)
        for number in numbers:
            counts |= batch["source"] == number
        masked = {
            name: jnp.where(
                counts.reshape(counts.shape + (1,) * (batch[name].ndim - 2)), batch[name], fields.TABLE[name].fill
            )
            for name in _SUPERVISION
            if name in batch
        }
        return {**batch, **masked}


Terms = Mapping[str, Term]


def on_data(terms: Terms, pairs: bool = False) -> dict[str, Term]:
    """The terms that a batch of the data alone can be judged by: not those that read what rewards are made into.

    Args:
      terms: of the objective.
      pairs: whether the pairs that terms read are of the policy's answers, and not of the data's.
    """
    of_answers = OF_ROLLOUTS | ({"pair"} if pairs else set())
    return {name: term for name, term in terms.items() if not of_answers.intersection(term.objective.fields)}


class Inputs(NamedTuple):
    """What the terms of a step read besides the models and the batch.

    Attributes:
      key: of this step.
      step: its number.
      rows: the number of each of the batch's rows in the whole batch.
      carry: what each term remembers of the steps before.
      gathered: term -> what its objective gathered of the whole batch; None where the batch is whole.
      first: see Context.
    """

    key: jax.Array
    step: Int[Array, ""]
    rows: Int[Array, " B"]
    carry: Carry
    gathered: Mapping[str, Any] | None = None
    first: Int[Array, ""] | int = 0


def row_numbers(batch: Batch) -> Int[Array, " B"]:
    """Of a whole batch."""
    return jnp.arange(batch["tokens"].shape[0], dtype=jnp.int32)


def init_carry(terms: Terms, batch: Mapping[str, jax.Array | jax.ShapeDtypeStruct]) -> Carry:
    """The first carries of those terms that have one; of `batch` only shapes and dtypes are read."""
    return {
        name: term.objective.init_carry(batch) for name, term in terms.items() if term.objective.init_carry is not None
    }


def hidden_states(terms: Terms) -> dict[str, tuple[int, ...]]:
    """Role -> the layers whose hidden states any of the terms reads."""
    states: dict[str, set[int]] = {}
    for term in terms.values():
        for role, layers in term.objective.states.items():
            states.setdefault(role, set()).update(layers)
    return {role: tuple(sorted(layers)) for role, layers in states.items()}


def gather(terms: Terms, forward: Forward, sources: Sequence[str] = ()) -> dict[str, Any]:
    """Term -> what its objective gathers of these rows: constants."""
    return {
        name: jax.lax.stop_gradient(term.objective.gather(forward, term.view(forward.batch, sources)))
        for name, term in terms.items()
        if term.objective.gather is not None
    }


def losses(terms: Terms, forward: Forward, inputs: Inputs, sources: Sequence[str] = ()) -> dict[str, LossOut]:
    """What each term makes of a batch, or of a part of one. Forward passes are made once, however many terms read them.

    Args:
      terms: of the objective.
      forward: the models on the batch; its params["objectives"] has the terms' own parameters, by name.
      inputs: the rest.
      sources: the names of the data's sources, in order. Of two or more, each has a `loss/NAME` among the metrics.
    """
    own = forward.params.get("objectives", {})
    gathered = gather(terms, forward, sources) if inputs.gathered is None else inputs.gathered
    outs = {}
    for name, term in terms.items():
        context = Context(
            key=jax.random.fold_in(inputs.key, np.uint32(zlib.crc32(name.encode()))),
            step=inputs.step,
            rows=inputs.rows,
            params=own.get(name, ()),
            carry=inputs.carry.get(name, ()),
            gathered=gathered.get(name, ()),
            first=inputs.first,
        )
        with naming_fields(term.options):
            out = term.objective.loss(forward, term.view(forward.batch, sources), context)
        outs[name] = _by_source(out, forward.batch, sources)
    return outs


def weighted_sum(
    terms: Terms, outs: Mapping[str, LossOut], step: Int[Array, ""], weights: Weights | None = None
) -> Float[Array, ""]:
    """sum_i c_i(step) S_i / W_i, the W_i constants: those of `weights`, by default the terms' own."""
    weights = weights or {name: out.weight for name, out in outs.items()}
    return sum(term.coefficient(step) * outs[name].loss_sum / _divisor(weights[name]) for name, term in terms.items())


def metrics(terms: Terms, outs: Mapping[str, LossOut], step: Int[Array, ""]) -> Metrics:
    """With one term, its metrics and `loss`; with several, "term/name" each, and their weighted sum as `loss`."""
    values: Metrics = {}
    for name, out in outs.items():
        prefix = "" if len(outs) == 1 else f"{name}/"
        values |= {prefix + k: v for k, v in out.metrics.items()} | {f"{prefix}loss": (out.loss_sum, out.weight)}
    if len(outs) > 1:
        values["loss"] = weighted_sum(terms, outs, step), jnp.ones((), jnp.float32)
    return values


def of_term(terms: Terms, name: str, values: Mapping[str, float]) -> dict[str, float]:
    """The metrics of one term among those that `metrics` gives, by their own names."""
    prefix = "" if len(terms) == 1 else f"{name}/"
    return {metric.removeprefix(prefix): value for metric, value in values.items() if metric.startswith(prefix)}


def source_tokens(batch: Batch, sources: Sequence[str]) -> Metrics:
    """`tokens/NAME` of each source, where there are two or more: how many tokens of the batch are its."""
    if len(sources) < 2:
        return {}
    real = batch["segment_ids"] > 0
    counts = (jnp.sum(real & (batch["source"] == number)).astype(jnp.float32) for number in range(len(sources)))
    return {f"tokens/{name}": (n, jnp.ones((), jnp.float32)) for name, n in zip(sources, counts, strict=True)}


def _by_source(out: LossOut, batch: Batch, sources: Sequence[str]) -> LossOut:
    """The same with the sums of each source in place of the values of each token."""
    if out.per_token is None or len(sources) < 2:
        return out._replace(per_token=None)
    values, weights = jax.lax.stop_gradient(out.per_token)
    sums = {}
    for number, name in enumerate(sources):
        own = jnp.where(batch["source"] == number, weights, 0)
        sums[f"loss/{name}"] = jnp.sum(jnp.where(own != 0, own * values, 0)), jnp.sum(own)
    return out._replace(metrics=out.metrics | sums, per_token=None)


def _divisor(weight: Float[Array, ""]) -> Float[Array, ""]:
    """The constant to divide a loss sum by; 1 where nothing is supervised, whose sum is 0."""
    weight = jax.lax.stop_gradient(weight)
    return jnp.where(weight > 0, weight, jnp.ones_like(weight))
