"""Which examples RHO-LOSS takes, and the lengths of errors."""

import goldens
import jax
import jax.numpy as jnp
import numpy as np

from research.ops import selection
from research.ops.head import Head
from research.ops.losses import target_log_probs

RHO = goldens.load("data_selection")["rho_loss"]


def test_rho_loss():
    logits, labels = jnp.asarray(RHO.inputs["logits"], jnp.float32), jnp.asarray(RHO.inputs["labels"], jnp.int32)
    head = Head(jnp.eye(logits.shape[-1], dtype=jnp.float32), None, 0.0)
    loss = -target_log_probs(logits[None], head, labels[None], frozen=True).target[0]
    np.testing.assert_allclose(loss, RHO.outputs["model_loss"], rtol=1e-5)
    irreducible = RHO.inputs["irreducible_losses"][RHO.inputs["global_index"]]
    values = selection.reducible_losses(loss, jnp.asarray(irreducible, jnp.float32))
    np.testing.assert_allclose(values, RHO.outputs["reducible_loss"], rtol=1e-5, atol=1e-6)
    chosen = selection.top(values, RHO.hparams["selected_batch_size"])
    assert set(chosen.tolist()) == set(RHO.outputs["selected"].tolist())


def test_of_equal_scores_the_first_come_first():
    assert selection.top(jnp.array([1.0, 2.0, 1.0, 2.0, 1.0]), 4).tolist() == [1, 3, 0, 2]


def test_error_norms_are_those_of_the_gradient_by_the_logits():
    logits = jax.random.normal(jax.random.key(0), (1, 6, 11)) * 3
    targets = jnp.arange(6, dtype=jnp.int32)[None]
    out = target_log_probs(
        logits, Head(jnp.eye(11, dtype=jnp.float32), None, 0.0), targets, collision=True, frozen=True
    )
    errors = jax.nn.softmax(logits) - jax.nn.one_hot(targets, 11)
    expected = jnp.linalg.norm(errors, axis=-1)
    np.testing.assert_allclose(selection.error_norms(out.target, out.collision), expected, rtol=1e-4, atol=1e-5)
