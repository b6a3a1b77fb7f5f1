"""Rotations against complex numbers, and stretched frequencies against their formulas, one pair at a time."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from research.errors import InputError
from research.ops.rope import RopeScaling, attention_factor, frequencies, rope, rope_angles

THETA, DIM = 500_000.0, 64
LLAMA3 = RopeScaling("llama3", 8.0, 8192)
YARN = RopeScaling("yarn", 4.0, 4096)
LONG = RopeScaling("longrope", 4.0, 8, short_factors=(1.0, 1.1), long_factors=(2.0, 3.0))


def plain(i):
    return THETA ** (-2 * i / DIM)


def llama3(i):
    wavelength = 2 * math.pi / plain(i)
    if wavelength < 8192 / 4:
        return plain(i)
    if wavelength > 8192:
        return plain(i) / 8
    smooth = (8192 / wavelength - 1) / (4 - 1)
    return (1 - smooth) * plain(i) / 8 + smooth * plain(i)


def yarn(i):
    """Section 3.2 of arXiv:2309.00071, with the ramp over whole dimensions, as the authors' code has it."""

    def pair_that_turns(times):
        return DIM / 2 * math.log(4096 / (2 * math.pi * times)) / math.log(THETA)

    low, high = math.floor(pair_that_turns(32)), math.ceil(pair_that_turns(1))
    ramp = min(max((i - low) / (high - low), 0), 1)
    return plain(i) / 4 * ramp + plain(i) * (1 - ramp)


@pytest.mark.parametrize(
    ("scaling", "formula"),
    [
        (RopeScaling(), plain),
        (RopeScaling("linear", 4.0), lambda i: plain(i) / 4),
        (LLAMA3, llama3),
        (YARN, yarn),
    ],
)
def test_frequencies_follow_their_formula(scaling, formula):
    ours = frequencies(THETA, DIM, scaling)
    np.testing.assert_allclose(ours, [formula(i) for i in range(DIM // 2)], rtol=1e-12)


@pytest.mark.parametrize("scaling", [LLAMA3, YARN])
def test_fast_pairs_stay_and_slow_pairs_are_divided(scaling):
    ratio = frequencies(THETA, DIM, RopeScaling()) / frequencies(THETA, DIM, scaling)
    assert ratio[0] == 1
    assert ratio[-1] == pytest.approx(scaling.factor)
    assert np.all(np.diff(ratio) >= 0)
    assert np.sum((ratio > 1) & (ratio < scaling.factor - 1e-9)) > 2


def test_scores_are_scaled_with_the_frequencies():
    assert attention_factor(YARN) == pytest.approx(0.1 * math.log(4) + 1)
    assert attention_factor(LONG) == pytest.approx(math.sqrt(1 + math.log(4) / math.log(8)))
    assert attention_factor(LLAMA3) == attention_factor(RopeScaling("linear", 4.0)) == 1
    assert attention_factor(RopeScaling("yarn", 4.0, 16, attention_factor=1.5)) == 1.5
    cos, sin = rope_angles(1e4, 8, YARN, jnp.arange(5, dtype=jnp.int32)[None])
    np.testing.assert_allclose(cos**2 + sin**2, (0.1 * math.log(4) + 1) ** 2, rtol=1e-6)


def test_longrope_goes_by_the_length_of_each_document():
    """A row of two documents, of 8 and of 9 tokens, where 8 are the most that aren't stretched."""
    positions = jnp.asarray([[*range(8), *range(9)]], jnp.int32)
    lengths = jnp.asarray([[8] * 8 + [9] * 9], jnp.int32)
    cos, sin = rope_angles(100.0, 4, LONG, positions, lengths)
    angle = np.arctan2(sin, cos)[0, :, 0]
    frequency = np.array([1.0, 0.1])
    expected = np.concatenate(
        [np.arange(8)[:, None] * frequency / [1.0, 1.1], np.arange(9)[:, None] * frequency / [2.0, 3.0]]
    )
    np.testing.assert_allclose(np.exp(1j * angle), np.exp(1j * expected), atol=1e-5)


@pytest.mark.parametrize("rotary_dim", [8, 4])
def test_pairs_are_turned_as_complex_numbers_and_the_rest_stays(rotary_dim):
    x = np.random.default_rng(0).normal(size=(2, 5, 3, 8)).astype(np.float32)
    positions = np.array([[0, 1, 2, 3, 4], [7, 7, 0, 100, 2]], np.int32)
    R = rotary_dim // 2
    turn = np.exp(1j * positions[:, :, None, None] * 100.0 ** (-np.arange(R) / R))
    pairs = (x[..., :R] + 1j * x[..., R:rotary_dim]) * turn
    expected = np.concatenate([pairs.real, pairs.imag, x[..., rotary_dim:]], axis=-1)
    angles = rope_angles(100.0, rotary_dim, RopeScaling(), jnp.asarray(positions))
    np.testing.assert_allclose(rope(jnp.asarray(x), angles), expected, atol=1e-4)
    assert rope(jnp.asarray(x, jnp.bfloat16), angles).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("scaling", "words"),
    [
        (RopeScaling("yarm", 2.0, 8), r"rope_scaling\.kind = 'yarm'.* Did you mean 'yarn'"),
        (RopeScaling("llama3", 2.0), r"rope_scaling\.original_length = 0: 'llama3'"),
        (RopeScaling("linear", 0.5), r"rope_scaling\.factor = 0\.5"),
        (
            RopeScaling("longrope", 2.0, 8, short_factors=(1.0,), long_factors=(1.0,) * 4),
            r"short_factors: has 1 .* 4 pairs",
        ),
    ],
)
def test_scalings_that_can_not_be(scaling, words):
    with pytest.raises(InputError, match=words):
        scaling.check(8)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_frequencies_are_those_of_transformers(seed):
    torch = pytest.importorskip("torch")
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rng = np.random.default_rng(seed)
    theta, dim, original = float(rng.choice([1e4, 5e5])), int(rng.choice([8, 64, 128])), int(rng.choice([64, 4096]))
    factor = float(rng.uniform(1.5, 32))
    fast, slow = float(rng.uniform(8, 64)), float(rng.uniform(0.5, 4))
    factors = tuple(rng.uniform(1, 8, dim // 2).tolist())
    told = {"factor": factor, "original_max_position_embeddings": original}
    for kind, ours, theirs in (
        ("linear", {}, {}),
        (
            "llama3",
            {"low_freq_factor": slow, "high_freq_factor": fast},
            {"low_freq_factor": slow, "high_freq_factor": fast},
        ),
        ("yarn", {"beta_fast": fast, "beta_slow": slow}, {"beta_fast": fast, "beta_slow": slow}),
        ("yarn", {"truncate": False}, {"truncate": False}),
        (
            "longrope",
            {"long_factors": factors, "short_factors": factors[::-1]},
            {"long_factor": list(factors), "short_factor": list(factors[::-1])},
        ),
    ):
        scaling = RopeScaling(kind, factor, original, **ours)
        config = LlamaConfig(
            head_dim=dim,
            max_position_embeddings=int(original * factor),
            rope_theta=theta,
            rope_parameters={"rope_theta": theta, "rope_type": kind, **told, **theirs},
        )
        for length in (original, original + 1):
            frequency, attention = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=length)
            mine = frequencies(theta, dim, scaling, long=length > original)
            np.testing.assert_allclose(mine, frequency.numpy(), rtol=1e-5, err_msg=kind)
            assert attention_factor(scaling) == pytest.approx(attention, rel=1e-6)
