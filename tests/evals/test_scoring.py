import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from research import params
from research.devices import sharding
from research.errors import InputError
from research.evals import scoring
from research.evals.scoring import Example
from research.models.config import ModelConfig
from research.models.generation import generate_batches, make_generate
from research.models.sampling import SamplingConfig
from research.models.transformer import make_model
from research.sources.tokenizers import TokenizerSpec, make_tokenizer

V, LONGEST = 64, 40
MODEL = make_model(
    ModelConfig(vocab_size=V, num_layers=1, d_model=16, num_heads=2, num_kv_heads=2, d_ff=16, max_length=LONGEST)
)
BYTES = make_tokenizer(TokenizerSpec("byte"), lambda: iter(()))


@pytest.fixture(scope="module")
def values():
    values = params.init(MODEL.specs, jax.random.key(0))
    return {**values, "embed": values["embed"] * 40.0}  # so that tokens differ in how likely they are


def _examples(lengths, seed=0):
    rng = np.random.default_rng(seed)
    examples = [Example(rng.integers(0, V, n).astype(np.int32), rng.random(n) < 0.6) for n in lengths]
    for _, mask in examples:
        mask[-1] = True
    return examples


def _expected(values, example):
    """By a softmax over the whole logits, one window of one example at a time."""
    tokens, mask = example
    logprobs, likeliest = {}, {}
    hidden = jax.jit(MODEL.hidden)
    for first in range(1, len(tokens), LONGEST):
        stop = min(first + LONGEST, len(tokens))
        inputs = tokens[max(0, stop - 1 - LONGEST) : stop - 1]
        batch = {
            "tokens": np.pad(inputs, (0, LONGEST - len(inputs)))[None],  # what comes after isn't seen
            "segment_ids": np.ones((1, LONGEST), np.int32),
            "positions": np.arange(LONGEST, dtype=np.int32)[None],
        }
        logits = hidden(values, batch)[0] @ MODEL.unembed(values).kernel
        whole = np.asarray(jax.nn.log_softmax(logits))[: len(inputs)]
        for t in range(first, stop):
            row = whole[t - stop]
            logprobs[t], likeliest[t] = row[tokens[t]], int(np.argmax(row)) == tokens[t]
    scored = [t for t in range(1, len(tokens)) if mask[t]]
    return np.array([logprobs[t] for t in scored]), all(likeliest[t] for t in scored)


@pytest.fixture(scope="module")
def cases(values):
    examples = _examples([3, 32, 33, 40, 41, 42, 100, 5, 5])
    best = next(t for t in range(V) if _expected(values, Example(np.array([7, t], np.int32), np.ones(2, bool)))[1])
    examples.append(Example(np.array([7, best], np.int32), np.array([True, True])))  # as greedy decoding goes on
    return examples, [_expected(values, example) for example in examples]


@pytest.mark.parametrize("batch_tokens", [1, 4096])
def test_as_a_softmax_over_all_logits_in_batches_of_any_size(values, cases, batch_tokens):
    examples, expected = cases
    done = []
    scored = scoring.make_token_scorer(MODEL, batch_tokens=batch_tokens)(values, examples, done.append)
    likelihoods = scoring.make_loglikelihood(MODEL, batch_tokens=batch_tokens)(values, examples)
    for found, likelihood, (logprobs, greedy) in zip(scored, likelihoods, expected, strict=True):
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, logprobs, atol=1e-5)
        assert likelihood.logprob == pytest.approx(logprobs.sum(), abs=1e-4)
        assert likelihood.greedy == greedy
    assert [likelihood.greedy for likelihood in likelihoods].count(True) == 1
    assert sum(done) <= sum(len(example.tokens) - 1 for example in examples)
    assert np.std(np.concatenate(scored)) > 1


def test_sharded_is_the_same(values, cases):
    examples, expected = cases
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    placed = jax.device_put(values, params.shardings(MODEL.specs, mesh, sharding.RULES))
    with jax.set_mesh(mesh):
        scored = scoring.make_token_scorer(MODEL, batch_tokens=64)(placed, examples)
        likelihoods = scoring.make_loglikelihood(MODEL, batch_tokens=64)(placed, examples)
    for found, likelihood, (logprobs, greedy) in zip(scored, likelihoods, expected, strict=True):
        np.testing.assert_allclose(found, logprobs, atol=1e-5)
        assert likelihood == (pytest.approx(logprobs.sum(), abs=1e-4), greedy)


def test_a_prefix_lm_gives_an_answer_the_log_probabilities_that_it_had_when_generated(values):
    """What stands before the first scored token is a prefix; plain text, scored whole, has none."""
    model = make_model(dataclasses.replace(MODEL.config, prefix=True))
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, V, n).tolist() for n in (5, 1, 12, 20)]
    generate = make_generate(model, SamplingConfig(max_new_tokens=8, temperature=1.0))
    answers = generate_batches(generate, values, prompts, jax.random.key(0), batch_size=2)
    whole = [np.array(prompt + answer.tokens, np.int32) for prompt, answer in zip(prompts, answers, strict=True)]
    examples = [
        Example(tokens, np.arange(len(tokens)) >= len(prompt)) for tokens, prompt in zip(whole, prompts, strict=True)
    ]
    for scored, answer in zip(scoring.make_token_scorer(model)(values, examples), answers, strict=True):
        np.testing.assert_allclose(scored, answer.logprobs, atol=1e-4)
    likelihoods = scoring.make_loglikelihood(model)(values, examples)
    np.testing.assert_allclose([x.logprob for x in likelihoods], [sum(x.logprobs) for x in answers], atol=1e-3)
    texts = [Example(tokens, np.ones(len(tokens), bool)) for tokens in whole]
    both = (scoring.make_token_scorer(one)(values, texts) for one in (model, MODEL))
    for ours, causal in zip(*both, strict=True):
        np.testing.assert_array_equal(ours, causal)


@pytest.mark.parametrize("compute", [scoring.token_logprobs, scoring.row_likelihoods])
def test_the_logits_of_a_batch_are_never_held(compute):
    big = make_model(
        ModelConfig(vocab_size=32_768, num_layers=1, d_model=16, num_heads=2, num_kv_heads=2, d_ff=16, max_length=256)
    )
    B, T = 32, 256
    batch = {
        name: jax.ShapeDtypeStruct((B, T), jnp.int32) for name in ("tokens", "segment_ids", "positions", "targets")
    }
    batch["weights"] = jax.ShapeDtypeStruct((B, T), jnp.float32)
    shapes = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, jnp.float32), big.specs)

    def sizes(jaxpr):
        for equation in jaxpr.eqns:
            yield from (math.prod(v.aval.shape) for v in equation.outvars)
            for inner in jaxprs_in_params(equation.params):
                yield from sizes(inner)

    largest = max(sizes(jax.make_jaxpr(lambda p, b: compute(big, p, b))(shapes, batch).jaxpr))
    assert 512 * 32_768 <= largest < B * T * 32_768 / 8


def test_few_shapes_are_compiled():
    rng = np.random.default_rng(0)
    lengths = {scoring.padded_length(int(n), 2048) for n in rng.integers(1, 2049, 5000)}
    assert lengths == {32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048}
    assert all(scoring.padded_length(n, 2048) >= n for n in range(1, 2049))
    assert scoring.padded_length(1000, 1000) == 1000


def test_records_become_what_training_sees():
    items = [
        ("x:1", {"text": "héy", "id": 3}),
        ("x:2", {"tokens": [5, 0, 9]}),
        ("x:3", {"prompt": "a", "response": "bc"}),
        ("x:4", {"messages": [{"role": r, "content": c} for r, c in ("u1", "a2", "u3", "a4")]}),
    ]
    for message in items[3][1]["messages"]:
        message["role"] = {"u": "user", "a": "assistant"}[message["role"]]
    text, ids, pair, chat = scoring.encode_records(items, BYTES, "plain", BYTES.size)
    assert text.tokens.tolist() == [BYTES.bos, *"héy".encode(), BYTES.eos]
    assert text.count == 5
    assert (ids.tokens.tolist(), ids.count) == ([5, 0, 9], 2)
    assert pair.tokens[pair.mask].tolist() == [*b"bc", BYTES.eos]
    assert chat.tokens[chat.mask].tolist() == [*b"2", BYTES.eos, *b"4", BYTES.eos]
    assert [e.tokens.tolist() for e in scoring.encode_records(items[1:2], None, "plain", 10)] == [[5, 0, 9]]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"tokens": [5]}, "x:7: has no token to score"),
        ({"tokens": []}, "x:7: has no token to score"),
        ({"tokens": [5, -1]}, "x:7: field 'tokens' holds -1, and the model's ids are 0 to 260"),
        ({"tokens": [5, 261]}, "x:7: field 'tokens' holds 261"),
        ({"tokens": [5, True]}, "x:7: field 'tokens' must be a list of whole numbers"),
        ({"tokens": "5 6"}, "x:7: field 'tokens' must be a list"),
        ({"tokens": [5, 6], "prompt": "a"}, "x:7: has 'tokens' and 'prompt': which"),
        ({"prompt": "a"}, "x:7: has the fields 'prompt', but needs"),
        ({"text": " "}, "x:7: field 'text' is an empty text"),
        ({"messages": [{"role": "user", "content": "a"}]}, "x:7: the conversation of 1 messages must end"),
    ],
)
def test_a_faulty_record_is_named(record, message):
    with pytest.raises(InputError, match=message):
        scoring.encode_records([("x:6", {"text": "fine"}), ("x:7", record)], BYTES, "plain", BYTES.size)


def test_text_without_a_tokenizer_and_a_tokenizer_too_large():
    with pytest.raises(InputError, match="x:1: holds text, and the model has no tokenizer"):
        scoring.encode_records([("x:1", {"text": "a"})], None, "plain", 300)
    with pytest.raises(InputError, match="x:1: has token 257, and the model's vocabulary ends at 255"):
        scoring.encode_records([("x:1", {"text": "a"})], BYTES, "plain", 256)


def test_a_continuation_has_the_tokens_of_the_whole_text():
    bpe = make_tokenizer(
        TokenizerSpec("bpe", vocab_size=300), lambda: iter(["the answer is: yes", "an answer there: no"] * 50)
    )
    example = scoring.encode_pair(bpe, "the answer is:  ", " no")
    whole = bpe.encode("the answer is:   no")
    given = len(bpe.encode("the answer is:"))
    assert example.tokens.tolist() == [bpe.bos, *whole]
    assert example.tokens[example.mask].tolist() == whole[given:]
    assert bpe.decode(whole[given:]) == "   no"
    empty = scoring.encode_pair(bpe, "", " no")
    assert empty.tokens.tolist() == [bpe.bos, *bpe.encode(" no")]
    assert empty.mask.tolist() == [False] + [True] * (len(empty.tokens) - 1)
    with pytest.raises(InputError, match="has no tokens of its own"):
        scoring.encode_pair(bpe, "the", "")


def test_a_long_context_loses_its_beginning():
    long = Example(np.arange(10, dtype=np.int32), np.arange(10) >= 7)
    assert scoring.keep_end(long, 9) is not None
    assert scoring.keep_end(long, 9).tokens.tolist() == list(range(10))
    assert scoring.keep_end(long, 5).tokens.tolist() == [4, 5, 6, 7, 8, 9]
    kept = scoring.keep_end(long, 2)  # what is scored stays whole, after one token at least
    assert kept.tokens.tolist() == [6, 7, 8, 9]
    assert kept.count == 3


def test_standard_errors():
    values = np.array([0.0, 1.0, 1.0, 0.0, 1.0])
    mean, error = scoring.ratio_of_sums(values, np.ones(5))
    assert (mean, error) == (pytest.approx(0.6), pytest.approx(np.std(values, ddof=1) / math.sqrt(5)))
    assert scoring.ratio_of_sums(np.array([3.0]), np.array([2.0])) == (1.5, None)
    rng = np.random.default_rng(0)
    weights = rng.integers(5, 50, (4000, 60)).astype(float)
    sums = weights * rng.normal(2, 0.5, weights.shape)
    found = [scoring.ratio_of_sums(s, w) for s, w in zip(sums, weights, strict=True)]
    assert np.mean([e for _, e in found]) == pytest.approx(np.std([v for v, _ in found]), rel=0.05)
