"""Reward models: what they read, that packing and cutting a batch change nothing, and a training of TRL's."""

import functools
from pathlib import Path

import goldens
import jax
import jax.numpy as jnp
import numpy as np
import pair_rows
import pytest

from research import loading, objectives, optim, params, train
from research.devices import sharding
from research.errors import InputError
from research.models.config import ModelConfig
from research.models.transformer import make_model
from research.objectives import terms as terms_lib
from research.objectives import types
from research.objectives.reward import notices
from research.objectives.terms import Inputs, row_numbers
from research.ops import rewards
from research.sources import fields

B, T, V, M = 8, 32, 64, 3
SIZE = {"vocab_size": V, "num_layers": 1, "d_model": 16, "num_heads": 2, "num_kv_heads": 2, "d_ff": 16}
MODEL = make_model(ModelConfig(**SIZE, num_labels=M, max_length=T))
VALUES = jax.tree.map(lambda x: 6.0 * x, params.init(MODEL.specs, jax.random.PRNGKey(0)))
NAMES = (*fields.group("text"), "pair", "side", "margin", "score")
TERMS = {
    "pairs": {},
    "margin": {"margin": True, "label_smoothing": 0.2, "centering": 0.3},
    "lists": {"loss": "plackett_luce", "centering": 0.1},
    "share": {"share": 0.6},
    "flipped": {"flipped": 0.2},
    "scores": {"loss": "regression"},
}


def terms_of(**terms):
    return objectives.load({"terms": {name: {"objective": "reward", **options} for name, options in terms.items()}})


def packed(seed=0):
    """See pair_rows.packed; of some answers nobody has said the score."""
    batch = pair_rows.packed(NAMES, B, T, V, seed)
    batch["score"] = np.where(batch["segment_ids"] == 2, np.nan, batch["score"])
    return batch


@functools.cache
def whole():
    return jax.jit(functools.partial(pair_rows.gradients, MODEL, terms_of(**TERMS)))(VALUES, packed())


def documents(batch):
    """Of each comparison its documents, the chosen first: (reward of each member, margin, score, length)."""
    logits = MODEL.hidden(VALUES, batch).astype(jnp.float32) @ MODEL.unembed(VALUES).kernel
    compared = {}
    for row in range(B):
        ends = np.flatnonzero(np.diff(np.append(batch["segment_ids"][row], 0)))
        for t in ends:
            read = (logits[row, t], batch["margin"][row, t], batch["score"][row, t], batch["positions"][row, t])
            compared.setdefault((row, batch["pair"][row, t]), {})[batch["side"][row, t]] = read
    return [(pair[0], pair[1]) for pair in compared.values()]


def close(a, b, **tolerance):
    jax.tree.map(functools.partial(np.testing.assert_allclose, **({"rtol": 1e-4, "atol": 1e-5} | tolerance)), a, b)


def test_losses_and_metrics_are_of_the_rewards_at_the_last_tokens():
    batch, (_, outs) = packed(), whole()
    pairs = documents(batch)
    (chosen, margin, *_), (rejected, *_) = ([np.array(x) for x in zip(*side, strict=True)] for side in zip(*pairs))  # noqa: B905
    assert len(pairs) > 10
    difference, log = chosen - rejected, lambda x: np.log1p(np.exp(-x))
    bt, squares = log(difference).mean(1), np.square(chosen + rejected).mean(1)
    close(outs["pairs"][:2], (bt.sum(), len(pairs)))
    smooth = 0.8 * log(difference - margin[:, None]) + 0.2 * log(-difference - margin[:, None])
    close(outs["margin"][0], (smooth.mean(1) + 0.3 * squares).sum())
    close(outs["lists"][0], (bt + 0.1 * squares).sum())
    metrics = {name: total / weight for name, (total, weight) in outs["pairs"][2].items()}
    mean = difference.mean(1)
    close((metrics["accuracy"], metrics["margin"]), ((mean > 0).mean(), mean.mean()))
    assert 0.2 < metrics["accuracy"] < 0.8
    close((metrics["log_loss"], metrics["identical"]), (log(mean).mean(), 0.0))
    agree = np.mean([(difference[:, i] > 0) == (difference[:, j] > 0) for i in range(M) for j in range(i)])
    close((metrics["agreement"], metrics["spread"]), (agree, difference.std(1).mean()))
    longer = np.array([a[3] - b[3] for a, b in pairs])
    for name, here in (("longer", longer > 0), ("shorter", longer < 0)):
        assert here.any()
        close(metrics[f"accuracy_where_{name}_wins"], (mean[here] > 0).mean())
    sums = rewards.calibration_sums(jnp.asarray(mean), jnp.ones(len(pairs)))
    close(train.means([outs["pairs"][2]])["calibration_error"], np.abs(sums).sum() / len(pairs))
    scored = [(reward, score) for pair in pairs for reward, _, score, _ in pair if not np.isnan(score)]
    errors = np.array([reward - score for reward, score in scored])
    close(outs["scores"][:2], (np.square(errors).mean(1).sum(), len(scored)))
    close(outs["scores"][2]["squared_error"][0], np.square(errors.mean(1)).sum())
    assert len(scored) < 2 * len(pairs)
    p = 1 / (1 + np.exp(-mean))
    close(outs["flipped"][2]["log_loss"][0], -np.log(0.8 * p + 0.2 * (1 - p)).sum())
    sums = rewards.calibration_sums(jnp.asarray(mean), jnp.ones(len(pairs)), 0.2)
    close(train.means([outs["flipped"][2]])["calibration_error"], np.abs(sums).sum() / len(pairs))
    assert 0.3 < outs["share"][1] / len(pairs) < 0.9


def test_the_loss_is_told_by_source():
    batch = packed()
    source = np.where(batch["pair"] % 2 == 0, 1, 0).astype(np.int32)
    forward = types.Forward({"policy": MODEL}, {"policy": VALUES}, {**batch, "source": source})
    inputs = Inputs(jax.random.PRNGKey(0), jnp.zeros((), jnp.int32), row_numbers(batch), {})
    outs = jax.jit(lambda: terms_lib.losses(terms_of(**TERMS), forward, inputs, ("even", "odd")))()
    for out in outs.values():
        parts = [out.metrics[f"loss/{name}"] for name in ("even", "odd")]
        close(np.sum(parts, axis=0), (out.loss_sum, out.weight))
        assert min(float(weight) for _, weight in parts) > 0


def test_packing_changes_nothing():
    alone = jax.jit(functools.partial(pair_rows.gradients, MODEL, terms_of(**TERMS)))(VALUES, pair_rows.alone(packed()))
    close(alone, whole())


@pytest.mark.slow
@pytest.mark.parametrize("cut", ["microbatches", "mesh"])
def test_cutting_a_batch_changes_nothing(cut):
    if cut == "microbatches":
        close(
            jax.jit(functools.partial(pair_rows.gradients, MODEL, terms_of(**TERMS), microbatches=4))(VALUES, packed()),
            whole(),
            atol=1e-4,
        )
        return
    mesh = sharding.make_mesh({"fsdp": 2, "sequence": 2, "tensor": 2})
    with jax.set_mesh(mesh):
        values = jax.device_put(VALUES, params.shardings(MODEL.specs, mesh))
        batch = jax.device_put(packed(), sharding.named(mesh, ("batch", "time")))
        close(
            jax.jit(functools.partial(pair_rows.gradients, MODEL, terms_of(**TERMS)))(values, batch), whole(), atol=1e-4
        )


def test_a_training_of_trl():
    """Each pair in one row, where TRL has two, padded."""
    case = goldens.load("reward")["reward_llama"]
    found = loading.find(str(Path(goldens.__file__).parent / "golden/hf_tiny/llama_reward"))
    model, mesh = make_model(found.config), sharding.make_mesh({}, jax.devices()[:1])
    values = found.read(model.specs, params.shardings(model.specs, mesh))
    options = {"learning_rate": 0.003, "warmup_steps": 2, "weight_decay": 0.01, "b2": 0.999, "clip_norm": 1.0}
    optimizer = optim.make_optimizer(
        optim.OptimizerSpec(**options), 8, {"policy": params.tree_map(lambda s: True, model.specs)}
    )
    terms = terms_of(reward={"centering": case.hparams["center_rewards_coefficient"]})
    step = jax.jit(train.TrainStep(terms, {"policy": model}, optimizer, lambda t: jnp.zeros(())))
    state = train.init_state({"policy": values}, optimizer, jax.random.PRNGKey(0))
    for i, wanted in enumerate(zip(case.outputs["loss"], case.outputs["grad_norm"], strict=True)):
        state, metrics = step(state, {}, side_by_side(case.inputs["input_ids"][i], case.inputs["attention_mask"][i]))
        got = [float(metrics[name][0] / metrics[name][1]) for name in ("loss", "grad_norm")]
        np.testing.assert_allclose(got, wanted, rtol=2e-4, err_msg=f"step {i}")
    probe = np.asarray(case.inputs["probe_ids"], np.int32)
    batch = {"tokens": probe, "segment_ids": np.ones_like(probe), "positions": np.arange(12)[None] + 0 * probe}
    logits = jax.jit(lambda values, batch: model.unembed(values).logits(model.hidden(values, batch)[:, -1]))
    final = logits(state.params["policy"], batch)
    np.testing.assert_allclose(final, case.outputs["final_probe_logits"], atol=2e-3)


def side_by_side(ids, mask):
    """TRL's rows, the chosen answers first, as rows with a chosen answer and a rejected one."""
    batch = fields.empty((*fields.group("text"), "pair", "side"), len(ids) // 2, {"time": 2 * ids.shape[1]})
    for row in range(len(ids) // 2):
        start = 0
        for side in (0, 1):
            tokens = ids[row + side * len(ids) // 2][mask[row + side * len(ids) // 2] == 1]
            here = np.s_[row, start : start + len(tokens)]
            placed = {"tokens": tokens, "segment_ids": side + 1, "positions": np.arange(len(tokens))}
            for name, value in {**placed, "pair": 1, "side": side}.items():
                batch[name][here] = value
            start += len(tokens)
    return batch


def test_what_a_run_says():
    assert notices({"log_loss": 0.7, "identical": 0.0}, True) == {}
    assert "begins at 1.2, and a new head has ln 2" in notices({"log_loss": 1.2}, True)["start"]
    assert notices({"log_loss": 1.2}, False) == {}
    assert "12.5% of the compared answers" in notices({"identical": 0.125}, False)["identical"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"loss": "bradley_tery"}, "Did you mean 'bradley_terry'"),
        ({"centering": -1.0}, "objective.terms.r.centering = -1.0: must be at least 0"),
        ({"label_smoothing": 0.5}, "must be in \\[0, 0.5\\)"),
        ({"flipped": 0.1, "label_smoothing": 0.1}, "give one of them"),
        ({"share": 0.0}, "must be in \\(0, 1\\]"),
        ({"loss": "plackett_luce", "margin": True}, "loss = 'plackett_luce' has no such option"),
        ({"loss": "regression", "centering": 0.1}, "loss = 'regression' has no such option"),
    ],
)
def test_bad_options_are_named(options, words):
    with pytest.raises(InputError, match=words):
        terms_of(r=options)


@pytest.mark.parametrize(
    ("num_labels", "options", "words"),
    [(0, {}, "model.num_labels = 0: the model's head predicts tokens"), (1, {"share": 0.5}, "share = 0.5: is of an")],
)
def test_a_head_that_does_not_fit_is_named(num_labels, options, words):
    model = make_model(ModelConfig(**SIZE, num_labels=num_labels, max_length=T))
    forward = types.Forward({"policy": model}, {"policy": params.init(model.specs, jax.random.PRNGKey(0))}, packed())
    (term,) = terms_of(r=options).values()
    with pytest.raises(InputError, match=words):
        jax.eval_shape(lambda: term.objective.loss(forward, forward.batch, None))


def test_a_head_of_one_number_begins_near_0():
    (one, many) = (make_model(ModelConfig(**SIZE, num_labels=n, max_length=T)).specs["head"] for n in (1, 3))
    scale = [
        float(jnp.std(spec.init(jax.random.PRNGKey(0), (4096, spec.shape[1]), jnp.float32))) for spec in (one, many)
    ]
    np.testing.assert_allclose(scale, [1 / 17, 0.02], rtol=0.05)
