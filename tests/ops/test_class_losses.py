"""Losses on classes against those that others published, and against their formulas."""

import functools

import goldens
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research import optim
from research.ops import class_losses as cl

GOLDENS = goldens.load("w2s")


def _kind(name):
    return "_".join(w for w in name.split("_")[:2] if not w.isdigit())


# The first words of a case's name -> its cases.
KINDS = {kind: [c for n, c in GOLDENS.items() if _kind(n) == kind] for kind in dict.fromkeys(map(_kind, GOLDENS))}


def _labels(case):
    if "labels" in case.inputs:
        return case.inputs["labels"]
    if "teacher_logits" in case.inputs:
        x = np.exp(case.inputs["teacher_logits"])
        return x / x.sum(-1, keepdims=True)
    return np.stack([1 - case.inputs["weak_p1"], case.inputs["weak_p1"]], axis=-1)


def _check(cases, loss, *columns, dtype=jnp.float64):
    """All cases at once: rows are padded with NaN of weight 0, which must change nothing.

    loss(logits, labels, weights, *columns) is a sum; `columns` hold a value for each case.
    """
    logits = [c.inputs["logits" if "logits" in c.inputs else "student_logits"] for c in cases]
    most = max(map(len, logits)) + 1
    pad = lambda xs: np.stack([np.pad(x, ((1, most - len(x)), (0, 0)), constant_values=np.nan) for x in xs])  # noqa: E731
    weights = np.stack([np.pad(np.ones(len(x)), (1, most - len(x))) for x in logits])

    @jax.jit
    @jax.vmap
    @functools.partial(jax.value_and_grad, has_aux=False)
    def mean(logits, labels, weights, *columns):
        return loss(logits, labels, weights, *columns) / jnp.sum(weights)

    with jax.enable_x64(True):
        arrays = [jnp.asarray(x, dtype) for x in (pad(logits), pad([_labels(c) for c in cases]), weights, *columns)]
        losses, gradients = mean(*arrays)
    assert losses.dtype == gradients.dtype == dtype
    tight = {"rtol": 1e-9, "atol": 1e-12} if dtype == jnp.float64 else {"rtol": 1e-5, "atol": 1e-7}
    for case, own, gradient, x in zip(cases, losses, np.asarray(gradients), logits, strict=True):
        theirs = case.outputs["grad_logits" if "grad_logits" in case.outputs else "grad_student"]
        np.testing.assert_allclose(own, case.outputs["loss"], **tight, err_msg=case.name)
        np.testing.assert_allclose(gradient[1 : len(x) + 1], theirs, **tight, err_msg=case.name)
        assert not gradient[0].any()
        assert not gradient[len(x) + 1 :].any()


def _column(cases, name):
    return np.array([c.hparams[name] for c in cases], np.float64)


def _own_by_quantile(logits, labels, weights, coefficient, prior=None):
    p = jax.nn.softmax(jnp.where(weights[:, None] > 0, logits, 0.0))
    prior = cl.mean_label(labels, weights) if prior is None else prior
    thresholds = cl.quantile_thresholds(p, prior, weights)
    return cl.auxiliary_confidence(logits, labels, weights, coefficient=coefficient, thresholds=thresholds)


def test_every_published_case_is_tested():
    tested = {
        "xent",
        "logconf",
        "product",
        "eleuther_window",
        "eleuther_kl",
        "eleuther_logconf",
        "adaptconf",
        "augconf",
    }
    assert set(KINDS) == tested | {"recipe_xent", "recipe_logconf", "recipe_product"}
    assert sum(map(len, KINDS.values())) == 156


def test_cross_entropy_of_openai():
    _check(KINDS["xent"], cl.cross_entropy)


def test_auxiliary_confidence_of_openai():
    cases = KINDS["logconf"]
    done, warm = _column(cases, "step_frac"), _column(cases, "warmup_frac")
    coefficients = _column(cases, "aux_coef") * np.where(done > warm, 1.0, done)  # with the jump at the end of warm-up
    _check(cases, _own_by_quantile, coefficients, dtype=jnp.float32)


def test_product_of_confidence_of_openai():
    cases = KINDS["product"]
    loss = lambda x, y, w, alpha, beta: cl.product_of_confidence(x, y, w, alpha=alpha, beta=beta)  # noqa: E731
    _check(cases, loss, _column(cases, "alpha_weak"), _column(cases, "beta_strong"))


def test_window_and_divergence_of_eleuther():
    loss = lambda x, y, w, radius: cl.confidence_window(x, y, w, radius=radius)  # noqa: E731
    _check(KINDS["eleuther_window"], loss, _column(KINDS["eleuther_window"], "radius"), dtype=jnp.float32)
    _check(KINDS["eleuther_kl"], cl.forward_kl, dtype=jnp.float32)


def test_log_confidence_of_eleuther():
    def ours(logits, labels, weights, coefficient, balanced, hard, buffer, buffered):
        labels = jnp.where(balanced > 0, cl.balance(labels, weights), labels)
        prior = jnp.where(balanced > 0, 0.5, cl.mean_label(labels, weights))
        p0 = jax.nn.softmax(jnp.where(weights[:, None] > 0, logits, 0.0))[:, 0]
        # The last 32 values, those of the batch included; the padding first.
        known = jnp.concatenate([buffer, p0])
        there = jnp.concatenate([buffered, weights])
        latest = jnp.cumsum(there[::-1])[::-1] <= 32
        thresholds = cl.quantile_thresholds(
            jnp.stack([known, 1 - known], -1), prior, there * latest.astype(there.dtype)
        )
        kwargs = {"coefficient": coefficient, "thresholds": thresholds}
        hardened, soft = (cl.auxiliary_confidence(logits, labels, weights, soft=s, **kwargs) for s in (False, True))
        return jnp.where(hard > 0, hardened, soft)

    cases = KINDS["eleuther_logconf"]
    rise = np.minimum(1.0, _column(cases, "step") / _column(cases, "warmup_steps"))
    buffers = [c.inputs["buffer_before"] for c in cases]
    most = max(map(len, buffers))
    padded = [np.pad(b, (most - len(b), 0)) for b in buffers]
    there = [np.pad(np.ones(len(b)), (most - len(b), 0)) for b in buffers]
    columns = _column(cases, "aux_coef") * rise, _column(cases, "balance_batch"), _column(cases, "harden")
    _check(cases, ours, *columns, padded, there, dtype=jnp.float32)


def test_adaptive_and_augmented_confidence_of_guo():
    adaptive, augmented = KINDS["adaptconf"], KINDS["augconf"]

    def adapt(x, y, w, scale, temperature):
        return cl.adaptive_confidence(x, y, w, scale=scale, temperature=temperature)

    def augment(x, y, w, coefficient, temperature):
        return cl.augmented_confidence(x, y, w, coefficient=coefficient, temperature=temperature)

    temperature = functools.partial(_column, name="kd_temperature")
    _check(adaptive, adapt, _column(adaptive, "superalignment_threshold"), temperature(adaptive))
    rise = _column(augmented, "epoch") / (_column(augmented, "epochs") * _column(augmented, "superalignment_rate"))
    coefficient = np.minimum(1.0, rise) * _column(augmented, "superalignment_threshold")
    _check(augmented, augment, coefficient, temperature(augmented))


@pytest.mark.parametrize("loss", ["xent", "logconf", "product"])
def test_a_whole_training_of_openai(loss):
    """Twelve steps of Adam from the same parameters, at a constant and at a falling learning rate."""
    cases = KINDS[f"recipe_{loss}"]
    case, tight = cases[0], {"rtol": 1e-5, "atol": 1e-6} if loss == "logconf" else {"rtol": 1e-9, "atol": 1e-11}
    steps = len(case.outputs["lr"])
    for c, schedule in zip(cases, ("cosine", "constant"), strict=True):
        spec = optim.OptimizerSpec(learning_rate=c.hparams["lr"], warmup_steps=0, schedule=schedule)
        ours = [float(optim.make_schedule(spec, steps)(t)) for t in range(steps)]
        np.testing.assert_allclose(ours, c.outputs["lr"], rtol=1e-5)

    def mean(params, ids, labels, done):
        there = (ids != 0).astype(labels.dtype)
        bag = jnp.sum(params["emb"][ids] * there[..., None], axis=1) / jnp.sum(there, axis=1, keepdims=True)
        logits = jnp.tanh(bag) @ params["score"].T
        weights = jnp.ones(len(ids), labels.dtype)
        if loss == "logconf":
            logits, labels, weights = (x.astype(jnp.float32) for x in (logits, labels, weights))
            coefficient = 0.5 * jnp.where(done > 0.1, 1.0, done)
            total = _own_by_quantile(logits, labels, weights, coefficient)
        else:
            total = {"xent": cl.cross_entropy, "product": cl.product_of_confidence}[loss](logits, labels, weights)
        return total / len(ids), cl.scores(logits, labels, weights).correct_sum / len(ids)

    def train(rates, params, ids, labels, done):
        def step(state, x):
            params, m, v = state
            rate, t, *batch = x
            (value, correct), g = jax.value_and_grad(mean, has_aux=True)(params, *batch)
            m = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, m, g)
            v = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, v, g)

            def adam(p, m, v):
                return p - rate * m / (1 - 0.9**t) / (jnp.sqrt(v / (1 - 0.999**t)) + 1e-8)

            return (jax.tree.map(adam, params, m, v), m, v), (value, correct)

        zeros = jax.tree.map(jnp.zeros_like, params)
        count = 1 + jnp.arange(steps).astype(rates.dtype)
        return jax.lax.scan(step, (params, zeros, zeros), (rates, count, ids, labels, done))

    with jax.enable_x64(True):
        params = {"emb": jnp.asarray(case.inputs["emb0"]), "score": jnp.asarray(case.inputs["score0"])}
        rows = lambda x: jnp.asarray(np.tile(x, (2,) + (1,) * (x.ndim - 1)).reshape(steps, -1, *x.shape[1:]))  # noqa: E731
        labels = _labels(case).astype(np.float32).astype(np.float64)  # theirs pass through a float32 tensor
        rates = jnp.asarray([c.outputs["lr"] for c in cases])
        arrays = (
            params,
            rows(case.inputs["input_ids_padded"]),
            rows(labels),
            jnp.asarray(np.arange(steps) / steps),
        )
        run = jax.jit(jax.vmap(train, in_axes=(0, None, None, None, None)))
        (params, _, _), (losses, correct) = run(rates, *arrays)
    for i, c in enumerate(cases):
        np.testing.assert_allclose(losses[i], c.outputs["loss"], **tight)
        # At the first step all logits are 0: they call that class 0, and we call a tie wrong.
        np.testing.assert_allclose(correct[i, 1:], c.outputs["train_accuracy"][1:], rtol=1e-6)
        np.testing.assert_allclose(params["emb"][i], c.outputs["emb_final"], **tight)
        np.testing.assert_allclose(params["score"][i], c.outputs["score_final"], **tight)


def _example(N=40, C=5, seed=0, zeros=True):
    rng = np.random.default_rng(seed)
    logits, labels = rng.normal(0, 2, (N, C)), rng.dirichlet(np.full(C, 0.5), N)
    if zeros:
        labels[::3] = np.eye(C)[rng.integers(0, C, len(labels[::3]))]
    return logits, labels, rng.uniform(0.2, 1.5, N)


def _log(labels, least):
    return np.log(np.maximum(labels, np.exp(least)))


FORMULAS = {
    "cross_entropy": lambda p, y: -(0.8 * y + 0.2 / 5) @ np.log(p),
    "forward_kl": lambda p, y: sum(a * np.log(a / b) for a, b in zip(y, p, strict=True) if a),
    "reverse_kl": lambda p, y: p @ (np.log(p) - _log(y, -4.0)),
    "reverse_cross_entropy": lambda p, y: -p @ _log(y, -4.0),
    "symmetric_cross_entropy": lambda p, y: -0.3 * y @ np.log(p) - 2.0 * p @ _log(y, -4.0),
    "bootstrap": lambda p, y: -(0.7 * y + 0.3 * p) @ np.log(p),
}
OPTIONS = {
    "cross_entropy": {"label_smoothing": 0.2},
    "reverse_kl": {"log_zero": -4.0},
    "reverse_cross_entropy": {"log_zero": -4.0},
    "symmetric_cross_entropy": {"alpha": 0.3, "beta": 2.0, "log_zero": -4.0},
    "bootstrap": {"coefficient": 0.3},
}


def test_losses_are_their_formulas_and_gradients_their_differences():
    logits, labels, weights = _example()

    def formula(kind, logits):
        p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        return sum(w * FORMULAS[kind](a, b) for w, a, b in zip(weights, p, labels, strict=True))

    @jax.jit
    def ours(logits, labels, weights):
        losses = {k: functools.partial(getattr(cl, k), **OPTIONS.get(k, {})) for k in FORMULAS}
        return {k: jax.value_and_grad(f)(logits, labels, weights) for k, f in losses.items()}

    with jax.enable_x64(True):
        found = ours(*map(jnp.asarray, (logits, labels, weights)))
    direction = np.random.default_rng(1).normal(size=logits.shape)
    for kind, (loss, gradient) in found.items():
        np.testing.assert_allclose(loss, formula(kind, logits), rtol=1e-12, err_msg=kind)
        slope = (formula(kind, logits + 1e-5 * direction) - formula(kind, logits - 1e-5 * direction)) / 2e-5
        np.testing.assert_allclose(np.sum(np.asarray(gradient) * direction), slope, rtol=1e-7, err_msg=kind)


def test_hard_labels_and_the_first_of_equal_ones():
    assert cl.harden(jnp.asarray([[0.2, 0.4, 0.4], [0.3, 0.3, 0.3]])).tolist() == [[0, 1, 0], [1, 0, 0]]
    logits, labels, weights = map(jnp.asarray, _example())
    with jax.enable_x64(False):
        expected = cl.cross_entropy(logits, jnp.eye(5)[jnp.argmax(labels, -1)], weights)
        np.testing.assert_allclose(cl.hard_cross_entropy(logits, labels, weights), expected, rtol=1e-6)
    # At equal logits the model's own class is the first, as in torch, and the gradient says so.
    gradient = jax.grad(cl.augmented_confidence)(jnp.zeros((1, 3)), jnp.ones((1, 3)) / 3, jnp.ones(1), coefficient=1.0)
    np.testing.assert_allclose(gradient, [[-2 / 3, 1 / 3, 1 / 3]], rtol=1e-6)


def test_thresholds_are_quantiles_over_what_is_not_masked():
    logits, labels, weights = _example(N=61)
    weights[::4] = 0
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    p[::4] = np.nan
    kept, prior = p[weights > 0], labels[weights > 0].mean(0)
    np.testing.assert_allclose(cl.mean_label(jnp.asarray(labels), jnp.asarray(weights)), prior, rtol=1e-5)
    found = cl.quantile_thresholds(*(jnp.asarray(x, jnp.float32) for x in (p, prior, weights)))
    np.testing.assert_allclose(found, [np.quantile(kept[:, c], 1 - prior[c]) for c in range(5)], rtol=1e-4)
    for c in range(5):
        assert abs(np.mean(kept[:, c] > found[c]) - prior[c]) < 1.5 / len(kept)
    chosen = np.argmax(cl.harden(jnp.asarray(kept, jnp.float32), found), -1)
    np.testing.assert_array_equal(chosen, np.argmax(kept - np.asarray(found), -1))
    assert not np.array_equal(chosen, np.argmax(kept, -1))


def test_two_classes_have_the_wanted_frequencies_and_one_threshold():
    p0 = jnp.asarray([0.9, 0.8, 0.7, 0.6, 0.95])
    p = jnp.stack([p0, 1 - p0], -1)
    for zeros in range(6):
        prior = jnp.asarray([zeros / 5, 1 - zeros / 5])
        thresholds = cl.quantile_thresholds(p, prior, jnp.ones(5))
        np.testing.assert_allclose(thresholds.sum(), 1.0, rtol=1e-6)
        # Where all are wanted in class 1, the published rule leaves the highest in class 0.
        assert cl.harden(p, thresholds)[:, 0].sum() == max(zeros, 1)


def test_a_batch_in_which_nothing_counts_gives_zeros():
    nan, none = jnp.full((2, 3, 4), jnp.nan), jnp.zeros((2, 3))
    losses = {k: functools.partial(getattr(cl, k), **OPTIONS.get(k, {})) for k in FORMULAS}
    losses |= {k: getattr(cl, k) for k in ("hard_cross_entropy", "product_of_confidence", "adaptive_confidence")}
    losses["confidence_window"] = cl.confidence_window
    losses["auxiliary_confidence"] = lambda *x: cl.auxiliary_confidence(
        *x, coefficient=0.5, thresholds=cl.quantile_thresholds(nan, cl.mean_label(nan, none), none)
    )
    values = jax.jit(lambda *x: {k: jax.value_and_grad(f)(*x) for k, f in losses.items()})(nan, nan, none)
    for value in jax.tree.leaves((values, cl.scores(nan, nan, none))):
        assert not np.any(value)
    before = cl.init_thresholds(4)
    after = cl.update_thresholds(before, cl.threshold_sums(before, nan, nan, none), 0.1)
    jax.tree.map(np.testing.assert_array_equal, after, before)


def test_a_step_of_the_running_thresholds():
    before = cl.RunningThresholds(jnp.asarray([0.3, 0.6]), jnp.asarray([0.25, 0.75]), jnp.asarray(12.0))
    logits = jnp.log(jnp.asarray([[0.8, 0.2], [0.2, 0.8], [0.4, 0.6 - 1e-4], [jnp.nan, jnp.nan]]))
    labels = jnp.asarray([[1.0, 0.0], [0.5, 0.5], [0.75, 0.25], [0.5, 0.5]])
    sums = cl.threshold_sums(before, logits, labels, jnp.asarray([1.0, 2.0, 1.0, 0.0]))
    jax.tree.map(np.testing.assert_allclose, sums, cl.ThresholdSums(np.array([2.0, 1.0]), np.array([2.25, 0.75]), 3.0))
    after = cl.update_thresholds(before, sums, 0.1)
    prior = np.array([0.25 * 12 + 2.25, 0.75 * 12 + 0.75]) / 15
    np.testing.assert_allclose(after.prior, prior, rtol=1e-6)
    np.testing.assert_allclose(after.thresholds, [0.3, 0.6] + 0.1 * (np.array([2, 1]) / 3 - prior), rtol=1e-6)


@pytest.mark.parametrize("C", [2, 4])
def test_running_thresholds_become_those_of_the_whole_stream(C):
    """However a batch is cut. Labels are skewed, so that the thresholds are far from 1 / C, where they begin."""
    steps, N = 1500, 16
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(0, 1.5, (steps, N, C)), jnp.float32)
    labels = jnp.asarray(rng.dirichlet(np.linspace(0.4, 2.0, C), (steps, N)), jnp.float32)
    weights = jnp.asarray(rng.random((steps, N)) < 0.8, jnp.float32)

    @functools.partial(jax.jit, static_argnums=0)
    def run(parts, logits, labels, weights):
        def step(running, batch):
            cut = [x.reshape(parts, N // parts, *x.shape[1:]) for x in batch]
            sums = jax.vmap(cl.threshold_sums, in_axes=(None, 0, 0, 0))(running, *cut)
            running = cl.update_thresholds(running, jax.tree.map(lambda x: x.sum(0), sums), 0.01)
            return running, running.thresholds

        return jax.lax.scan(step, cl.init_thresholds(C), (logits, labels, weights))

    whole, path = run(1, logits, labels, weights)
    prior = cl.mean_label(labels, weights)
    np.testing.assert_allclose(whole.prior, prior, rtol=1e-4)
    assert float(whole.seen) == float(weights.sum())
    expected = cl.quantile_thresholds(jax.nn.softmax(logits), prior, weights)
    assert np.max(np.abs(expected - 1 / C)) > 0.1
    np.testing.assert_allclose(path[800:].mean(0), expected, atol=0.015)
    np.testing.assert_allclose(path[-1], expected, atol=0.05)
    cut, _ = run(4, logits, labels, weights)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4), cut, whole)


def test_warmup_is_linear_and_continuous():
    steps = jnp.arange(8)
    np.testing.assert_allclose(jax.vmap(lambda t: cl.warmup(t, 0.6, 4))(steps), [0, 0.15, 0.3, 0.45, *[0.6] * 4])
    assert float(cl.warmup(jnp.asarray(0), 0.6, 0)) == pytest.approx(0.6)


def test_scores_and_low_precision():
    logits = jnp.asarray([[2.0, 0.0], [0.0, 1.0], [1.0, 1.0]], jnp.bfloat16)
    labels = jnp.asarray([[1.0, 0.0], [0.75, 0.25], [1.0, 0.0]])
    weights = jnp.asarray([1.0, 1.0, 2.0])
    out = cl.scores(logits, labels, weights)
    p = np.exp([[2.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    p /= p.sum(-1, keepdims=True)
    np.testing.assert_allclose(out.nll_sum, -np.sum(weights * np.sum(labels * np.log(p), -1)), rtol=1e-6)
    assert (float(out.correct_sum), float(out.weight_sum)) == (1.0, 4.0)  # a tie isn't right
    np.testing.assert_allclose(out.brier_sum, np.sum(weights * np.sum((p - labels) ** 2, -1)), rtol=1e-6)
    np.testing.assert_allclose(out.confidence_sum, np.sum(weights * p.max(-1)), rtol=1e-6)
    assert out.nll_sum.dtype == cl.forward_kl(logits, labels, weights).dtype == jnp.float32
