import dataclasses
import functools

import goldens
import jax
import jax.numpy as jnp
import jaxprs
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from research.devices import sharding
from research.ops import chunks, losses
from research.ops.head import Head
from research.ops.losses import cross_entropy, log_probs

GOLDENS = goldens.load("ce")


@functools.partial(jax.jit, static_argnames=("z_loss", "label_smoothing"))
def _by_logits(logits, labels, weights, z_loss, label_smoothing):
    """CrossEntropy of given logits, and the gradient of its loss sum by them and by the weights."""

    def loss(logits, weights):
        head = Head(jnp.eye(logits.shape[-1], dtype=jnp.float32), None, 0.0)
        out = cross_entropy(logits, head, labels, weights, z_loss=z_loss, label_smoothing=label_smoothing, chunk=3)
        return out.loss_sum, out

    gradients, out = jax.grad(loss, argnums=(0, 1), has_aux=True)(logits, weights)
    return out, *gradients


@pytest.mark.parametrize("name", GOLDENS)
def test_cross_entropy_of_torch_transformers_and_t5x(name):
    # All in float32; torch's values are float64.
    case = GOLDENS[name]
    h, logits = case.hparams, jnp.asarray(case.inputs["logits"], jnp.float32)
    labels = jnp.asarray(case.inputs["labels"], jnp.int32)
    if h.get("shift") or h.get("shift_labels"):
        labels = jnp.pad(labels[:, 1:], ((0, 0), (0, 1)), constant_values=-100)
    weights = jnp.asarray(case.inputs.get("weights", labels != -100), jnp.float32)
    e, V, lowest = h.get("label_smoothing", h.get("epsilon", 0.0)), logits.shape[-1], 0.0
    if e and "z_loss" in h:  # T5X smooths with e / (V - 1) on the others, and subtracts the loss at its minimum
        lowest = -(1 - e) * np.log(1 - e) - e * np.log(e / (V - 1))
        e = e * V / (V - 1)

    out, by_logits, by_weights = _by_logits(logits, labels, weights, h.get("z_loss", 0.0), e)
    mean = h.get("reduction") == "mean" or name.startswith("hf")
    count = (h.get("num_items_in_batch") or out.weight_sum) if mean else 1.0
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    if h.get("reduction") == "none":  # the gradient by a token's weight is its loss
        close(jnp.where(labels == -100, 0.0, by_weights), case.outputs["loss"])
    elif "loss" in case.outputs:
        close(out.loss_sum / count, case.outputs["loss"])
    else:
        close(out.loss_sum - lowest * out.weight_sum, case.outputs["loss_sum"])
        close(h["z_loss"] * out.z_sum, case.outputs["z_loss_sum"])
        close(out.weight_sum, case.outputs["weight_sum"])
    theirs = "grad_logits_of_sum" if "grad_logits_of_sum" in case.outputs else "grad_logits"
    close(by_logits / count, case.outputs[theirs])


def _inputs(B=4, T=13, D=8, V=32, dtype=jnp.float32, seed=0):
    keys = jax.random.split(jax.random.key(seed), 5)
    hidden = jax.random.normal(keys[0], (B, T, D)).astype(dtype)
    kernel, bias = jax.random.normal(keys[1], (D, V)), jax.random.normal(keys[2], (V,))
    targets = jax.random.randint(keys[3], (B, T), 0, V)
    weights = jax.random.uniform(keys[4], (B, T)) * (jnp.arange(T) % 3 > 0).astype(jnp.float32)[None]
    return hidden, kernel, bias, targets, weights


def _head(kernel, bias=None, softcap=0.0, by_token=False, rules=None):
    """Of a kernel [D, V], however the head is to store it."""
    return Head(kernel.T if by_token else kernel, bias, softcap, by_token, rules)


def _reference(hidden, kernel, bias, targets, weights, *, softcap=0.0, z_loss=0.0, label_smoothing=0.0):
    """The whole logits, by autodiff: losses.CrossEntropy."""
    logits = jnp.einsum("btd,dv->btv", hidden, kernel.astype(hidden.dtype), preferred_element_type=jnp.float32)
    logits = logits if bias is None else logits + bias[None, None]
    logits = softcap * jnp.tanh(logits / softcap) if softcap else logits
    lse = jax.nn.logsumexp(logits, axis=-1)
    log_p = logits - lse[..., None]
    nll = -jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]
    loss = (1 - label_smoothing) * nll - label_smoothing * log_p.mean(-1) + z_loss * lse**2
    correct = (jnp.argmax(logits, -1) == targets).astype(jnp.float32)
    sums = ((weights * x).sum() for x in (loss, nll, lse**2, correct, jnp.ones_like(nll)))
    return losses.CrossEntropy(*sums, loss, nll)


def _close(ours, theirs, **tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), ours, theirs)


@pytest.mark.parametrize(
    ("chunk", "softcap", "use_bias"),
    [(1, 0.0, True), (4, 2.0, True), (4, 0.0, False), (13, 2.0, False), (None, 2.0, True)],
)
def test_values_and_gradients_are_those_of_the_whole_logits(chunk, softcap, use_bias):
    hidden, kernel, bias, targets, weights = _inputs()
    bias = bias if use_bias else None
    options = {"z_loss": 0.1, "label_smoothing": 0.2}

    def ours(hidden, kernel, bias, weights):
        out = cross_entropy(hidden, Head(kernel, bias, softcap), targets, weights, chunk=chunk, **options)
        return 3.0 * out.loss_sum, out  # a cotangent that isn't 1

    def theirs(hidden, kernel, bias, weights):
        out = _reference(hidden, kernel, bias, targets, weights, softcap=softcap, **options)
        return 3.0 * out.loss_sum, out

    args = hidden, kernel, bias, weights
    gradient = lambda f: jax.jit(jax.grad(f, argnums=(0, 1, 2, 3), has_aux=True))(*args)  # noqa: E731
    _close(gradient(ours), gradient(theirs), rtol=2e-5, atol=1e-5)
    _close(jax.jit(ours)(*args), jax.jit(theirs)(*args), rtol=2e-5)  # the pass without gradients


def test_only_the_loss_has_a_gradient():
    hidden, kernel, bias, targets, weights = _inputs()
    for field in ("nll_sum", "z_sum", "correct_sum", "weight_sum", "nll"):
        f = lambda h, w, field=field: getattr(cross_entropy(h, Head(kernel, bias, 0.0), targets, w), field).sum()  # noqa: E731
        assert all(not g.any() for g in jax.jit(jax.grad(f, argnums=(0, 1)))(hidden, weights))


def test_a_tied_embedding_gets_both_gradients():
    hidden, kernel, _, targets, weights = _inputs()
    f = lambda ce: lambda e: ce(hidden + e[targets], e)  # noqa: E731
    ours = f(lambda h, e: cross_entropy(h, Head(e, None, 0.0, by_token=True), targets, weights, chunk=5).loss_sum)
    theirs = f(lambda h, e: _reference(h, e.T, None, targets, weights).loss_sum)
    _close(jax.jit(jax.grad(ours))(kernel.T), jax.jit(jax.grad(theirs))(kernel.T), rtol=1e-5, atol=1e-5)


def test_gradients_inside_scan_and_checkpoint():
    hidden, kernel, bias, targets, weights = _inputs(B=6)

    @jax.checkpoint
    def loss(kernel, hidden, targets, weights):
        return cross_entropy(jnp.tanh(hidden), Head(kernel, bias, 0.0), targets, weights, chunk=4).loss_sum

    def microbatch(total, x):
        return total + jax.grad(loss)(kernel, *x), None

    parts = jax.tree.map(lambda x: x.reshape(3, 2, *x.shape[1:]), (hidden, targets, weights))
    total, _ = jax.lax.scan(microbatch, jnp.zeros_like(kernel), parts)
    _close(total, jax.jit(jax.grad(loss))(kernel, hidden, targets, weights), rtol=1e-5, atol=1e-5)


def test_the_kernel_gradient_of_bfloat16_accumulates_in_float32():
    hidden, kernel, _, targets, weights = _inputs(T=512, dtype=jnp.bfloat16)
    targets, hidden = jnp.zeros_like(targets), jnp.abs(hidden)  # one sign, so that a bfloat16 sum would stall
    f = lambda k: cross_entropy(hidden, Head(k, None, 0.0), targets, weights, chunk=1).loss_sum  # noqa: E731
    g = lambda k: _reference(hidden.astype(jnp.float32), k, None, targets, weights).loss_sum  # noqa: E731
    ours, exact = jax.jit(jax.grad(f))(kernel), jax.jit(jax.grad(g))(kernel)
    assert ours.dtype == jnp.float32
    _close(ours, exact, rtol=0.02, atol=0.02 * float(jnp.abs(exact).max()))
    np.testing.assert_allclose(ours[:, 0], exact[:, 0], rtol=0.005)


def test_a_tie_is_not_correct():
    hidden, kernel, _, targets, weights = _inputs()
    head = Head(jnp.zeros_like(kernel), None, 0.0)
    assert cross_entropy(hidden, head, targets, weights).correct_sum == 0
    right = cross_entropy(
        hidden, dataclasses.replace(head, bias=jax.nn.one_hot(7, 32)), jnp.full_like(targets, 7), weights
    )
    assert right.correct_sum == right.weight_sum


def test_sharded_over_batch_and_vocabulary_equals_one_device():
    hidden, kernel, bias, targets, weights = _inputs(B=8)

    def f(hidden, kernel, bias, targets, weights):
        out = cross_entropy(
            hidden, Head(kernel, bias, 5.0, rules=sharding.RULES), targets, weights, z_loss=0.1, chunk=4
        )
        return out.loss_sum / out.weight_sum, out

    f = jax.value_and_grad(f, argnums=(0, 1, 2), has_aux=True)
    args = hidden, kernel, bias, targets, weights
    rows, mesh = PartitionSpec(("data", "fsdp")), sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    specs = rows, PartitionSpec("fsdp", "tensor"), PartitionSpec("tensor"), rows, rows
    with jax.set_mesh(mesh):
        placed = [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(args, specs, strict=True)]
        sharded = jax.jit(f)(*placed)
    _close(sharded, jax.jit(f)(*args), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("by_token", "temperature", "size"), [(False, 1.0, None), (True, 0.7, 27)])
def test_log_probs_entropies_and_their_gradients(by_token, temperature, size):
    hidden, kernel, bias, targets, weights = _inputs()
    targets = targets if size is None else targets % size

    def ours(h, k, b):
        head = _head(k, b, 2.0, by_token)
        return log_probs(h, head, targets, temperature=temperature, vocab_size=size, chunk=4)

    def theirs(h, k, b):
        logits = 2.0 * jnp.tanh((h @ k + b[None, None]) / 2.0)[:, :, :size]
        log_p = jax.nn.log_softmax(logits / temperature)
        target = jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]
        return losses.LogProbs(target, -jnp.sum(jnp.exp(log_p) * log_p, axis=-1))

    _close(ours(hidden, kernel, bias), theirs(hidden, kernel, bias), rtol=1e-5)

    def gradient(f):
        def loss(*x):
            out = f(*x)
            return (weights * (out.target**2 + 3 * out.entropy**2)).sum()

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(hidden, kernel, bias)

    expected = gradient(theirs)
    _close(gradient(ours), expected, rtol=1e-5, atol=1e-5)

    def at_once(h, k, b):
        """The same in one pass over the head, with the target's log-probability as a detail."""
        function = lambda probs, factor: (probs.target**2 + factor * probs.entropy**2, probs.target)  # noqa: E731
        args = (_head(k, b, 2.0, by_token), targets, weights, jnp.full(targets.shape, 3.0))
        return losses.sampled_loss(function, h, *args, temperature=temperature, vocab_size=size, chunk=4)

    by_args = jax.jit(jax.grad(lambda *x: at_once(*x)[0], argnums=(0, 1, 2)))(hidden, kernel, bias)
    _close(by_args, expected, rtol=1e-5, atol=1e-5)
    _, values, details = at_once(hidden, kernel, bias)
    out = theirs(hidden, kernel, bias)
    _close((values, details), (out.target**2 + 3 * out.entropy**2, out.target), rtol=1e-5)
    head = _head(kernel, bias, 2.0, by_token)
    alone = losses.target_log_probs(hidden, head, targets, temperature=temperature, vocab_size=size).target
    np.testing.assert_allclose(alone, ours(hidden, kernel, bias).target, rtol=1e-5, atol=1e-6)


def test_an_entropy_without_an_impossible_token():
    hidden, kernel, _, targets, _ = _inputs()
    impossible = jnp.where(jnp.arange(32) < 20, 0.0, -jnp.inf)
    f = lambda b: log_probs(hidden, Head(kernel, b, 0.0), targets).entropy.sum()  # noqa: E731
    entropy, gradient = jax.value_and_grad(f)(impossible)
    fewer = log_probs(hidden, Head(kernel[:, :20], None, 0.0), targets).entropy.sum()
    np.testing.assert_allclose(entropy, fewer, rtol=1e-5)
    assert jnp.isfinite(gradient).all()


def test_a_large_vocabulary_takes_a_quarter_of_a_gigabyte_beside_the_gradients():
    """The kernel as tied embeddings lie in memory, and as a head of its own does."""
    B, T, D, V = 8, 256, 64, 128_256
    rows = [jax.ShapeDtypeStruct((B, T, *s), d) for s, d in (((D,), jnp.float32), ((), jnp.int32), ((), jnp.float32))]
    for shape in ((V, D), (D, V)):

        def loss(hidden, stored, targets, weights):
            return cross_entropy(hidden, Head(stored, None, 0.0, stored.shape[0] == V), targets, weights).loss_sum

        args = rows[0], jax.ShapeDtypeStruct(shape, jnp.float32), *rows[1:]
        memory = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*args).compile().memory_analysis()
        assert memory.temp_size_in_bytes - memory.output_size_in_bytes < 256e6


def _largest(f, *args):
    return max(a.size for a in jaxprs.arrays(jax.make_jaxpr(f)(*args).jaxpr))


@pytest.mark.parametrize("devices", [1, 8])
def test_no_array_holds_the_logits(devices):
    B, T, D, V = 8, 4096, 16, 262_144
    shapes = [(B, T, D), (D, V), (B, T), (B, T)]
    dtypes = [jnp.bfloat16, jnp.float32, jnp.int32, jnp.float32]
    args = [jax.ShapeDtypeStruct(s, d) for s, d in zip(shapes, dtypes, strict=True)]
    head = lambda k: Head(k, None, 0.0, rules=sharding.RULES)  # noqa: E731
    ce = lambda h, k, t, w: cross_entropy(h, head(k), t, w).loss_sum  # noqa: E731
    lp = lambda h, k, t, w: sum((w * x).sum() for x in log_probs(h, head(k), t))  # noqa: E731
    own = lambda p, _: (p.target, None)  # noqa: E731
    once = lambda h, k, t, w: losses.sampled_loss(own, h, head(k), t, w)[0]  # noqa: E731
    mesh = sharding.make_mesh({"data": 1, "fsdp": 4, "tensor": 2}) if devices == 8 else None
    with jax.set_mesh(mesh) if mesh else jax.default_device(None):
        for f in (ce, lp, once):
            assert _largest(jax.grad(f, argnums=(0, 1)), *args) * 4 <= chunks.chunk_bytes() * devices


def test_nothing_is_made_for_a_gradient_that_is_not_asked_for():
    hidden, kernel, bias, targets, weights = _inputs()

    def f(hidden, kernel):
        return cross_entropy(hidden, Head(kernel, bias, 0.0), targets, weights, chunk=4).loss_sum

    products = lambda f: str(jax.make_jaxpr(f)(hidden, kernel)).count("dot_general")  # noqa: E731
    assert [products(x) for x in (f, jax.grad(f), jax.grad(f, 1), jax.grad(f, (0, 1)))] == [1, 2, 2, 3]
