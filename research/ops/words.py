"""Where words begin in rows of tokens, looked up in tables of what each token of a vocabulary spells.

A word is a run of characters that are neither white space nor punctuation; of the others each stands alone, and so does
each Chinese character: what BERT takes for words (google-research/bert, tokenization.py). Tokens that have a part of
one word belong together. Axes: B batch, T time, V vocabulary.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

ALONE, LETTER, PIECE, INSIDE = range(4)  # kinds of characters; see WordTables


@dataclasses.dataclass(frozen=True, eq=False)
class WordTables:
    """What the tokens of a vocabulary spell, as far as borders of words depend on it. Arrays of NumPy.

    A character of several bytes may lie in several tokens. Then its bytes are put together from a token's own and from
    those that follow.

    Attributes:
      first: [V] uint8, of the character that a token begins with: ALONE, or LETTER of a word; PIECE where the token is
        but the first bytes of one character; INSIDE where the character began in a token before.
      last: [V] uint8, of the last character that begins in a token: ALONE, LETTER, or PIECE where it goes on after the
        token; INSIDE where none begins in it.
      bits, missing: [V] int32, of that PIECE: the bits of its code point so far, and how many bytes are to come.
      leading: [V, 3] uint8, the first bytes of a token; 0 beyond its end.
      size: [V] int32, how many of these it has; 3 for one that spells nothing, since no character goes on after it.
      borders: [N] int32, code points: a character is of a word where an odd number of them are no larger.
    """

    first: np.ndarray
    last: np.ndarray
    bits: np.ndarray
    missing: np.ndarray
    leading: np.ndarray
    size: np.ndarray
    borders: np.ndarray

    @property
    def has_pieces(self) -> bool:
        """Whether any token ends within a character."""
        return bool(np.any(self.missing))


def word_starts(tables: WordTables, tokens: Int[Array, "B T"], documents: Int[Array, "B T"]) -> Bool[Array, "B T"]:
    """True at each token that has no part of the word of the token before it.

    Args:
      tables: of the tokens' vocabulary.
      tokens: ids.
      documents: a number for each token, another one in each of two neighbouring documents. No word is of both.
    """
    first, last = (jnp.asarray(table)[tokens] for table in (tables.first, tables.last))
    if tables.has_pieces:
        kind = _kind_of_piece(tables, tokens)
        first = jnp.where(first == PIECE, kind, first)
        last = jnp.where(last == PIECE, kind, last)
        for _ in range(3):  # a character of four bytes may have three tokens in which none begins
            last = jnp.where(last == INSIDE, _before(last, ALONE), last)
    joined = (first == INSIDE) | ((first == LETTER) & (_before(last, ALONE) == LETTER))
    return ~(joined & (documents == _before(documents, -1)))


def _kind_of_piece(tables: WordTables, tokens: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """ALONE or LETTER: the character whose first bytes end a token, and whose others are in those that follow."""
    leading, size = jnp.asarray(tables.leading)[tokens].astype(jnp.int32), jnp.asarray(tables.size)[tokens]
    (one, two, three), (size_one, size_two) = _following(leading), _following(size)[:2]
    third = jnp.where(size_two >= 2, two[:, :, 1], three[:, :, 0])
    following = (
        one[:, :, 0],
        jnp.where(size_one >= 2, one[:, :, 1], two[:, :, 0]),
        jnp.where(size_one >= 3, one[:, :, 2], jnp.where(size_one == 2, two[:, :, 0], third)),
    )
    code, missing = jnp.asarray(tables.bits)[tokens], jnp.asarray(tables.missing)[tokens]
    whole = jnp.ones(tokens.shape, bool)
    for number, byte in enumerate(following):
        needed = missing > number
        whole &= ~needed | (byte >> 6 == 0b10)
        code = jnp.where(needed, (code << 6) | (byte & 0b111111), code)
    of_word = jnp.searchsorted(jnp.asarray(tables.borders), code, side="right") % 2 == 1
    return jnp.where(whole & of_word, LETTER, ALONE).astype(jnp.uint8)


def _following(x: Int[Array, "B T ..."]) -> list[Int[Array, "B T ..."]]:
    """`x` of the next token, of that after it, and of the third; 0 beyond the row."""
    beyond = [(0, 0), (0, 3)] + [(0, 0)] * (x.ndim - 2)
    padded = jnp.pad(x, beyond)
    return [padded[:, n : n + x.shape[1]] for n in (1, 2, 3)]


def _before(x: Int[Array, "B T"], fill: int) -> Int[Array, "B T"]:
    """`x` of the token before each; `fill` for the first."""
    return jnp.pad(x[:, :-1], ((0, 0), (1, 0)), constant_values=fill)
