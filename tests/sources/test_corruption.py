"""Corruption of texts: T5's inputs, targets and lengths exactly, masks as likely as there, and the inverse."""

import itertools
from collections import Counter

import goldens
import numpy as np
import pytest

from research.errors import InputError
from research.sources import corruption

CASES = goldens.load("spans")
T5 = [case for name, case in CASES.items() if name.startswith("t5_span_")]
ONE = [case for name, case in CASES.items() if name.startswith("t5_single_sentinel_")]
FLAX = [case for name, case in CASES.items() if name.startswith("hf_t5mlm_")]


@pytest.mark.parametrize("case", T5, ids=lambda case: case.name)
def test_spans_are_marked_as_t5_marks_them(case):
    """Texts that begin or end with a hidden span are among them."""
    tokens, mask = case.inputs["tokens"], case.inputs["noise_mask"]
    sentinels = np.arange(case.hparams["vocab_size"] - 1, 70, -1)
    inputs = corruption.with_sentinels(tokens, mask, sentinels)
    targets = corruption.with_sentinels(tokens, ~mask, sentinels)
    np.testing.assert_array_equal(inputs, case.outputs["inputs"])
    np.testing.assert_array_equal(targets, case.outputs["targets"])
    np.testing.assert_array_equal(corruption.restored(inputs, targets, sentinels), tokens)


def test_the_golden_texts_begin_and_end_either_way():
    assert {(bool(c.inputs["noise_mask"][0]), bool(c.inputs["noise_mask"][-1])) for c in T5} >= {
        (False, False),
        (True, False),
        (False, True),
    }


@pytest.mark.parametrize("case", ONE, ids=lambda case: case.name)
def test_one_sentinel_for_every_span_or_token_or_none(case):
    tokens, mask = case.inputs["tokens"], case.inputs["noise_mask"]
    last = case.hparams["vocab_size"] - 1
    np.testing.assert_array_equal(corruption.with_sentinels(tokens, mask, last), case.outputs["span_to_one_sentinel"])
    np.testing.assert_array_equal(np.where(mask, last, tokens), case.outputs["token_to_sentinel"])
    np.testing.assert_array_equal(tokens[~mask], case.outputs["drop_noise"])
    np.testing.assert_array_equal(tokens[mask], case.outputs["drop_nonnoise"])


@pytest.mark.parametrize("case", FLAX, ids=lambda case: case.name)
def test_counts_and_rising_sentinels_as_in_the_flax_example_of_transformers(case):
    eos, sentinels = case.hparams["eos_token_id"], np.arange(case.hparams["vocab_size"], 200)
    settings = case.hparams["noise_density"], case.hparams["mean_noise_span_length"]
    for i, (tokens, mask) in enumerate(zip(case.inputs["tokens"], case.inputs["noise_mask"], strict=True)):
        counts = case.outputs["num_noise_tokens"][i], case.outputs["num_spans"][i]
        assert corruption.span_counts(len(tokens), *settings) == counts
        inputs = corruption.with_sentinels(tokens, mask, sentinels)
        targets = corruption.with_sentinels(tokens, ~mask, sentinels)
        np.testing.assert_array_equal([*inputs, eos], case.outputs["input_ids"][i])
        np.testing.assert_array_equal([*targets, eos], case.outputs["labels"][i])


def test_lengths_are_those_of_random_spans_helper():
    for inputs_length, density, mean_span, tokens, targets in CASES["t5_lengths"].outputs["table"]:
        assert corruption.encoder_lengths(int(inputs_length), density, mean_span) == (tokens, targets)


def test_a_mask_has_its_counts_and_alternates():
    rng = np.random.default_rng(0)
    for _ in range(300):
        length, density, mean_span = int(rng.integers(2, 200)), rng.uniform(0.01, 0.99), rng.uniform(1, 20)
        mask = corruption.span_mask(length, density, mean_span, rng)
        hidden, spans = corruption.span_counts(length, density, mean_span)
        assert (len(mask), mask.sum(), np.sum(mask[1:] & ~mask[:-1])) == (length, hidden, spans)
        assert not mask[0]
        assert mask[-1]


def test_all_masks_are_equally_likely():
    """Of 9 tokens 4 are hidden in 2 spans: 3 ways to part the hidden ones, and 4 to part the others."""
    rng, draws = np.random.default_rng(1), 12_000
    counts = Counter(corruption.span_mask(9, 4 / 9, 2.0, rng).tobytes() for _ in range(draws))
    assert len(counts) == 12
    chi2 = sum((n - draws / 12) ** 2 / (draws / 12) for n in counts.values())
    assert chi2 < 31.3  # the 0.001 quantile of 11 degrees of freedom


def test_the_least_and_the_most_that_is_hidden():
    """At least one token is hidden and one shown, and spans never touch."""
    assert corruption.span_counts(2, 0.15, 3.0) == (1, 1)
    assert corruption.span_counts(100, 1e-9, 3.0) == (1, 1)
    assert corruption.span_counts(100, 1 - 1e-9, 3.0) == (99, 1)
    assert corruption.span_counts(100, 0.9, 1.0) == (90, 10)
    mask = corruption.span_mask(100, 0.9, 1.0, np.random.default_rng(0))
    assert (mask.sum(), np.sum(mask[1:] & ~mask[:-1])) == (90, 10)


def test_a_suffix_of_half_the_text_is_any_and_others_have_their_mean():
    rng = np.random.default_rng(2)
    for length, density in itertools.product((2, 3, 10, 41), (0.05, 0.25, 0.5, 0.75, 0.95)):
        masks = [corruption.suffix_mask(length, density, rng) for _ in range(2000)]
        sizes = np.array([mask.sum() for mask in masks])
        assert all(not mask[0] and mask[-1] and np.all(np.diff(mask.astype(int)) >= 0) for mask in masks)
        mean = min(max(round(2 * length * density), 2), 2 * length - 2) / 2
        assert abs(sizes.mean() - mean) < 4 * max(sizes.std(), 1e-9) / np.sqrt(len(sizes)) + 1e-9
        if density == 0.5:
            assert set(sizes) == set(range(1, length))


def test_more_spans_than_sentinels_is_an_error_that_says_how_many():
    tokens, mask = np.arange(8), np.arange(8) % 2 == 1
    with pytest.raises(InputError, match="4 spans need as many sentinels, and there are 3"):
        corruption.with_sentinels(tokens, mask, [99, 98, 97])
    np.testing.assert_array_equal(corruption.with_sentinels(tokens, mask, 99), [0, 99, 2, 99, 4, 99, 6, 99])


def test_any_text_and_any_mask_come_back():
    rng, sentinels = np.random.default_rng(3), np.arange(1000, 1200)
    for _ in range(300):
        tokens = rng.integers(0, 1000, rng.integers(1, 120))
        mask = rng.random(len(tokens)) < rng.random()
        for ids in (sentinels, sentinels[::-1], 1000):
            if isinstance(ids, int) and mask.all():
                continue
            inputs = corruption.with_sentinels(tokens, mask, ids)
            targets = corruption.with_sentinels(tokens, ~mask, ids)
            np.testing.assert_array_equal(corruption.restored(inputs, targets, ids), tokens)


def test_an_answer_that_ends_early_leaves_its_spans_empty():
    inputs = np.array([1, 100, 2, 101, 3, 102])
    np.testing.assert_array_equal(
        corruption.restored(inputs, np.array([100, 7, 8, 101]), [100, 101, 102]), [1, 7, 8, 2, 3]
    )
    np.testing.assert_array_equal(corruption.restored(inputs, np.array([], int), [100, 101, 102]), [1, 2, 3])


def test_the_longest_text_that_fits():
    assert corruption.longest(lambda n: 3 * n, 100) == 33
    assert corruption.longest(lambda n: n // 10, 7) == 79
    assert corruption.longest(lambda n: n + 5, 6) == 1
