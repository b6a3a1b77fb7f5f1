"""Distances between hidden states, and between relations of tokens, against published values and plain formulas."""

import goldens
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.errors import InputError
from research.ops import matching
from research.ops.matching import hidden_distance, relation_divergence

GOLDENS = goldens.load("distill")


@pytest.mark.parametrize("name", [n for n in GOLDENS if "hid_mse" in n or "cos_loss" in n])
def test_published_distances(name):
    case = GOLDENS[name]
    with jax.enable_x64(True):
        student, teacher, mask = (jnp.asarray(case.inputs[f]) for f in ("student_hidden", "teacher_hidden", "mask"))
        weights = mask.astype(jnp.float64) / float(mask.sum())
        kind = "mse" if "mse" in name else "cosine"
        loss, by_student = jax.jit(jax.value_and_grad(lambda s: hidden_distance(s, teacher, weights, kind)))(student)
        np.testing.assert_allclose(loss, case.outputs["loss"], rtol=1e-9)
        np.testing.assert_allclose(by_student, case.outputs["grad_student"], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", matching.DISTANCES)
def test_garbage_where_the_weight_is_0_changes_nothing(kind):
    student, teacher = jax.random.normal(jax.random.key(0), (2, 2, 3, 4))
    weights = jnp.array([[1.0, 0, 0.5], [0, 0, 2]])
    spoiled = (jnp.where(weights[..., None] == 0, jnp.nan, x) for x in (student, teacher))
    f = jax.jit(jax.value_and_grad(lambda s, t: hidden_distance(s, t, weights, kind), argnums=(0, 1)))
    found, clean = f(*spoiled), f(student, teacher)
    jax.tree.map(np.testing.assert_array_equal, found, clean)
    assert clean[0] > 0
    assert not clean[1][1].any()  # the teacher's


def _relations_one_by_one(student, teacher, segments, weights, heads, causal, prefix):
    """By plain loops in float64."""

    def join(pair):
        a, b = (np.asarray(x, np.float64) for x in pair)
        b = np.repeat(b, a.shape[2] // b.shape[2], axis=2)
        return tuple(x.reshape(*x.shape[:2], heads, -1) for x in (a, b))

    (a, b), (c, d) = join(student), join(teacher)
    total = 0.0
    for i in range(len(segments)):
        for t in range(segments.shape[1]):
            seen = (np.arange(segments.shape[1]) <= t) | (not causal) | (False if prefix is None else prefix[i] > 0)
            seen &= segments[i] == segments[i, t]
            for head in range(heads):
                q, p = (
                    np.exp(x - np.logaddexp.reduce(x))
                    for x in (v[i, seen, head] @ u[i, t, head] / np.sqrt(u.shape[-1]) for u, v in ((a, b), (c, d)))
                )
                total += float(weights[i, t]) * np.sum(p * np.log(p / q)) / heads
    return total


PREFIX = np.array([[1, 1, 0, 0, 1, 0, 0], [1, 1, 1, 1, 0, 0, 0]], np.int32)


@pytest.mark.parametrize(
    ("causal", "prefix", "chunk"),
    [(True, None, 2**24), (True, None, 40), (False, None, 40), (True, PREFIX, 2**24), (True, PREFIX, 40)],
)
def test_relations_are_those_of_plain_loops(causal, prefix, chunk, monkeypatch):
    monkeypatch.setattr(matching, "_CHUNK_ELEMENTS", chunk)  # of 7 queries: all at once, or one at a time
    keys = jax.random.split(jax.random.key(1), 4)
    shapes = (2, 7, 4, 6), (2, 7, 2, 6), (2, 7, 2, 10), (2, 7, 1, 10)  # with fewer keys than queries
    a, b, c, d = (2 * jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True))
    segments = jnp.array([[1, 1, 1, 1, 2, 2, 0], [1, 1, 2, 2, 2, 3, 3]])
    weights = jnp.array([[1.0, 1, 0.5, 1, 1, 1, 0], [1, 1, 1, 0, 1, 1, 1]])

    def f(a, b):
        return relation_divergence((a, b), (c, d), segments, weights, heads=2, causal=causal, prefix=prefix)

    value, gradient = jax.jit(jax.value_and_grad(f, (0, 1)))(a, b)
    plain = _relations_one_by_one((a, b), (c, d), np.asarray(segments), weights, 2, causal, prefix)
    np.testing.assert_allclose(value, plain, rtol=1e-5)
    ones = jax.tree.map(lambda x: jax.random.normal(keys[0], x.shape), (a, b))
    step = 1e-3
    ahead, behind = (f(*jax.tree.map(lambda x, y, s=s: x + s * y, (a, b), ones)) for s in (step, -step))
    along = sum(jnp.vdot(x, y) for x, y in zip(gradient, ones, strict=True))
    np.testing.assert_allclose(along, (ahead - behind) / (2 * step), rtol=1e-2)


def test_no_array_holds_the_relations_of_all_tokens():
    B, T, H = 4, 8192, 8
    pair = (jax.ShapeDtypeStruct((B, T, H, 16), jnp.float32),) * 2
    f = jax.grad(lambda s, t, g, w: relation_divergence(s, t, g, w, heads=H))
    shape = jax.ShapeDtypeStruct
    compiled = jax.jit(f).lower(pair, pair, shape((B, T), jnp.int32), shape((B, T), jnp.float32)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * B * T * T * H / 8


def test_heads_that_do_not_divide_the_width_are_an_error():
    x = jnp.ones((1, 2, 2, 4))
    with pytest.raises(InputError, match="relation_heads = 3: doesn't divide 8"):
        relation_divergence((x, x), (x, x), jnp.ones((1, 2), jnp.int32), jnp.ones((1, 2)), heads=3)
    with pytest.raises(InputError, match=r"distance = 'mes'.*Did you mean 'mse'"):
        hidden_distance(x[0], x[0], jnp.ones((1, 2)), "mes")
