"""The compiled functions that probes share, so that each is compiled once."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from research import params as params_lib
from research.devices import compilation
from research.objectives.types import Forward, next_token_targets
from research.ops.head import Head
from research.run.assemble import Parts
from research.train import TrainStep

Batch = Mapping[str, jax.Array]
Params = Any
OFFSETS = (-1, 0, 1, 2)  # of targets from the position that predicts them; 1 is the next token


class Reading(NamedTuple):
    """What a model says of each position of a batch, by plain formulas.

    Attributes:
      hidden: the last hidden states.
      nll: of the token that follows, natural logarithm; 0 where none does.
      weights: 1 where a next token belongs to the same document.
      entropy: of the prediction, natural logarithm.
      correct: whether the likeliest token is the one that follows.
      end: the highest log-probability of the tokens that end an answer.
      offsets: [B, T, 4] the negative log-probability of the tokens at OFFSETS; NaN where there is none in the document.
    """

    hidden: Float[Array, "B T D"]
    nll: Float[Array, "B T"]
    weights: Float[Array, "B T"]
    entropy: Float[Array, "B T"]
    correct: Bool[Array, "B T"]
    end: Float[Array, "B T"]
    offsets: Float[Array, "B T 4"]


@dataclasses.dataclass(frozen=True, eq=False)
class Programs:
    """Compiled functions of a run's parts. To be called with the run's mesh in context."""

    parts: Parts

    @functools.cached_property
    def step(self) -> TrainStep:
        """The train step as it is before it is jitted."""
        return inspect.unwrap(self.parts.step)

    @functools.cached_property
    def _jitted(self) -> dict[Callable[..., Any], Callable[..., Any]]:
        return {}

    def jit(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function of a module whose first argument is the run's parts, jitted once; it takes the others."""
        if function not in self._jitted:
            options = compilation.compiler_options(self.mesh)
            self._jitted[function] = jax.jit(functools.partial(function, self.parts), compiler_options=options)
        return self._jitted[function]

    @functools.cached_property
    def mesh(self) -> jax.sharding.Mesh:
        return self.parts.state.step.sharding.mesh

    @functools.cached_property
    def evaluate(self) -> Callable[..., Any]:
        """The evaluation, compiled as fast as other probes are; see assemble.Parts."""
        options = compilation.compiler_options(self.mesh)
        return jax.jit(inspect.unwrap(self.parts.evaluate), compiler_options=options)

    @functools.cached_property
    def read(self) -> Callable[..., Reading]:
        """(role, parameters of all roles, batch, ids of tokens that end an answer [N]) -> Reading."""

        def read(role: str, params: Params, batch: Batch, ends: Int[Array, " N"]) -> Reading:
            return reading(Forward(self.parts.models, params, batch), role, ends)

        return jax.jit(read, static_argnums=0, compiler_options=compilation.compiler_options(self.mesh))


def reading(forward: Forward, role: str, ends: Int[Array, " N"]) -> Reading:
    """What a model says of a batch, a row at a time, so that the logits of one are held."""
    hidden, head = forward.hidden(role), forward.token_head(role)
    targets, weights = next_token_targets(forward.batch)
    ids, there = _at_offsets(forward.batch)

    def row(part: tuple[Array, ...]) -> tuple[Array, ...]:
        return _of_row(head, ends, *part)

    nll, entropy, correct, end, offsets = jax.lax.map(row, (hidden, targets, ids))
    return Reading(
        hidden.astype(jnp.float32), nll * weights, weights, entropy, correct, end, jnp.where(there, offsets, jnp.nan)
    )


def _of_row(
    head: Head, ends: Int[Array, " N"], hidden: Float[Array, "T D"], targets: Int[Array, " T"], ids: Int[Array, "T 4"]
) -> tuple[Array, ...]:
    log_probs = jax.nn.log_softmax(head.logits(hidden[None])[0].astype(jnp.float32), axis=-1)
    nll = -jnp.take_along_axis(log_probs, targets[:, None], axis=1)[:, 0]
    entropy = -jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1)
    end = jnp.max(log_probs[:, ends], axis=1, initial=-jnp.inf)
    return nll, entropy, jnp.argmax(log_probs, axis=-1) == targets, end, -jnp.take_along_axis(log_probs, ids, axis=1)


def _at_offsets(batch: Batch) -> tuple[Int[Array, "B T 4"], Bool[Array, "B T 4"]]:
    """The tokens at OFFSETS of each position, and whether they are in its document."""
    tokens, segments = batch["tokens"], batch["segment_ids"]
    if "virtual" in batch:
        tokens = jnp.where(batch["virtual"] > 0, 0, tokens)
        segments = jnp.where(batch["virtual"] > 0, 0, segments)
    place = jnp.arange(tokens.shape[1])[None]
    ids, there = [], []
    for offset in OFFSETS:
        inside = (place + offset >= 0) & (place + offset < tokens.shape[1])
        ids.append(jnp.roll(tokens, -offset, axis=1))
        there.append(inside & (jnp.roll(segments, -offset, axis=1) == segments) & (segments > 0))
    return jnp.stack(ids, axis=-1), jnp.stack(there, axis=-1)


def joined(state: Any, frozen: Params) -> Params:
    """Role -> all its parameters, what is trained and what isn't."""
    return params_lib.join(state.params, {**frozen, **state.synced})
