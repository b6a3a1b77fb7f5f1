"""Every implementation of attention against the reference, and the reference against loops."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from research.errors import InputError
from research.ops import attention
from research.ops.attention import cached_attention, self_attention
from research.ops.cpu import attention as blocks
from research.ops.cpu import tiles
from research.ops.scores import Memory

CASES = {
    "causal": {},
    "window": {"window": 20},
    "softcap": {"softcap": 0.7},
    "all": {"causal": False, "window": 70, "softcap": 0.7},
    "bidirectional": {"causal": False},
    "prefix": {"prefix": True},
    "prefix_window": {"prefix": True, "window": 30},
    "prefix_all": {"prefix": True, "window": 30, "softcap": 0.7},
}


def make_inputs(B=2, T=150, H=4, K=2, h=8, dtype=jnp.float32):
    """q, k, v (the same in every dtype), and packed rows: two documents and padding, other borders in each row."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(B, T, n, h)), jnp.bfloat16).astype(dtype) for n in (H, K, K))
    segment_ids = np.zeros((B, T), np.int32)
    for b in range(B):
        segment_ids[b, : T // 3 + b] = 1
        segment_ids[b, T // 3 + b : T - 4 - b] = 2
    return q, k, v, jnp.asarray(segment_ids)


def make_prefix(segment_ids):
    """[B, T] int32: the first half of each document, of the last row the whole first and nothing of the second."""
    prefix = np.zeros(segment_ids.shape, np.int32)
    for row, segments in enumerate(np.asarray(segment_ids)):
        for segment in (1, 2):
            (times,) = np.nonzero(segments == segment)
            share = 0.5 if row + 1 < len(prefix) else 2 - segment
            prefix[row, times[: int(share * len(times))]] = 1
    return jnp.asarray(prefix)


def of_kind(options, segment_ids):
    """Options of a case as self_attention takes them."""
    return options | {"prefix": make_prefix(segment_ids)} if "prefix" in options else options


def out_and_gradients(q, k, v, segment_ids, **options):
    """The output, and the gradients of a sum of it with fixed weights, all in float32."""
    options = of_kind(options, segment_ids)
    weights = jnp.asarray(np.random.default_rng(1).normal(size=q.shape), jnp.bfloat16).astype(q.dtype)

    @jax.jit
    def run(q, k, v):
        f = functools.partial(self_attention, scale=0.3, **options)
        out, vjp = jax.vjp(lambda q, k, v: f(q, k, v, segment_ids), q, k, v)
        return out, *vjp(weights)

    return [np.asarray(x, np.float32) for x in run(q, k, v)]


@functools.cache
def reference(case, B, T):
    return out_and_gradients(*make_inputs(B, T), implementation="reference", **CASES[case])


def attention_by_loops(q, k, v, segment_ids, scale, causal, window, softcap, prefix):
    q, k, v, segment_ids = (np.asarray(x, np.float64) for x in (q, k, v, segment_ids))
    B, T, H, _ = q.shape
    out = np.zeros_like(q)
    for b, t, n in np.ndindex(B, T, H):
        group = n // (H // k.shape[2])
        weights = {}
        for s in range(T):
            hidden = causal and s > t and not (prefix is not None and prefix[b, s])
            if segment_ids[b, s] != segment_ids[b, t] or hidden or (window and abs(s - t) >= window):
                continue
            score = scale * float(q[b, t, n] @ k[b, s, group])
            weights[s] = math.exp(softcap * math.tanh(score / softcap) if softcap else score)
        out[b, t, n] = sum(w * v[b, s, group] for s, w in weights.items()) / sum(weights.values())
    return out


@pytest.mark.parametrize(
    ("causal", "window", "softcap", "prefix"),
    [
        (True, 0, 0.0, False),
        (True, 4, 0.0, False),
        (False, 0, 0.7, False),
        (False, 3, 0.0, False),
        (True, 0, 0.0, True),
        (True, 3, 0.7, True),
    ],
)
def test_reference_is_the_definition(causal, window, softcap, prefix):
    x = make_inputs(T=17)
    prefix = make_prefix(x[-1]) if prefix else None
    options = {"scale": 0.3, "causal": causal, "window": window, "softcap": softcap, "prefix": prefix}
    out = self_attention(*x, implementation="reference", **options)
    np.testing.assert_allclose(out, attention_by_loops(*x, **options), atol=2e-6)


@pytest.mark.parametrize(
    ("implementation", "case"),
    [("cpu", c) for c in CASES]
    + [("xla", c) for c in ("causal", "window", "bidirectional", "prefix")]
    + [("splash", c) for c in ("softcap", "window", "all", "prefix", "prefix_all")],
)
def test_implementations_agree_with_the_reference(implementation, case):
    x = make_inputs()  # T = 150 is 3 blocks of "cpu" and pads 2 of "splash"
    options = CASES[case]
    got = out_and_gradients(*x, implementation=implementation, interpret=True, **options)
    for a, b in zip(got, reference(case, 2, 150), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


MEMORY_CASES = ("causal", "window", "softcap", "bidirectional", "prefix")


def with_memory(q, k, v, segment_ids, memory, **options):
    """The output, and the gradients by q, k, v and the memory of a sum of it with fixed weights."""
    options = of_kind(options, segment_ids)
    weights = jnp.asarray(np.random.default_rng(1).normal(size=q.shape), q.dtype)

    @jax.jit
    def run(q, k, v, memory):
        f = functools.partial(self_attention, scale=0.3, **options)
        out, vjp = jax.vjp(lambda q, k, v, memory: f(q, k, v, segment_ids, memory=memory), q, k, v, memory)
        return out, *jax.tree.leaves(vjp(weights))

    return [np.asarray(x, np.float32) for x in run(q, k, v, memory)]


def make_memory(size=3, dtype=jnp.float32):
    rng = np.random.default_rng(2)
    return Memory(*(jnp.asarray(rng.normal(size=(size, 2, 8)), dtype) for _ in range(2)))


@pytest.mark.parametrize("case", MEMORY_CASES)
def test_every_query_sees_the_memory_and_blocks_agree_with_the_reference(case):
    q, k, v, segment_ids = make_inputs(B=1, T=130)
    memory = make_memory()
    expected = with_memory(q, k, v, segment_ids, memory, implementation="reference", **CASES[case])
    got = with_memory(q, k, v, segment_ids, memory, implementation="cpu", **CASES[case])
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    other = Memory(memory.keys, memory.values.at[1].add(1.0))
    f = functools.partial(self_attention, scale=0.3, implementation="reference", **of_kind(CASES[case], segment_ids))
    moved = f(q, k, v, segment_ids, memory=other) - f(q, k, v, segment_ids, memory=memory)
    assert np.all(np.abs(moved) > 0)


def test_a_memory_is_as_if_its_keys_came_before_the_document():
    """One document without a window: the memory's keys put in front of it are seen in the same way."""
    q, k, v, _ = make_inputs(B=2, T=12)
    memory, ones = make_memory(), jnp.ones((2, 12), jnp.int32)
    out = self_attention(q, k, v, ones, scale=0.3, memory=memory, implementation="reference")
    k, v = (jnp.concatenate([jnp.broadcast_to(m, (2, *m.shape)), x], 1) for m, x in zip(memory, (k, v), strict=True))
    q = jnp.pad(q, ((0, 0), (3, 0), (0, 0), (0, 0)))
    longer = self_attention(q, k, v, jnp.ones((2, 15), jnp.int32), scale=0.3, implementation="reference")
    np.testing.assert_allclose(out, longer[:, 3:], atol=1e-6)


@pytest.mark.parametrize(
    ("implementation", "axes"),
    [
        ("cpu", ("data", "fsdp")),
        ("reference", ("data", "fsdp")),
        pytest.param("auto", ("data", "sequence"), marks=pytest.mark.slow),
    ],
)
def test_a_memory_on_a_mesh_is_the_same(implementation, axes):
    x, memory = make_inputs(B=4, T=72), make_memory()
    expected = with_memory(*x, memory, implementation="reference")
    mesh = jax.make_mesh((2, 2, 2), (*axes, "tensor"), axis_types=(AxisType.Auto,) * 3)
    spec = P(axes, None, "tensor", None) if axes[1] == "fsdp" else P(*axes, "tensor", None)
    x = jax.device_put(x, tuple(NamedSharding(mesh, s) for s in (spec, spec, spec, P(*spec[:2]))))
    memory = jax.device_put(memory, NamedSharding(mesh, P(None, "tensor", None)))
    with jax.set_mesh(mesh):
        f = functools.partial(with_memory, implementation=implementation, spec=spec)
        got = f(*x, memory)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("implementation", ["xla", "cudnn", "splash"])
def test_kernels_without_a_memory_refuse_one(implementation):
    with pytest.raises(InputError, match="all queries see"):
        self_attention(*make_inputs(T=8), scale=0.3, memory=make_memory(), implementation=implementation)


@pytest.mark.parametrize("platform", ["tpu", "gpu", "cpu"])
def test_auto_takes_blocks_with_a_memory_and_says_so(monkeypatch, platform):
    monkeypatch.setattr(attention.sharding, "platform", lambda: platform)
    monkeypatch.setattr(attention, "_capability", lambda: 9.0)
    attention._note_instead.cache_clear()
    lines = []
    monkeypatch.setattr(attention.logging, "warning", lambda line, *values: lines.append(line % values))
    q = jnp.zeros((1, 256, 2, 8))
    assert attention._choose(q, 0.0, None, True) == "cpu"
    assert attention._choose(q[:, :8], 0.0, None, True) == "reference"
    attention._choose(q, 0.0, None, True)
    instead = {
        "gpu": ["'cpu' in place of 'cudnn'", "'reference' in place of 'cudnn'"],
        "tpu": ["'cpu' in place of 'splash'"],
    }
    assert len(lines) == len(instead.get(platform, []))
    for line, words in zip(lines, instead.get(platform, []), strict=True):
        assert words in line


@pytest.mark.parametrize(("T", "heads"), [(1, (3, 3)), (64, (6, 1)), (600, (2, 1))])
def test_cpu_at_other_lengths_and_groups(T, heads):
    x = make_inputs(B=1, T=T, H=heads[0], K=heads[1])
    expected = out_and_gradients(*x, implementation="reference", window=100)
    for a, b in zip(out_and_gradients(*x, implementation="cpu", window=100), expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.fixture
def small_tiles(monkeypatch):
    """Rows of 150 are cut into 4 tiles of 48, the last of which is in part padding."""
    monkeypatch.setattr(blocks, "LEAST_TILED", 100)
    monkeypatch.setattr(tiles, "_SCORES", 2 * 48**2)
    assert tiles.size(150, 2) == 48


@pytest.mark.parametrize("case", ["causal", "window", "all", "prefix_all"])
def test_tiles_agree_with_the_reference(small_tiles, case):
    got = out_and_gradients(*make_inputs(), implementation="cpu", **CASES[case])
    for a, b in zip(got, reference(case, 2, 150), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("case", ["softcap", "prefix"])
def test_tiles_read_a_memory(small_tiles, case):
    x, memory = make_inputs(B=1, T=130), make_memory()
    expected = with_memory(*x, memory, implementation="reference", **CASES[case])
    for a, b in zip(with_memory(*x, memory, implementation="cpu", **CASES[case]), expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_tiles_that_no_query_sees_are_left_out(small_tiles):
    """What isn't read may be NaN: another document's tiles, those before a window, and those after all queries."""
    q, k, v, _ = make_inputs(B=1)
    segment_ids = jnp.asarray(np.arange(150) >= 96, jnp.int32)[None]
    f = functools.partial(self_attention, scale=0.3, implementation="cpu")
    for options, ids, hidden, finite in (
        ({}, segment_ids, slice(0, 96), slice(96, 150)),
        ({}, segment_ids * 0, slice(96, 150), slice(0, 96)),
        ({"window": 10}, segment_ids * 0, slice(0, 48), slice(96, 150)),
        ({"causal": False}, segment_ids, slice(96, 150), slice(0, 96)),
    ):
        out = f(q, k.at[:, hidden].set(jnp.nan), v.at[:, hidden].set(jnp.nan), ids, **options)
        assert np.isfinite(out[:, finite]).all()
        assert not np.isfinite(out[:, hidden]).any()


def test_tiles_on_a_mesh_are_the_same_and_gather_nothing(small_tiles):
    q, k, v, segment_ids = make_inputs(B=4)
    expected = out_and_gradients(q, k, v, segment_ids, implementation="reference")
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    spec = P("data", None, "tensor", None)
    x = jax.device_put((q, k, v, segment_ids), tuple(NamedSharding(mesh, s) for s in (spec, spec, spec, P("data"))))
    with jax.set_mesh(mesh):
        got = out_and_gradients(*x, implementation="cpu", spec=spec)
        f = jax.jit(functools.partial(self_attention, scale=0.3, implementation="cpu", spec=spec))
        assert "all-" not in f.lower(*x).compile().as_text()
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_the_program_of_tiles_is_as_long_at_every_length_and_holds_no_square():
    f = functools.partial(self_attention, scale=0.3, implementation="cpu")
    gradients = jax.grad(lambda *x: f(*x).sum(), argnums=(0, 1, 2))
    texts = [str(jax.make_jaxpr(gradients)(*make_inputs(B=1, T=T, H=2, K=1))) for T in (1024, 4096)]
    assert texts[0].count(" = ") == texts[1].count(" = ")
    assert "4096,4096" not in texts[1]
    assert "8192,4096" not in texts[1]


@pytest.mark.parametrize("case", ["causal", "prefix_all"])
def test_cpu_computes_half_of_a_batch_and_the_others_apart(monkeypatch, case):
    memory = make_memory()
    options = CASES[case] | {"implementation": "cpu"}
    whole = with_memory(*make_inputs(), memory, **options)
    joined = []
    monkeypatch.setattr(blocks, "_LEAST_SPLIT", 0)
    monkeypatch.setattr(
        jnp, "concatenate", lambda parts, axis=0, own=jnp.concatenate: joined.append(axis) or own(parts, axis)
    )
    halves = with_memory(*make_inputs(), memory, **options)
    assert joined.count(0) == 6  # the result and its sums; the gradients by q, k, v and the memory
    for own, other in zip(jax.tree.leaves(halves), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(own, other, atol=1e-6)


@pytest.mark.parametrize("implementation", ["reference", "xla", "cpu", "splash"])
def test_bfloat16_is_close_to_float32(implementation):
    x = make_inputs(T=70, dtype=jnp.bfloat16)
    # Within jax's own code, dtypes are promoted.
    with jax.numpy_dtype_promotion("standard" if implementation == "xla" else "strict"):
        got = out_and_gradients(*x, implementation=implementation, interpret=True)
        out = jax.eval_shape(functools.partial(self_attention, scale=0.3, implementation=implementation), *x)
    assert out.dtype == jnp.bfloat16
    for a, b in zip(got, reference("causal", 2, 70), strict=True):
        np.testing.assert_allclose(a, b, atol=0.03, rtol=0.03)


@pytest.mark.parametrize("kind", ["causal", "bidirectional", "prefix"])
@pytest.mark.parametrize("implementation", ["reference", "xla", "cpu", "splash", "cudnn"])
def test_documents_never_see_each_other(implementation, kind):
    """All of one document is changed, its prefix too: the others' outputs are the same bit for bit."""
    if implementation == "cudnn" and attention._capability() < 8:
        pytest.skip("there is no GPU with cuDNN")
    dtype = jnp.bfloat16 if implementation == "cudnn" else jnp.float32
    q, k, v, segment_ids = make_inputs(dtype=dtype)
    second = (segment_ids == 2)[:, :, None, None]
    options = of_kind(CASES[kind], segment_ids)
    f = jax.jit(functools.partial(self_attention, scale=0.3, implementation=implementation, interpret=True, **options))
    one = f(q, k, v, segment_ids)
    two = f(*(jnp.where(second, 9 * x, x) for x in (q, k, v)), segment_ids)
    changed = np.asarray((one != two).any(axis=(2, 3)))
    np.testing.assert_array_equal(changed, np.asarray(segment_ids == 2))
    assert np.isfinite(two).all()  # padding too


@pytest.mark.parametrize("implementation", ["reference", "xla", "cpu", "splash"])
def test_what_follows_a_prefix_is_causal_and_what_is_in_it_sees_it_whole(implementation):
    """A token is changed: who is changed by it is all of its document for one of a prefix, else who follows."""
    q, k, v, segment_ids = make_inputs()
    prefix = make_prefix(segment_ids)
    run = functools.partial(self_attention, scale=0.3, implementation=implementation, interpret=True, prefix=prefix)
    f = jax.jit(run)
    one = f(q, k, v, segment_ids)
    for t in (20, 30):  # in the first row, whose first document has 50 tokens and a prefix of 25
        two = f(q, k.at[0, t].multiply(9), v.at[0, t].multiply(9), segment_ids)
        (changed,) = np.nonzero(np.asarray((one != two).any(axis=(2, 3)))[0])
        np.testing.assert_array_equal(changed, np.arange(0 if t < 25 else t, 50))


@pytest.mark.parametrize("kind", ["causal", "prefix"])
@pytest.mark.parametrize("implementation", ["reference", "cpu", "splash"])
def test_sharded_over_batch_and_heads_is_the_same(implementation, kind):
    x = make_inputs(B=4, T=70)
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    spec = P(("data", "fsdp"), None, "tensor", None)
    x = jax.device_put(x, tuple(NamedSharding(mesh, s) for s in (spec, spec, spec, P(("data", "fsdp")))))
    with jax.set_mesh(mesh):
        got = out_and_gradients(*x, implementation=implementation, spec=spec, interpret=True, **CASES[kind])
    for a, b in zip(got, reference(kind, 4, 70), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["auto", "reference", "xla", "splash"])
@pytest.mark.parametrize("kind", ["causal", "window", "bidirectional", "prefix", "prefix_window"])
def test_sharded_over_time_is_the_same(implementation, kind):
    x = make_inputs(B=2, T=256)
    mesh = jax.make_mesh((2, 2, 2), ("data", "sequence", "tensor"), axis_types=(AxisType.Auto,) * 3)
    spec = P("data", "sequence", "tensor", None)
    x = jax.device_put(x, tuple(NamedSharding(mesh, s) for s in (spec, spec, spec, P("data", "sequence"))))
    with jax.set_mesh(mesh), jax.numpy_dtype_promotion("standard" if implementation == "xla" else "strict"):
        got = out_and_gradients(*x, implementation=implementation, spec=spec, interpret=True, **CASES[kind])
    for a, b in zip(got, reference(kind, 2, 256), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_time_that_is_cut_finely_or_for_the_wrong_kernel_is_refused():
    x = make_inputs(B=2, T=70)
    mesh = jax.make_mesh((2,), ("sequence",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    spec = P(None, "sequence", None, None)
    with jax.set_mesh(mesh):
        with pytest.raises(InputError, match="multiple of 128, and q has 70"):
            self_attention(*x, scale=0.3, implementation="splash", spec=spec)
        with pytest.raises(InputError, match="T must be whole on each device"):
            self_attention(*x, scale=0.3, implementation="cpu", spec=spec)
        with pytest.raises(InputError, match="h must be whole on each device"):
            self_attention(*x, scale=0.3, implementation="splash", spec=P(None, None, None, "sequence"))


def test_cached_attention_step_by_step_is_self_attention():
    q, k, v, _ = make_inputs(T=12)
    whole = self_attention(q, k, v, jnp.ones((2, 12), jnp.int32), scale=0.3, softcap=0.7, implementation="reference")
    k, v = k.transpose(0, 2, 3, 1), v.swapaxes(1, 2)
    for t in (0, 6, 11):
        mask = jnp.broadcast_to(jnp.arange(12) <= t, (2, 1, 12))
        step = cached_attention(q[:, t : t + 1], k, v, mask, scale=0.3, softcap=0.7)
        np.testing.assert_allclose(step[:, 0], whole[:, t], atol=1e-6)


def test_a_query_that_sees_nothing_is_finite():
    q, k, v, _ = make_inputs(T=5)
    k, v = k.transpose(0, 2, 3, 1), v.swapaxes(1, 2)
    assert np.isfinite(cached_attention(q, k, v, jnp.zeros((2, 5, 5), bool), scale=0.3, softcap=0.0)).all()


def test_saving_by_name_spares_the_forward_pass():
    q, k, v, segment_ids = make_inputs(T=64)
    policy = jax.checkpoint_policies.save_only_these_names("attention")

    def loss(q):
        return (self_attention(q, k, v, segment_ids, scale=0.3, implementation="cpu") ** 2).sum()

    def maxima(f):  # only forward passes take the maximum of the scores
        return str(jax.make_jaxpr(jax.grad(f))(q)).count("reduce_max")

    saved = maxima(jax.checkpoint(loss, policy=policy))
    assert saved == maxima(loss) > 0
    assert maxima(jax.checkpoint(loss)) > saved


@pytest.mark.parametrize("kind", ["causal", "prefix"])
def test_cudnn_lowers_where_jax_has_cuda_and_else_says_what_to_install(kind):
    q, k, v, segment_ids = make_inputs(T=64, dtype=jnp.bfloat16)
    options = of_kind(CASES[kind], segment_ids)
    f = jax.jit(functools.partial(self_attention, scale=0.3, window=8, implementation="cudnn", **options))
    try:
        lowered = f.trace(q, k, v, segment_ids).lower(lowering_platforms=("cuda",)).as_text()
    except InputError as error:
        assert "pip install -e '.[gpu]'" in str(error)  # noqa: PT017
    else:
        assert "cudnn$fmha" in lowered


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"implementation": "splahs"}, "Did you mean 'splash'"),
        ({"implementation": "xla", "softcap": 5.0}, "softcap=5.0. Use 'cpu'"),
        ({"implementation": "cudnn"}, "q is float32. Change the compute dtype"),
    ],
)
def test_what_an_implementation_cannot_do_is_an_error(options, message):
    with pytest.raises(InputError, match=message):
        self_attention(*make_inputs(T=8), scale=0.3, **options)


@pytest.mark.parametrize(
    ("shape", "message"), [({"h": 12}, "multiples of 8"), ({"T": 7}, "even length"), ({"softcap": 1.0}, "softcap")]
)
def test_limits_of_cudnn(shape, message):
    softcap = shape.pop("softcap", 0.0)
    with pytest.raises(InputError, match=message):
        self_attention(
            *make_inputs(**{"T": 8, **shape}, dtype=jnp.bfloat16),
            scale=0.3,
            softcap=softcap,
            implementation="cudnn",
        )


def test_a_prefix_where_every_token_sees_all_is_refused():
    x = make_inputs(T=8)
    with pytest.raises(InputError, match="prefix: every token sees all of its document with causal=False"):
        self_attention(*x, scale=0.3, causal=False, prefix=make_prefix(x[-1]))


def test_heads_must_group():
    with pytest.raises(InputError, match="3 heads, not a multiple of the 2"):
        self_attention(*make_inputs(T=8, H=3, K=2), scale=0.3)


def test_splash_under_a_mesh_needs_a_spec():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    with jax.set_mesh(mesh), pytest.raises(InputError, match="Give spec"):
        self_attention(*make_inputs(T=8), scale=0.3, implementation="splash")


@pytest.mark.parametrize(
    ("platform", "capability", "q", "softcap", "expected"),
    [
        ("cpu", 0.0, (65, 8, jnp.float32), 5.0, "cpu"),
        ("cpu", 0.0, (64, 8, jnp.float32), 5.0, "reference"),
        ("tpu", 0.0, (128, 64, jnp.float32), 5.0, "splash"),
        ("tpu", 0.0, (64, 64, jnp.float32), 0.0, "reference"),
        ("gpu", 8.0, (64, 128, jnp.bfloat16), 0.0, "cudnn"),
        ("gpu", 8.9, (64, 256, jnp.bfloat16), 0.0, "reference"),
        ("gpu", 9.0, (64, 256, jnp.bfloat16), 0.0, "cudnn"),
        ("gpu", 7.5, (64, 64, jnp.bfloat16), 0.0, "reference"),
        ("gpu", 9.0, (64, 64, jnp.float32), 0.0, "reference"),
        ("gpu", 9.0, (64, 64, jnp.bfloat16), 5.0, "reference"),
        ("metal", 0.0, (64, 64, jnp.float32), 0.0, "reference"),
    ],
)
def test_auto_follows_its_rule(monkeypatch, platform, capability, q, softcap, expected):
    T, h, dtype = q
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    monkeypatch.setattr(attention, "_capability", lambda: capability)
    assert attention._choose(jax.ShapeDtypeStruct((2, T, 4, h), dtype), softcap, None) == expected


def test_capability_is_zero_without_cuda():
    assert attention._capability() == 0.0
