"""LESS's numbers, and that projections keep inner products."""

import goldens
import jax
import jax.numpy as jnp
import numpy as np

from research.ops import influence

CASE = goldens.load("data_selection")["less"]


def test_directions_and_influence_of_less():
    h, inputs = CASE.hparams, CASE.inputs
    with jax.enable_x64(True):
        given = [jnp.asarray(inputs[name], jnp.float64) for name in ("grad", "exp_avg", "exp_avg_sq")]
        direction = influence.adam_direction(*given, h["beta1"], h["beta2"], h["eps"])
        train, valid = (jnp.asarray(inputs[f"{name}_features"], jnp.float64) for name in ("train", "valid"))
        values = influence.influence(train, valid)
    np.testing.assert_allclose(direction, CASE.outputs["adam_gradient"], rtol=1e-9)
    np.testing.assert_allclose(values, CASE.outputs["influence"], rtol=1e-9)


def test_a_sketch_keeps_inner_products_on_average():
    rng = np.random.default_rng(0)
    x, y = jnp.asarray(rng.normal(size=(2, 1000)), jnp.float32)
    y = y + 0.5 * x
    keys = jax.random.split(jax.random.key(0), 300)

    def product(key):
        sketch = influence.make_sketch(key, 1000, 64)
        return jnp.dot(influence.sketched(sketch, x), influence.sketched(sketch, y))

    products = np.asarray(jax.vmap(product)(keys))
    deviation = products.std() / np.sqrt(len(products))
    assert abs(products.mean() - float(jnp.dot(x, y))) < 4 * deviation
    assert products.std() < 2 * float(jnp.linalg.norm(x) * jnp.linalg.norm(y)) / np.sqrt(64)


def test_where_there_is_room_nothing_is_lost():
    x = jnp.arange(5, dtype=jnp.float32)
    out = influence.sketched(influence.make_sketch(jax.random.key(1), 5, 8), x)
    assert sorted(np.abs(np.asarray(out)).tolist()) == [0, 0, 0, 0, 1, 2, 3, 4]


def test_rows_have_length_1_or_0():
    rows = influence.normalized(jnp.array([[3.0, 4.0], [0.0, 0.0]]))
    np.testing.assert_allclose(rows, [[0.6, 0.8], [0, 0]], rtol=1e-6)
