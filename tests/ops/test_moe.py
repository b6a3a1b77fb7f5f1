"""The mixture of experts against a loop over tokens."""

import goldens
import jax
import jax.numpy as jnp
import jaxprs
import numpy as np
import pytest

from research.devices import sharding
from research.ops.moe import load_balance, mixture, route, routing, sharded_mixture

N, D, F, E = 6, 8, 6, 4


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)
    shapes = {"x": (N, D), "logits": (N, E), "up": (E, D, F), "down": (E, F, D)}
    return {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}


def ours(a, k, normalize):
    weights, experts = route(a["logits"], k, normalize)
    return mixture(a["x"], weights, experts, E, lambda dot, x: dot(jax.nn.silu(dot(x, a["up"])), a["down"]))


def by_loops(a, k, normalize):
    rows = []
    for x, logits in zip(a["x"], a["logits"], strict=True):
        probabilities = jax.nn.softmax(logits)
        chosen = np.argsort(-np.asarray(jax.lax.stop_gradient(logits)))[:k].tolist()
        total = sum(probabilities[e] for e in chosen) if normalize else 1.0
        rows.append(sum(probabilities[e] / total * (jax.nn.silu(x @ a["up"][e]) @ a["down"][e]) for e in chosen))
    return jnp.stack(rows)


@pytest.mark.parametrize(("k", "normalize"), [(1, False), (2, True), (2, False), (4, True)])
def test_output_and_gradients_are_those_of_a_loop_over_tokens(arrays, k, normalize):
    weights = jnp.asarray(np.random.default_rng(1).normal(size=(N, D)), jnp.float32)

    def measured(f):
        out, vjp = jax.vjp(lambda a: f(a, k, normalize), arrays)
        return out, vjp(weights)[0]

    (out, gradients), (expected, wanted) = jax.jit(lambda: measured(ours))(), measured(by_loops)
    np.testing.assert_allclose(out, expected, atol=1e-5)
    for name in arrays:
        np.testing.assert_allclose(gradients[name], wanted[name], atol=1e-5, err_msg=name)


def test_no_token_is_dropped_when_all_want_one_expert(arrays):
    logits = jnp.tile(jnp.asarray([[0.0, 50.0, -50.0, -50.0]], jnp.float32), (N, 1))
    a = {**arrays, "logits": logits}
    expected = jax.nn.silu(a["x"] @ a["up"][1]) @ a["down"][1]
    np.testing.assert_allclose(ours(a, 1, True), expected, atol=1e-5)
    gradient = jax.jit(jax.grad(lambda up: jnp.sum(ours({**a, "up": up}, 1, True))))(a["up"])
    assert np.any(gradient[1])
    assert not np.any(gradient[jnp.asarray([0, 2, 3])])


def test_the_router_chooses_the_likeliest(arrays):
    weights, experts = route(arrays["logits"], 2, normalize=False)
    probabilities = jax.nn.softmax(arrays["logits"], axis=1)
    np.testing.assert_array_equal(experts, np.argsort(-probabilities, axis=1)[:, :2])
    np.testing.assert_array_equal(weights, np.sort(probabilities, axis=1)[:, :-3:-1])
    np.testing.assert_allclose(jnp.sum(route(arrays["logits"], 3, normalize=True)[0], axis=1), 1, rtol=1e-6)


def test_bfloat16_stays_bfloat16(arrays):
    weights, experts = route(arrays["logits"], 2, normalize=True)
    x = arrays["x"].astype(jnp.bfloat16)
    out = mixture(x, weights, experts, E, lambda dot, x: dot(jax.nn.silu(dot(x, arrays["up"])), arrays["down"]))
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), by_loops(arrays, 2, True), atol=0.1, rtol=0.05)


@pytest.mark.parametrize("overrides", [{}, {"batch": ("data", "fsdp", "expert", "tensor")}])
def test_over_devices_it_is_the_same_where_tokens_are_cut_along_the_kernels_axis_too(arrays, overrides):
    rules, mesh = (
        sharding.make_rules(overrides),
        sharding.make_mesh({"data": 1, "expert": 2, "tensor": 2}, jax.devices()[:4]),
    )
    kernels = {"up": ("experts", "embed", "mlp"), "down": ("experts", "mlp", "embed")}
    params = {name: arrays[name] for name in kernels}
    weights, experts = (y[:4].reshape(4, 1, 2) for y in route(arrays["logits"], 2, normalize=True))

    def network(params, dot, x):
        return dot(jax.nn.silu(dot(x, params["up"])), params["down"])

    f = lambda *args: sharded_mixture(*args, E, params, network, kernels=kernels, rules=rules)  # noqa: E731
    with jax.set_mesh(mesh):
        out = jax.jit(f)(arrays["x"][:4].reshape(4, 1, D), weights, experts)
    np.testing.assert_allclose(out[:, 0], by_loops(arrays, 2, True)[:4], atol=1e-5)


def test_devices_meet_no_more_choices_at_once_than_they_have_tokens(arrays):
    """However many of a group's tokens choose one device's expert, with the gradient too."""
    rules, mesh = sharding.make_rules({}), sharding.make_mesh({"data": 1, "expert": 4}, jax.devices()[:4])
    kernels = {"up": ("experts", "embed", "mlp"), "down": ("experts", "mlp", "embed")}
    params = {"up": jnp.ones((E, D, 7)), "down": jnp.ones((E, 7, D))}  # 7: nothing else has this size
    x, chosen = jnp.ones((4, 8, D)), jnp.zeros((4, 8, 1), jnp.int32)  # 8 tokens a device, all to the first

    def network(params, dot, x):
        return dot(jax.nn.silu(dot(x, params["up"])), params["down"])

    def loss(params, x):
        y = sharded_mixture(x, jnp.ones(chosen.shape), chosen, E, params, network, kernels=kernels, rules=rules)
        return jnp.sum(jnp.square(y))

    with jax.set_mesh(mesh):
        program = jax.make_jaxpr(jax.grad(loss))(params, x).jaxpr
    equations = list(jaxprs.equations(program))
    rows = [v.aval.shape[0] for e in equations for v in e.outvars if getattr(v.aval, "shape", ())[1:] == (7,)]
    assert max(rows) == 8
    loops = [e for e in equations if e.primitive.name == "scan"]
    inside = [e.primitive.name for loop in loops for e in jaxprs.equations(loop.params["jaxpr"].jaxpr)]
    assert inside.count("ragged_dot_general") > 2
    assert not any(name.startswith("psum") and "scatter" not in name for name in inside)  # of the kernels' gradients


@pytest.mark.parametrize("case", goldens.load("routers").values(), ids=lambda case: case.name)
def test_losses_are_those_of_transformers(case):
    logits, mask = (jnp.asarray(case.inputs[name]) for name in ("logits", "mask"))
    num_experts, k = logits.shape[-1], case.hparams["experts_per_token"]

    def sums(logits):
        experts = route(logits.reshape(-1, num_experts), k, normalize=False)[1]
        return jax.vmap(routing, (0, 0, None))(logits, experts.reshape(*logits.shape[:-1], k), mask)

    def balance(logits, pooled=True):
        s = sums(logits)
        tokens = jnp.sum(s.tokens[0])
        return load_balance(jnp.sum(s.counts, axis=1), tokens, jnp.sum(s.probabilities, axis=1), pooled) / tokens

    loss, gradient = jax.value_and_grad(balance)(logits)
    np.testing.assert_allclose(loss, case.outputs["load_balance"], rtol=1e-5)
    np.testing.assert_allclose(gradient, case.outputs["gradient"], atol=1e-6)
    each = [balance(layer[None]) for layer in logits]
    np.testing.assert_allclose(balance(logits, pooled=False), np.mean(each), rtol=1e-5)
    if "z" in case.outputs:
        s = sums(logits)
        np.testing.assert_allclose(jnp.sum(s.squares) / jnp.sum(s.tokens), case.outputs["z"], rtol=1e-5)


def test_entropies_are_those_of_the_routers_probabilities():
    logits = jnp.asarray([[[0.0, 0.0, 0.0, 0.0], [90.0, 0.0, 0.0, 0.0], [1.0, 2.0, 3.0, 4.0]]])
    sums = routing(logits, jnp.asarray([[[0, 1], [0, 1], [3, 2]]]), jnp.asarray([[1.0, 1.0, 0.0]]))
    np.testing.assert_allclose(sums.entropies, [np.log(4)], rtol=1e-5)
    np.testing.assert_array_equal(sums.counts, [[2, 2, 0, 0]])
    np.testing.assert_array_equal(sums.tokens, [2])
