import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.devices import sharding
from research.ops.cpu import few_rows


@pytest.mark.parametrize(("shape", "contract"), [((24, 1024), 1), ((24, 2, 512), 1), ((4, 8, 512), 2)])
def test_products_with_blocks_are_those_with_the_kernel(shape, contract):
    rng = np.random.default_rng(0)
    kernel = jnp.asarray(rng.normal(size=shape), jnp.float32)
    x = jnp.asarray(rng.normal(size=(3, 1, *shape[:contract])), jnp.float32)
    y = jax.jit(few_rows.product, static_argnums=2)(x, few_rows.blocks(kernel, contract), contract)
    expected = jnp.tensordot(x, kernel, axes=contract)
    np.testing.assert_allclose(y, expected.reshape(3, 1, -1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "dtype"), [((64, 1008), jnp.float32), ((64, 32), jnp.float32), ((64, 1024), jnp.bfloat16)]
)
def test_what_gains_nothing_has_no_blocks(shape, dtype):
    assert few_rows.blocks(jnp.zeros(shape, dtype)) is None


def test_blocks_are_for_few_rows_on_one_cpu():
    assert [few_rows.apply(rows) for rows in (1, 2, 8, 9)] == [False, True, True, False]
    with jax.set_mesh(sharding.make_mesh({"fsdp": 8})):
        assert not few_rows.apply(8)
