"""Objectives on classes: what they read, that they are the losses of ops, and that cutting a batch changes nothing."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import runs

from research import objectives, params, train
from research.devices import sharding
from research.errors import InputError
from research.models.config import ModelConfig
from research.models.transformer import make_model
from research.objectives import classes, types, weak_to_strong
from research.objectives.terms import Inputs, init_carry, losses, row_numbers
from research.ops import class_losses
from research.sources.tokenizers import TokenizerSpec, make_tokenizer

B, T, C, V = 8, 12, 3, 264
SIZE = {"vocab_size": V, "num_layers": 1, "d_model": 16, "num_heads": 2, "num_kv_heads": 2, "d_ff": 16, "max_length": T}
CLASSIFIER = make_model(ModelConfig(**SIZE, num_labels=C, head_bias=True, logit_softcap=4.0))
LANGUAGE = make_model(ModelConfig(**SIZE, tie_embeddings=True))
TOKENIZER = make_tokenizer(TokenizerSpec(kind="byte"), lambda: iter(()))
WORDS = ("yes", "no", "maybe")


def values_of(model):
    values = params.init(model.specs, jax.random.PRNGKey(0))
    # Large logits, and a bias that isn't 0.
    return jax.tree.map(lambda x: 8.0 * x + 0.3 * jnp.arange(x.size, dtype=x.dtype).reshape(x.shape) / x.size, values)


CLASSIFIES, SPEAKS = values_of(CLASSIFIER), values_of(LANGUAGE)


def make_batch(seed=0, hard=False):
    """Packed rows; most documents have a label at their last token, and one row has none."""
    rng = np.random.default_rng(seed)
    segments = np.sort(rng.integers(0, 4, (B, T)), axis=1)[:, ::-1].astype(np.int32)
    first = np.concatenate([np.ones((B, 1), bool), segments[:, 1:] != segments[:, :-1]], axis=1)
    positions = np.arange(T) - np.maximum.accumulate(np.where(first, np.arange(T), 0), axis=1)
    last = np.concatenate([first[:, 1:], np.ones((B, 1), bool)], axis=1) & (segments > 0) & (rng.random((B, T)) < 0.9)
    last[2] = False
    labels = rng.dirichlet([1.5, 0.7, 0.4], (B, T))
    labels = np.eye(C)[labels.argmax(-1)] if hard else labels
    batch = {"tokens": rng.integers(0, V, (B, T)).astype(np.int32), "segment_ids": segments}
    batch |= {"positions": positions.astype(np.int32), "label_probs": (labels * last[..., None]).astype(np.float32)}
    return jax.tree.map(jnp.asarray, batch)


def term(name, tokenizer=None, /, **options):
    return objectives.load({"terms": {name: 1.0}, name: options}, tokenizer)


def out_of(terms, batch, model=CLASSIFIER, values=CLASSIFIES, step=0):
    inputs = Inputs(jax.random.PRNGKey(0), jnp.asarray(step), row_numbers(batch), init_carry(terms, batch))
    (out,) = losses(terms, types.Forward({"policy": model}, {"policy": values}, batch), inputs).values()
    return out


def at_labels(batch):
    """(logits, labels) of the labelled documents alone."""
    hidden, head = CLASSIFIER.hidden(CLASSIFIES, batch), CLASSIFIER.unembed(CLASSIFIES)
    here = np.asarray(batch["label_probs"]).sum(-1) > 0
    assert 10 < here.sum() < 40
    return 4 * np.tanh((hidden @ head.kernel + head.bias[None, None]) / 4)[here], np.asarray(batch["label_probs"])[here]


def test_class_logits_are_columns_of_the_head_and_no_other_is_computed():
    batch, tokens = make_batch(), classes.label_tokens(WORDS, TOKENIZER, "words")
    assert tokens == tuple(map(ord, "ynm"))

    def logits(values):
        return classes.class_logits(types.Forward({"policy": LANGUAGE}, {"policy": values}, batch), tokens)

    whole = LANGUAGE.hidden(SPEAKS, batch) @ LANGUAGE.unembed(SPEAKS).kernel
    np.testing.assert_allclose(logits(SPEAKS), whole[..., tokens], rtol=1e-5, atol=1e-5)
    program = str(jax.make_jaxpr(jax.grad(lambda values: jnp.sum(logits(values))))(SPEAKS))
    assert f"[{B},{T},{C}]" in program
    assert not re.search(rf"\[{B},{T},{V}\]|\[{B * T},{V}\]", program)


def test_words_are_the_labels_of_a_language_model():
    batch = make_batch(hard=True)
    terms = term("classify", TOKENIZER, head="words", words=WORDS)
    out = out_of(terms, batch, LANGUAGE, SPEAKS)
    here = np.asarray(batch["label_probs"]).sum(-1) > 0
    whole = LANGUAGE.hidden(SPEAKS, batch) @ LANGUAGE.unembed(SPEAKS).kernel
    log_p = np.asarray(jax.nn.log_softmax(whole[..., jnp.asarray([ord(w[0]) for w in WORDS])]))[here]
    np.testing.assert_allclose(out.loss_sum, -np.sum(log_p * np.asarray(batch["label_probs"])[here]), rtol=1e-5)
    assert float(out.weight) == here.sum()


def test_the_loss_of_classes_is_told_by_source():
    batch = make_batch()
    source = jnp.where(batch["segment_ids"] > 0, jnp.arange(T, dtype=jnp.int32) % 2, 0)
    inputs = Inputs(jax.random.PRNGKey(0), jnp.zeros((), jnp.int32), row_numbers(batch), {})
    forward = types.Forward({"policy": CLASSIFIER}, {"policy": CLASSIFIES}, batch | {"source": source})
    out = losses(term("classify", label_smoothing=0.1), forward, inputs, ("even", "odd"))["classify"]
    parts = [out.metrics[f"loss/{name}"] for name in ("even", "odd")]
    np.testing.assert_allclose(np.sum(parts, axis=0), (out.loss_sum, out.weight), rtol=1e-5)
    assert min(float(weight) for _, weight in parts) > 0


@pytest.mark.parametrize("hard", [True, False])
def test_classify_counts_labelled_positions_alone(hard):
    batch = make_batch(hard=hard)
    logits, labels = at_labels(batch)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    out = out_of(term("classify", label_smoothing=0.3), batch)
    np.testing.assert_allclose(out.loss_sum, -np.sum((0.7 * labels + 0.1) * log_p), rtol=1e-5)
    means = {name: float(total / weight) for name, (total, weight) in out.metrics.items()}
    assert means["label_nll"] == pytest.approx(-np.sum(labels * log_p) / len(labels), rel=1e-5)
    assert means["accuracy"] == pytest.approx(np.mean(logits.argmax(-1) == labels.argmax(-1)))
    assert 0 < means["accuracy"] < 1
    learned = out_of(term("weak_to_strong"), batch).metrics  # from another model's labels, which may be wrong
    assert "accuracy" not in learned
    assert float(learned["agreement"][0] / learned["agreement"][1]) == pytest.approx(means["accuracy"])
    assert means["confidence"] == pytest.approx(np.exp(log_p).max(-1).mean(), rel=1e-5)


def test_classes_with_weights():
    batch, weights = make_batch(hard=True), (0.0, 1.0, 2.5)
    logits, labels = at_labels(batch)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    each = labels @ np.asarray(weights)
    out = out_of(term("classify", class_weights=weights), batch)
    np.testing.assert_allclose(out.loss_sum, -np.sum(each * np.sum(labels * log_p, -1)), rtol=1e-5)
    np.testing.assert_allclose(out.weight, each.sum(), rtol=1e-6)  # as torch.nn.CrossEntropyLoss(weight) divides
    plain = out_of(term("classify"), batch)
    jax.tree.map(np.testing.assert_array_equal, dict(out.metrics), dict(plain.metrics))
    with pytest.raises(InputError, match="2 weights for the 3 classes"):
        out_of(term("classify", class_weights=(1.0, 2.0)), batch)
    for bad in ((0.0, 0.0, 0.0), (1.0, -1.0, 1.0), (1.0, float("nan"), 1.0), ("a", "b", "c")):
        with pytest.raises(InputError, match="class_weights"):
            term("classify", class_weights=bad)


# Loss and options -> the same from ops.class_losses.
MADE = {
    "cross_entropy": ({"label_smoothing": 0.1}, class_losses.cross_entropy, {"label_smoothing": 0.1}),
    "hard_cross_entropy": ({}, class_losses.hard_cross_entropy, {}),
    "forward_kl": ({}, class_losses.forward_kl, {}),
    "reverse_kl": ({"log_zero": -3.0}, class_losses.reverse_kl, {"log_zero": -3.0}),
    "reverse_cross_entropy": ({}, class_losses.reverse_cross_entropy, {"log_zero": np.log(1e-4)}),
    "symmetric_cross_entropy": ({"alpha": 0.4}, class_losses.symmetric_cross_entropy, {"alpha": 0.4, "beta": 1.0}),
    "product_of_confidence": ({"beta": 2.0}, class_losses.product_of_confidence, {"alpha": 1.0, "beta": 2.0}),
    "confidence_window": ({"radius": 0.2}, class_losses.confidence_window, {"radius": 0.2}),
    "adaptive_confidence": ({"scale": 0.5}, class_losses.adaptive_confidence, {"scale": 0.5, "temperature": 1.0}),
    "augmented_confidence": ({"warmup_steps": 20}, class_losses.augmented_confidence, {"coefficient": 0.25}),
    "bootstrap": ({}, class_losses.bootstrap, {"coefficient": 0.05}),
}


def test_weak_to_strong_is_the_loss_of_that_name():
    batch = make_batch()
    logits, labels = map(jnp.asarray, at_labels(batch))
    ones = jnp.ones(len(labels))
    terms = {name: term("weak_to_strong", loss=name, **options) for name, (options, _, _) in MADE.items()}
    assert set(MADE) | {"auxiliary_confidence"} == set(weak_to_strong.LOSSES)
    found = jax.jit(lambda batch: {name: out_of(t, batch, step=10) for name, t in terms.items()})(batch)
    expected = jax.jit(
        lambda *x: {name: function(*x, **kwargs) for name, (_, function, kwargs) in MADE.items()},
    )(logits, labels, ones)
    for name, out in found.items():
        np.testing.assert_allclose(out.loss_sum, expected[name], rtol=1e-5, err_msg=name)
        assert float(out.weight) == len(labels)
    assert float(found["augmented_confidence"].metrics["coefficient"][0]) == pytest.approx(0.25 * len(labels))


def test_own_labels_of_auxiliary_confidence():
    batch = make_batch()
    logits, labels = map(jnp.asarray, at_labels(batch))
    p, ones = jax.nn.softmax(logits), jnp.ones(len(labels))
    even = jnp.full((C,), 1 / C)
    by_batch = class_losses.quantile_thresholds(p, class_losses.mean_label(labels, ones), ones)
    by_even = class_losses.quantile_thresholds(p, even, ones)
    balanced = class_losses.balance(labels, ones)
    cases = {  # options -> labels, thresholds, whether soft, whether something is gathered of the whole batch
        "batch": ({}, labels, by_batch, False, True),
        "balanced": ({"balance": True}, balanced, by_even, False, True),
        "running": ({"own_labels": "running"}, labels, even, False, False),
        "argmax": ({"own_labels": "argmax"}, labels, None, False, False),
        "soft": ({"own_labels": "soft", "balance": True}, balanced, None, True, True),
    }
    terms = {
        name: term("weak_to_strong", loss="auxiliary_confidence", coefficient=0.7, **options)
        for name, (options, *_) in cases.items()
    }
    found = jax.jit(lambda batch: {name: out_of(t, batch) for name, t in terms.items()})(batch)

    @jax.jit
    def expected(logits, ones):
        return {
            name: class_losses.auxiliary_confidence(
                logits, given, ones, coefficient=0.7, thresholds=thresholds, soft=soft
            )
            for name, (_, given, thresholds, soft, _) in cases.items()
        }

    sums = expected(logits, ones)
    for name, (_, _, thresholds, _, gathers) in cases.items():
        np.testing.assert_allclose(found[name].loss_sum, sums[name], rtol=1e-4, err_msg=name)
        assert (terms[name]["weak_to_strong"].objective.gather is not None) == gathers
        assert ("threshold_0" in found[name].metrics) == (thresholds is not None)
    own, count = found["batch"].metrics["own_class_0"]
    assert float(own) == np.sum(np.argmax(np.asarray(p - by_batch[None, :]), -1) == 0)
    np.testing.assert_allclose(found["running"].statistics.labels, labels.sum(0), rtol=1e-5)
    assert float(found["running"].statistics.count) == float(count) == len(labels)
    assert len({round(float(out.loss_sum), 3) for out in found.values()}) >= 4
    hard = out_of(term("weak_to_strong", loss="bootstrap", hard=True, coefficient=0.7), batch)
    np.testing.assert_allclose(hard.loss_sum, found["argmax"].loss_sum, rtol=1e-5)


RUNNING = {"loss": "auxiliary_confidence", "own_labels": "running", "rate": 0.2, "warmup_steps": 2}


@functools.cache
def stepper(microbatches=1, **options):
    terms, optimizer = term("weak_to_strong", **options), optax.sgd(0.1, momentum=0.9)
    step = train.TrainStep(
        terms, {"policy": CLASSIFIER}, optimizer, schedule=lambda t: jnp.asarray(0.1), microbatches=microbatches
    )
    return terms, optimizer, jax.jit(step)


def begin(terms, optimizer, values=CLASSIFIES):
    carry = init_carry(terms, make_batch())
    return train.init_state({"policy": values}, optimizer, jax.random.PRNGKey(1), carry=carry)


def three_steps(microbatches=1, mesh=None, **options):
    terms, optimizer, step = stepper(microbatches, **options)
    # Classes are told apart: where all are about as likely, rounding decides on which side of a threshold a row is.
    values, batches = {**CLASSIFIES, "head": 30 * CLASSIFIES["head"]}, [make_batch(seed) for seed in range(3)]
    if mesh is not None:
        step = jax.jit(step.__wrapped__)  # traced anew, under the mesh
        values = jax.device_put(values, params.shardings(CLASSIFIER.specs, mesh))
        batches = jax.device_put(batches, sharding.named(mesh, ("batch", "time")))
    state = begin(terms, optimizer, values)
    for batch in batches:
        state, metrics = step(state, {}, batch)
    return state, metrics


def same(one, two):
    close = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5)
    jax.tree.map(close, (one[0].params, one[0].carry), (two[0].params, two[0].carry))
    for name in ("loss", "agreement", "grad_norm"):
        np.testing.assert_allclose(*(m[name][0] / m[name][1] for _, m in (one, two)), rtol=1e-3)


@pytest.mark.slow
def test_running_thresholds_are_the_same_for_microbatches_and_a_mesh():
    whole = three_steps(**RUNNING)
    carry = whole[0].carry["weak_to_strong"]
    assert np.max(np.abs(carry.thresholds - 1 / C)) > 0.05
    assert float(carry.seen) == sum(int(np.sum(make_batch(seed)["label_probs"].sum(-1) > 0)) for seed in range(3))
    same(three_steps(microbatches=4, **RUNNING), whole)
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    with jax.set_mesh(mesh):
        sharded = three_steps(mesh=mesh, **RUNNING)
    same(sharded, whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{}, {"balance": True}, {"own_labels": "soft", "balance": True}], ids=["batch", "balanced", "soft"]
)
def test_what_is_of_the_whole_batch_is_the_same_for_microbatches(options):
    options = {"loss": "auxiliary_confidence", "coefficient": 0.7, **options}
    whole, cut = three_steps(**options), three_steps(microbatches=4, **options)
    same(cut, whole)
    for name in ("own_class_0", "weak_class_0", "threshold_0"):
        if name in whole[1]:
            np.testing.assert_allclose(cut[1][name], whole[1][name], rtol=1e-4)


def test_thresholds_of_the_batch_are_the_same_on_a_mesh():
    batch, terms = make_batch(), term("weak_to_strong", loss="auxiliary_confidence")
    single = out_of(terms, batch)
    mesh = sharding.make_mesh({"data": 8})
    with jax.set_mesh(mesh):
        rows = jax.device_put(batch, sharding.named(mesh, ("batch", "time")))
        sharded = jax.jit(lambda rows: out_of(terms, rows))(rows)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), sharded, single)


def test_a_run_goes_on_from_a_checkpoint_with_its_thresholds(tmp_path):
    terms, optimizer, step = stepper(1, **RUNNING)
    state = begin(terms, optimizer)
    first, _ = step(state, {}, make_batch(0))
    expected, _ = step(first, {}, make_batch(1))
    restored = runs.restored(first, tmp_path)
    found, _ = step(restored, {}, make_batch(1))
    assert not np.array_equal(first.carry["weak_to_strong"].thresholds, found.carry["weak_to_strong"].thresholds)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("weak_to_strong", {"loss": "cross_entropi"}, "no such loss. Did you mean 'cross_entropy'"),
        ("weak_to_strong", {"radius": 0.2}, "radius = 0.2: loss = 'cross_entropy' has no such option"),
        ("weak_to_strong", {"loss": "forward_kl", "alpha": 1.0}, "It has none"),
        ("weak_to_strong", {"radios": 0.2}, "radios: no such option. Did you mean 'radius'"),
        ("weak_to_strong", {"loss": "auxiliary_confidence", "coefficient": 1.5}, r"coefficient = 1.5: .* in \[0, 1\]"),
        (
            "weak_to_strong",
            {"loss": "auxiliary_confidence", "warmup_steps": 2.5},
            "warmup_steps = 2.5: must be of type int",
        ),
        ("weak_to_strong", {"loss": "auxiliary_confidence", "rate": 0.1}, "own_labels = 'batch'"),
        ("weak_to_strong", {"loss": "auxiliary_confidence", "own_labels": "bach"}, "Did you mean 'batch'"),
        (
            "weak_to_strong",
            {"loss": "auxiliary_confidence", "balance": "yes"},
            "balance = 'yes': must be of type bool",
        ),
        ("weak_to_strong", {"loss": "reverse_kl", "log_zero": 1.0}, "log_zero = 1.0: .* below 0"),
        ("weak_to_strong", {"loss": "confidence_window", "radius": "wide"}, "radius = 'wide': must be of type float"),
        ("weak_to_strong", {"tokenizer": None}, "tokenizer: no such option"),
        ("classify", {"label_smoothing": 1.0}, r"label_smoothing = 1.0: must be in \[0, 1\)"),
        ("classify", {"head": "linnear"}, "Did you mean 'linear'"),
        ("classify", {"head": "words"}, "name a word for each class"),
        ("classify", {"words": WORDS}, "words are for head = 'words'"),
        ("classify", {"head": "words", "words": "yes"}, "words = 'yes': must be of type list"),
        ("classify", {"head": "words", "words": ("yes",)}, r"words = \('yes',\): give a list"),
        ("classify", {"head": "words", "words": [" yes", " no"]}, "' yes' and ' no' begin with the same token ' '"),
    ],
)
def test_bad_options_are_named(name, options, words):
    with pytest.raises(InputError, match=words):
        term(name, TOKENIZER, **options)


def test_a_head_that_does_not_fit_is_named():
    batch, two = make_batch(), make_batch()
    two["label_probs"] = two["label_probs"][..., :2]
    words = {"head": "words", "words": WORDS}
    for terms, model, batch_, message in (
        (term("classify"), LANGUAGE, batch, "model.num_labels = 0: .* head predicts tokens"),
        (term("classify", TOKENIZER, **words), CLASSIFIER, batch, "model.num_labels = 3: .* predicts classes"),
        (term("classify"), CLASSIFIER, two, "model.num_labels = 3: the data has 2 classes"),
        (term("classify", TOKENIZER, **words), LANGUAGE, two, "3 words for the 2 classes"),
        (term("classify", None, **words), LANGUAGE, batch, "made without"),
    ):
        with pytest.raises(InputError, match=message):
            out_of(terms, batch_, model, CLASSIFIES if model is CLASSIFIER else SPEAKS)
