"""What an evaluation makes of its batches."""

import jax.numpy as jnp
import pytest

from research.objectives import Term
from research.objectives.types import Objective
from research.run import evaluation


def term(weight):
    return Term(Objective(loss=None), lambda step: jnp.float32(weight))


def test_the_loss_of_several_terms_is_the_sum_of_their_losses_over_all_batches():
    """Of two batches, the second has no token of term b: its own sum is that of a alone."""
    scores = {"a/loss": 2.0, "b/loss": 3.0, "loss": (2.0 + 0.5 * 3.0 + 2.0) / 2}
    terms = {"a": term(1.0), "b": term(0.5)}
    assert evaluation.whole_loss(terms, scores)["loss"] == pytest.approx(3.5)
    assert evaluation.whole_loss(terms, {"a/loss": 2.0})["loss"] == 2.0
    assert evaluation.whole_loss({"a": term(1.0)}, {"loss": 7.0}) == {"loss": 7.0}
