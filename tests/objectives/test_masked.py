"""Masked tokens: which are chosen and what becomes of them, the same however a batch is cut, and what is refused."""

import dataclasses
import functools
from pathlib import Path

import goldens
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import runs
import text_cases
from contexts import context
from encoders import CONFIG, MASK, TOKENIZER
from test_train import close

from research import loading, objectives, params, train
from research.devices import sharding
from research.errors import InputError
from research.evals.perplexity import make_perplexity
from research.models.transformer import make_model
from research.objectives import masked
from research.objectives.masked import Noise
from research.objectives.types import Forward
from research.ops.words import word_starts
from research.sources.tokenizers import TokenizerSpec, make_tokenizer
from research.sources.words import ordinary_tokens, word_tables

ROWS, LENGTH = 8, 32
BERT = Path(goldens.__file__).parent / "golden/hf_tiny/bert_mlm"
MODEL = make_model(CONFIG)
INITIAL = params.init(MODEL.specs, jax.random.key(0))
WORDS = "the quick brown fox, jumps over a lazy dog's naïve tail in 1999 — (日本) or so"


def make_batch(tokenizer=TOKENIZER, rows=ROWS, length=LENGTH, seed=0, text=WORDS):
    """Rows of packed documents, each with what ends it, some with padding. The second half of the last row
    isn't supervised."""
    rng = np.random.default_rng(seed)
    batch = {name: np.zeros((rows, length), np.int32) for name in ("tokens", "segment_ids", "positions")}
    for row in range(rows):
        start, segment, stop = 0, 1, length - row % 3 * 4
        while stop - start > 3:
            words = rng.choice(text.split(), 20)
            ids = [*tokenizer.encode(" ".join(words))[: rng.integers(1, 14)], tokenizer.eos][: stop - start]
            place = slice(start, start + len(ids))
            batch["tokens"][row, place], batch["segment_ids"][row, place] = ids, segment
            batch["positions"][row, place] = np.arange(len(ids))
            start, segment = start + len(ids), segment + 1
    batch["loss_mask"] = (batch["segment_ids"] > 0).astype(np.float32)
    batch["loss_mask"][-1, length // 2 :] = 0
    return jax.tree.map(jnp.asarray, batch)


def make_noise(share=0.15, mask=0.8, random=0.1, tokenizer=TOKENIZER, whole_word=False):
    tables = word_tables(tokenizer) if whole_word else None
    return Noise(share, mask, random, tokenizer.special("<|mask|>"), ordinary_tokens(tokenizer), tables)


def keys_of(rows=ROWS, seed=0):
    return jax.random.split(jax.random.key(seed), rows)


def places(choice):
    """[B, T] bool: the chosen."""
    chosen = np.zeros(choice.tokens.shape, bool)
    for row, (at, weights) in enumerate(zip(choice.at, choice.weights, strict=True)):
        chosen[row, np.asarray(at)[np.asarray(weights) == 1]] = True
    return chosen


@functools.cache
def chosen(share=0.15, seeds=60, whole_word=False):
    """(batch, choices of many keys)."""
    batch, choose = make_batch(), jax.jit(make_noise(share, whole_word=whole_word).choose)
    return batch, [choose(batch, keys_of(seed=seed)) for seed in range(seeds)]


def candidates_of(batch):
    tokens = np.asarray(batch["tokens"])
    return (np.asarray(batch["loss_mask"]) > 0) & (np.asarray(batch["segment_ids"]) > 0) & (tokens < 256)


@pytest.mark.parametrize("share", [0.15, 0.5, 1.0])
def test_so_many_are_chosen_of_each_row_and_none_that_is_special_or_padding(share):
    batch, choices = chosen(share, 5)
    can = candidates_of(batch)
    assert (can.sum(axis=1) < LENGTH).all()
    for choice in choices:
        np.testing.assert_array_equal(choice.candidates, can)
        picked = places(choice)
        assert not (picked & ~can).any()
        np.testing.assert_array_equal(picked.sum(axis=1), np.maximum(1, np.round(share * can.sum(axis=1))))
        np.testing.assert_array_equal(np.asarray(choice.tokens)[~picked], np.asarray(batch["tokens"])[~picked])
        assert (np.diff(np.asarray(choice.at), axis=1) > 0).all()
        assert choice.at.shape[1] == min(LENGTH, int(np.ceil(share * LENGTH)))


def test_shares_are_of_the_chosen_and_each_candidate_is_as_likely():
    batch, choices = chosen(0.5)
    before, can = np.asarray(batch["tokens"]), candidates_of(batch)
    after, picked = (np.stack(x) for x in zip(*((np.asarray(c.tokens), places(c)) for c in choices), strict=True))
    before = np.broadcast_to(before, after.shape)
    count = picked.sum()
    hidden, same = (after == MASK) & picked, (after == before) & picked
    others = picked & ~hidden & ~same
    assert abs(hidden.sum() / count - 0.8) < 0.02
    assert abs(others.sum() / count - 0.1) < 0.015
    assert abs(same.sum() / count - 0.1) < 0.015
    assert (after[others] < 256).all()  # ordinary tokens
    assert len(np.unique(after[others])) > 100
    wanted = np.round(0.5 * can.sum(axis=1)) / can.sum(axis=1)
    frequency = picked.mean(axis=0)
    spread = np.sqrt(0.25 / len(choices))
    assert (np.abs(frequency - wanted[:, None])[can] < 5 * spread).all()


def test_statistics_are_those_of_the_collator_of_transformers():
    case = goldens.load("masked")["mlm_stats"]
    special, mask = case.hparams["special_ids"], case.hparams["mask_id"]
    ordinary = np.ones(case.hparams["vocab"], bool)
    ordinary[special] = False
    options = [case.hparams[name] for name in ("mlm_probability", "mask_replace_prob", "random_replace_prob")]
    tokens = np.tile(case.inputs["sample_in"], (100, 1)).astype(np.int32)
    batch = {"tokens": tokens, "segment_ids": np.ones_like(tokens), "loss_mask": np.ones(tokens.shape, np.float32)}
    choice = jax.jit(Noise(*options, mask, ordinary, None).choose)(batch, keys_of(len(tokens)))
    picked, after = places(choice), np.asarray(choice.tokens)
    theirs = case.outputs
    assert picked[np.isin(tokens, special)].sum() == theirs["frac_special_selected"] == 0
    ours = {
        "frac_selected": picked[~np.isin(tokens, special)].mean(),
        "frac_mask": (after == mask)[picked].mean(),
        "frac_kept": (after == tokens)[picked].mean(),
        "frac_random": ((after != mask) & (after != tokens))[picked].mean(),
    }
    for name, value in ours.items():
        assert value == pytest.approx(theirs[name], abs=0.02), name
    labels, sample = case.inputs["sample_labels"], case.inputs["sample_in"]
    np.testing.assert_array_equal(labels[labels >= 0], sample[labels >= 0])  # the targets are the tokens themselves


def one_by_one(sizes, wanted, most):
    """The loop of google-research/bert, create_pretraining_data.py: which words are taken, of these sizes in order."""
    wanted = sizes[0] if wanted < sizes[0] <= most else wanted
    taken, count = [], 0
    for size in sizes:
        taken.append(count + size <= wanted)
        count += size * taken[-1]
    return taken


def test_words_fill_up_what_is_to_be_chosen_as_one_after_the_other_would():
    rng, fill, short = np.random.default_rng(0), jax.jit(masked._fill, static_argnums=3), 0
    for _ in range(200):
        sizes = rng.choice([1, 1, 2, 3, 4, 5, 8], 64)
        ends = np.cumsum(sizes)
        sizes, count = sizes[ends <= 56], int(ends[ends <= 56][-1])
        starts = np.ones(64, bool)
        starts[:count] = False
        starts[np.concatenate([[0], np.cumsum(sizes)[:-1]])] = True
        wanted = int(rng.integers(1, 14))
        taken = np.asarray(fill(starts, np.arange(64) < count, np.int32(wanted), 16))
        expected = np.repeat(one_by_one(sizes, wanted, 16), sizes)
        assert not taken[count:].any()
        short += expected.sum() - taken.sum()
        assert not (taken[:count] & ~expected).any()  # the last rounds may be left out
    assert short < 20


@pytest.mark.parametrize("kind", ["byte", "gpt2", "word piece"])
def test_whole_words_are_chosen_together(kind, tmp_path):
    tokenizer = TOKENIZER
    if kind != "byte":
        tokenizer = text_cases.make_folder(tmp_path, kind).with_tokens(["<|mask|>"])
    batch = make_batch(tokenizer, text="the unbelievable Catamarans naïvely Parisian's 12345.678 한국어 overturning 🎉")
    noise = make_noise(0.4, tokenizer=tokenizer, whole_word=True)
    starts = np.asarray(word_starts(noise.words, batch["tokens"], batch["segment_ids"]))
    choose, several = jax.jit(noise.choose), 0
    for seed in range(10):
        choice = choose(batch, keys_of(seed=seed))
        picked, can = places(choice), np.asarray(choice.candidates)
        assert not (picked & ~can).any()
        inside = ~starts & can & np.roll(can, 1, axis=1)
        np.testing.assert_array_equal(picked[inside], np.roll(picked, 1, axis=1)[inside])
        several += (picked & inside).sum()
        wanted = np.round(0.4 * can.sum(axis=1))
        assert (picked.sum(axis=1) >= 1).all()
        assert 0.8 < picked.sum() / wanted.sum() <= 1.1
    assert several > 10


@pytest.mark.parametrize("whole_word", [False, True])
def test_a_document_of_one_token(whole_word):
    tokens = np.full((3, 8), TOKENIZER.eos, np.int32)
    tokens[0, 0] = tokens[1, 1] = 65
    segments = np.array([[1, 2, 0, 0, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0, 0, 0], [1, 1, 2, 0, 0, 0, 0, 0]], np.int32)
    batch = {"tokens": tokens, "segment_ids": segments, "loss_mask": np.ones((3, 8), np.float32)}
    choice = jax.jit(make_noise(whole_word=whole_word, mask=1.0, random=0.0).choose)(batch, keys_of(3))
    assert np.argwhere(places(choice)).tolist() == [[0, 0], [1, 1]]
    assert np.asarray(choice.tokens)[[0, 1], [0, 1]].tolist() == [MASK, MASK]


def forward_of(batch, model=MODEL, values=INITIAL):
    return Forward({"policy": model}, {"policy": values}, batch)


def test_the_loss_is_that_of_the_chosen_alone_and_reads_the_noise():
    batch, objective = make_batch(), masked.make(0.3, tokenizer=TOKENIZER)
    given = context(batch, key=jax.random.key(3))
    out = jax.jit(lambda values: objective.loss(forward_of(batch, values=values), batch, given))(INITIAL)
    choice = jax.jit(make_noise(0.3).choose)(batch, given.row_keys())
    picked = places(choice)
    of = lambda values, batch: MODEL.unembed(values).logits(MODEL.hidden(values, batch))  # noqa: E731
    logits = jax.jit(of)(INITIAL, {**batch, "tokens": choice.tokens})
    log_p = np.asarray(jax.nn.log_softmax(logits))
    targets = np.asarray(batch["tokens"])
    nll = -np.take_along_axis(log_p, targets[:, :, None], axis=2)[:, :, 0]
    np.testing.assert_allclose(out.loss_sum, nll[picked].sum(), rtol=1e-5)
    assert float(out.weight) == picked.sum()
    sums = {name: [float(x) for x in pair] for name, pair in out.metrics.items()}
    assert sums["accuracy"][0] == (np.asarray(logits).argmax(axis=2) == targets)[picked].sum()
    assert sums["chosen"] == [picked.sum(), candidates_of(batch).sum()]
    values, weights = out.per_token
    np.testing.assert_array_equal(weights, picked)
    np.testing.assert_allclose(np.asarray(values)[picked], nll[picked], rtol=1e-5)


OBJECTIVE = {"terms": {"masked": {"share": 0.3, "whole_word": True}}}


@functools.cache
def terms():
    return objectives.load(OBJECTIVE, TOKENIZER)


def run_steps(microbatches=1, mesh=None, count=2, state=None):
    """Parameters and metrics after some steps; each reads another batch and draws anew."""
    optimizer = optax.sgd(0.1)
    step = train.TrainStep(terms(), {"policy": MODEL}, optimizer, lambda t: jnp.asarray(0.1), microbatches)
    values = {"policy": INITIAL}
    if mesh is not None:
        values = jax.device_put(values, params.shardings({"policy": MODEL.specs}, mesh))
    state = state or train.init_state(values, optimizer, jax.random.PRNGKey(1))
    step, metrics = jax.jit(step), []
    while int(state.step) < count:
        batch = make_batch(seed=int(state.step))
        if mesh is not None:
            batch = jax.device_put(batch, sharding.named(mesh, ("batch", "time")))
        state, more = step(state, {}, batch)
        metrics.append({name: float(total) for name, (total, _) in more.items()})
    return state, metrics


@functools.cache
def whole():
    return run_steps()


def assert_same(one, two):
    for a, b in zip(one[1], two[1], strict=True):
        assert a["chosen"] == b["chosen"]  # a count of tokens
        assert a["nll"] == pytest.approx(b["nll"], rel=1e-5)
    close(one[0].params, two[0].params, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("microbatches", [2, 4])
def test_microbatches_change_nothing(microbatches):
    assert_same(run_steps(microbatches), whole())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "microbatches"), [({"data": 2, "fsdp": 2, "tensor": 2}, 1), ({"data": 2, "sequence": 4}, 2)]
)
def test_nor_does_a_mesh(mesh, microbatches):
    mesh = sharding.make_mesh(mesh)
    with jax.set_mesh(mesh):
        sharded = run_steps(microbatches, mesh)
    assert_same(sharded, whole())


@pytest.mark.slow
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    first, _ = run_steps(count=1)
    restored = runs.restored(first, tmp_path)
    jax.tree.map(np.testing.assert_array_equal, run_steps(state=restored)[0], whole()[0])


def test_each_step_and_row_has_draws_of_its_own():
    batch, choose = jax.tree.map(lambda x: jnp.broadcast_to(x[:1], x.shape), make_batch()), jax.jit(make_noise().choose)
    first, second = (places(choose(batch, context(batch, key=jax.random.key(i)).row_keys())) for i in range(2))
    assert len({row.tobytes() for row in np.concatenate([first, second])}) > ROWS


def test_evaluations_choose_the_same_each_time_and_for_any_size_of_batches():
    batch = jax.tree.map(np.asarray, make_batch(rows=12))
    step = jax.jit(train.EvalStep(terms(), {"policy": MODEL}))

    def evaluate(size):
        batches = [jax.tree.map(lambda x: x[i : i + size], batch) for i in range(0, 12, size)]  # noqa: B023
        measure = make_perplexity(
            step, batches, TOKENIZER.token_bytes(), use_loss_mask=True, put=jax.device_put, with_bytes=False
        )
        return measure({"policy": INITIAL}, {})

    one, two, again = evaluate(4), evaluate(6), evaluate(4)
    assert one == again
    assert one.keys() == {"nll", "accuracy", "chosen", "loss", "perplexity"}
    assert one == pytest.approx(two, rel=1e-5)
    assert one["perplexity"] == pytest.approx(np.exp(one["nll"]))


def test_the_loss_of_bert():
    given, theirs = goldens.load("masked")["bert_mlm"].inputs, goldens.load("masked")["bert_mlm"].outputs["loss"]
    logits = goldens.load("checkpoints")["hf_tiny/bert_mlm"].outputs["logits"]
    labels, seen = given["labels"], given["attention_mask"] == 1
    log_p = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), np.maximum(labels, 0)[:, :, None], axis=2)[
        :, :, 0
    ]
    assert -log_p[labels >= 0].mean() == pytest.approx(theirs, rel=1e-5)
    wanted = (labels >= 0) & seen  # one label of theirs is at padding
    numbers = np.arange(labels.shape[1], dtype=np.int32)
    at = np.sort(np.where(wanted, numbers, labels.shape[1] + numbers))
    batch = {
        "tokens": given["input_ids"],
        "segment_ids": seen,
        "positions": np.broadcast_to(numbers, labels.shape),
        "token_types": given["token_type_ids"],
    }
    batch = jax.tree.map(lambda x: jnp.asarray(x, jnp.int32), batch)
    loaded = loading.load_model(str(BERT), check=None, needs_tokenizer=False)
    forward = forward_of(batch, loaded.model, loaded.params)
    weights = jnp.asarray(at < labels.shape[1], jnp.float32)
    out = masked.loss_at(forward, jnp.asarray(labels, jnp.int32), jnp.asarray(at), weights)
    assert float(out.weight_sum) == wanted.sum() == (labels >= 0).sum() - 1
    assert float(out.loss_sum) == pytest.approx(
        theirs * (labels >= 0).sum() + log_p[(labels >= 0) & ~seen].sum(), rel=1e-5
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share": 0.0}, "objective.terms.masked.share = 0.0: must be in (0, 1]"),
        (
            {"mask": 0, "random": 0},
            "objective.terms.masked.mask = 0: with random = 0 every chosen token stays as it is",
        ),
        ({"share": 15}, "objective.terms.masked.share = 15: must be in (0, 1]"),
        ({"mask": 0.8, "random": 0.3}, "objective.terms.masked.random = 0.3: with mask = 0.8"),
        ({"whole_word": "yes"}, "objective.terms.masked.whole_word = 'yes': must be of type bool, and is str."),
        ({"whole_words": True}, "objective.terms.masked.whole_words: no such option. Did you mean 'whole_word'"),
    ],
)
def test_options_that_cannot_work(options, message):
    with pytest.raises(InputError) as error:
        objectives.load({"terms": {"masked": options}}, TOKENIZER)
    assert str(error.value).startswith(message)


def test_a_causal_model_and_a_tokenizer_without_a_mask_are_refused():
    batch = make_batch()
    causal = make_model(dataclasses.replace(CONFIG, causal=True))
    with pytest.raises(InputError, match=r"model\.causal = True: a masked token"):
        masked.make(tokenizer=TOKENIZER).loss(forward_of(batch, causal), batch, context(batch))
    bare = make_tokenizer(TokenizerSpec("byte"), lambda: iter(()))
    with pytest.raises(InputError, match=r"no <\|mask\|>"):
        masked.make(tokenizer=bare)
    assert masked.special_tokens(bare) == ("<|mask|>",)
