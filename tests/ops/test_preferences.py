"""The losses of preferences as functions of scores."""

import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.ops import preferences
from research.ops.preferences import LOSSES, Options

PAIRED = [kind for kind, row in LOSSES.items() if not row.labels]
SMOOTHED = [kind for kind, row in LOSSES.items() if "label_smoothing" in row.takes]


def options(kind, **values):
    smoothing = {"label_smoothing": 0.1} if kind in SMOOTHED else {}
    defaults = {k: v for k, v in LOSSES[kind].defaults.items() if k != "shift_decay"}
    return Options(**{"beta": 0.2, **defaults, **smoothing, **values})


@pytest.mark.parametrize("kind", [kind for kind, row in LOSSES.items() if row.reference])
@pytest.mark.parametrize("beta", [0.05, 0.5])
def test_a_loss_begins_where_theory_has_it(kind, beta):
    row, chosen = LOSSES[kind], jnp.zeros(2)
    o = options(kind, beta=beta)
    if row.labels:
        o = options(kind, beta=beta, desirable_weight=1.5)
        value = jnp.mean(row.function(chosen, jnp.array([True, False]), 0.0, o))
    else:
        value = row.function(chosen, jnp.zeros(2), o)
    np.testing.assert_allclose(value, row.at_start(o), rtol=1e-6)


def test_the_values_at_the_start_are_those_of_the_papers():
    o = Options(beta=0.1, label_smoothing=0.2)
    at_start = {kind: row.at_start(o) for kind, row in LOSSES.items() if row.reference}
    ln2 = math.log(2)
    assert at_start == pytest.approx(
        {
            "sigmoid": ln2,
            "cdpo": ln2,
            "robust": ln2,
            "hinge": 1,
            "ipo": 25,
            "ipo_mean": 25,
            "exo": math.log(0.5) - (math.log(0.8) + math.log(0.2)) / 2,
            "discopop": (1 + ln2) / 2,
            "nca": 2 * ln2,
            "bco": 2 * ln2,
            "sppo": 50,
            "aot": ln2,
            "aot_unpaired": ln2,
            "apo_zero": 1,
            "apo_down": 1,
            "kto": 0.5,
            "apo_zero_unpaired": 0.5,
        }
    )


@pytest.mark.parametrize("kind", PAIRED)
def test_equal_answers_teach_what_depends_on_the_difference_nothing(kind):
    """Both sides move as one, as they do where they are one answer."""
    row, o = LOSSES[kind], options(kind)
    gradient = jax.grad(lambda x: jnp.sum(row.function(x, x, o)))(jnp.array([-1.3, -0.2]))
    if row.difference or kind == "aot_unpaired":  # where all of a batch's pairs are so
        np.testing.assert_array_equal(gradient, 0)
    else:
        assert np.all(np.abs(gradient) > 1e-3)


@pytest.mark.parametrize("kind", SMOOTHED)
def test_label_smoothing_has_an_effect(kind):
    chosen, rejected = jnp.array([-0.5, -3.0]), jnp.array([-2.0, -0.3])
    values = [LOSSES[kind].function(chosen, rejected, options(kind, label_smoothing=e)) for e in (0.1, 0.3)]
    assert np.all(np.abs(values[0] - values[1]) > 1e-3)


def test_robust_is_unbiased_under_flips():
    """Its mean over labels of which 30 % are flipped is the loss of true labels."""
    chosen, rejected = jnp.array([-0.5, -3.0]), jnp.array([-2.0, -0.3])
    o = Options(beta=0.5, label_smoothing=0.3)
    mean = 0.7 * preferences.robust(chosen, rejected, o) + 0.3 * preferences.robust(rejected, chosen, o)
    np.testing.assert_allclose(mean, preferences.sigmoid(chosen, rejected, Options(beta=0.5)), rtol=1e-5)


def test_alphapo_nears_simpo():
    chosen, rejected = jnp.array([-0.5, -3.0]), jnp.array([-2.0, -0.3])
    near, limit = (preferences.alphapo(chosen, rejected, Options(2.0, gamma=0.5, alpha=a)) for a in (1e-4, 0.0))
    np.testing.assert_allclose(near, limit, rtol=1e-3)
    np.testing.assert_array_equal(limit, preferences.simpo(chosen, rejected, Options(2.0, gamma=0.5)))


@pytest.mark.parametrize(("divergence", "alpha"), [("forward_kl", 0.5), ("js", 0.5), ("alpha", 0.5), ("alpha", 0.0)])
def test_divergences_are_as_steep_as_dpo_where_the_models_are_one(divergence, alpha):
    score, slope = jax.value_and_grad(lambda x: preferences.shape(x, divergence, alpha))(0.0)
    np.testing.assert_allclose((score, slope), (0, 0.5 if divergence == "js" else 1), atol=1e-7)
    far = jax.value_and_grad(lambda x: preferences.shape(x, divergence, alpha))(-1000.0)
    assert np.all(np.isfinite(far))


def test_alpha_nears_both_divergences():
    x = jnp.array([-1.5, 0.4])
    np.testing.assert_allclose(preferences.shape(x, "alpha", 0.999), x, rtol=2e-3)
    np.testing.assert_allclose(preferences.shape(x, "alpha", 0.0), preferences.shape(x, "forward_kl"), rtol=1e-6)


@pytest.mark.parametrize("kind", PAIRED)
def test_no_loss_overflows(kind):
    """Scores of long answers far from the reference, and of an answer that is all but certain."""
    row, o = LOSSES[kind], options(kind)
    far = jnp.array([-900.0, 900.0, -1e-9, 0.0]) if row.reference else jnp.array([-30.0, -1e-3, -1e-9, 0.0])

    def total(chosen, rejected):
        return jnp.sum(row.function(chosen, rejected, o))

    value, gradients = jax.value_and_grad(total, argnums=(0, 1))(far, far[::-1])
    assert np.isfinite(value)
    assert np.all(np.isfinite(gradients))


def test_partners_have_the_same_rank():
    values, others = jnp.array([3.0, 9.0, 1.0, 2.0]), jnp.array([10.0, 40.0, 20.0, 30.0])
    present = jnp.array([True, False, True, True])
    partners = preferences.partners(values, others, present, jnp.array([0, 2, 3]))
    np.testing.assert_array_equal(partners, [30, 10, 20])


def test_the_page_on_preferences_has_every_loss():
    page = (pathlib.Path(__file__).parents[2] / "docs/preferences.md").read_text()
    assert all(f"| `{kind}` |" in page and row.source in page for kind, row in LOSSES.items())
