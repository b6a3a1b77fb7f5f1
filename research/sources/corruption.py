"""Corruption of texts for denoising: which tokens are hidden, what stands for them, and how long that makes a text.

A mask says which tokens are hidden. From a text and its mask come the inputs, which a model is shown, and the targets,
which it is to write. The definitions are those of T5 (Raffel et al., arXiv:1910.10683, and t5/data/preprocessors.py),
whose names stand in brackets.
"""

from collections.abc import Callable, Sequence

import numpy as np

from research.errors import InputError


def span_counts(length: int, density: float, mean_span: float) -> tuple[int, int]:
    """How many tokens are hidden, and in how many spans: the same in every draw.

    At least one token is hidden and one shown, and no two spans touch. Halves are rounded to even numbers, in float64
    as random_spans_helper does. (random_spans_noise_mask counts in float32, which hides one token more at a few ties,
    such as 0.15 of 190.)

    Args:
      length: of the text in tokens, at least 2.
      density: share of the tokens that is hidden.
      mean_span: mean number of tokens in a span.
    """
    hidden, _ = _rounded_counts(length, density, mean_span)
    hidden = min(max(hidden, 1), length - 1)
    return hidden, min(max(round(hidden / mean_span), 1), hidden, length - hidden)


def _rounded_counts(length: int, density: float, mean_span: float) -> tuple[int, int]:
    """The counts as the shares say, which may be 0."""
    hidden = round(length * density)
    return hidden, round(hidden / mean_span)


def span_mask(length: int, density: float, mean_span: float, rng: np.random.Generator) -> np.ndarray:
    """Spans by chance (random_spans_noise_mask): [length] bool, True where a token is hidden.

    Stretches of shown and of hidden tokens alternate; the first is shown and the last hidden. All masks with the
    counts of `span_counts`, which see for the arguments, are equally likely.
    """
    hidden, spans = span_counts(length, density, mean_span)
    sizes = np.empty(2 * spans, np.int64)
    sizes[0::2], sizes[1::2] = _segment_sizes(length - hidden, spans, rng), _segment_sizes(hidden, spans, rng)
    return np.repeat(np.arange(2 * spans) % 2 == 1, sizes)


def _segment_sizes(items: int, segments: int, rng: np.random.Generator) -> np.ndarray:
    """Parts `items` into segments of at least one, all partitions equally likely: [segments] int64."""
    edges = np.zeros(segments + 1, np.int64)
    edges[1:-1] = np.sort(rng.choice(items - 1, segments - 1, replace=False, shuffle=False)) + 1 if segments > 1 else 0
    edges[-1] = items
    return edges[1:] - edges[:-1]


def suffix_mask(length: int, density: float, rng: np.random.Generator) -> np.ndarray:
    """A suffix of random length: [length] bool, True where a token is hidden.

    Its length is uniform around the mean length * density, and as wide as leaves one token at least on either side.
    With a density of 0.5 any split is equally likely (random_prefix_noise_mask, whose True is what is shown).

    Args:
      length: of the text in tokens, at least 2.
      density: mean share of the tokens that is hidden.
      rng: draws the length.
    """
    mean = min(max(round(length * density * 2), 2), 2 * length - 2)  # twice the mean, so that halves are whole
    least, most = max(1, mean - length + 1), min(mean - 1, length - 1)
    return np.arange(length) >= length - int(rng.integers(least, most + 1))


def with_sentinels(tokens: np.ndarray, mask: np.ndarray, sentinels: Sequence[int] | np.ndarray | int) -> np.ndarray:
    """Each stretch of masked tokens becomes one sentinel.

    With the mask, this gives inputs (noise_span_to_unique_sentinel); with its inverse, targets
    (nonnoise_span_to_unique_sentinel).

    Args:
      tokens: [n] integers.
      mask: [n] bool.
      sentinels: ids in the order of use; or one id for all stretches (noise_span_to_sentinel).

    Raises:
      InputError: there are more stretches than sentinels.
    """
    later = np.zeros_like(mask)
    later[1:] = mask[1:] & mask[:-1]
    first = np.flatnonzero(mask & ~later)
    result = tokens.copy()
    if not isinstance(sentinels, int):
        if len(first) > len(sentinels):
            raise InputError(f"{len(first)} spans need as many sentinels, and there are {len(sentinels)}.")
        sentinels = np.asarray(sentinels)[: len(first)]
    result[first] = sentinels
    return result[~later]


def restored(inputs: np.ndarray, targets: np.ndarray, sentinels: Sequence[int] | np.ndarray | int) -> np.ndarray:
    """The text that inputs and targets were made of, or that a model's answer to inputs makes.

    What stands after the k-th sentinel of the targets, up to the next one or the end, takes the place of the k-th
    sentinel of the inputs. (Targets whose first token is none belong to a text that begins with a span.)

    Args:
      inputs, targets: [n], [m] integers, without the tokens that begin and end them.
      sentinels: all ids that mark spans; or the only one.
    """
    before, *spans = np.split(targets, np.flatnonzero(np.isin(targets, sentinels)))
    spans = ([before] if len(before) else []) + [span[1:] for span in spans]
    first, *shown = np.split(inputs, np.flatnonzero(np.isin(inputs, sentinels)))
    spans += [targets[:0]] * (len(shown) - len(spans))
    pairs = zip(spans, shown, strict=False)  # a sentinel that closes the targets has no place in the inputs
    return np.concatenate([first, *(part for span, after in pairs for part in (span, after[1:]))])


def longest(size: Callable[[int], int], limit: int) -> int:
    """The greatest length n with size(n) <= limit, where `size` never falls and grows without end; 1 where size(2) is
    more."""
    low, high = 1, 2
    while size(high) <= limit:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if size(middle) <= limit else (low, middle)
    return low


def encoder_lengths(inputs_length: int, density: float, mean_span: float) -> tuple[int, int]:
    """What an encoder's inputs of so many tokens hold (random_spans_helper).

    Args:
      inputs_length: of inputs with the token that ends them.
      density, mean_span: see `span_counts`.

    Returns:
      the greatest length of a text whose inputs fit, and the length of its targets with the token that ends them. At a
      density of 0.5, a text whose targets would be longer than its inputs has one token less. As there, a text too
      short for one span of the mean length counts as having none, and its inputs are a token longer than that.
    """

    def sizes(length: int) -> tuple[int, int]:
        hidden, spans = _rounded_counts(length, density, mean_span)
        return length - hidden + spans + 1, hidden + spans + 1

    length = longest(lambda length: sizes(length)[0], inputs_length)
    inputs, targets = sizes(length)
    return (length - 1, targets - 1) if density == 0.5 and targets > inputs else (length, targets)
