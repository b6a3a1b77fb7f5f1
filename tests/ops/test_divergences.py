import functools
import re

import goldens
import jax
import jax.numpy as jnp
import jaxprs
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from research.devices import sharding
from research.errors import InputError
from research.ops import chunks
from research.ops.divergences import KINDS, Divergence, divergence, top_k, topk_divergence, uld
from research.ops.head import Head
from research.ops.losses import cross_entropy

GOLDENS = goldens.load("distill")


def _identity(logits):
    """The head that makes logits of themselves."""
    return Head(jnp.eye(logits.shape[-1], dtype=logits.dtype), None, 0.0)


def _published(name, h, div, hard_nll):
    """The loss that a case's producer computes, summed over tokens, from ours: div(kind, **options) -> Divergence."""
    value = lambda kind, **options: div(kind, **options).divergence_sum  # noqa: E731
    T, lam = h.get("temperature", 1.0), h.get("lam")
    match re.sub(r"_[01](_.*)?$", "", name):
        case "gkd_jsd" | "trl_chunked":
            return value("jsd", beta=h["beta"], temperature=T)
        case "trl_full":
            return value("jsd", beta=h["alpha"])
        case "hinton_kd":
            return T**2 * value("forward_kl", temperature=T)
        case "torchdistill_kd":
            return h["alpha"] * hard_nll() + (1 - h["alpha"]) * T**2 * value("forward_kl", temperature=T)
        case "textbrewer_kd_ce":
            return value("cross_entropy", temperature=T)
        case "textbrewer_kd_mse":
            return value("logit_mse", temperature=T)
        case "distillm_forward_kl" | "torchtune_ForwardKLLoss":
            return value("cross_entropy")
        case "distillm_reverse_kl" | "torchtune_ReverseKLLoss":
            return value("reverse_kl")
        case "distillm_symmetric_kl":
            return (1 - lam) * value("cross_entropy") + lam * value("reverse_kl")
        case "torchtune_SymmetricKLLoss":
            return h["sym_kd_ratio"] * value("cross_entropy") + (1 - h["sym_kd_ratio"]) * value("reverse_kl")
        case "distillm_js_distance":
            return value("jsd", beta=1 - lam)
        case "distillm_tv_distance":
            return value("total_variation")
        case "distillm_skewed_forward_kl":
            out = div("skewed_forward_kl", alpha=lam)
            return out.divergence_sum + out.teacher_entropy_sum
        case "distillm_skewed_reverse_kl":
            return value("skewed_reverse_kl", alpha=lam)
    raise AssertionError(name)


def _close_to_golden(case, ours, theirs):
    single = case.hparams.get("dtype") == "float32"
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if single else {"rtol": 1e-9, "atol": 1e-12}
    np.testing.assert_allclose(ours, theirs, **tolerance)


@pytest.mark.parametrize("name", [n for n in GOLDENS if not re.search("topk|uld|sampled|hid|cos|mmd|fsp", n)])
def test_published_losses(name):
    case = GOLDENS[name]
    inputs, outputs, h = case.inputs, case.outputs, case.hparams
    with jax.enable_x64(True):
        student = jnp.asarray(inputs.get("student_logits", inputs.get("student_hidden")), jnp.float64)
        teacher = jnp.asarray(inputs.get("teacher_logits", inputs.get("teacher_hidden")), jnp.float64)
        student_head, teacher_head = _identity(student), _identity(teacher)
        if "student_head" in inputs:
            student_head, teacher_head = (
                Head(jnp.asarray(inputs[f"{x}_head"].T), None, 0.0) for x in ("student", "teacher")
            )
        mask = inputs.get("mask", inputs["labels"] != -100 if "labels" in inputs else np.ones(student.shape[:2]))

        def loss(student, weights):
            div = functools.partial(_kind_first, student, student_head, teacher, teacher_head, weights, chunk=4)
            log_q = jax.nn.log_softmax(student)
            nll = lambda: -jnp.take_along_axis(log_q, inputs["hard_labels"][..., None], axis=-1).sum()  # noqa: E731
            entropy = div("jsd", beta=h["beta"]).student_entropy_sum if name.startswith("trl_chunked") else 0.0
            return _published(name, h, div, nll), entropy

        weights = jnp.asarray(mask, jnp.float64)
        (total, entropy), (by_student, by_weights) = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(
            student, weights
        )

        if "per_token" in outputs:
            _close_to_golden(case, by_weights, outputs["per_token"])
            _close_to_golden(case, by_student, outputs["grad_student_of_sum"])
            return
        if h.get("reduction") == "none":  # of each supervised token, the terms of the sum over the vocabulary
            _close_to_golden(case, by_weights[mask], outputs["loss"].sum(-1))
            return
        count = float(mask.sum())
        if name.startswith("gkd"):
            elements = count * student.shape[-1]
            counts = {"sum": 1, "batchmean": h.get("num_items_in_batch") or count, "mean": elements}
            count = counts.get(h.get("reduction"), len(mask))
        _close_to_golden(case, total / count, outputs["loss"])
        if "grad_student" in outputs or "grad_student_hidden" in outputs:
            _close_to_golden(case, by_student / count, outputs.get("grad_student", outputs.get("grad_student_hidden")))
        if "student_entropy_sum" in outputs:
            _close_to_golden(case, entropy, outputs["student_entropy_sum"])


def _kind_first(student, student_head, teacher, teacher_head, weights, kind, **options):
    return divergence(student, student_head, teacher, teacher_head, weights, kind=kind, **options)


@pytest.mark.parametrize("name", [n for n in GOLDENS if "topk" in n])
def test_published_losses_of_the_top_k(name):
    case = GOLDENS[name]
    with jax.enable_x64(True):
        student = jnp.asarray(case.inputs["student_logits"])
        if "trl" in name:
            ids = jax.lax.top_k(student, case.hparams["topk"])[1]
            log_p = jax.nn.log_softmax(jnp.asarray(case.inputs["teacher_logits"]))
            log_probs = jnp.take_along_axis(log_p, ids, axis=-1)
            tail = "bucket" if case.hparams["add_tail"] else "renormalize"
            options = {"kind": "jsd", "beta": case.hparams["alpha"], "tail": tail}
        else:
            ids = jnp.asarray(case.inputs["teacher_topk_ids"], jnp.int32)
            log_probs = jnp.asarray(case.inputs["teacher_topk_logprobs"], jnp.float64)
            options = {"kind": "forward_kl", "tail": "truncate"}
        rest = jnp.log1p(-jnp.exp(log_probs).sum(-1))

        def loss(student, weights):
            args = student, _identity(student), ids, log_probs, rest, weights
            return topk_divergence(*args, **options, chunk=4).divergence_sum

        weights = jnp.ones(student.shape[:2], jnp.float64)
        by_student, by_weights = jax.jit(jax.grad(loss, (0, 1)))(student, weights)
        _close_to_golden(case, by_weights, case.outputs["per_token"])
        _close_to_golden(case, by_student, case.outputs["grad_student_of_sum"])


@pytest.mark.parametrize("name", [n for n in GOLDENS if n.startswith("uld")])
def test_published_losses_across_vocabularies(name):
    case = GOLDENS[name]
    mask = case.inputs["labels"] != -100
    with jax.enable_x64(True):  # the mean over rows of the mean over a row's positions
        student, teacher = (jnp.asarray(case.inputs[f]) for f in ("student_logits", "teacher_logits_other_vocab"))
        weights = jnp.asarray(mask / mask.sum(-1, keepdims=True) / len(mask))
        loss = lambda s: uld(s, _identity(s), teacher, _identity(teacher), weights, chunk=4).divergence_sum  # noqa: E731
        total, by_student = jax.jit(jax.value_and_grad(loss))(student)
        _close_to_golden(case, total, case.outputs["loss"])
        _close_to_golden(case, by_student, case.outputs["grad_student"])


def test_student_and_teacher_have_temperatures_of_their_own_in_uld():
    keys = jax.random.split(jax.random.key(3), 2)
    student, teacher = (3 * jax.random.normal(key, (2, 5, n)) for key, n in zip(keys, (7, 9), strict=True))
    weights = jnp.ones((2, 5))

    def loss(s, t, **options):
        return uld(s, _identity(s), t, _identity(t), weights, chunk=4, **options).divergence_sum

    q, p = (-np.sort(-np.asarray(jax.nn.softmax(x / T))) for x, T in ((student, 2.0), (teacher, 0.5)))
    wanted = np.abs(np.pad(q, [(0, 0), (0, 0), (0, 2)]) - p).sum()
    options = {"temperature": 2.0, "teacher_temperature": 0.5}
    np.testing.assert_allclose(loss(student, teacher, **options), wanted, rtol=1e-5)
    by_student = jax.grad(loss)(student, teacher, **options)
    step = 1e-2 * jax.random.normal(jax.random.key(4), student.shape)
    change = loss(student + step, teacher, **options) - loss(student - step, teacher, **options)
    np.testing.assert_allclose(2 * jnp.sum(by_student * step), change, rtol=2e-2)
    assert loss(student, teacher, temperature=2.0) == loss(student, teacher, temperature=2.0, teacher_temperature=2.0)


def _inputs(B=4, T=7, D=8, E=6, V=32, W=32, dtype=jnp.float32):
    """student: hidden, kernel, bias; teacher: the same; weights."""
    keys = jax.random.split(jax.random.key(0), 7)
    normal = lambda i, *shape: jax.random.normal(keys[i], shape)  # noqa: E731
    student = normal(0, B, T, D).astype(dtype), normal(1, D, V), normal(2, V)
    teacher = normal(3, B, T, E).astype(dtype), normal(4, E, W), normal(5, W)
    weights = jax.random.uniform(keys[6], (B, T)) * (jnp.arange(T) % 3 > 0).astype(jnp.float32)[None]
    return student, teacher, weights


def _divergence(student, teacher, weights, *, softcap=0.0, **options):
    (hidden, kernel, bias), (t_hidden, t_kernel, t_bias) = student, teacher
    heads = Head(kernel, bias, softcap), Head(t_kernel, t_bias, softcap)
    return divergence(hidden, heads[0], t_hidden, heads[1], weights, **options)


def _softmax(model, softcap=0.0, temperature=1.0, size=None):
    hidden, kernel, bias = (None if x is None else x.astype(jnp.float32) for x in model)
    logits = hidden @ kernel if bias is None else hidden @ kernel + bias[None, None]
    logits = softcap * jnp.tanh(logits / softcap) if softcap else logits
    return jax.nn.softmax(logits[..., :size] / temperature)


def _by_definition(kind, p, q, beta=0.5, alpha=0.1):
    """Per token, from the probabilities of teacher and student."""
    kl = lambda a, b: (a * jnp.log(a / b)).sum(-1)  # noqa: E731
    mixed = lambda c: c * p + (1 - c) * q  # noqa: E731
    return {
        "forward_kl": lambda: kl(p, q),
        "reverse_kl": lambda: kl(q, p),
        "cross_entropy": lambda: -(p * jnp.log(q)).sum(-1),
        "reverse_cross_entropy": lambda: -(q * jnp.log(p)).sum(-1),
        "jsd": lambda: beta * kl(p, mixed(beta)) + (1 - beta) * kl(q, mixed(beta)),
        "skewed_forward_kl": lambda: kl(p, mixed(alpha)),
        "skewed_reverse_kl": lambda: kl(q, mixed(1 - alpha)),
        "total_variation": lambda: jnp.abs(p - q).sum(-1) / 2,
    }[kind]()


def _close(ours, theirs, **tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), ours, theirs)


CAPPED, PLAIN = (3, 2.0, 1.7, True), (None, 0.0, 1.0, False)


@pytest.mark.parametrize(
    ("kind", "chunk", "softcap", "temperature", "bias"), [*((k, *CAPPED) for k in KINDS), ("jsd", *PLAIN)]
)
def test_values_and_gradients_are_those_of_the_whole_logits(kind, chunk, softcap, temperature, bias):
    # With a bias, the teacher is of another size and both have padding rows.
    student, teacher, weights = _inputs(W=36 if bias else 32)
    size = 30 if bias else None
    if bias:  # so that they agree here and there
        student, teacher = ((*x[:2], x[2].at[:3].add(4.0)) for x in (student, teacher))
    else:
        student, teacher = (*student[:2], None), (*teacher[:2], None)
    mixture = {"beta": 0.3, "alpha": 0.2}

    def ours(student, teacher, weights):
        options = {"softcap": softcap, "temperature": temperature, "vocab_size": size, "chunk": chunk}
        out = _divergence(student, teacher, weights, kind=kind, **options, **mixture)
        return 3.0 * out.divergence_sum, out  # a cotangent that isn't 1

    def theirs(student, teacher, weights):
        p, q = (_softmax(x, softcap, temperature, size) for x in (jax.lax.stop_gradient(teacher), student))
        per_token = _by_definition(kind, p, q, **mixture), *(-(x * jnp.log(x)).sum(-1) for x in (p, q))
        per_token += ((p.argmax(-1) == q.argmax(-1)).astype(jnp.float32), jnp.ones_like(weights))
        sums = [(weights * x).sum() for x in per_token]
        return 3.0 * sums[0], Divergence(*sums, jnp.where(weights == 0, 0.0, per_token[0]))

    gradient = lambda f: jax.jit(jax.grad(f, (0, 1, 2), has_aux=True))(student, teacher, weights)  # noqa: E731
    (by_student, by_teacher, by_weights), out = gradient(ours)
    (their_by_student, _, their_by_weights), their_out = gradient(theirs)
    _close((by_student, out), (their_by_student, their_out), rtol=2e-5, atol=1e-5)
    _close(by_weights, jnp.where(weights == 0, 0.0, their_by_weights), rtol=2e-5, atol=1e-5)
    assert not any(g.any() for g in jax.tree.leaves(by_teacher))
    assert not bias or 0 < float(out.agreement_sum) < float(out.weight_sum)


def test_the_pass_without_gradients():
    args, options = _inputs(), {"kind": "reverse_kl", "chunk": 3}
    f = lambda *args: (_divergence(*args, **options)[0], _divergence(*args, **options))  # noqa: E731
    _close(jax.jit(f)(*args), jax.jit(jax.value_and_grad(f, has_aux=True))(*args)[0], rtol=1e-6)


def test_mixtures_of_one_part_are_plain_divergences():
    args = _inputs()
    value = lambda kind, **options: float(_divergence(*args, kind=kind, **options).divergence_sum)  # noqa: E731
    assert value("jsd", beta=0) == value("skewed_forward_kl", alpha=0) == value("forward_kl")
    assert value("jsd", beta=1) == value("skewed_reverse_kl", alpha=0) == value("reverse_kl")


@pytest.mark.parametrize("kind", KINDS)
def test_far_apart_distributions_give_finite_values_and_gradients(kind):
    # Probabilities that underflow on either side, and one so small that a mixture of it does.
    student = jnp.array([[[400.0, 0, -400], [0.0, 87.5, 1], [0.0, 0, 0]]])
    teacher = jnp.array([[[-400.0, 0, 400], [0.0, 90, 88], [400.0, 0, 0]]])
    args = (student, _identity(student).kernel, None), (teacher, _identity(teacher).kernel, None), jnp.ones((1, 3))
    f = lambda s: _divergence((s, *args[0][1:]), *args[1:], kind=kind).divergence_sum  # noqa: E731
    total, gradient = jax.jit(jax.value_and_grad(f))(student)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: x.astype(jnp.float64), args)
        f = lambda s: _divergence((s, *wide[0][1:]), *wide[1:], kind=kind).divergence_sum  # noqa: E731
        exact, exact_gradient = jax.jit(jax.value_and_grad(f))(wide[0][0])
    _close((total, gradient), (exact, exact_gradient), rtol=1e-5, atol=1e-5)


def _topk(probs, K):
    """ids, log_probs and rest of the K likeliest tokens."""
    top, ids = jax.lax.top_k(probs, K)
    others = jnp.put_along_axis(probs, ids, 0.0, axis=-1, inplace=False)
    return ids, jnp.log(top), jnp.log(others.sum(-1))


@pytest.mark.parametrize(("kind", "tail"), [*((k, "bucket") for k in KINDS), ("skewed_reverse_kl", "renormalize")])
def test_top_k_is_a_divergence_between_fewer_classes(kind, tail):
    (hidden, kernel, bias), teacher, weights = _inputs()
    hidden, weights, teacher = hidden[:, :2], weights[:, 1:3], (teacher[0][:, :2], *teacher[1:])
    ids, log_probs, rest = _topk(_softmax(teacher), 5)
    log_probs = log_probs.at[:, ::2, 4].set(-jnp.inf)  # unused entries, with ids that don't exist
    rest = jnp.log1p(-jnp.exp(log_probs).sum(-1))
    stored = ids.at[:, ::2, 4].set(-7)

    def theirs(hidden, kernel, bias):
        q = _softmax((hidden, kernel, bias), 3.0, 2.0)
        total = jnp.zeros(())
        for t in range(q.shape[1]):
            n = 4 if t % 2 == 0 else 5
            mine, of_teacher = jnp.take_along_axis(q[:, t], ids[:, t, :n], -1), jnp.exp(log_probs[:, t, :n])
            if tail == "bucket":
                mine, of_teacher = (jnp.concatenate([x, 1 - x.sum(-1, keepdims=True)], -1) for x in (mine, of_teacher))
            mine, of_teacher = (x / x.sum(-1, keepdims=True) for x in (mine, of_teacher))
            total += (weights[:, t] * _by_definition(kind, of_teacher, mine)).sum()
        return total

    def ours(hidden, kernel, bias):
        options = {"kind": kind, "tail": tail, "temperature": 2.0, "chunk": 3}
        return topk_divergence(
            hidden, Head(kernel, bias, 3.0), stored, log_probs, rest, weights, **options
        ).divergence_sum

    gradient = lambda f: jax.jit(jax.value_and_grad(f, (0, 1, 2)))(hidden, kernel, bias)  # noqa: E731
    _close(gradient(ours), gradient(theirs), rtol=3e-5, atol=1e-5)


def test_the_top_k_of_all_tokens_is_the_whole_divergence():
    student, teacher, weights = _inputs()
    hidden, kernel, bias = student
    whole = lambda h, k: _divergence((h, k, bias), teacher, weights, kind="jsd", vocab_size=30)  # noqa: E731
    ids, log_probs, _ = _topk(_softmax(teacher, size=30), 30)
    rest = jnp.full(weights.shape, -jnp.inf)
    stored = lambda h, k: topk_divergence(  # noqa: E731
        h, Head(k, bias, 0.0), ids, log_probs, rest, weights, kind="jsd", vocab_size=30
    )
    both = lambda f: jax.jit(jax.grad(lambda h, k: (f(h, k)[0], f(h, k)), (0, 1), has_aux=True))(hidden, kernel)  # noqa: E731
    _close(both(stored), both(whole), rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("k", [5, 30])
def test_the_likeliest_tokens_of_a_model(k):
    _, (hidden, kernel, bias), _ = _inputs()
    found = jax.jit(lambda h, w: top_k(h, Head(w, bias, 3.0), k, temperature=2.0, vocab_size=30, chunk=3))(
        hidden, kernel
    )
    _close(tuple(found), _topk(_softmax((hidden, kernel, bias), 3.0, 2.0, 30), k), rtol=1e-5, atol=1e-5)
    assert found.ids.dtype == jnp.int32
    assert (k == 30) == np.isneginf(found.rest).all()
    with pytest.raises(InputError, match=r"k=31: must be in 1\.\.30"):
        top_k(hidden, Head(kernel, bias, 0.0), 31, vocab_size=30)


def test_the_rest_of_a_sure_student_is_not_lost_in_rounding():
    logits = jnp.array([[[30.0, 0.0, 1.0]]])  # 1 - q_0 would be 0
    ids, log_probs = jnp.zeros((1, 1, 1), jnp.int32), jnp.full((1, 1, 1), jnp.log(0.5))
    f = lambda s: topk_divergence(s, _identity(s), ids, log_probs, log_probs[..., 0], jnp.ones((1, 1)))[0]  # noqa: E731
    total, gradient = jax.value_and_grad(f)(logits)
    share = jax.nn.softmax(jnp.array([0.0, 1.0]))
    np.testing.assert_allclose(total, np.log(0.5) + 0.5 * (30 - np.log(1 + np.e)), rtol=1e-6)
    np.testing.assert_allclose(gradient[0, 0], jnp.concatenate([jnp.array([0.5]), -0.5 * share]), rtol=1e-6)


@pytest.mark.parametrize("kind", ["jsd", "topk", "uld"])
def test_a_vocabulary_of_128_000(kind):
    student, teacher, weights = _inputs(B=1, T=4, D=4, E=4, V=128_000, W=128_000)
    head = lambda x: Head(x[1], x[2], 0.0)  # noqa: E731
    likeliest = jax.lax.top_k(_softmax(teacher), 64)[1]

    def ours(student, teacher):
        if kind == "uld":
            return uld(student[0], head(student), teacher[0], head(teacher), weights, chunk=2).divergence_sum
        if kind == "topk":
            cached = top_k(teacher[0], head(teacher), 64, chunk=2)
            return topk_divergence(student[0], head(student), *cached, weights, kind="jsd", chunk=2).divergence_sum
        return _divergence(student, teacher, weights, kind=kind, chunk=2).divergence_sum

    def theirs(student, teacher):
        p, q = _softmax(teacher), _softmax(student)
        if kind == "uld":
            return (weights * jnp.abs(jnp.sort(p) - jnp.sort(q)).sum(-1)).sum()
        if kind == "topk":  # the others are one more class
            p, q = (jnp.take_along_axis(x, likeliest, axis=-1) for x in (p, q))
            p, q = (jnp.concatenate([x, 1 - x.sum(-1, keepdims=True)], axis=-1) for x in (p, q))
        return (weights * _by_definition("jsd", p, q)).sum()

    gradient = lambda f: jax.jit(jax.value_and_grad(f))(student, teacher)  # noqa: E731
    _close(gradient(ours), gradient(theirs), rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize("by_token", [False, True])
def test_a_tied_embedding_shared_with_the_cross_entropy(by_token):
    (hidden, kernel, _), teacher, weights = _inputs()
    targets = jax.random.randint(jax.random.key(1), weights.shape, 0, kernel.shape[1])

    def ours(embedding):
        h, head = hidden + embedding[targets], Head(embedding if by_token else embedding.T, None, 0.0, by_token)
        hard = cross_entropy(h, head, targets, weights).loss_sum
        theirs = Head(teacher[1].T if by_token else teacher[1], teacher[2], 0.0, by_token)
        soft = divergence(h, head, teacher[0], theirs, weights, kind="reverse_kl", chunk=2)
        top = topk_divergence(h, head, *top_k(teacher[0], theirs, 32, chunk=2), weights, kind="reverse_kl", chunk=2)
        return hard + soft.divergence_sum + top.divergence_sum + uld(h, head, teacher[0], theirs, 0 * weights)[0]

    def theirs(embedding):
        p, q = _softmax(teacher), _softmax((hidden + embedding[targets], embedding.T, None))
        hard = -jnp.log(jnp.take_along_axis(q, targets[..., None], axis=-1)[..., 0])
        return (weights * (hard + 2.0 * _by_definition("reverse_kl", p, q))).sum()

    _close(jax.jit(jax.grad(ours))(kernel.T), jax.jit(jax.grad(theirs))(kernel.T), rtol=2e-5, atol=2e-5)


def test_bfloat16_accumulates_in_float32():
    (hidden, kernel, _), teacher, weights = _inputs(T=128, dtype=jnp.bfloat16)
    hidden = jnp.abs(hidden)  # one sign, so that a bfloat16 sum would stall

    def ours(kernel, teacher):
        return _divergence((hidden, kernel, None), teacher, weights, kind="forward_kl", chunk=1).divergence_sum

    def theirs(kernel, teacher):
        return (weights * _by_definition("forward_kl", _softmax(teacher), _softmax((hidden, kernel, None)))).sum()

    (ours, by_kernel), (theirs, exact) = (jax.jit(jax.value_and_grad(f))(kernel, teacher) for f in (ours, theirs))
    assert by_kernel.dtype == ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, theirs, rtol=0.005)
    np.testing.assert_allclose(by_kernel, exact, rtol=0.02, atol=0.01 * float(jnp.abs(exact).max()))


def _every_form(student, teacher, cached, weights):
    """The sum of the three functions, and what each returns."""
    head = lambda x: Head(x[1], x[2], 5.0, rules=sharding.RULES)  # noqa: E731
    outs = (
        divergence(student[0], head(student), teacher[0], head(teacher), weights, kind="jsd", chunk=3),
        topk_divergence(student[0], head(student), *cached, weights, chunk=3),
        uld(student[0], head(student), teacher[0], head(teacher), weights, chunk=3),
    )
    return sum(out.divergence_sum for out in outs), outs


def test_garbage_where_the_weight_is_0_changes_nothing():
    student, teacher, weights = _inputs()
    cached = _topk(_softmax(teacher), 4)

    def spoil(x):
        bad = (weights == 0).reshape(weights.shape + (1,) * (x.ndim - 2))
        return jnp.where(bad, jnp.nan if jnp.issubdtype(x.dtype, jnp.floating) else -100, x)

    spoiled = (spoil(student[0]), *student[1:]), (spoil(teacher[0]), *teacher[1:]), jax.tree.map(spoil, cached)
    f = jax.jit(jax.value_and_grad(_every_form, has_aux=True))
    _close(f(*spoiled, weights), f(student, teacher, cached, weights), rtol=1e-6)


@pytest.mark.parametrize("sizes", [{"data": 2, "tensor": 4}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_sharded_over_batch_and_vocabulary_equals_one_device(sizes):
    student, teacher, weights = _inputs(B=8)
    args = student, teacher, _topk(_softmax(teacher), 4), weights
    rows, mesh = PartitionSpec(("data", "fsdp")), sharding.make_mesh(sizes)
    model = rows, PartitionSpec("fsdp", "tensor"), PartitionSpec("tensor")
    f = jax.value_and_grad(_every_form, has_aux=True)
    with jax.set_mesh(mesh):
        specs = model, model, (rows, rows, rows), rows
        placed = jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), args, specs)
        sharded = jax.jit(f)(*placed)
    _close(sharded, jax.jit(f)(*args), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("devices", [1, 8])
def test_no_array_holds_the_logits(devices):
    B, T, D, V, K = 8, 4096, 16, 262_144, 16
    array = jax.ShapeDtypeStruct
    model = array((B, T, D), jnp.bfloat16), array((D, V), jnp.float32), array((V,), jnp.float32)
    cached = array((B, T, K), jnp.int32), array((B, T, K), jnp.float32), array((B, T), jnp.float32)

    def f(student, teacher, cached, weights):
        head = lambda x: Head(x[1], x[2], 0.0, rules=sharding.RULES)  # noqa: E731
        live = student[0], head(student), teacher[0], head(teacher), weights
        stored = topk_divergence(student[0], head(student), *cached, weights).divergence_sum
        return sum(divergence(*live, kind=k).divergence_sum for k in KINDS) + stored + uld(*live).divergence_sum

    mesh = sharding.make_mesh({"data": 1, "fsdp": 4, "tensor": 2}) if devices == 8 else None
    with jax.set_mesh(mesh) if mesh else jax.default_device(None):
        jaxpr = jax.make_jaxpr(jax.grad(f))(model, model, cached, array((B, T), jnp.float32))
    assert max(x.size * x.dtype.itemsize for x in jaxprs.arrays(jaxpr.jaxpr)) <= chunks.chunk_bytes() * devices


def test_logits_are_made_once_and_nothing_for_a_gradient_that_is_not_asked_for():
    student, teacher, weights = _inputs()
    f = lambda s: _divergence(s, teacher, weights, kind="jsd", chunk=4).divergence_sum  # noqa: E731
    assert str(jax.make_jaxpr(f)(student)).count("dot_general") == 2
    assert str(jax.make_jaxpr(jax.grad(f))(student)).count("dot_general") == 4
    frozen = lambda hidden: f((hidden, *student[1:]))  # noqa: E731
    assert str(jax.make_jaxpr(jax.grad(frozen))(student[0])).count("dot_general") == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "forward"}, "kind='forward'.*Did you mean 'forward_kl'"),
        ({"kind": "jsd", "beta": 1.5}, "beta=1.5"),
        ({"kind": "skewed_reverse_kl", "alpha": 1.0}, "alpha=1.0"),
        ({"kind": "forward_kl", "temperature": 0.0}, "temperature=0.0"),
        ({"kind": "forward_kl", "vocab_size": 33}, "vocab_size=33: must be in 1..32"),
        ({"kind": "forward_kl"}, "32 entries, the teacher's 36.*vocab_size"),
    ],
)
def test_what_cannot_be_computed_is_an_error(options, message):
    with pytest.raises(InputError, match=message):
        _divergence(*_inputs(W=36), **options)


def test_what_top_k_cannot_do_is_an_error():
    (hidden, kernel, bias), teacher, weights = _inputs()
    f = functools.partial(topk_divergence, hidden, Head(kernel, bias, 0.0), *_topk(_softmax(teacher), 4), weights)
    with pytest.raises(InputError, match=r"tail='bucke'.*Did you mean 'bucket'"):
        f(tail="bucke")
    with pytest.raises(InputError, match=r"truncate.*reverse_kl"):
        f(kind="reverse_kl", tail="truncate")
