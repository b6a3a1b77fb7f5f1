"""Matching of states: what is compared, its own parameters, and one pass through each model."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from runs import load, parameters
from test_train import CONFIG, INITIAL, MODEL, close, make_batch

from research import config, loading, objectives, params, train
from research.devices import sharding
from research.errors import InputError
from research.models.config import ModelConfig
from research.models.transformer import make_model
from research.run import run

TEACHER = make_model(
    ModelConfig(
        128, num_layers=3, d_model=48, num_heads=6, num_kv_heads=3, d_ff=64, max_length=32, sliding_window=(0, 8)
    )
)
MODELS = {"policy": MODEL, "teacher": TEACHER}
FROZEN = {"teacher": jax.jit(lambda key: params.init(TEACHER.specs, key))(jax.random.PRNGKey(7))}
SPEC = {
    "terms": {"sft": 0.5, "match": 1.0},
    "match": {"layers": ((1, 2), (-1, -1)), "attention": ((2, -2),), "relations": ("attention", "values")},
}


def specs_of(spec):
    terms = objectives.load(spec)
    return {"policy": MODEL.specs, "objectives": {"match": terms["match"].specs(MODELS)}}


def values_of(spec):
    own = jax.jit(lambda key: params.init({"objectives": specs_of(spec)["objectives"]}, key))(jax.random.PRNGKey(3))
    return {"policy": INITIAL, **own}


def one_step(values, batch, frozen, microbatches=1):
    optimizer = optax.sgd(1.0)
    step = train.TrainStep(
        objectives.load(SPEC), MODELS, optimizer, schedule=lambda t: jnp.asarray(1.0), microbatches=microbatches
    )
    return jax.jit(step)(train.init_state(values, optimizer, jax.random.PRNGKey(1)), frozen, batch)


@pytest.fixture(scope="module")
def whole():
    return one_step(values_of(SPEC), make_batch(), FROZEN)


def test_the_states_are_those_that_come_out_of_the_layers():
    """The model cut after its n-th layer ends in the n-th state."""
    batch = make_batch()
    _, states = jax.jit(lambda p, b: TEACHER.hidden_at(p, b, (0, 1, 2, -1)))(FROZEN["teacher"], batch)
    for n, state in enumerate(states):
        if n == 0:
            np.testing.assert_array_equal(state, FROZEN["teacher"]["embed"][batch["tokens"]])
            continue
        cut = make_model(ModelConfig(**{**vars(TEACHER.config), "num_layers": n}))
        values = FROZEN["teacher"] | {"layers": jax.tree.map(lambda w, n=n: w[:n], FROZEN["teacher"]["layers"])}
        scale = jax.lax.rsqrt(jnp.mean(jnp.square(state), axis=-1, keepdims=True) + cut.config.norm_eps)
        close(jax.jit(cut.hidden)(values, batch), state * scale * values["final_norm"]["scale"][None, None])


def test_the_loss_is_what_its_parts_are(whole):
    batch, values = make_batch(), values_of(SPEC)
    weights = (batch["segment_ids"] > 0).astype(jnp.float32)
    (_, ours), (_, theirs) = (
        MODELS[role].hidden_at(p, batch, layers)
        for role, p, layers in (("policy", INITIAL, (1, 2)), ("teacher", FROZEN["teacher"], (2, 3)))
    )
    own, means = values["objectives"]["match"], train.means([whole[1]])
    for name, x, y in (("1_2", ours[0], theirs[0]), ("-1_-1", ours[1], theirs[1])):
        each = jnp.mean(jnp.square(x @ own[name] - y), axis=-1)
        np.testing.assert_allclose(means[f"match/hidden_{name}"], jnp.sum(each * weights) / weights.sum(), rtol=1e-4)
    parts = sum(v for k, v in means.items() if k.startswith(("match/hidden", "match/attention")))
    np.testing.assert_allclose(means["match/loss"], parts, rtol=1e-5)
    assert means["match/attention_2_-2"] > 0
    np.testing.assert_allclose(means["loss"], 0.5 * means["sft/loss"] + means["match/loss"], rtol=1e-5)


def test_attention_is_what_the_model_attends_with():
    """Values mixed by the relation of queries and keys, then projected, are what the layer adds to the stream."""
    batch = make_batch()
    config = ModelConfig(**{**vars(CONFIG), "num_layers": 1})
    model = make_model(config)
    values = INITIAL | {"layers": jax.tree.map(lambda w: w[:1], INITIAL["layers"])}
    silent = jax.tree.map(jnp.zeros_like, values["layers"]["mlp"])
    values = values | {"layers": values["layers"] | {"mlp": silent}}
    _, (before, after) = model.hidden_at(values, batch, (0, 1))
    q, k, v = model.attention_inputs(values, before, batch, 1)
    k, v = (jnp.repeat(x, 2, axis=2) for x in (k, v))
    scores = jnp.einsum("bthd,bshd->bhts", q, k) / np.sqrt(8).astype(np.float32)
    T, segments = scores.shape[-1], batch["segment_ids"]
    seen = (segments[:, :, None] == segments[:, None, :]) & (jnp.arange(T)[:, None] >= jnp.arange(T)[None])[None]
    mixed = jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(jnp.where(seen[:, None], scores, -jnp.inf)), v)
    added = jnp.einsum("bthd,hde->bte", mixed, values["layers"]["attention"]["o"]["kernel"][0])
    real = (segments > 0)[..., None]
    close(jnp.where(real, after - before, 0.0), jnp.where(real, added, 0.0))


def test_projections_train_and_the_teacher_does_not(whole):
    values = values_of(SPEC)
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), values, whole[0].params)
    assert all(x > 0 for x in jax.tree.leaves(moved["objectives"]))
    assert whole[0].params.keys() == {"policy", "objectives"}


@pytest.mark.slow
def test_microbatches_on_a_mesh_give_the_update_of_the_whole_batch(whole):
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    with jax.set_mesh(mesh):
        values = jax.device_put(values_of(SPEC), params.shardings(specs_of(SPEC), mesh))
        rows = jax.device_put(make_batch(), sharding.named(mesh, ("batch", "time")))
        sharded, _ = one_step(values, rows, jax.device_put(FROZEN, sharding.named(mesh, ())), microbatches=2)
    close(sharded.params, whole[0].params, rtol=1e-3, atol=1e-5)


def test_composed_terms_make_one_pass_through_each_model():
    calls = []
    counted = {
        role: model._replace(
            hidden=lambda *a: pytest.fail("a second pass"),
            hidden_at=lambda *a, role=role, model=model: calls.append(role) or model.hidden_at(*a),
        )
        for role, model in MODELS.items()
    }
    evaluate = train.EvalStep(objectives.load(SPEC), counted)
    jax.eval_shape(evaluate, values_of(SPEC), FROZEN, make_batch(), jax.random.PRNGKey(0))
    assert sorted(calls) == ["policy", "teacher"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": ((3, 1),)}, r"match\.layers: has \(3, 1\), and the student has layers 1 to 2"),
        ({"layers": ((-1, -5),)}, r"the teacher has layers 1 to 3"),
        ({"attention": ((0, 1),)}, r"match\.attention: has \(0, 1\), and the student"),
        ({"projection": "none"}, r"'none': the student is 32 wide, and the teacher 48"),
        ({"layers": (), "attention": ()}, "name no pair of layers"),
        ({"layers": (1, 2, 3)}, "match.layers = 1: must be of type list"),
        ({"layers": ((1, 2, 3),)}, "must be pairs of layers"),
        ({"relations": ("value",)}, "match.relations = 'value'.*Did you mean 'values'"),
        ({"distance": "mae"}, "match.distance = 'mae'"),
    ],
)
def test_what_can_not_be_compared_is_an_error(options, message):
    with pytest.raises(InputError, match=message):
        objectives.load({"terms": {"match": 1.0}, "match": options})["match"].specs(MODELS)


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
def test_a_run_keeps_its_projections(tmp_path):
    """Begun from a checkpoint, resumed, read as a model: the projections are the run's, not the model's."""
    few = {"steps": 1, "eval.every": 0, "checkpoint.best_metric": "", "data.path": "tasks:copy"}
    run.run(load("sft", **few), str(tmp_path / "teacher"))
    values = config.to_dict(load("sft", **few))
    values["model"] = {"init_from": str(tmp_path / "teacher")}
    values |= {"roles": {"teacher": {"init_from": str(tmp_path / "teacher")}}}
    values["objective"] = {"terms": {"match": 1.0}, "match": {"layers": [[1, -1]], "attention": [[1, 2]]}}
    run.run(config.parse(values), str(tmp_path / "student"))
    first = parameters(tmp_path / "student")
    final = run.run(config.parse({**values, "steps": 2}), str(tmp_path / "student"))
    second = parameters(tmp_path / "student")
    name = "['params']['objectives']['match']['1_-1']"
    assert first[name].shape == (64, 64)
    assert np.abs(first[name] - second[name]).max() > 0
    assert 0 < final["train/hidden_1_-1"] < 10
    assert (
        loading.load_model(str(tmp_path / "student")).params.keys()
        == loading.load_model(str(tmp_path / "teacher")).params.keys()
    )
