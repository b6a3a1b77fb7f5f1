"""The scan over the head as a new loss would use it, and logits with everything that a head may have."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.devices import sharding
from research.ops.head import Head, detached_values, differentiated, token_values, weighted_sum

B, T, D, V = 2, 7, 4, 24


@pytest.fixture(scope="module")
def arrays():
    """hidden, kernel, bias, weights."""
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = (B, T, D), (D, V), (V,), (B, T)
    return tuple(jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))


def head(kernel, bias, by_token=False):
    return Head(kernel.T if by_token else kernel, bias, 3.0, by_token)


def whole_logits(hidden, kernel, bias):
    return 3.0 * jnp.tanh((hidden @ kernel + bias[None, None]) / 3.0)


def close(ours, theirs, rtol=2e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-6), ours, theirs)


@differentiated
def sum_of_squares(logits, power):
    """A new loss: sum p^2, to a power that each token has of its own."""
    return jnp.sum(jax.nn.softmax(logits) ** 2, axis=-1) ** power


@pytest.mark.parametrize("by_token", [False, True])
def test_a_new_loss_is_a_function_of_a_chunks_logits(arrays, by_token):
    hidden, kernel, bias, weights = arrays
    power = 1.0 + jnp.arange(T, dtype=jnp.float32)[None] / T * jnp.ones((B, 1))

    def summed(hidden, kernel, bias, weights):
        total, *_ = weighted_sum(sum_of_squares, hidden, head(kernel, bias, by_token), weights, power, chunk=3)
        return total

    def by_token_values(hidden, kernel, bias, weights):
        return jnp.sum(weights * token_values(sum_of_squares, hidden, head(kernel, bias, by_token), power, chunk=3))

    def whole(hidden, kernel, bias, weights):
        p = jax.nn.softmax(whole_logits(hidden, kernel, bias))
        return jnp.sum(weights * jnp.sum(p**2, axis=-1) ** power)

    expected = jax.value_and_grad(whole, (0, 1, 2, 3))(hidden, kernel, bias, weights)
    for f in (summed, by_token_values):
        close(jax.jit(jax.value_and_grad(f, (0, 1, 2, 3)))(hidden, kernel, bias, weights), expected)


def test_detached_values_have_no_gradient(arrays):
    hidden, kernel, bias, _ = arrays
    f = lambda h: jnp.sum(detached_values(sum_of_squares, h, head(kernel, bias), jnp.ones((B, T)), chunk=3))  # noqa: E731
    value, gradient = jax.value_and_grad(f)(hidden)
    close(value, jnp.sum(jax.nn.softmax(whole_logits(hidden, kernel, bias)) ** 2))
    assert not gradient.any()


@pytest.mark.parametrize("by_token", [False, True])
def test_logits_of_all_tokens_and_of_some(arrays, by_token):
    hidden, kernel, bias, _ = arrays
    columns, whole = jnp.array([5, 0, 23]), whole_logits(hidden, kernel, bias)
    for logits, expected in (
        (head(kernel, bias, by_token).logits(hidden), whole),
        (head(kernel, bias, by_token).logits(hidden[:, 0]), whole[:, 0]),
        (head(kernel, bias, by_token).logits(hidden, columns), whole[:, :, columns]),
        (head(kernel, bias, by_token).first(9).logits(hidden), whole[:, :, :9]),
    ):
        close(logits, expected)


def products(jaxpr):
    """Shapes of all matrix products of a jaxpr, those of its inner jaxprs among them."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation.outvars[0].aval.shape
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(inner, "eqns"):
                yield from products(inner)


def frozen(loss, arrays, form):
    """The gradient of a loss by all but the head, as a jaxpr."""
    hidden, kernel, bias, weights = arrays

    def f(scale, kernel):
        if form == "stop_gradient":
            kernel = jax.lax.stop_gradient(kernel)
        return loss(scale * hidden, head(kernel, bias), weights)

    if form == "checkpoint":
        f = jax.checkpoint(f)
    if form == "scan":  # as microbatches are
        step = lambda total, _: (total + jax.grad(f)(1.0, kernel), None)  # noqa: E731
        return jax.make_jaxpr(lambda: jax.lax.scan(step, 0.0, jnp.arange(2))[0])()
    return jax.make_jaxpr(jax.grad(f))(1.0, kernel)


@pytest.mark.parametrize("form", ["argument", "stop_gradient", "checkpoint", "scan"])
@pytest.mark.parametrize("name", ["weighted_sum", "token_values"])
def test_a_frozen_head_has_no_gradient_in_its_shape(arrays, name, form):
    def loss(hidden, head, weights):
        power = jnp.ones((B, T))
        if name == "weighted_sum":
            return weighted_sum(sum_of_squares, hidden, head, weights, power, chunk=3)[0]
        return jnp.sum(weights * token_values(sum_of_squares, hidden, head, power, chunk=3))

    _, kernel, bias, weights = arrays
    trained = jax.make_jaxpr(jax.grad(lambda k: loss(arrays[0], head(k, bias), weights)))(kernel)
    assert (D, V) in set(products(trained.jaxpr))
    shapes = set(products(frozen(loss, arrays, form).jaxpr))
    assert (B, 3, D) in shapes, "the gradient by hidden states isn't there either"
    assert not {(D, V), (V, D)} & shapes


N, FIRST = 3, 5  # added tokens, and the first of them


def with_added(kernel, bias, added, by_token=False, rules=None):
    turn = lambda x: x.T if by_token else x  # noqa: E731
    return Head(turn(kernel), bias, 3.0, by_token, rules, turn(added), FIRST)


def put(kernel, added):
    return kernel.at[:, FIRST : FIRST + N].set(added)


@pytest.mark.parametrize("by_token", [False, True])
def test_added_tokens_stand_in_their_place(arrays, by_token):
    hidden, kernel, bias, _ = arrays
    added = jax.random.normal(jax.random.key(1), (D, N))
    whole, head = whole_logits(hidden, put(kernel, added), bias), with_added(kernel, bias, added, by_token)
    close(head.kernel, put(kernel, added))
    close(head.logits(hidden), whole)
    columns = jnp.array([6, 0, 23, 5, 8])
    close(head.logits(hidden, columns), whole[:, :, columns])
    for size in (4, 5, 6, 8, 9, V):
        close(head.first(size).logits(hidden), whole[:, :, :size])
        close(head.first(size).kernel, head.kernel[:, :size])


@pytest.mark.parametrize("by_token", [False, True])
@pytest.mark.parametrize("sharded", [False, True])
def test_added_tokens_have_their_gradients(arrays, by_token, sharded):
    hidden, kernel, bias, weights = arrays
    added, power = jax.random.normal(jax.random.key(1), (D, N)), jnp.ones((B, T))

    def ours(hidden, kernel, bias, added, weights):
        head = with_added(kernel, bias, added, by_token, sharding.RULES if sharded else None)
        total, *_ = weighted_sum(sum_of_squares, hidden, head, weights, power, chunk=3)
        return total + jnp.sum(token_values(sum_of_squares, hidden, head, power, chunk=3))

    def theirs(hidden, kernel, bias, added, weights):
        p = jax.nn.softmax(whole_logits(hidden, put(kernel, added), bias))
        return jnp.sum((weights + 1) * jnp.sum(p**2, axis=-1))

    args = hidden, kernel, bias, added, weights
    expected = jax.value_and_grad(theirs, (0, 1, 2, 3, 4))(*args)
    assert not expected[1][1][:, FIRST : FIRST + N].any()
    mesh = sharding.make_mesh({"data": 2, "tensor": 2}, jax.devices()[:4])
    with jax.set_mesh(mesh) if sharded else contextlib.nullcontext():
        close(jax.jit(jax.value_and_grad(ours, (0, 1, 2, 3, 4)))(*args), expected)


@pytest.mark.parametrize("name", ["weighted_sum", "token_values"])
def test_added_tokens_trained_alone_leave_no_gradient_of_the_others(arrays, name):
    hidden, kernel, bias, weights = arrays

    def loss(scale, added):
        head, power = with_added(kernel, bias, added), jnp.ones((B, T))
        if name == "weighted_sum":
            return weighted_sum(sum_of_squares, scale * hidden, head, weights, power, chunk=3)[0]
        return jnp.sum(token_values(sum_of_squares, scale * hidden, head, power, chunk=3))

    shapes = set(products(jax.make_jaxpr(jax.grad(loss, (0, 1)))(1.0, jnp.ones((D, N))).jaxpr))
    assert {(D, N), (B, 3, D)} <= shapes
    assert not {(D, V), (V, D)} & shapes
