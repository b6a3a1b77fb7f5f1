"""The next token of each row by settings of its own: temperature, filters, and which log-probabilities are wanted.

Axes: A rows, V vocabulary, K tokens that are shown.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from research.models.sampling import CANDIDATES, draw
from research.models.slots import Decoder, Generated, Queue, Slots
from research.ops.cpu.argmax import argmax

SHOWN = 20  # the most of the likeliest tokens of which log-probabilities are shown


class Draws(NamedTuple):
    """How each row's tokens are chosen; see models.sampling.SamplingConfig.

    Attributes:
      temperature: float32; 0 takes the likeliest token.
      top_k: int32; 0 keeps all.
      top_p: float32; 1 keeps all.
      min_p: float32; 0 keeps all.
      of_draws: log-probabilities are those of the distribution that is drawn from, and not the model's.
      shows: log-probabilities of the likeliest tokens are wanted too.
    """

    temperature: Float[Array, " A"]
    top_k: Int[Array, " A"]
    top_p: Float[Array, " A"]
    min_p: Float[Array, " A"]
    of_draws: Bool[Array, " A"]
    shows: Bool[Array, " A"]


class DrawQueue(NamedTuple):
    """See models.slots.Queue; with how each row's tokens are chosen."""

    prompts: Int[Array, "A P"]
    lengths: Int[Array, " A"]
    limits: Int[Array, " A"]
    keys: Key[Array, " A"]
    draws: Draws


class Chances(NamedTuple):
    """Log-probabilities at one token of each row, float32.

    Attributes:
      chosen: of the token.
      ids: the likeliest tokens; 0 where none are wanted.
      likeliest: of these.
    """

    chosen: Float[Array, " A"]
    ids: Int[Array, "A K"]
    likeliest: Float[Array, "A K"]


class Candidates(NamedTuple):
    """What each row's token is drawn from: logits, after temperature and filters, and the ids that they are of."""

    logits: Float[Array, "A V"]
    ids: Int[Array, "A V"]


class RowDecoder(Decoder):
    """A Decoder whose queue is a DrawQueue; Generated.logprobs are Chances [A, N, ...]."""

    @property
    def shown(self) -> int:
        return min(SHOWN, self.vocab_size)

    def empty(self, rows: int) -> Generated:
        out = super().empty(rows)
        none = jnp.zeros((*out.tokens.shape, self.shown), jnp.float32)
        return out._replace(logprobs=Chances(out.logprobs, none.astype(jnp.int32), none))

    def choose(self, logits: Float[Array, "A V"], queue: Queue, slots: Slots) -> tuple[Int[Array, " A"], Any]:
        draws = jax.tree.map(lambda x: x[slots.row], queue.draws)
        return choose_by_row(logits, draws, queue.keys[slots.row], slots.count, self.shown)


def choose_by_row(
    logits: Float[Array, "A V"], draws: Draws, keys: Key[Array, " A"], numbers: Int[Array, " A"], shown: int
) -> tuple[Int[Array, " A"], Chances]:
    """The next token of each row, int32, and its log-probability.

    With a temperature, and top_p and min_p or without, it is the token that models.sampling.choose_tokens draws.

    Args:
      logits: float32.
      draws: how tokens are chosen.
      keys: random keys of the rows.
      numbers: which of its new tokens each row gets, from 0.
      shown: K.
    """
    greedy = draws.temperature == 0
    everything = Candidates(logits, jnp.broadcast_to(jnp.arange(logits.shape[1], dtype=jnp.int32), logits.shape))
    likeliest = argmax(logits)

    def drawn() -> tuple[Array, Array, Candidates]:
        kept = _filter(everything, draws)
        place, log_p = draw(kept.logits, jax.vmap(jax.random.fold_in)(keys, numbers))
        tokens = jnp.where(greedy, likeliest, _take(kept.ids, place))
        return tokens, log_p, kept

    # Most requests draw, or none does; the other work is left out.
    tokens, log_p, kept = jax.lax.cond(
        jnp.all(greedy), lambda: (likeliest, jnp.zeros(len(logits), jnp.float32), everything), drawn
    )
    of_draws = draws.of_draws & ~greedy
    chosen = jnp.where(of_draws, log_p, _take(logits, tokens) - jax.nn.logsumexp(logits, axis=1))
    source = jax.tree.map(lambda a, b: jnp.where(of_draws[:, None], a, b), kept, everything)
    none = jnp.zeros((len(logits), shown))
    ids, values = jax.lax.cond(
        jnp.any(draws.shows), functools.partial(_likeliest, source, shown), lambda: (none.astype(jnp.int32), none)
    )
    return tokens, Chances(chosen, ids, values)


def _filter(candidates: Candidates, draws: Draws) -> Candidates:
    """After temperature, top_k, top_p and min_p, in this order; rows with neither of the first two keep theirs."""
    temperature = jnp.where(draws.temperature == 0, 1.0, draws.temperature)
    scaled = candidates._replace(logits=candidates.logits / temperature[:, None])
    sorts = (draws.temperature > 0) & ((draws.top_k > 0) | (draws.top_p < 1))
    kept = jax.lax.cond(jnp.any(sorts), lambda: _truncate(scaled, draws, sorts), lambda: scaled)
    best = jnp.max(kept.logits, axis=1, keepdims=True)
    return kept._replace(logits=jnp.where(kept.logits >= best + jnp.log(draws.min_p)[:, None], kept.logits, -jnp.inf))


def _truncate(candidates: Candidates, draws: Draws, sorts: Bool[Array, " A"]) -> Candidates:
    """After top_k and top_p. As many tokens as sampling.CANDIDATES are sorted first, and all where those don't do."""
    V = candidates.logits.shape[1]
    everything = jax.nn.logsumexp(candidates.logits, axis=1)

    def likeliest(count: int) -> tuple[Candidates, Bool[Array, ""]]:
        logits, ids = jax.lax.top_k(candidates.logits, count)
        top_k = jnp.where(draws.top_k == 0, V, draws.top_k)
        logits = jnp.where(jnp.arange(count)[None] < top_k[:, None], logits, -jnp.inf)
        total = jnp.where(draws.top_k == 0, everything, jax.nn.logsumexp(logits, axis=1))
        p = jnp.exp(logits - total[:, None])
        sums = jnp.cumsum(p, axis=1)
        logits = jnp.where((sums - p < draws.top_p[:, None]) | (draws.top_p == 1)[:, None], logits, -jnp.inf)
        done = jnp.where(draws.top_k == 0, (sums[:, -1] >= draws.top_p) & (draws.top_p < 1), top_k <= count)
        others = ((0, 0), (0, V - count))
        kept = Candidates(jnp.pad(logits, others, constant_values=-jnp.inf), jnp.pad(ids, others))
        return kept, jnp.all(done | ~sorts)

    kept, enough = likeliest(min(CANDIDATES, V))
    if CANDIDATES < V:
        kept = jax.lax.cond(enough, lambda: kept, lambda: likeliest(V)[0])
    return jax.tree.map(lambda a, b: jnp.where(sorts[:, None], a, b), kept, candidates)


def _likeliest(source: Candidates, shown: int) -> tuple[Int[Array, "A K"], Float[Array, "A K"]]:
    values, places = jax.lax.top_k(source.logits, shown)
    norm = jax.nn.logsumexp(source.logits, axis=1, keepdims=True)
    return jnp.take_along_axis(source.ids, places, axis=1), values - norm


def _take(values: Array, places: Int[Array, " A"]) -> Array:
    return jnp.take_along_axis(values, places[:, None], axis=1)[:, 0]
