"""Rewards that models of a run give to answers: those that the same models give to the same tokens elsewhere."""

import jax
import numpy as np

from research import params
from research.devices import sharding
from research.evals import record_rewards
from research.models.config import ModelConfig
from research.models.transformer import make_model
from research.rollouts import model_rewards
from research.rollouts.engines.types import Answers
from research.rollouts.rewards.reward_model import ModelReward
from research.sources.prompts import Prompt

SIZE = {"vocab_size": 384, "num_layers": 1, "d_model": 16, "num_heads": 2, "num_kv_heads": 2, "d_ff": 16}
MODEL = make_model(ModelConfig(**SIZE, max_length=16, num_labels=3))
B, T, N = 4, 16, 5


def test_rewards_of_answers():
    """An ensemble's, combined in each way; 3 prompts with 2 answers each are one pass and a half."""
    values = params.init(MODEL.specs, jax.random.PRNGKey(0))
    values = {**values, "head": 50 * values["head"]}
    rng = np.random.default_rng(0)
    prompts = [Prompt(rng.integers(1, 99, 2 + i).astype(np.int32), "", {}, str, 0) for i in range(3)]
    lengths = np.array([1, 5, 3, 0, 2, 4], np.int32)
    tokens = np.where(np.arange(N) < lengths[:, None], rng.integers(1, 99, (6, N)), 0).astype(np.int32)
    answers = Answers(tokens, lengths, np.zeros((6, N), np.float32), lengths < N, 0)
    mesh = sharding.make_mesh({}, jax.devices()[:1])
    whole = sharding.named(mesh, ())
    like = {name: jax.ShapeDtypeStruct((B, T), np.int32, sharding=whole) for name in model_rewards.FIELDS}
    members = jax.jit(model_rewards.Members({"judge": MODEL}, ("judge",)), out_shardings=whole)
    mean, worst, penalised = (ModelReward("judge", *way) for way in (("mean", 0.0), ("min", 0.0), ("variance", 2.0)))
    ways = (mean, None, worst, penalised)
    documents = [np.concatenate([prompts[i // 2].tokens, tokens[i, : lengths[i]]]) for i in range(6)]
    with jax.set_mesh(mesh):
        given = model_rewards.ModelRewards(members, ways, like)({"judge": values}, prompts, answers, 2)
        apart = record_rewards.make_rewarder(MODEL)(values, documents).astype(np.float64)
    assert given.shape == (3, 2, 4)
    assert np.isnan(given[:, :, 1]).all()
    np.testing.assert_allclose(given[:, :, 0].reshape(6), apart.mean(axis=1), atol=1e-5)
    np.testing.assert_allclose(given[:, :, 2].reshape(6), apart.min(axis=1), atol=1e-5)
    np.testing.assert_allclose(given[:, :, 3].reshape(6), apart.mean(axis=1) - 2 * apart.var(axis=1), atol=1e-4)
    assert apart.std() > 0.1
