"""Answers of the policy in place of the data's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research import params
from research.errors import InputError
from research.models import transformer
from research.models.config import ModelConfig
from research.models.generation import make_generate, pad_prompts
from research.models.sampling import SamplingConfig
from research.rollouts.answers import make_rollout
from research.rollouts.spec import RolloutSpec

T, N, STOP = 24, 8, 3
MODEL = transformer.make_model(
    ModelConfig(vocab_size=32, num_layers=2, d_model=32, num_heads=4, num_kv_heads=2, d_ff=64, max_length=64)
)
PARAMS = params.init(MODEL.specs, jax.random.key(0))
PARAMS["embed"] *= 30.0  # so that answers differ and end at different places


def make_batch():
    """Prompts of 5, 16, 17 and 0 tokens, each but the last with an answer of 4; the third leaves too little room."""
    rng = np.random.default_rng(0)
    tokens = np.zeros((4, T), np.int32)
    segments, mask = np.zeros((4, T), np.int32), np.zeros((4, T), np.float32)
    for row, prompt in enumerate((5, 16, 17, 0)):
        tokens[row, : prompt + 4] = rng.integers(4, 32, prompt + 4)
        segments[row, : prompt + 4] = 1
        mask[row, prompt : prompt + 4] = 1
    positions = np.where(segments > 0, np.arange(T, dtype=np.int32)[None], 0)
    source = np.where(segments > 0, np.array([[1], [0], [1], [0]], np.int32), 0)
    batch = {"tokens": tokens, "segment_ids": segments, "positions": positions, "loss_mask": mask, "source": source}
    return batch | {"prefix": segments}  # all of each, which an answer is to change


@functools.cache
def jitted_rollout(share, **options):
    spec = RolloutSpec(share=share, max_new_tokens=N, **options)
    return jax.jit(make_rollout(MODEL, spec, seq_len=T, stop_tokens=(STOP,), vocab_size=32))


def roll(share, seed=0, **options):
    batch = make_batch()
    out = jitted_rollout(share, **options)(PARAMS, {k: jnp.asarray(v) for k, v in batch.items()}, jax.random.key(seed))
    return batch, {k: np.asarray(v) for k, v in out.items()}


def test_an_answer_is_what_generate_gives_for_the_prompt():
    before, after = roll(1.0, temperature=0.0)
    generate = make_generate(MODEL, SamplingConfig(max_new_tokens=N, stop_tokens=(STOP,)), 32)
    for row, prompt in enumerate((5, 16)):
        prompts, lengths = pad_prompts([before["tokens"][row, :prompt].tolist()], bucket=T - N)
        made = generate(PARAMS, prompts, lengths, jax.random.key(0))
        end = prompt + int(made.lengths[0])
        np.testing.assert_array_equal(after["tokens"][row, :prompt], before["tokens"][row, :prompt])
        np.testing.assert_array_equal(after["tokens"][row, prompt:end], made.tokens[0, : end - prompt])
        for name, want in {
            "loss_mask": [0] * prompt + [1] * (end - prompt),
            "segment_ids": [1] * end,
            "positions": list(range(end)),
            "source": [1 - row] * end,
            "prefix": [1] * prompt + [0] * (end - prompt),
        }.items():
            np.testing.assert_array_equal(after[name][row], want + [0] * (T - end))
        np.testing.assert_array_equal(after["tokens"][row, end:], 0)
    assert not np.array_equal(after["tokens"][0], before["tokens"][0])


@pytest.mark.slow
def test_rows_that_take_turns_get_the_same_answers():
    together, turns = (roll(1.0, temperature=1.0, slots=slots)[1] for slots in (0, 1))
    for name, want in together.items():
        np.testing.assert_array_equal(turns[name], want)


def test_a_row_without_room_or_without_a_prompt_keeps_its_answer():
    before, after = roll(1.0)
    for name in before:
        np.testing.assert_array_equal(after[name][2:], before[name][2:])


@pytest.mark.slow
def test_the_share_is_of_rows_and_chance_is_the_key_s():
    before, after = roll(0.0)
    np.testing.assert_array_equal(after["tokens"], before["tokens"])
    changed = [not np.array_equal(roll(0.5, seed)[1]["tokens"][0], before["tokens"][0]) for seed in range(6)]
    assert 0 < sum(changed) < 6
    np.testing.assert_array_equal(roll(0.5, 3)[1]["tokens"], roll(0.5, 3)[1]["tokens"])


def test_what_cannot_work_is_named():
    with pytest.raises(InputError, match=r"rollout\.share = 1\.5: must be in \[0, 1\]"):
        RolloutSpec(share=1.5)
    with pytest.raises(InputError, match=r"rollout\.slots = -1: must be at least 0"):
        RolloutSpec(slots=-1)
    with pytest.raises(InputError, match=r"rollout\.max_new_tokens = 24 leaves no room for a prompt in seq_len = 24"):
        make_rollout(MODEL, RolloutSpec(1.0, max_new_tokens=24), seq_len=24, stop_tokens=(), vocab_size=32)
