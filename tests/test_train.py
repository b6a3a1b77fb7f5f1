"""The train step: the same update however the batch is cut or sharded; nothing taken from bad batches."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from research import objectives, optim, params, train
from research.devices import sharding
from research.models.config import ModelConfig
from research.models.transformer import make_model
from research.objectives import Term
from research.objectives.terms import init_carry
from research.objectives.types import LossOut, Objective

CONFIG = ModelConfig(vocab_size=128, num_layers=2, d_model=32, num_heads=4, num_kv_heads=2, d_ff=64, max_length=32)
MODEL = make_model(CONFIG)
EXPERTS = make_model(dataclasses.replace(CONFIG, num_experts=4, d_ff=32))
INITIAL, INITIAL_EXPERTS = (
    jax.jit(lambda key, model=model: params.init(model.specs, key))(jax.random.PRNGKey(0)) for model in (MODEL, EXPERTS)
)


def make_batch(rows=8, length=24, seed=0):
    """Packed rows with very uneven masks: one row has no supervised token at all."""
    rng = np.random.default_rng(seed)
    segments = np.sort(rng.integers(0, 4, (rows, length)), axis=1)[:, ::-1].astype(np.int32)
    positions = np.zeros_like(segments)
    for b in range(rows):
        for t in range(1, length):
            positions[b, t] = positions[b, t - 1] + 1 if segments[b, t] == segments[b, t - 1] else 0
    mask = (rng.random((rows, length)) < np.linspace(0, 0.9, rows)[:, None]).astype(np.float32) * (segments > 0)
    tokens = rng.integers(0, 128, (rows, length)).astype(np.int32)
    return {
        k: jnp.asarray(v)
        for k, v in {"tokens": tokens, "segment_ids": segments, "positions": positions, "loss_mask": mask}.items()
    }


def one_step(spec, batch, *, microbatches=1, optimizer=None, steps=1, model=MODEL, initial=INITIAL):
    terms, models = objectives.load(spec), {"policy": model}
    optimizer = optimizer or optax.sgd(1.0)
    step = jax.jit(
        train.TrainStep(terms, models, optimizer, schedule=lambda t: jnp.asarray(1.0), microbatches=microbatches)
    )
    state = train.init_state({"policy": initial}, optimizer, jax.random.PRNGKey(1))
    for _ in range(steps):
        state, metrics = step(state, {}, batch)
    return state, metrics


def adamw(model=MODEL):
    return optim.make_optimizer(
        optim.OptimizerSpec(learning_rate=1e-2, warmup_steps=0), 10, params.decay_mask({"policy": model.specs})
    )


def close(a, b, rtol=1e-4, atol=1e-6):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=rtol, atol=atol), a, b)


SFT = {"terms": {"sft": 1.0}}
TWO_TERMS = {"terms": {"sft": 0.3, "next_token": {"start": 0.5, "end": 1.0, "steps": 10}}, "sft": {"z_loss": 1e-3}}


@functools.cache
def whole_step(rate=1.0):
    """A step of SGD on the whole batch."""
    return one_step(SFT, make_batch(), optimizer=optax.sgd(rate))


@pytest.mark.parametrize(("spec", "cuts"), [(SFT, (4,)), (TWO_TERMS, (2, 4))])
def test_microbatches_give_the_update_of_the_whole_batch(spec, cuts):
    batch = make_batch()
    whole, metrics = whole_step() if spec is SFT else one_step(spec, batch)
    for parts in cuts:
        cut, cut_metrics = one_step(spec, batch, microbatches=parts)
        close(cut.params, whole.params)
        for name in ("loss", "grad_norm", "supervised_fraction"):
            np.testing.assert_allclose(*(m[name][0] / m[name][1] for m in (cut_metrics, metrics)), rtol=1e-4)


ROUTED = {"terms": {"sft": 1.0, "load_balance": 0.5, "router_z": 0.1}}


@pytest.mark.slow
def test_microbatches_give_the_update_of_the_whole_batch_with_losses_of_routers():
    batch = make_batch()
    whole, metrics = one_step(ROUTED, batch, model=EXPERTS, initial=INITIAL_EXPERTS)
    cut, cut_metrics = one_step(ROUTED, batch, microbatches=4, model=EXPERTS, initial=INITIAL_EXPERTS)
    close(cut.params, whole.params)
    names = ("loss", "load_balance/loss", "router_z/loss", "grad_norm/router", "router/entropy", "router/largest_load")
    for name in names:
        np.testing.assert_allclose(*(m[name][0] / m[name][1] for m in (cut_metrics, metrics)), rtol=1e-4, err_msg=name)
    values = train.means([metrics])
    assert values["grad_norm/router"] > 0
    assert values["router/dropped"] == 0
    assert values["router/smallest_load"] < 1 < values["router/largest_load"] < 2


def test_an_update_of_parameters_that_are_all_zero_has_no_ratio_to_them():
    zero = {"a": jnp.zeros(3)}
    terms = {"sum": Term(Objective(loss=_sum_of_parameters), lambda step: jnp.asarray(1.0))}
    step = jax.jit(train.TrainStep(terms, {}, optax.sgd(1.0), schedule=lambda t: jnp.asarray(1.0)))
    state, metrics = step(train.init_state({"policy": zero}, optax.sgd(1.0), jax.random.PRNGKey(1)), {}, make_batch())
    assert "update_ratio" not in train.means([metrics])
    np.testing.assert_array_equal(state.params["policy"]["a"], -jnp.ones(3))
    _, metrics = step(state, {}, make_batch())
    np.testing.assert_allclose(train.means([metrics])["update_ratio"], 1.0, rtol=1e-6)


def _sum_of_parameters(forward, batch, context):
    return LossOut(jnp.sum(forward.params["policy"]["a"]), jnp.ones(()), {})


def test_the_gradient_is_that_of_the_mean_over_supervised_tokens():
    batch, values = make_batch(), {"policy": INITIAL}

    def mean_nll(values):
        hidden = MODEL.hidden(values["policy"], batch)
        log_p = jax.nn.log_softmax(hidden @ MODEL.unembed(values["policy"]).kernel)
        nll = -jnp.take_along_axis(log_p[:, :-1], batch["tokens"][:, 1:, None], axis=2)[..., 0]
        same = batch["segment_ids"][:, 1:] == batch["segment_ids"][:, :-1]
        mask = batch["loss_mask"][:, 1:] * same.astype(jnp.float32)
        return jnp.sum(nll * mask) / jnp.sum(mask)

    state, metrics = whole_step()
    loss, grads = jax.jit(jax.value_and_grad(mean_nll))(values)
    np.testing.assert_allclose(metrics["loss"][0] / metrics["loss"][1], loss, rtol=1e-5)
    close(jax.tree.map(lambda a, b: a - b, values, state.params), grads)


def test_weights_are_found_without_a_second_forward_pass():
    """The scan that adds up the weights of the microbatches must cost next to nothing."""
    spec, batch = {"terms": {"sft": 1.0}}, make_batch()

    def products(microbatches):
        optimizer = optax.sgd(1.0)
        step = train.TrainStep(
            objectives.load(spec), {"policy": MODEL}, optimizer, schedule=lambda t: t, microbatches=microbatches
        )
        state = train.init_state({"policy": INITIAL}, optimizer, jax.random.PRNGKey(1))
        text = jax.jit(step).lower(state, {}, batch).compile().as_text()
        return text.count(" dot(") + text.count("__onednn$matmul") + text.count("custom-call(")

    assert 0 < products(2) <= products(1)


def test_composed_terms_make_one_forward_pass():
    batch, calls = make_batch(), []
    counted = MODEL._replace(hidden=lambda p, b: calls.append(1) or MODEL.hidden(p, b))
    evaluate = train.EvalStep(objectives.load(TWO_TERMS), {"policy": counted})
    values = {"policy": INITIAL}
    metrics = evaluate(values, {}, batch, jax.random.PRNGKey(0))
    assert len(calls) == 1
    means = {k: float(s / w) for k, (s, w) in metrics.items()}
    np.testing.assert_allclose(means["loss"], 0.3 * means["sft/loss"] + 0.5 * means["next_token/loss"], rtol=1e-5)


MESHES = [
    {"data": 8},
    {"fsdp": 4, "tensor": 2},
    {"data": 2, "fsdp": 2, "tensor": 2},
    {"sequence": 8},
    {"data": 2, "sequence": 4},
    {"fsdp": 2, "sequence": 2, "tensor": 2},
    {"expert": 4, "tensor": 2},
    {"fsdp": 2, "expert": 2, "sequence": 2},
]


def of(experts):
    model = EXPERTS if experts else MODEL
    return model, INITIAL_EXPERTS if experts else INITIAL, adamw(model)


@functools.cache
def on_one_device(experts):
    model, initial, optimizer = of(experts)
    spec = ROUTED if experts else SFT
    return one_step(spec, make_batch(), optimizer=optimizer, steps=3, model=model, initial=initial)


CUTS = [(mesh, False) for mesh in MESHES[:6]] + [(mesh, True) for mesh in (MESHES[1], *MESHES[5:])]
ALWAYS = (CUTS[2], CUTS[5], CUTS[9])  # each axis once


@pytest.mark.parametrize(
    ("mesh", "experts"), [pytest.param(*cut, marks=() if cut in ALWAYS else pytest.mark.slow) for cut in CUTS]
)
def test_sharded_equals_single_device(mesh, experts):
    single, single_metrics = on_one_device(experts)
    model, initial, optimizer, batch = *of(experts), make_batch()
    mesh = sharding.make_mesh(mesh)
    terms = objectives.load(ROUTED if experts else SFT)
    with jax.set_mesh(mesh):
        step = jax.jit(train.TrainStep(terms, {"policy": model}, optimizer, schedule=lambda t: jnp.asarray(1.0)))
        placed = params.shardings({"policy": model.specs}, mesh)
        values = jax.device_put({"policy": initial}, placed)
        state = train.init_state(values, optimizer, jax.random.PRNGKey(1))
        rows = jax.device_put(batch, sharding.named(mesh, ("batch", "time")))
        for _ in range(3):
            state, metrics = step(state, {}, rows)
    close(state.params, single.params, rtol=1e-3, atol=1e-5)
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(*(m[name][0] / m[name][1] for m in (metrics, single_metrics)), rtol=1e-4)


def part_step(pattern, microbatches=1, mesh=None, steps=2):
    """Some steps of SGD in which only what matches is trained: (state, frozen)."""
    specs = params.cut(MODEL.specs, pattern)
    halves = params.split(specs, params.matching(specs, pattern))
    trained, frozen = params.split(params.in_pieces(INITIAL, specs), params.matching(specs, pattern))
    batch, trained, frozen = make_batch(), {"policy": trained}, {"policy": frozen}
    optimizer = optax.sgd(0.5)
    if mesh is not None:
        trained, frozen = (
            jax.device_put(values, params.shardings({"policy": half}, mesh))
            for values, half in zip((trained, frozen), halves, strict=True)
        )
        batch = jax.device_put(batch, sharding.named(mesh, ("batch", "time")))
    schedule = lambda t: jnp.asarray(0.5)  # noqa: E731
    step = jax.jit(
        train.TrainStep(objectives.load(SFT), {"policy": MODEL}, optimizer, schedule, microbatches=microbatches)
    )
    state = train.init_state(trained, optimizer, jax.random.PRNGKey(1), ema=True)
    for _ in range(steps):
        state, metrics = step(state, frozen, batch)
    return state, frozen, metrics


@pytest.mark.parametrize("pattern", ["final_norm/.*|layers/mlp/.*", "layers/1/.*", "layers/0/attention/.*|embed"])
def test_what_is_frozen_stays_and_is_no_part_of_the_state(pattern):
    """The trained part moves as it does where all is trained; the first step's gradient is of the same loss."""
    state, frozen, _ = part_step(pattern, steps=1)
    everything, _ = whole_step(0.5)
    whole = params.in_pieces(everything.params["policy"], params.cut(MODEL.specs, pattern))
    names = {params.path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(state.params["policy"])}
    specs = params.cut(MODEL.specs, pattern)
    expected, _ = params.split(whole, params.matching(specs, pattern))
    close(state.params["policy"], expected, rtol=1e-5)
    assert names.isdisjoint(params.path_name(p) for p, _ in jax.tree_util.tree_leaves_with_path(frozen["policy"]))
    assert jax.tree.structure(state.ema) == jax.tree.structure(state.params)


@pytest.mark.slow
def test_a_part_is_trained_alike_in_microbatches_and_on_a_mesh():
    single, _, metrics = part_step("layers/1/.*|final_norm/.*")
    cut, _, _ = part_step("layers/1/.*|final_norm/.*", microbatches=4)
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    with jax.set_mesh(mesh):
        sharded, _, others = part_step("layers/1/.*|final_norm/.*", mesh=mesh)
    for other in (cut, sharded):
        close(other.params, single.params, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(others["grad_norm"][0], metrics["grad_norm"][0], rtol=1e-4)


def test_the_learning_rate_of_each_group_is_a_metric():
    rates = {"head": lambda t: jnp.asarray(0.25), "rest": lambda t: jnp.asarray(0.5)}
    step = train.TrainStep(objectives.load(SFT), {"policy": MODEL}, optax.sgd(1.0), lambda t: t, group_schedules=rates)
    state = train.init_state({"policy": INITIAL}, optax.sgd(1.0), jax.random.PRNGKey(1))
    out = jax.jit(step)(state, {}, make_batch())[1]
    assert (out["learning_rate/head"][0], out["learning_rate/rest"][0]) == (0.25, 0.5)


def test_a_bad_batch_changes_nothing_and_is_counted():
    def poisoned(forward, batch, context):
        bad = jnp.where(context.step == 1, jnp.nan, 1.0) * jnp.sum(forward.hidden().astype(jnp.float32))
        return LossOut(bad, jnp.asarray(1.0), {})

    optimizer = adamw()
    terms = {"bad": Term(Objective(loss=poisoned), lambda step: jnp.asarray(1.0))}
    step = jax.jit(train.TrainStep(terms, {"policy": MODEL}, optimizer, schedule=lambda t: t))
    values = {"policy": INITIAL}
    first, _ = step(train.init_state(values, optimizer, jax.random.PRNGKey(1), ema=True), {}, make_batch())
    second, metrics = step(first, {}, make_batch())
    assert float(metrics["nonfinite"][0]) == 1
    assert int(second.bad_steps) == 1
    assert (int(second.step), int(second.updates)) == (2, 1)
    for name in ("params", "opt_state", "ema"):
        jax.tree.map(np.testing.assert_array_equal, getattr(second, name), getattr(first, name))
    third, metrics = step(second, {}, make_batch())
    assert int(third.bad_steps) == 0
    assert int(third.updates) == 2


def test_an_all_masked_batch_is_skipped_and_reported():
    batch = make_batch() | {"loss_mask": jnp.zeros((8, 24))}
    state, metrics = one_step({"terms": {"sft": 1.0}}, batch, optimizer=adamw())
    assert float(metrics["empty_batch"][0]) == 1
    assert float(metrics["nonfinite"][0]) == 0
    close(state.params, {"policy": INITIAL}, rtol=0, atol=0)


SMALL = make_model(dataclasses.replace(CONFIG, num_layers=1, d_model=16, num_heads=2, d_ff=16))


def carrying(bad_step):
    """An objective whose loss is scaled by a carry: a running mean of the hidden states' squares. Its loss isn't finite
    at `bad_step`."""

    def loss(forward, batch, context):
        real = (batch["segment_ids"] > 0).astype(jnp.float32)
        squares = jnp.sum(jnp.square(forward.hidden()) * real[:, :, None], axis=(0, 1))
        total = jnp.where(context.step == bad_step, jnp.nan, 1.0) * jnp.sum(squares * context.carry["mean"])
        return LossOut(total, jnp.sum(real), {}, {"sum": squares, "count": jnp.sum(real)})

    def first(batch):
        return {"mean": jnp.full((SMALL.config.d_model,), 1.0 / batch["tokens"].shape[0])}

    def update(carry, sums):
        return {"mean": carry["mean"] + 0.5 * (sums["sum"] / sums["count"] - carry["mean"])}

    return {"carrying": Term(Objective(loss=loss, init_carry=first, update=update), lambda step: jnp.asarray(1.0))}


def three_steps(microbatches=1, mesh=None):
    """The states after 1, 2 and 3 steps on as many batches; the second is skipped."""
    terms, models, optimizer = carrying(bad_step=1), {"policy": SMALL}, optax.sgd(0.1)
    schedule = lambda t: jnp.asarray(0.1)  # noqa: E731
    step = jax.jit(train.TrainStep(terms, models, optimizer, schedule=schedule, microbatches=microbatches))
    batches = [make_batch(seed=i) for i in range(3)]
    values = {"policy": params.init(SMALL.specs, jax.random.PRNGKey(0))}
    if mesh is not None:
        values = jax.device_put(values, params.shardings({"policy": SMALL.specs}, mesh))
        batches = jax.device_put(batches, sharding.named(mesh, ("batch", "time")))
    carry = init_carry(terms, batches[0])
    states = [train.init_state(values, optimizer, jax.random.PRNGKey(1), carry=carry)]
    for batch in batches:
        states.append(step(states[-1], {}, batch)[0])
    return states[1:]


def mean_squares(state, batch):
    return np.square(SMALL.hidden(state.params["policy"], batch))[np.asarray(batch["segment_ids"] > 0)].mean(axis=0)


@pytest.fixture(scope="module")
def carried():
    return three_steps()


def test_a_carry_follows_the_statistics_of_the_whole_batch(carried):
    before, last = (s.carry["carrying"]["mean"] for s in carried[1:])
    np.testing.assert_allclose(last, 0.5 * before + 0.5 * mean_squares(carried[1], make_batch(seed=2)), rtol=1e-4)
    evaluate = train.EvalStep(carrying(bad_step=-1), {"policy": SMALL})
    out = evaluate(carried[-1].params, {}, make_batch(), jax.random.PRNGKey(0), carried[-1].carry)
    expected = np.sum(mean_squares(carried[-1], make_batch()) * last)
    np.testing.assert_allclose(out["loss"][0] / out["loss"][1], expected, rtol=1e-4)


def test_a_carry_stays_where_the_update_is_skipped(carried):
    first, second, third = carried
    assert [int(s.updates) for s in carried] == [1, 1, 2]
    np.testing.assert_array_equal(second.carry["carrying"]["mean"], first.carry["carrying"]["mean"])
    assert not np.allclose(third.carry["carrying"]["mean"], first.carry["carrying"]["mean"])


@pytest.mark.slow
def test_a_carry_is_the_same_for_microbatches_and_for_a_mesh(carried):
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    cut = three_steps(microbatches=4)
    with jax.set_mesh(mesh):
        sharded = three_steps(mesh=mesh)
    assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(sharded[-1].carry))
    for other in (cut, sharded):
        close(other[-1].carry, carried[-1].carry, rtol=1e-4)
        close(other[-1].params, carried[-1].params, rtol=1e-3, atol=1e-5)


def test_a_carry_needs_both_its_beginning_and_its_update():
    with pytest.raises(ValueError, match="come together"):
        Objective(loss=lambda *args: None, update=lambda carry, sums: carry)


def test_remat_changes_no_gradient():
    batch, values = make_batch(), INITIAL

    def grads(remat):
        model = make_model(dataclasses.replace(CONFIG, remat=remat))
        return jax.jit(jax.grad(lambda p: jnp.sum(jnp.square(model.hidden(p, batch)))))(values)

    plain = grads("none")
    for remat in ("full", "dots", "attention"):
        close(grads(remat), plain, rtol=1e-4, atol=1e-5)
