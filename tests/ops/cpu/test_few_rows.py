import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.ops.cpu import few_rows


@pytest.mark.parametrize(
    ("x", "kernel", "contract"), [((3, 1, 8), (8, 2, 6), 1), ((2, 2, 3, 4), (3, 4, 8), 2), ((5, 8, 8), (8, 12), 1)]
)
def test_it_is_the_product_of_few_rows_and_of_many(x, kernel, contract):
    x, kernel = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate((x, kernel)))
    turned = few_rows.turned(kernel, contract)
    y = few_rows.product(x, turned, contract)
    np.testing.assert_allclose(y, jnp.tensordot(x, kernel, axes=contract), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [4, few_rows.MOST_ROWS + 1])
def test_of_few_rows_the_kernel_is_the_first_operand(rows):
    """And of many the second, as the library copies that one."""
    x, turned = jnp.ones((rows, 16)), jnp.ones((24, 16))
    text = jax.jit(few_rows.product).lower(x, turned).compile().as_text()
    shapes = re.findall(r"= f32\[(\d+),(\d+)\]\S* dot\(", text)
    assert shapes == [("24", str(rows)) if rows <= few_rows.MOST_ROWS else (str(rows), "24")]
