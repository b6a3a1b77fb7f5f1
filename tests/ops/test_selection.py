"""The lengths of errors."""

import jax
import jax.numpy as jnp
import numpy as np

from research.ops import selection
from research.ops.head import Head
from research.ops.losses import target_log_probs


def test_error_norms_are_those_of_the_gradient_by_the_logits():
    logits = jax.random.normal(jax.random.key(0), (1, 6, 11)) * 3
    targets = jnp.arange(6, dtype=jnp.int32)[None]
    out = target_log_probs(
        logits, Head(jnp.eye(11, dtype=jnp.float32), None, 0.0), targets, collision=True, frozen=True
    )
    errors = jax.nn.softmax(logits) - jax.nn.one_hot(targets, 11)
    expected = jnp.linalg.norm(errors, axis=-1)
    np.testing.assert_allclose(selection.error_norms(out.target, out.collision), expected, rtol=1e-4, atol=1e-5)
