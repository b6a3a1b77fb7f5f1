import dataclasses

import goldens
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from research import optim
from research.errors import InputError
from research.optim import OptimizerSpec, make_optimizer, make_schedule
from research.params import ParamSpec

Dims = optax.contrib.MuonDimensionNumbers
SCHEDULES = goldens.load("schedules")
OPTIMIZERS = goldens.load("optim")


@pytest.fixture
def x64():
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_of_transformers(name):
    hparams, kind = SCHEDULES[name].hparams, name.split("_{")[0]
    ours = {"constant_with_warmup": "constant", "cosine_with_min_lr": "cosine", "warmup_stable_decay": "wsd"}
    steps = hparams["num_training_steps"]
    low = hparams.get("min_lr_rate", hparams.get("min_lr_ratio", 0.0))
    spec = OptimizerSpec(
        learning_rate=1.0,
        schedule=ours.get(kind, kind),
        warmup_steps=0 if kind == "constant" else hparams["num_warmup_steps"],
        start_ratio=low if kind == "warmup_stable_decay" else 0.0,  # where theirs starts its warm-up
        end_ratio=low,
        **({"decay_fraction": hparams["num_decay_steps"] / steps} if kind == "warmup_stable_decay" else {}),
    )
    rates = make_schedule(spec, steps)(jnp.arange(steps))
    assert rates.dtype == jnp.float32
    np.testing.assert_allclose(rates, SCHEDULES[name].outputs["lr"], rtol=1e-6)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd", "constant", "inverse_sqrt"])
@pytest.mark.parametrize("warmup", [0, 10, 100])
def test_a_schedule_is_continuous_peaks_where_warm_up_ends_and_stays_at_its_end(schedule, warmup):
    if schedule == "wsd" and warmup == 100:
        return
    spec = OptimizerSpec(learning_rate=0.5, schedule=schedule, warmup_steps=warmup, end_ratio=0.2)
    rates = np.asarray(make_schedule(spec, 100)(jnp.arange(150)))
    assert np.abs(np.diff(rates[:100])).max() <= 0.5 / 10 + 1e-6
    assert rates.max() == rates[warmup] == 0.5 or warmup == 100
    if schedule in ("cosine", "linear", "wsd"):
        np.testing.assert_allclose(rates[100:], 0.1, rtol=1e-6)


@pytest.mark.parametrize(("shape", "halfway"), [("linear", 0.5), ("cosine", 0.5), ("1-sqrt", 1 - np.sqrt(0.5))])
def test_shapes_of_the_decay_of_wsd(shape, halfway):
    """transformers' get_wsd_schedule has the same three: linear, cosine and 1-sqrt."""
    spec = OptimizerSpec(learning_rate=1.0, schedule="wsd", decay_fraction=0.4, decay_shape=shape, end_ratio=0.1)
    rates = np.asarray(make_schedule(spec, 100)(jnp.arange(101)))
    np.testing.assert_array_equal(rates[:61], 1.0)
    np.testing.assert_allclose(rates[[80, 100]], [0.1 + 0.9 * halfway, 0.1], rtol=1e-6)
    quarter = {"linear": 0.75, "cosine": np.cos(np.pi / 8) ** 2, "1-sqrt": 0.5}[shape]
    np.testing.assert_allclose(rates[70], 0.1 + 0.9 * quarter, rtol=1e-6)


def test_cosine_with_restarts_is_that_of_each_part():
    one = OptimizerSpec(learning_rate=1.0, schedule="cosine", warmup_steps=10, end_ratio=0.1)
    rates = make_schedule(dataclasses.replace(one, cycles=3), 100)(jnp.arange(101))
    part = make_schedule(dataclasses.replace(one, warmup_steps=0), 30)(jnp.arange(30))
    np.testing.assert_allclose(rates[10:100], np.tile(part, 3), rtol=1e-5)
    np.testing.assert_allclose(rates[100], 0.1, rtol=1e-6)
    np.testing.assert_allclose(rates[:10], np.arange(10) / 10, rtol=1e-6)


def test_inverse_sqrt_with_a_timescale():
    spec = OptimizerSpec(learning_rate=1.0, schedule="inverse_sqrt", warmup_steps=10, timescale=40)
    rates = make_schedule(spec, 1000)(jnp.asarray([10, 50, 130, 330]))
    np.testing.assert_allclose(rates, [1, np.sqrt(1 / 2), 1 / 2, 1 / 3], rtol=1e-6)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"decay_shape": "cosine"}, "optimizer.decay_shape = 'cosine': is of the schedule 'wsd'"),
        ({"decay_fraction": 0.5}, "optimizer.decay_fraction = 0.5: is of the schedule 'wsd'"),
        ({"timescale": 5}, "optimizer.timescale = 5: is of the schedule 'inverse_sqrt'"),
        ({"schedule": "linear", "cycles": 2}, "optimizer.cycles = 2: is of the schedule 'cosine'"),
        ({"cycles": 20}, "optimizer.cycles = 20: is more than the steps"),
        ({"cycles": 0}, "optimizer.cycles = 0: must be at least 1"),
        ({"schedule": "inverse_sqrt", "timescale": -1}, "optimizer.timescale = -1: must be at least 0"),
        (
            {"schedule": "wsd", "decay_shape": "sqrt"},
            "optimizer.decay_shape = 'sqrt': not known. Did you mean '1-sqrt'",
        ),
    ],
)
def test_options_of_another_schedule_are_refused(fields, words):
    with pytest.raises(InputError) as error:
        make_schedule(OptimizerSpec(**fields), 10)
    assert words in str(error.value)


def _trajectory(spec, case, *, dims=None, dtype=jnp.float64):
    """Parameters after each of the case's steps, name -> array."""
    params = {k: jnp.asarray(case.inputs[f"{k}0"], dtype) for k in ("w", "b") if f"{k}0" in case.inputs}
    grads = {k: jnp.asarray(case.inputs[f"grad_{k}"], dtype) for k in params}
    steps = grads["w"].shape[0]
    tx = make_optimizer(spec, steps, jax.tree.map(lambda _: True, params), dims)

    def step(carry, g):
        params, state = carry
        updates, state = tx.update(g, state, params)
        params = jax.tree.map(lambda p, u: (p.astype(u.dtype) + u).astype(p.dtype), params, updates)
        return (params, state), params

    return jax.lax.scan(step, (params, tx.init(params)), grads)[1]


def _spec(name, hparams, **fields):
    b1, b2 = hparams.get("betas", (0.9, 0.999))
    spec = OptimizerSpec(
        name=name,
        learning_rate=hparams["lr"] or 0.01,
        schedule="constant",
        weight_decay=hparams.get("weight_decay", 0.01),
        b1=b1,
        b2=b2,
        clip_norm=hparams.get("max_norm", 0.0),
        momentum=hparams.get("momentum", 0.0),
        nesterov=hparams.get("nesterov", False),
    )
    return dataclasses.replace(spec, **fields)


def _close(ours, case, **tolerance):
    for name in ours:
        np.testing.assert_allclose(ours[name], case.outputs[name], err_msg=name, **tolerance)


@pytest.mark.parametrize("name", ["adamw", "adamw_llm", "adamw_bigeps"])
def test_adamw_of_torch(x64, name):
    # In float64 but for the first moment, which is held in float32.
    case = OPTIMIZERS[name]
    _close(_trajectory(_spec("adamw", case.hparams, eps=case.hparams["eps"]), case), case, rtol=1e-6)


@pytest.mark.parametrize("name", ["adamw_clip1.0", "adamw_clip0.1"])
def test_clipping_of_torch(x64, name):
    # torch adds 1e-6 to the norm that it divides by.
    case = OPTIMIZERS[name]
    _close(_trajectory(_spec("adamw", case.hparams), case), case, rtol=1e-6)


def test_a_schedule_moves_with_the_updates_as_in_torch(x64):
    case = OPTIMIZERS["adamw_cosine"]
    spec = _spec("adamw", case.hparams, schedule="cosine")
    np.testing.assert_allclose(make_schedule(spec, 20)(jnp.arange(20)), case.outputs["lr"], rtol=1e-9)
    _close(_trajectory(spec, case), case, rtol=1e-6)


@pytest.mark.parametrize("name", ["sgd_momentum", "sgd_nesterov"])
def test_sgd_of_torch(x64, name):
    case = OPTIMIZERS[name]
    spec = _spec("sgd", case.hparams, weight_decay=case.hparams.get("weight_decay", 0.0), mu_dtype="float32")
    _close(_trajectory(spec, case, dtype=jnp.float32), case, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["adafactor_hf_fixed", "adafactor_hf_relative"])
def test_adafactor_of_transformers(x64, name):
    # Relative: their rate is min(0.01, 1 / sqrt(step)) times the parameter's scale, 0.01 for the first 10 000 steps.
    case = OPTIMIZERS[name]
    relative = case.hparams["relative_step"]
    spec = _spec("adafactor", case.hparams, weight_decay=0.0, scale_by_parameter=relative, factor_min_size=1)
    _close(_trajectory(spec, case), case, rtol=1e-5)


@pytest.mark.parametrize("scaling", ["original", "match_rms_adamw"])
def test_muon_of_torch(scaling):
    # Theirs runs Newton-Schulz in bfloat16, and a matrix as [outputs, inputs].
    case = OPTIMIZERS[f"muon_{scaling}"]
    spec = _spec("muon", case.hparams, muon_scaling=scaling)
    ours = _trajectory(spec, case, dims={"w": Dims(reduction_axis=1, output_axis=0)}, dtype=jnp.float32)
    _close(ours, case, rtol=1e-2)
    moved = np.abs(np.diff(case.outputs["w"], axis=0)).mean()
    assert np.abs(np.diff(ours["w"], axis=0) - np.diff(case.outputs["w"], axis=0)).mean() < 0.02 * moved


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_small_updates_vanish_in_bfloat16_parameters_alone(dtype):
    case = OPTIMIZERS[f"adamw_{dtype}_lr0.0001"]
    w = _trajectory(_spec("adamw", case.hparams), case, dtype=dtype)["w"]
    changed = np.mean(np.asarray(w[-1] != jnp.asarray(case.inputs["w0"], dtype)))
    assert changed == case.outputs["fraction_of_w_changed"]


def _one_update(spec, params, grads, decay=None, dims=None):
    spec = dataclasses.replace(spec, schedule="constant", clip_norm=0.0)
    tx = make_optimizer(spec, 10, decay or jax.tree.map(lambda _: False, params), dims)
    return tx.update(grads, tx.init(params), params)[0]


def test_lion_steps_by_the_sign():
    spec = OptimizerSpec(name="lion", learning_rate=0.1, weight_decay=0.5)
    params, grads = {"w": jnp.array([1.0, 2.0, 3.0])}, {"w": jnp.array([1e-3, -7.0, 0.0])}
    updates = _one_update(spec, params, grads, decay={"w": True})
    np.testing.assert_allclose(updates["w"], [-0.1 * (1 + 0.5), -0.1 * (-1 + 1.0), -0.1 * 1.5], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor", "muon", "sgd"])
def test_decay_follows_the_mask(name):
    params = {"kernel": jnp.ones((3, 4, 5)), "norm": jnp.ones((3, 4))}
    dims = {"kernel": Dims((1,), (2,)), "norm": None}
    spec = OptimizerSpec(name=name, learning_rate=0.1, weight_decay=0.5)
    updates = _one_update(spec, params, jax.tree.map(jnp.zeros_like, params), {"kernel": True, "norm": False}, dims)
    scale = 1.95 if name == "sgd" else 1.0  # Nesterov's momentum of a first gradient
    np.testing.assert_allclose(updates["kernel"], jnp.full((3, 4, 5), -0.05 * scale), rtol=1e-6)
    np.testing.assert_array_equal(updates["norm"], jnp.zeros((3, 4)))


def test_muon_orthogonalises_each_matrix_of_a_stack_and_adamw_takes_the_rest():
    keys = iter(jax.random.split(jax.random.key(0), 3))
    shapes = {"q": (2, 12, 4, 2), "o": (2, 4, 2, 12), "embed": (20, 12)}  # [L, D, H, h], [L, H, h, D], [V, D]
    grads = {k: jax.random.normal(next(keys), shape) for k, shape in shapes.items()}
    params = jax.tree.map(jnp.ones_like, grads)
    dims = {"q": Dims((1,), (2, 3)), "o": Dims((1, 2), (3,)), "embed": None}
    spec = OptimizerSpec(name="muon", learning_rate=1.0, weight_decay=0.0)
    updates = _one_update(spec, params, grads, dims=dims)

    for layer in range(2):
        one = _one_update(
            spec,
            {"q": params["q"][layer].reshape(12, 8), "o": params["o"][layer].reshape(8, 12)},
            {"q": grads["q"][layer].reshape(12, 8), "o": grads["o"][layer].reshape(8, 12)},
            dims={"q": Dims(0, 1), "o": Dims(0, 1)},
        )
        for name in ("q", "o"):
            np.testing.assert_allclose(updates[name][layer].reshape(one[name].shape), one[name], atol=1e-5)
            singular = np.linalg.svd(one[name], compute_uv=False) / (0.2 * 12**0.5)
            assert singular.min() > 0.6
            assert singular.max() < 1.3
    adamw = _one_update(dataclasses.replace(spec, name="adamw"), params, grads)
    np.testing.assert_allclose(updates["embed"], adamw["embed"], rtol=1e-6)


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_a_skipped_update_leaves_the_state(name):
    params = {"w": jnp.ones((4, 6))}
    tx = make_optimizer(OptimizerSpec(name=name, factor_min_size=2), 10, {"w": True}, {"w": Dims()})
    _, before = tx.update({"w": jnp.full((4, 6), 0.5)}, tx.init(params), params)
    _, after = tx.update({"w": jnp.full((4, 6), jnp.nan)}, before, params, ok=jnp.asarray(False))
    _, moved = tx.update({"w": jnp.full((4, 6), 0.25)}, before, params, ok=jnp.asarray(True))
    before, after, moved = map(jax.tree.leaves, (before, after, moved))
    assert all(map(np.array_equal, before, after))
    assert not all(map(np.array_equal, before, moved))


@pytest.mark.parametrize("name", ["adamw", "lion", "muon", "sgd"])
def test_momentum_is_held_in_mu_dtype(name):
    params = {"w": jnp.ones((4, 4))}
    spec = OptimizerSpec(name=name, mu_dtype="bfloat16", momentum=0.9)
    tx = make_optimizer(spec, 10, {"w": True}, {"w": Dims()})
    state = tx.init(params)
    updates, after = jax.jit(tx.update)(params, state, params)
    assert updates["w"].dtype == jnp.float32
    assert any(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(state))
    assert [x.dtype for x in jax.tree.leaves(state)] == [x.dtype for x in jax.tree.leaves(after)]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"name": "adamW"}, ["optimizer.name", "adamW", "'adamw'"]),
        ({"schedule": "cosin"}, ["optimizer.schedule", "cosin", "'cosine'"]),
        ({"mu_dtype": "float16"}, ["optimizer.mu_dtype", "bfloat16"]),
        ({"learning_rate": -1e-3}, ["optimizer.learning_rate", "-0.001"]),
        ({"learning_rate": float("nan")}, ["optimizer.learning_rate", "nan"]),
        ({"warmup_steps": 101}, ["optimizer.warmup_steps", "101", "steps = 100"]),
        ({"warmup_steps": -1}, ["optimizer.warmup_steps", "-1"]),
        ({"schedule": "wsd", "warmup_steps": 90}, ["optimizer.warmup_steps", "optimizer.decay_fraction", "100"]),
        ({"b2": 1.0}, ["optimizer.b2", "1.0", "[0, 1)"]),
        ({"end_ratio": 3e-5, "start_ratio": 2.0}, ["optimizer.start_ratio", "2.0"]),
        ({"clip_norm": -1.0}, ["optimizer.clip_norm", "-1.0"]),
        ({"name": "muon"}, ["optimizer.name", "muon", "adamw"]),
    ],
)
def test_bad_values_are_named(fields, words):
    with pytest.raises(InputError) as error:
        make_optimizer(OptimizerSpec(**fields), 100, {"w": True}, {"w": None})
    assert all(word in str(error.value) for word in words), error.value


SPECS = {
    "policy": {"body": ParamSpec((6, 4), ("embed", "mlp"), None, ("embed",)), "head": ParamSpec((4,), ("mlp",), None)},
    "value": {"head": ParamSpec((4, 3), ("mlp", "labels"), None, ("mlp",))},
}
DECAYS = {"policy": {"body": True, "head": False}, "value": {"head": True}}
GROUPS = {
    "critic": {
        "match": "value/.*", "learning_rate": 0.5, "weight_decay": 0.3, "warmup_steps": 4, "clip_norm": 0.25,
    },
    "head": {"match": "policy/head", "learning_rate": 0.02},
}  # fmt: skip


def _updates(tx, gradients, values):
    """The parameters after some updates."""
    state = tx.init(values)
    for grads in gradients:
        updates, state = tx.update(grads, state, values)
        values = optax.apply_updates(values, updates)
    return values


@pytest.mark.parametrize("name", ["adamw", "sgd", "lion", "adafactor"])
def test_groups_are_separate_optimizers(name):
    """A group with its own norm is a chain of its own; one without shares the others' clipping, at its own rate."""
    spec = OptimizerSpec(name=name, learning_rate=0.1, warmup_steps=2, weight_decay=0.1, clip_norm=1.0, groups=GROUPS)
    labels = optim.group_labels(spec, SPECS)
    assert labels == {"policy": {"body": "", "head": "head"}, "value": {"head": "critic"}}
    key = jax.random.PRNGKey(0)
    values = jax.tree.map(lambda s: jax.random.normal(key, s.shape), SPECS, is_leaf=lambda x: isinstance(x, ParamSpec))
    gradients = [jax.tree.map(lambda v, i=i: 3 * jnp.cos(v * (i + 1)), values) for i in range(6)]
    ours = _updates(make_optimizer(spec, 10, DECAYS, labels=labels), gradients, values)

    def alone(role, **fields):
        one = dataclasses.replace(spec, groups={}, **fields)
        tx = make_optimizer(one, 10, {role: DECAYS[role]})
        return _updates(tx, [{role: g[role]} for g in gradients], {role: values[role]})[role]

    critic = alone("value", learning_rate=0.5, weight_decay=0.3, warmup_steps=4, clip_norm=0.25)
    np.testing.assert_allclose(ours["value"]["head"], critic["head"], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(ours["policy"]["body"], alone("policy")["body"], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(
        ours["policy"]["head"], alone("policy", learning_rate=0.02)["head"], rtol=1e-6, atol=1e-6
    )


def test_groups_have_schedules_of_their_own():
    spec = OptimizerSpec(learning_rate=0.1, warmup_steps=2, groups=GROUPS)
    schedules = optim.make_group_schedules(spec, 10)
    assert schedules.keys() == {"critic", "head"}
    assert [float(schedules["critic"](t)) for t in (0, 2, 4)] == [0, 0.25, 0.5]
    np.testing.assert_allclose(schedules["head"](2), 0.02, rtol=1e-6)


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_a_delay_is_a_rate_of_0_before_the_schedule_of_the_steps_that_are_left(schedule):
    spec = OptimizerSpec(learning_rate=0.1, schedule=schedule, warmup_steps=2, start_ratio=0.5, end_ratio=0.1)
    delayed = make_schedule(dataclasses.replace(spec, delay_steps=4), 14)(jnp.arange(14))
    np.testing.assert_array_equal(delayed[:4], 0)
    np.testing.assert_allclose(delayed[4:], make_schedule(spec, 10)(jnp.arange(10)), rtol=1e-6)


def test_rates_that_update_is_told_stand_for_those_of_the_spec():
    values = {"policy": {"body": jnp.ones((6, 4)), "head": jnp.ones(4)}}
    specs, decays = {"policy": SPECS["policy"]}, {"policy": DECAYS["policy"]}
    gradients = jax.tree.map(lambda v: jnp.full_like(v, 0.1), values)

    def update(spec, **options):
        optimizer = make_optimizer(spec, 10, decays, labels=optim.group_labels(spec, specs))
        return optimizer.update(gradients, optimizer.init(values), values, **options)

    for groups in ({}, {"head": {"match": "policy/head", "learning_rate": 0.5}}):
        wanted = OptimizerSpec(learning_rate=0.02, start_ratio=0.5, warmup_steps=3, groups=groups)
        other = {name: {**group, "learning_rate": 1.0} for name, group in groups.items()}
        told = update(dataclasses.replace(wanted, learning_rate=7.0, groups=other), rates=optim.rates(wanted))
        jax.tree.map(np.testing.assert_array_equal, told, update(wanted))


def test_a_spec_without_groups_gives_the_numbers_and_the_state_of_one_with_an_idle_group():
    values = {"policy": {"body": jnp.ones((6, 4)), "head": jnp.ones(4)}}
    specs, decays = {"policy": SPECS["policy"]}, {"policy": DECAYS["policy"]}
    gradients = [jax.tree.map(lambda v, i=i: jnp.full_like(v, 0.1 * i - 0.2), values) for i in range(5)]
    plain = OptimizerSpec(weight_decay=0.1)
    grouped = dataclasses.replace(plain, groups={"same": {"match": "policy/head"}})
    ours = make_optimizer(grouped, 10, decays, labels=optim.group_labels(grouped, specs))
    theirs = make_optimizer(plain, 10, decays)
    jax.tree.map(np.testing.assert_array_equal, *(_updates(tx, gradients, values) for tx in (ours, theirs)))
    assert jax.tree.leaves(ours.init(values))[0].shape == jax.tree.leaves(theirs.init(values))[0].shape


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        (
            {"a": {"match": "polciy/.*"}},
            r"groups\.a\.match = 'polciy/.*': matches none .* policy/body, policy/head, value",
        ),
        ({"a": {"match": "policy/("}}, r"groups\.a\.match = 'policy/\(': is no regular expression"),
        ({"a": {"learning_rate": 1.0}}, r"groups\.a: needs a field match"),
        ({"a": {"match": "value/.*", "learning_rte": 1.0}}, r"groups\.a\.learning_rte: no such .*'learning_rate'"),
        ({"a": {"match": "value/.*", "clip_norm": "1"}}, r"groups\.a\.clip_norm = '1': must be of type float"),
        ({"a": {"match": "value/.*", "clip_norm": -1}}, r"groups\.a\.clip_norm = -1: must be at least 0"),
        ({"a": {"match": "value/.*", "warmup_steps": 11}}, r"groups\.a\.warmup_steps = 11 is more than steps = 10"),
        ({"a": {"match": "value/.*", "delay_steps": 10}}, r"groups\.a\.delay_steps = 10: leaves none of steps = 10"),
        ({"a": {"match": "value/.*", "delay_steps": 0.5}}, r"groups\.a\.delay_steps = 0\.5: must be of type int"),
        (
            {"a": {"match": ".*head"}, "b": {"match": "value/.*"}},
            r"groups\.b\.match .* matches value/head, which is in .*\.a",
        ),
    ],
)
def test_groups_that_can_not_be_are_named(groups, words):
    spec = OptimizerSpec(groups=groups)

    def read():
        optim.check(spec, 10)
        optim.group_labels(spec, SPECS)

    with pytest.raises(InputError, match=words):
        read()


def test_a_warm_up_may_be_a_share_of_the_steps():
    share, steps = (
        optim.make_schedule(optim.OptimizerSpec(**each), 50) for each in ({"warmup_share": 0.2}, {"warmup_steps": 10})
    )
    assert [float(share(t)) for t in range(50)] == [float(steps(t)) for t in range(50)]
    with pytest.raises(InputError, match=r"optimizer.warmup_share = 0.2: and optimizer.warmup_steps = 3"):
        optim.make_schedule(optim.OptimizerSpec(warmup_share=0.2, warmup_steps=3), 50)
    group = optim.OptimizerSpec(warmup_share=0.2, groups={"a": {"match": "x", "warmup_steps": 5}})
    assert float(optim.make_group_schedules(group, 50)["a"](5)) == pytest.approx(1e-3)
