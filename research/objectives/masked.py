"""Masked language modelling: some tokens are hidden, and the model says from both sides which they were."""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from research.devices import sharding
from research.errors import InputError
from research.objectives.types import Batch, Context, Forward, LossOut, Objective
from research.ops.chunks import time_parts
from research.ops.losses import CrossEntropy, cross_entropy
from research.ops.words import WordTables, word_starts
from research.ranges import Part, Share
from research.sources import special_tokens as spelled
from research.sources.tokenizers import Tokenizer
from research.sources.words import ordinary_tokens, word_tables

FIELDS = ("tokens", "segment_ids", "positions", "loss_mask")
_ROUNDS = 4  # in which whole words fill up what is to be chosen


def special_tokens(tokenizer: Tokenizer, **options: object) -> tuple[str, ...]:
    """The names of the special tokens that the objective needs of a tokenizer."""
    return spelled.mask_names(tokenizer)


def make(
    share: Part = 0.15,
    mask: Share = 0.8,
    random: Share = 0.1,
    whole_word: bool = False,
    tokenizer: Tokenizer | None = None,
) -> Objective:
    """Mean cross-entropy of tokens chosen at random, given all others of their documents (Devlin et al. 2019,
    arXiv:1810.04805, section 3.1). It is for models in which tokens see what comes after them.

    In training each step chooses others; in evaluations a row's are the same each time. What can be chosen is an
    ordinary token that the source marked in `loss_mask`: of plain text all, of prompts and responses the responses.

    Args:
      share: of the tokens of a row that can be chosen, rounded to a whole number and at least one.
      mask: of those chosen, become the mask token.
      random: of those chosen, become a random ordinary token. The rest are kept as they are.
      whole_word: the tokens of a word are chosen together; see `choose`.
      tokenizer: the run's.

    Raises:
      InputError: a share out of its range, or a tokenizer without a mask token.
    """
    if not mask + random:
        raise InputError(f"mask = {mask}: with random = {random} every chosen token stays as it is. Raise either.")
    if mask + random > 1 + 1e-9:
        raise InputError(f"random = {random}: with mask = {mask} it is more than all that is chosen. Lower either.")
    noise = None
    if tokenizer is not None:
        tables = word_tables(tokenizer) if whole_word else None
        noise = Noise(share, mask, random, spelled.mask_token(tokenizer), ordinary_tokens(tokenizer), tables)

    def loss(forward: Forward, batch: Batch, context: Context) -> LossOut:
        return _loss(noise, forward, batch, context)

    def hides(batch: Batch, keys: jax.Array) -> tuple[jax.Array, jax.Array]:
        choice = noise.choose(batch, keys)
        return choice.tokens, spread(choice.weights, choice.at, choice.tokens.shape)

    return Objective(loss=loss, fields=FIELDS, bits_per_byte=False, hides=hides if noise else None)


def _loss(noise: "Noise | None", forward: Forward, batch: Batch, context: Context) -> LossOut:
    """See `make`."""
    model = forward.models["policy"]
    if model.config.causal:
        raise InputError(
            f"model.causal = {model.config.causal}: a masked token is to be told from what follows it too. Set it to "
            "False, or begin with a model that sees both sides, such as BERT (model.init_from)."
        )
    if noise is None:
        raise InputError("masked: needs a tokenizer, and the objective was made without.")
    choice = noise.choose(batch, context.row_keys(), time_parts(batch["tokens"].shape[1], model.rules))
    tokens = sharding.constrain(choice.tokens, ("batch", "time"), model.rules)
    noisy = forward.on({**forward.batch, "tokens": tokens})
    out = loss_at(noisy, batch["tokens"], choice.at, choice.weights)
    metrics = {
        "nll": (out.nll_sum, out.weight_sum),
        "accuracy": (out.correct_sum, out.weight_sum),
        "chosen": (out.weight_sum, jnp.sum(choice.candidates.astype(jnp.float32))),
    }
    per_token = (spread(values, choice.at, tokens.shape) for values in (out.loss, choice.weights))
    return LossOut(out.loss_sum, out.weight_sum, metrics, per_token=tuple(per_token))


def loss_at(
    forward: Forward, targets: Int[Array, "B T"], at: Int[Array, "B K"], weights: Float[Array, "B K"]
) -> CrossEntropy:
    """The policy's cross-entropy at some places, through the head at these alone. Args: see Choice."""
    hidden = sharding.constrain(take(forward.hidden(), at), ("batch", "time", None), forward.models["policy"].rules)
    return cross_entropy(hidden, forward.token_head(), take(targets, at), weights)


class Choice(NamedTuple):
    """Which tokens of a batch are to be told, and what the model reads.

    Attributes:
      at: [B, K], the places of the chosen tokens in rising order; where a row has fewer, then numbers beyond T.
      weights: [B, K], 1 where there is one, else 0.
      tokens: [B, T], with noise at the chosen.
      candidates: [B, T], True at the tokens that could be chosen.
    """

    at: Int[Array, "B K"]
    weights: Float[Array, "B K"]
    tokens: Int[Array, "B T"]
    candidates: Bool[Array, "B T"]


@dataclasses.dataclass(frozen=True, eq=False)
class Noise:
    """How tokens are chosen, and what becomes of them.

    Attributes:
      share, mask, random: see `make`.
      mask_token: id.
      ordinary: [V] bool, the ids that stand for text: they can be chosen, and a random token is one of them.
      words: where whole words are chosen.
    """

    share: float
    mask: float
    random: float
    mask_token: int
    ordinary: np.ndarray
    words: WordTables | None

    def choose(self, batch: Batch, keys: jax.Array, parts: int = 1) -> Choice:
        """Draws for each row by its key.

        Of a row with n candidates round(share * n) are chosen, at least one. BERT chooses so many, at random; in
        transformers' DataCollatorForLanguageModeling each token is chosen by itself, and their number varies.

        Whole words are taken in random order, and one that is longer than what is left to choose is passed over, as in
        BERT: so a few tokens less may be chosen. The first of the order is taken in any case, up to ceil(share * T)
        tokens; no longer word is ever chosen.

        Args:
          batch: with FIELDS.
          keys: [B], of the rows.
          parts: into how many the mesh cuts T, and is to cut K, which is ceil(share * T) or a little more.
        """
        tokens, segments = batch["tokens"], batch["segment_ids"]
        length = tokens.shape[1]
        most = min(length, math.ceil(self.share * length))
        candidates = (segments > 0) & (batch["loss_mask"] > 0) & jnp.asarray(self.ordinary)[tokens]
        starts = jnp.ones(tokens.shape, bool)
        if self.words is not None:
            same = (candidates == jnp.roll(candidates, 1, axis=1)).at[:, 0].set(False)
            starts = word_starts(self.words, tokens, segments) | ~same
        row = jax.vmap(lambda key, tokens, candidates, starts: self._row(key, tokens, candidates, starts, most))
        places, noisy = row(keys, tokens, candidates, starts)
        room = -(-most // parts) * parts
        beyond = length + jnp.broadcast_to(jnp.arange(most, room), (tokens.shape[0], room - most))
        at = jnp.concatenate([places, beyond.astype(places.dtype)], axis=1)
        return Choice(at, (at < length).astype(jnp.float32), noisy, candidates)

    def _row(
        self,
        key: jax.Array,
        tokens: Int[Array, " T"],
        candidates: Bool[Array, " T"],
        starts: Bool[Array, " T"],
        most: int,
    ) -> tuple[Int[Array, " K"], Int[Array, " T"]]:
        """The places and the tokens of a Choice, of one row; K is `most`."""
        length = len(tokens)
        numbers = jnp.arange(length, dtype=jnp.int32)
        of_order, of_kind, of_tokens = jax.random.split(key, 3)
        draws = jax.random.uniform(of_order, (length,))
        draws = draws[jax.lax.cummax(jnp.where(starts, numbers, 0))]  # a word has that of its first token
        order = jnp.argsort(jnp.where(candidates, draws, 2.0)).astype(jnp.int32)  # it is stable: words stay whole
        count = jnp.sum(candidates)
        wanted = jnp.maximum(jnp.round(self.share * count.astype(jnp.float32)).astype(jnp.int32), 1)
        wanted = jnp.minimum(wanted, most)
        taken = candidates[order] & (numbers < wanted)
        if self.words is not None:
            taken = _fill(starts[order], candidates[order], wanted, most)
        places = jnp.sort(jnp.where(taken, order, length + numbers))[:most]
        # Of the chosen, so many become the mask token, and so many a random one.
        kind = jax.random.uniform(of_kind, (length,))
        (ordinary,) = np.nonzero(self.ordinary)
        others = jnp.asarray(ordinary, tokens.dtype)[jax.random.randint(of_tokens, (length,), 0, len(ordinary))]
        noise = jnp.where(kind < self.mask, self.mask_token, jnp.where(kind < self.mask + self.random, others, tokens))
        chosen = jnp.zeros(length, bool).at[order].set(taken, unique_indices=True)
        return places, jnp.where(chosen, noise, tokens)


def _fill(
    starts: Bool[Array, " T"], candidates: Bool[Array, " T"], wanted: Int[Array, ""], most: int
) -> Bool[Array, " T"]:
    """Which tokens are taken, in the order of draws: the words that fit, one after the other, into `wanted` tokens.

    Each round takes words up to the first that doesn't fit, which no later one would; so the rounds are the loop that
    goes from word to word. What is left after the last of them is little.

    Args:
      starts: where words begin.
      candidates: the tokens that can be taken, all before the others.
      wanted: how many are to be.
      most: what the first word may be longer than `wanted`, to be taken all the same.
    """
    numbers = jnp.arange(len(starts), dtype=jnp.int32)
    first = jax.lax.cummax(jnp.where(starts, numbers, 0))
    ends = jnp.append(starts[1:], True)
    last = jax.lax.cummin(jnp.where(ends, numbers, len(starts)), reverse=True)
    sizes = last - first + 1
    left = jnp.where((sizes[0] > wanted) & (sizes[0] <= most), sizes[0], wanted)
    taken = jnp.zeros(len(starts), bool)
    for _ in range(_ROUNDS):
        fits = candidates & ~taken & (sizes <= left)
        through = jnp.cumsum(fits)[last]  # tokens up to the end of the word
        more = fits & (through <= left)
        taken |= more
        left -= jnp.sum(more)
    return taken


def take(x: Float[Array, "B T ..."], at: Int[Array, "B K"]) -> Float[Array, "B K ..."]:
    """`x` at places in rising order; 0 where they are beyond T."""

    def row(x: Float[Array, "T ..."], at: Int[Array, " K"]) -> Float[Array, "K ..."]:
        return x.at[at].get(mode="fill", fill_value=0, unique_indices=True, indices_are_sorted=True)

    return jax.vmap(row)(x, at)


def spread(values: Float[Array, "B K"], at: Int[Array, "B K"], shape: tuple[int, int]) -> Float[Array, "B T"]:
    """The values at their places; 0 elsewhere."""

    def row(values: Float[Array, " K"], at: Int[Array, " K"]) -> Float[Array, " T"]:
        zeros = jnp.zeros(shape[1], values.dtype)
        return zeros.at[at].set(values, mode="drop", unique_indices=True, indices_are_sorted=True)

    return jax.vmap(row)(values, at)
