"""Updates of parameters in bfloat16: rounded to the nearest, and stochastically; what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs

from research import params, updates
from research.devices import sharding
from research.errors import InputError

BF16 = {"trained_dtype": "bfloat16", "optimizer": {"rounding": "stochastic"}}


def draws(x, n):
    keys = jax.random.split(jax.random.PRNGKey(0), n)
    return jax.jit(jax.vmap(updates.stochastic, (None, 0)))(x, keys).astype(jnp.float32)


def test_the_mean_of_stochastic_rounding_is_the_number_and_what_bfloat16_can_hold_stays():
    held = jnp.asarray([0.0, -0.0, 1.0, -1.5, 2.0**-130, 3.0e38, jnp.inf, -jnp.inf, jnp.nan], jnp.bfloat16)
    x = np.asarray(np.random.default_rng(0).normal(size=64) * np.logspace(-6, 6, 64), np.float32)
    values = np.asarray(draws(jnp.concatenate([x, held.astype(jnp.float32)]), 4096))
    np.testing.assert_array_equal(values[:, 64:], np.broadcast_to(held.astype(np.float32), (4096, 9)))
    unit, values = 2 ** (np.floor(np.log2(np.abs(x))) - 7), values[:, :64]  # in the last place of bfloat16
    assert np.all(np.abs(values - x) < unit)
    assert np.max(np.abs(np.mean(values, axis=0) - x) / unit) < 4 * 0.5 / 4096**0.5  # of deviations of a half
    assert np.all(np.std(values, axis=0) > 0)


def test_small_updates_arrive_by_stochastic_rounding_alone():
    """Of 1 the next number in bfloat16 is 1 + 2^-7, and a thousandth is less than half of that."""
    small = {"w": jnp.full((2048,), 1e-3)}

    @jax.jit
    def walk(key):
        step = lambda values, key: (updates.apply(values, small, key), None)  # noqa: E731
        keys = None if key is None else jax.random.split(key, 50)
        return jax.lax.scan(step, {"w": jnp.ones(2048, jnp.bfloat16)}, keys, length=50)[0]["w"].astype(jnp.float32)

    np.testing.assert_array_equal(walk(None), 1.0)
    np.testing.assert_allclose(jnp.mean(walk(jax.random.PRNGKey(1))), 1.05, atol=2e-3)


def test_each_parameter_has_bits_of_its_own_and_float32_is_summed_as_ever():
    values = {"a": jnp.ones(512, jnp.bfloat16), "b": jnp.ones(512, jnp.bfloat16), "c": jnp.ones(512)}
    steps, key = {name: jnp.full((512,), 3e-3) for name in values}, jax.random.PRNGKey(0)
    new = jax.jit(updates.apply)(values, steps, key)
    assert np.any(np.asarray(new["a"] != new["b"]))
    np.testing.assert_array_equal(new["c"], values["c"] + steps["c"])
    one = jax.jit(updates.apply)({"b": values["b"]}, {"b": steps["b"]}, key)
    np.testing.assert_array_equal(one["b"], new["b"])


def test_the_bits_do_not_depend_on_devices():
    mesh = sharding.make_mesh({"fsdp": 2, "tensor": 2}, jax.devices()[:4])
    x = jnp.asarray(np.random.default_rng(0).normal(size=(64, 96)), jnp.float32)
    cut = jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp", "tensor")))
    rounded = jax.jit(updates.stochastic)
    np.testing.assert_array_equal(rounded(cut, jax.random.PRNGKey(3)), rounded(x, jax.random.PRNGKey(3)))


def test_kernels_are_held_so_and_averages_and_moments_are_not():
    parts = runs.parts_of(runs.small(ema_decay=0.9, **BF16))
    kernels = {name: spec.contracts for name, spec in params.named_leaves(parts.roles.trained)}
    for name, x in params.named_leaves(parts.state.params):
        assert x.dtype == (jnp.bfloat16 if kernels[name] else jnp.float32), name
    others = [x for x in jax.tree.leaves((parts.state.ema, parts.state.opt_state)) if x.dtype != jnp.int32]
    assert {x.dtype for x in others} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"optimizer": {"rounding": "stochastic"}}, "optimizer.rounding = 'stochastic': is of parameters in bfloat16"),
        ({"optimizer": {"rounding": "up"}}, "optimizer.rounding = 'up': not known"),
        ({"trained_dtype": "bfloat15"}, "trained_dtype = 'bfloat15': no such choice. Did you mean 'bfloat16'"),
        (
            {"trained_dtype": "bfloat16", "trainable": r".*norm/scale"},
            "trained_dtype = 'bfloat16': has no effect, since no kernel is trained",
        ),
        (
            {
                "trained_dtype": "bfloat16",
                "roles": {"reference": {"of": "policy", "sync_every": 2, "sync_weight": 0.5}},
            },
            "roles.reference.sync_weight = 0.5: is a moving average, whose small moves are lost",
        ),
    ],
)
def test_what_has_no_effect_or_loses_something_is_refused(fields, words):
    with pytest.raises(InputError) as error:
        runs.parts_of(runs.small(**fields))
    assert words in str(error.value)
