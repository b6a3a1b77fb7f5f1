import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.devices import sharding
from research.ops.cpu.matmul import matmul


@pytest.mark.parametrize(
    ("x", "kernel", "contract"),
    [
        ((2, 5, 8), (8, 12), 1),
        ((2, 5, 12), (12, 8), 1),
        ((2, 5, 8), (8, 3, 4), 1),
        ((2, 5, 3, 4), (3, 4, 8), 2),
        ((2, 5, 3, 4), (3, 4, 2, 8), 2),
        ((7, 8), (8, 4), 1),
    ],
)
def test_gradients_are_those_of_a_plain_product(x, kernel, contract):
    keys = jax.random.split(jax.random.key(0), 3)
    x, kernel = jax.random.normal(keys[0], x), jax.random.normal(keys[1], kernel)
    y, pullback = jax.vjp(lambda x, k: matmul(x, k, contract), x, kernel)
    plain, plain_pullback = jax.vjp(lambda x, k: jnp.tensordot(x, k, axes=contract), x, kernel)
    np.testing.assert_allclose(y, plain, rtol=1e-6)
    dy = jax.random.normal(keys[2], y.shape)
    for gradient, expected in zip(pullback(dy), plain_pullback(dy), strict=True):
        np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-5)


def test_in_bfloat16_and_cut_over_devices():
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    keys = jax.random.split(jax.random.key(0), 3)
    shapes, axes = ((4, 6, 8), (8, 4), (4, 6, 4)), (("batch", "time", None), ("embed", "mlp"), ("batch", "time", "mlp"))
    arrays = [jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes, strict=True)]

    def loss(x, kernel, weights, product=matmul):
        return jnp.sum(weights * product(x, kernel))

    with jax.set_mesh(mesh):
        placed = [jax.device_put(x, sharding.named(mesh, names)) for x, names in zip(arrays, axes, strict=True)]
        gradients = jax.jit(jax.grad(loss, argnums=(0, 1)))(*placed)
    plain = functools.partial(loss, product=jnp.matmul)
    exact = jax.grad(plain, argnums=(0, 1))(*(x.astype(jnp.float32) for x in arrays))
    for gradient, expected in zip(gradients, exact, strict=True):
        assert gradient.dtype == jnp.bfloat16
        np.testing.assert_allclose(gradient.astype(jnp.float32), expected, rtol=0.02, atol=0.02)


def test_transposes_the_smaller_operand_by_itself():
    """And not the gradient of the activation, with all that makes it."""

    def loss(x, up, down):
        return jnp.sum(matmul(jax.nn.silu(matmul(x, up)), down))

    x, up, down = jnp.ones((2, 64, 8)), jnp.ones((8, 32)), jnp.ones((32, 8))
    text = jax.jit(jax.grad(loss, argnums=(1, 2))).lower(x, up, down).as_text()
    turned = [line for line in text.splitlines() if "stablehlo.transpose" in line and "64" in line]
    assert len(turned) == 2, text
    assert all("tensor<8x2x64xf32>" in line for line in turned), turned
