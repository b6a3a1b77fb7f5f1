"""Losses and metrics of reward models, which give an answer one number, and of ensembles of them.

Axes: B rows of a batch, S answers of a row, M members of an ensemble. Which answers are compared stands in two arrays
[B, S]: `pair`, the number of the comparison in its row (0: none), and `side`, the answer's rank in it (0: the best).
All is in float32, or in float64 where the rewards are.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt

BINS = 10  # of `calibration_sums`


class Answers(NamedTuple):
    """The answers of a batch's rows: its documents.

    Attributes:
      at: where each one's last token is.
      real: False where a row has fewer answers.
      pair, side: see above.
      lengths: of the documents, in tokens.
      hashes: of the documents' tokens.
    """

    at: Int[Array, "B S"]
    real: Bool[Array, "B S"]
    pair: Int[Array, "B S"]
    side: Int[Array, "B S"]
    lengths: Int[Array, "B S"]
    hashes: UInt[Array, "B S"]

    def read(self, values: Float[Array, "B T *N"]) -> Float[Array, "B S *N"]:
        """What stands at each answer's last token; 0 where there is no answer."""
        shape = (*self.at.shape, *(1,) * (values.ndim - 2))
        here = jnp.take_along_axis(values, self.at.reshape(shape), axis=1)
        return jnp.where(self.real.reshape(shape), here, 0)

    def put(self, values: Float[Array, "B S"], length: int) -> Float[Array, "B T"]:
        """The values at the answers' last tokens, and 0 elsewhere, in rows of `length`."""
        rows = jnp.arange(values.shape[0])[:, None]
        values = jnp.where(self.real, values, 0)
        return jnp.zeros((values.shape[0], length), values.dtype).at[rows, self.at].add(values)

    def better(self) -> Bool[Array, "B S S"]:
        """Whether answer i was preferred to answer j of the same comparison."""
        return self._together() & (self.side[:, :, None] < self.side[:, None, :])

    def not_better(self) -> Bool[Array, "B S S"]:
        """Whether answer j of the same comparison wasn't preferred to answer i, which counts itself."""
        return self._together() & (self.side[:, :, None] <= self.side[:, None, :])

    def rivals(self) -> Int[Array, "B S"]:
        """How many answers an answer's comparison has, itself included."""
        return jnp.sum(self._together(), axis=2)

    def _together(self) -> Bool[Array, "B S S"]:
        here = self.real & (self.pair > 0) & (self.side >= 0)
        return (self.pair[:, :, None] == self.pair[:, None, :]) & here[:, :, None] & here[:, None, :]

    def pair_weights(self) -> Float[Array, "B S S"]:
        """Of each preferred answer and the one it was preferred to: 1 over the number of such pairs in the comparison,
        so that a list of many answers counts as much as two (Ouyang et al. 2022, arXiv:2203.02155, equation 1)."""
        return self.better().astype(jnp.float32) / jnp.maximum(self._pairs(), 1).astype(jnp.float32)[:, :, None]

    def decided(self) -> Bool[Array, "B S"]:
        """Whether an answer's comparison prefers any answer to another."""
        return self._pairs() > 0

    def _pairs(self) -> Int[Array, "B S"]:
        """Of how many pairs in an answer's comparison one was preferred."""
        won = jnp.sum(self.better(), axis=2)
        return jnp.sum(jnp.where(self._together(), won[:, None, :], 0), axis=2)

    def members(self, number: int, share: float) -> Float[Array, "B S M"]:
        """1 where a member of an ensemble learns from the answer's comparison, else 0.

        Which comparisons these are depends on their tokens alone, so that they are the same in each epoch.

        Args:
          number: M.
          share: of the comparisons, for each member.
        """
        whole = jnp.sum(jnp.where(self._together(), self.hashes[:, None, :], 0), axis=2, dtype=jnp.uint32)
        whole = jnp.where(self.pair > 0, whole, self.hashes)
        salts = _mixed(jnp.arange(1, number + 1, dtype=jnp.uint32))
        drawn = _mixed(whole[:, :, None] ^ salts[None, None])
        return ((drawn >> 8).astype(jnp.float32) < share * 2.0**24).astype(jnp.float32)


def find_answers(
    tokens: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    pair: Int[Array, "B T"],
    side: Int[Array, "B T"],
) -> Answers:
    """The documents of a batch. S is T / 2: a document has two tokens or more."""
    real = segment_ids > 0
    ends = jnp.concatenate([segment_ids[:, 1:] != segment_ids[:, :-1], jnp.ones_like(real[:, :1])], axis=1)
    last = real & ends
    at = jnp.argsort(~last, axis=1, stable=True)[:, : max(1, tokens.shape[1] // 2)]
    take = lambda x: jnp.take_along_axis(x, at, axis=1)  # noqa: E731
    mixed = _mixed(tokens.astype(jnp.uint32) * jnp.uint32(0x9E3779B1) + positions.astype(jnp.uint32))
    sums = take(jnp.cumsum(jnp.where(real, mixed, 0), axis=1, dtype=jnp.uint32))
    before = jnp.pad(sums, ((0, 0), (1, 0)))[:, :-1]
    here = take(last)
    clear = lambda x, fill: jnp.where(here, take(x), fill)  # noqa: E731
    return Answers(
        at, here, clear(pair, 0), clear(side, -1), clear(positions + 1, 0), jnp.where(here, sums - before, 0)
    )


def _mixed(x: UInt[Array, "*N"]) -> UInt[Array, "*N"]:
    """A bijection of 32-bit numbers in which every bit depends on all (the finaliser of MurmurHash3, public domain)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def bradley_terry(
    chosen: Float[Array, "*N"],
    rejected: Float[Array, "*N"],
    margin: Float[Array, "*N"] | float = 0.0,
    *,
    label_smoothing: float = 0.0,
    flipped: float = 0.0,
) -> Float[Array, "*N"]:
    """-log sigmoid(r_chosen - r_rejected - margin): the probability that the preferred answer wins under the model of
    Bradley and Terry (Biometrika 39, 1952).

    Args:
      chosen, rejected: rewards of the preferred answers, and of those they were preferred to.
      margin: by how much the reward is to be higher (Touvron et al. 2023, arXiv:2307.09288, equation 2).
      label_smoothing: how likely a preference is the wrong way round: the loss of the swapped answers has this weight,
        and the other the rest.
      flipped: the share of preferences that are the wrong way round, however far apart the answers are: the loss is
        -log((1 - flipped) p + flipped (1 - p)), p the sigmoid above. Unlike label_smoothing it is the likelihood of
        such labels, and rewards may grow apart as far as the rest of them say.
    """
    difference = chosen - rejected
    if flipped:
        x = difference - margin
        return -jnp.logaddexp(math.log1p(-flipped) + jax.nn.log_sigmoid(x), math.log(flipped) + jax.nn.log_sigmoid(-x))
    loss = jax.nn.softplus(margin - difference)
    if not label_smoothing:
        return loss
    return (1 - label_smoothing) * loss + label_smoothing * jax.nn.softplus(margin + difference)


def centering(chosen: Float[Array, "*N"], rejected: Float[Array, "*N"]) -> Float[Array, "*N"]:
    """(r_chosen + r_rejected)^2, which keeps rewards near 0 (Eisenstein et al. 2023, arXiv:2312.09244, section 3)."""
    return jnp.square(chosen + rejected)


def plackett_luce(rewards: Float[Array, "B S M"], not_better: Bool[Array, "B S S"]) -> Float[Array, "B S M"]:
    """Of each answer, -log p(it is the best of those that weren't preferred to it); their sum over a comparison is that
    of the whole ranking (Plackett 1975, Luce 1959; of equal ranks each is the best of all of them).

    Args:
      rewards: of the answers.
      not_better: see Answers. An answer in no comparison has 0.
    """
    there = not_better[:, :, :, None]
    others = jnp.where(there, rewards[:, None, :, :], -jnp.inf)
    any_there = jnp.any(there, axis=2)
    others = jnp.where(any_there[:, :, None, :], others, 0)  # no gradient of a logarithm of nothing
    return jnp.where(any_there, jax.nn.logsumexp(others, axis=2) - rewards, 0)


def calibration_sums(
    difference: Float[Array, "*N"], weights: Float[Array, "*N"], flipped: float = 0.0
) -> Float[Array, "10"]:
    """Sums of weight times (confidence - correctness) over the pairs of each of ten bins of confidence, from 0.5 to 1.

    The absolute values of the sums over all pairs, added up and divided by the weight, are the expected calibration
    error (Guo et al. 2017, arXiv:1706.04599, equation 3): how far the probability of the likelier answer, sigmoid of
    the absolute difference of rewards, is from how often it was preferred. `flipped`: see bradley_terry.
    """
    confidence = flipped + (1 - 2 * flipped) * jax.nn.sigmoid(jnp.abs(difference))
    gap = weights * (confidence - right(difference))
    number = jnp.clip(((confidence - 0.5) * (2 * BINS)).astype(jnp.int32), 0, BINS - 1)
    return jnp.stack([jnp.sum(jnp.where(number == i, gap, 0)) for i in range(BINS)])


def right(difference: Float[Array, "*N"]) -> Float[Array, "*N"]:
    """1 where the preferred answer has the higher reward, 0 where it has the lower, 0.5 where they are equal."""
    return 0.5 * (1 + jnp.sign(difference))


def agreement(differences: Float[Array, "*N M"]) -> Float[Array, "*N"]:
    """The share of pairs of members that prefer the same answer; M is 2 or more."""
    number = differences.shape[-1]
    votes = jnp.sum(differences > 0, axis=-1).astype(differences.dtype)
    against = number - votes
    return (votes * (votes - 1) + against * (against - 1)) / (number * (number - 1))
