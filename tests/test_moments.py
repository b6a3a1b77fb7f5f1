"""Adam's moments in 8 bits beside those in float32; how they are laid out, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import runs

from research import moments, optim
from research.devices import memory, sharding
from research.errors import InputError

MODEL = {"num_layers": 2, "d_model": 64, "num_heads": 4, "num_kv_heads": 2, "d_ff": 128, "vocab_size": 512}


@pytest.fixture(scope="module")
def moment():
    """[16, 512], eight blocks of 64 in a row, whose scales differ; some of it is 0."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(16, 512)) * np.logspace(-8, 0, 16)[:, None]
    x[3], x[:, 5] = 0, 0
    return jnp.asarray(x, jnp.float32)


@pytest.mark.parametrize("kind", ["mu", "nu"])
def test_the_mean_of_what_is_held_is_the_moment(kind, moment):
    x = jnp.square(moment) if kind == "nu" else moment

    def held(key):
        return moments.decoded(kind, *moments.encoded(kind, x, jax.random.bits(key, x.shape, jnp.uint16)))

    values = np.asarray(jax.jit(jax.vmap(held))(jax.random.split(jax.random.PRNGKey(0), 256)))
    x = np.asarray(x)
    blocks = x.reshape(16, 8, 64)
    largest = np.max(np.abs(blocks), axis=-1, keepdims=True)
    error = np.abs(np.mean(values, axis=0).reshape(blocks.shape) - blocks)
    # A step between codes is at most a 60th of the largest, or so; the smallest code of nu is never left out.
    assert np.all(error <= 5 * largest / 60 / 16)
    assert np.all((values == 0) | (x != 0))
    assert np.all((values[0] > 0) == (x > 0)) if kind == "nu" else np.all(values * x >= 0)
    near = np.abs(blocks) > largest / 10
    assert np.all(np.abs(values[0].reshape(blocks.shape) - blocks)[near] < 0.06 * np.abs(blocks[near]))


def test_blocks_of_axes():
    sizes = {4096: 256, 11008: 172, 768: 48, 384: 48, 128: 64, 64: 64, 100: 50, 257: 257, 31: 31, 50257: 50257}
    assert {n: moments.block_size(n) for n in sizes} == sizes


def trained(spec, steps=30):
    """Losses and parameters of a small regression that is learned with noise, with some numbers that seldom have a
    gradient."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(steps, 32, 64)), rng.normal(size=(64, 96))
    x[:, :, :8] *= rng.random((steps, 1, 8)) < 0.2
    x[:, :, 8:16] *= 1e-3
    x, y = jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32)
    values = {"w": jnp.zeros((64, 96)), "b": jnp.zeros(96)}
    tx = optim.make_optimizer(spec, steps, {"w": True, "b": False})

    def step(carry, x):
        values, state = carry
        loss = lambda p: jnp.mean(jnp.square(x @ p["w"] + p["b"][None] - x @ y))  # noqa: E731
        value, grads = jax.value_and_grad(loss)(values)
        changes, state = tx.update(grads, state, values)
        return (optax.apply_updates(values, changes), state), value

    return jax.jit(lambda: jax.lax.scan(step, (values, tx.init(values)), x))()


def test_it_learns_as_with_moments_in_float32():
    """After 30 steps parameters are within a twentieth of their way, and the loss within a hundredth of itself."""
    spec = optim.OptimizerSpec(learning_rate=0.05, schedule="constant", weight_decay=0.0)
    (whole, _), losses = trained(spec)
    (held, state), others = trained(optim.dataclasses.replace(spec, moments="int8"))
    assert losses[-1] < 0.6 * losses[0]
    np.testing.assert_allclose(others[-1], losses[-1], rtol=0.01)
    for name, x in whole.items():
        assert np.linalg.norm(held[name] - x) < 0.05 * np.linalg.norm(x), name
    own = next(s for s in state if isinstance(s, moments.State))
    assert (own.mu["w"].dtype, own.nu["w"].dtype, own.mu["b"].dtype) == (jnp.int8, jnp.uint8, jnp.float32)
    assert int(own.count) == 30


def test_a_bad_batch_leaves_it_as_it_was():
    spec = optim.OptimizerSpec(learning_rate=0.05, schedule="constant", weight_decay=0.0, moments="int8")
    tx = optim.make_optimizer(spec, 30, {"w": True})
    values = {"w": jnp.zeros((64, 64))}
    update = jax.jit(lambda g, state, ok: tx.update({"w": g}, state, values, ok=ok)[1])
    first = update(jnp.ones((64, 64)), tx.init(values), jnp.asarray(True))
    second = update(jnp.full((64, 64), jnp.nan), first, jnp.asarray(False))
    jax.tree.map(np.testing.assert_array_equal, second, first)
    own = next(s for s in first if isinstance(s, moments.State))
    assert int(own.count) == 1
    assert np.any(own.mu["w"])


def test_on_a_mesh_it_is_cut_as_parameters_are_and_the_same():
    mesh = sharding.make_mesh({"fsdp": 2, "tensor": 2}, jax.devices()[:4])
    where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp", "tensor"))
    grads = jnp.asarray(np.random.default_rng(0).normal(size=(2, 64, 96)), jnp.float32)
    tx = moments.adam(0.9, 0.95, 1e-8)

    @jax.jit
    def two_steps(grads):
        state = tx.init({"w": grads[0]})
        for g in grads:
            directions, state = tx.update({"w": g}, state)
        return directions["w"], moments.decoded("nu", state.nu["w"], state.nu_scale["w"])

    cut = jax.device_put(grads, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, *where.spec)))
    for ours, whole in zip(two_steps(cut), two_steps(grads), strict=True):
        np.testing.assert_allclose(ours, whole, rtol=1e-5)
    assert sharding.fitted(where, (64, 6)).spec == where.spec
    assert sharding.fitted(where, (64, 3)).spec == jax.sharding.PartitionSpec("fsdp", None)


def test_bytes_of_the_state():
    """Of 8 bytes for each parameter 2 are left, with scales and with what is small."""
    whole, held = (
        runs.parts_of(runs.small(model=MODEL, optimizer={"moments": kind})).state.opt_state for kind in moments.KINDS
    )
    share = memory.bytes_on_a_device(held) / memory.bytes_on_a_device(whole)
    assert 2 / 8 < share < 2.3 / 8


@pytest.mark.parametrize(
    ("optimizer", "words"),
    [
        ({"moments": "int4"}, "optimizer.moments = 'int4': not known"),
        ({"name": "lion"}, "optimizer.moments = 'int8': holds both of adamw's moments in 8 bits, and optimizer.name"),
        ({"mu_dtype": "bfloat16"}, "and optimizer.mu_dtype = 'bfloat16'. Leave that out"),
        ({}, "optimizer.moments = 'int8': has no effect, since nothing that is trained has 4096 numbers"),
    ],
)
def test_what_does_not_go_together_is_refused(optimizer, words):
    with pytest.raises(InputError) as error:
        runs.parts_of(runs.small(trainable="final_norm/.*", optimizer={"moments": "int8", **optimizer}))
    assert words in str(error.value)
