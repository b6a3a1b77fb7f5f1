"""Virtual tokens and prefixes in packed rows, while decoding, and before roles that lack them."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soft_prompts
from soft_prompts import logits, rows

from research.errors import InputError
from research.evals import labels
from research.evals.scoring import Example, make_token_scorer
from research.models import kernels, virtual
from research.models.generation import generate_batches, make_generate, make_stream
from research.models.sampling import SamplingConfig, longest_prompt
from research.objectives import distill, match, next_token
from research.objectives.types import Forward, next_token_targets
from research.rollouts.answers import RolloutSpec, make_rollout
from research.sources.rows import Part, lay_out
from research.sources.spec import DataSpec
from research.sources.store import Store

pytestmark = pytest.mark.slow

SPECS = {
    "prompt": {"kind": "prompt", "tokens": 3},
    "p_tuning": {"kind": "p_tuning", "tokens": 2, "hidden": 5},
    "prefix": {"kind": "prefix", "tokens": 3},
    "projected": {"kind": "prefix", "tokens": 2, "projection": True},
}
MOST = [pytest.param(name, marks=pytest.mark.slow if name == "p_tuning" else ()) for name in SPECS]
PROMPTS = [[5, 9, 11], [7], [3, 4, 5, 6, 8, 2, 9]]


def build(name, **changes):
    c, base = soft_prompts.llama()
    return soft_prompts.with_adapter(dataclasses.replace(c, **changes), base, **SPECS[name])


def store_of(lengths, **fields):
    """Documents of random tokens."""
    total = sum(lengths)
    tokens = np.random.default_rng(0).integers(3, 90, total).astype(np.int32)
    ones = np.ones(len(lengths), np.int64)
    values = {field.name: None for field in dataclasses.fields(Store)}
    values |= {"tokens": tokens, "length": np.array(lengths), "bytes": ones, "fields": fields}
    return Store(**values)


def packed(model, lengths, seq_len=24, pack=True, **fields):
    store = store_of(lengths, **fields)
    first = model.config.vocab_size
    ids = range(first, first + model.virtual_tokens)
    spec = DataSpec("", seq_len=seq_len, pack=pack)
    laid, _ = lay_out([Part(store, np.ones(len(lengths), bool))], spec, None, ids)
    if fields:
        laid = dataclasses.replace(laid, extra=dict.fromkeys(fields, ()))
    return laid.batch(np.arange(len(laid))), store


def documents(batch):
    """[(row, times)] of each."""
    found = []
    for row, segments in enumerate(np.asarray(batch["segment_ids"])):
        found += [(row, np.flatnonzero(segments == number)) for number in range(1, segments.max() + 1)]
    return found


@pytest.mark.parametrize("name", MOST)
@pytest.mark.parametrize("attention", ["reference", "cpu"])
def test_a_packed_document_is_as_if_alone(name, attention):
    model, values = build(name, attention=attention)
    batch, _ = packed(model, [7, 11, 4])
    assert batch["segment_ids"].max() >= 2
    out = logits(model, values, {key: jnp.asarray(x) for key, x in batch.items()})
    for row, times in documents(batch):
        alone = {key: jnp.asarray(x[row : row + 1, times]) for key, x in batch.items()}
        alone["segment_ids"] = jnp.ones_like(alone["segment_ids"])
        np.testing.assert_allclose(out[row, times], logits(model, values, alone)[0], atol=1e-5)


def test_positions_of_real_tokens_begin_after_a_prefix():
    c, base = soft_prompts.llama()
    c = dataclasses.replace(c, positions="learned")
    batch = rows([[5, 9, 11, 7]], [[1, 1, 1, 1]])
    table = jax.random.normal(jax.random.key(0), (c.max_length, c.d_model))
    learned, begun = soft_prompts.with_adapter(c, {**base, "position_embed": table}, **SPECS["prefix"])
    inputs = learned.hidden_at(begun, batch, (0,))[1][0]
    np.testing.assert_allclose(inputs[0], base["embed"][jnp.array([5, 9, 11, 7])] + table[3:7], atol=1e-6)


def test_every_piece_of_a_cut_document_has_the_virtual_tokens():
    model, _ = build("prompt")
    batch, store = packed(model, [30], seq_len=12, pack=False)
    first = model.config.vocab_size
    assert batch["tokens"].shape == (4, 12)
    np.testing.assert_array_equal(batch["tokens"][:, :3], np.tile(np.arange(first, first + 3), (4, 1)))
    np.testing.assert_array_equal(batch["virtual"][:, :3], 1)
    assert batch["virtual"][:, 3:].sum() == 0
    real = (batch["segment_ids"] > 0) & (batch["virtual"] == 0)
    np.testing.assert_array_equal(batch["tokens"][real], store.tokens)
    np.testing.assert_array_equal(batch["positions"][0], np.arange(12))
    np.testing.assert_array_equal(batch["loss_mask"], real)
    targets, weights = next_token_targets({key: jnp.asarray(x) for key, x in batch.items()})
    assert weights.sum() == 30  # the first of each piece too, which follows the virtual tokens
    assert targets.max() < first


def test_labels_stay_at_the_last_token():
    labels = np.eye(2, dtype=np.float32)
    store = dataclasses.replace(store_of([4, 6]), labels=labels, mask=np.ones(10, bool), supervised=np.array([4, 6]))
    laid, _ = lay_out([Part(store, np.ones(2, bool))], DataSpec("", seq_len=20), None, range(96, 99))
    batch = laid.batch(np.arange(len(laid)))
    ends = [(row, times[-1]) for row, times in documents(batch)]
    assert sorted(batch["label_probs"][end].tolist() for end in ends) == [[0.0, 1.0], [1.0, 0.0]]
    assert batch["label_probs"].sum() == 2
    assert sorted(len(times) for _, times in documents(batch)) == [7, 9]


def test_virtual_tokens_are_of_a_documents_prefix_where_it_has_one():
    model, _ = build("prompt")
    marks = np.array([1, 1, 0, 0, 0, 0, 0, 0], np.int32)
    batch, _ = packed(model, [4, 4], prefix=marks)
    for row, times in documents(batch):
        mine = batch["prefix"][row, times]
        assert mine.tolist() in ([1, 1, 1, 1, 1, 0, 0], [0] * 7)
    assert batch["prefix"].sum() == 5


@pytest.mark.parametrize("name", MOST)
def test_decoding_is_teacher_forcing(name):
    model, values = build(name)
    config = SamplingConfig(max_new_tokens=5, temperature=0.0)
    assert longest_prompt(model, config) == model.config.max_length - 5 - SPECS[name]["tokens"]
    generate = make_generate(model, config)
    answers = generate_batches(generate, values, PROMPTS, jax.random.key(0), batch_size=2, bucket=8)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        ids = np.array([prompt + answer.tokens])
        hidden = virtual.hidden(model, values, rows(ids, np.ones_like(ids)))
        scores = jnp.matmul(hidden, model.unembed(values).kernel, precision="highest")[0, len(prompt) - 1 : -1]
        assert jnp.argmax(scores, axis=1).tolist() == answer.tokens
        logprobs = np.asarray(jax.nn.log_softmax(scores))[np.arange(5), answer.tokens]
        np.testing.assert_allclose(answer.logprobs, logprobs, atol=1e-4)
    stream = make_stream(model, config, bucket=8)(model.unstack(values), PROMPTS[0], jax.random.key(0))
    assert [token for part in stream for token in part] == answers[0].tokens


def test_scores_are_given_after_the_virtual_tokens():
    model, values = build("prompt")
    ids = np.array([5, 9, 11, 7], np.int32)
    (scored,) = make_token_scorer(model)(values, [Example(ids, np.ones(4, bool))])
    whole = logits(model, values, rows(ids[None], np.ones((1, 4), int), model.config.vocab_size, 3))[0, 3:]
    expected = np.asarray(jax.nn.log_softmax(whole[:-1]))[np.arange(3), ids[1:]]
    np.testing.assert_allclose(scored, expected, atol=1e-5)


@pytest.mark.parametrize("name", ["prompt", "prefix"])
def test_labels_are_given_after_what_is_in_front(name):
    model, values = build(name)
    store, count, words = store_of([7, 30, 4]), model.virtual_tokens, (5, 7)
    probs = functools.partial(labels._make_probs(model.config, words, count), values)
    virtual_ids = range(model.config.vocab_size, model.config.vocab_size + count)
    classifier = labels.Classifier(name, "", probs, store, 24, ("a", "b"), {}, virtual_ids)
    room = 24 - count
    texts = [
        store.tokens[stop - min(n, room) : stop] for n, stop in zip(store.length, store.length.cumsum(), strict=True)
    ]
    ids, mask = (np.stack([np.pad(x, (0, room - len(x))) for x in each]) for each in (texts, map(np.ones_like, texts)))
    hidden = jax.jit(functools.partial(virtual.hidden, model))(values, rows(ids, mask))
    last = hidden[jnp.arange(3), jnp.array([len(text) - 1 for text in texts])]
    scores = jnp.matmul(last, model.unembed(values).kernel, precision="highest")[:, jnp.array(words)]
    np.testing.assert_allclose(labels.probabilities(classifier, range(3)), jax.nn.softmax(scores), atol=1e-5)


@pytest.mark.parametrize("name", ["prompt", "prefix"])
def test_a_role_without_the_adapter_sees_padding_there(name):
    model, values = build(name)
    plain = model._replace(adapter=None, of="policy")
    batch = {key: jnp.asarray(x) for key, x in packed(model, [7, 11, 4])[0].items()}
    forward = Forward({"policy": model, "reference": plain}, {"policy": values}, batch)
    out = forward.hidden("reference")
    for row, times in documents(batch):
        ids = np.asarray(batch["tokens"])[row, times][model.virtual_tokens :][None]
        alone = plain.hidden(kernels.bare(values), rows(ids, np.ones_like(ids)))
        np.testing.assert_allclose(out[row, times[model.virtual_tokens :]], alone[0], atol=1e-5)
    assert jnp.abs(forward.hidden() - out).max() > 1e-3


def test_what_a_teacher_has_not_read_is_not_distilled():
    """The first token of a document follows virtual tokens, and in a teacher without them nothing."""
    model, values = build("prompt")
    teacher = model._replace(adapter=None)
    batch = {key: jnp.asarray(x) for key, x in packed(model, [7, 11, 4])[0].items()}
    both = {"policy": values, "teacher": kernels.bare(values)}
    forward = Forward({"policy": model, "teacher": teacher}, both, batch, {"policy": (1,), "teacher": (1,)})
    assert distill.make().loss(forward, batch, None).weight == 22 - 3
    assert next_token.make().loss(forward, batch, None).weight == 22
    matched = match.make(layers=((1, 1),), projection="none")
    assert matched.loss(forward, batch, types.SimpleNamespace(params=())).weight == 22


def test_attention_is_not_compared_where_there_is_a_prefix():
    model, values = build("prefix")
    batch = rows([[5, 9, 11, 7]], [[1, 1, 1, 1]])
    with pytest.raises(InputError, match="sees a prefix too"):
        model.attention_inputs(values, model.hidden(values, batch), batch, 1)


def test_the_policy_answers_after_its_virtual_tokens():
    model, values = build("prompt")
    batch, _ = packed(model, [9, 6], seq_len=20, pack=False)
    batch["loss_mask"] = (batch["positions"] >= 3 + 4).astype(np.float32) * (batch["segment_ids"] > 0)
    batch = {key: jnp.asarray(x) for key, x in batch.items()}
    spec = RolloutSpec(share=1.0, max_new_tokens=5, temperature=0.0)
    rollout = make_rollout(model, spec, seq_len=20, stop_tokens=(), vocab_size=90)
    out = rollout(values, batch, jax.random.key(0))
    prompts = np.asarray(batch["tokens"])[:, 3:7].tolist()
    generate = make_generate(model, spec.sampling(()), 90)
    answers = generate_batches(generate, values, prompts, jax.random.key(0), batch_size=2, bucket=8)
    np.testing.assert_array_equal(out["tokens"][:, :7], batch["tokens"][:, :7])
    np.testing.assert_array_equal(out["tokens"][:, 7:12], [answer.tokens for answer in answers])
    np.testing.assert_array_equal(out["virtual"], batch["virtual"])
    np.testing.assert_array_equal(out["segment_ids"].sum(axis=1), 12)
    np.testing.assert_array_equal(out["loss_mask"][:, 7:12], 1)
