import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research import params as params_lib
from research.devices import sharding
from research.errors import InputError
from research.models import sampling
from research.models import slots as slots_lib
from research.models.config import ModelConfig
from research.models.generation import generate_batches, make_generate, make_stream, pad_prompts
from research.models.sampling import SamplingConfig
from research.models.transformer import make_model

TINY = ModelConfig(
    vocab_size=48, num_layers=2, d_model=32, num_heads=4, num_kv_heads=2, d_ff=48, max_length=64, init_std=0.3
)
PROMPTS = [[5, 9, 2, 40, 7], [11], [3, 3, 8, 21, 30, 1, 17, 6, 12], [40, 2]]


def _model(**changes):
    model = make_model(dataclasses.replace(TINY, **changes))
    return model, params_lib.init(model.specs, jax.random.key(1))


@pytest.fixture(scope="module")
def tiny():
    return _model(num_layers=1)


def _logits(model, params, documents, prompts=PROMPTS):
    """Of all positions, with no cache: [B, T, V], T the greatest length. What comes after a document means nothing."""
    rows = np.zeros((len(documents), max(map(len, documents))), np.int32)
    for row, ids in zip(rows, documents, strict=True):
        row[: len(ids)] = ids
    positions = np.broadcast_to(np.arange(rows.shape[1], dtype=np.int32), rows.shape)
    batch = {"tokens": rows, "segment_ids": np.ones_like(rows), "positions": positions}
    batch["prefix"] = (positions < [[len(prompt)] for prompt in prompts]).astype(np.int32)  # of a prefix LM alone

    @jax.jit
    def forward(params):
        head = model.unembed(params)
        logits = jnp.einsum("btd,dv->btv", model.hidden(params, batch), head.kernel)
        return head.softcap * jnp.tanh(logits / head.softcap) if head.softcap else logits

    return np.asarray(forward(params))


def _completions(model, params, config, prompts=PROMPTS, seed=0, **kwargs):
    generate = make_generate(model, config)
    key = jax.random.key(seed)
    return generate_batches(generate, params, prompts, key, batch_size=len(prompts), bucket=8, **kwargs)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"sliding_window": (4, 0), "attention_softcap": 2.0, "logit_softcap": 3.0, "tie_embeddings": False},
        {"norm": "layernorm", "mlp": "gelu", "qk_norm": "head", "embed_scale": True, "attention_bias": True},
        {"prefix": True},
        {"prefix": True, "sliding_window": (4, 0)},
    ],
)
def test_greedy_is_the_argmax_of_full_forward_passes(changes):
    model, params = _model(**changes)
    completions = _completions(model, params, SamplingConfig(max_new_tokens=12))
    documents = [prompt + completion.tokens for prompt, completion in zip(PROMPTS, completions, strict=True)]
    # Every token is to follow from those before it, so that one pass over all of them judges each.
    logits = _logits(model, params, documents)
    for prompt, completion, row in zip(PROMPTS, completions, logits, strict=True):
        row = row[len(prompt) - 1 :][:12]
        assert np.argmax(row, axis=1).tolist() == completion.tokens
        logprobs = np.asarray(jax.nn.log_softmax(row))[np.arange(12), completion.tokens]
        np.testing.assert_allclose(completion.logprobs, logprobs, atol=1e-4)


def test_a_row_depends_on_the_key_and_on_no_other_row(tiny):
    model, params = tiny
    generate = make_generate(model, SamplingConfig(max_new_tokens=10, temperature=1.0, top_p=0.9))

    def tokens(seed, batch_size, bucket):
        key = jax.random.key(seed)
        made = generate_batches(generate, params, PROMPTS, key, batch_size=batch_size, bucket=bucket)
        return [completion.tokens for completion in made]

    assert tokens(0, 1, 16) == tokens(0, 3, 8) == tokens(0, 3, 8)
    assert tokens(0, 3, 8) != tokens(1, 3, 8)


def test_top_k_of_one_is_greedy(tiny):
    greedy, top_one = (
        _completions(*tiny, SamplingConfig(max_new_tokens=8, **kwargs))
        for kwargs in ({}, {"temperature": 1.5, "top_k": 1})
    )
    assert [c.tokens for c in greedy] == [c.tokens for c in top_one]


def test_a_stop_token_ends_its_row_and_counts(tiny):
    free = _completions(*tiny, SamplingConfig(max_new_tokens=12))
    stop = free[2].tokens[4]
    model, params = tiny
    prompts, lengths = pad_prompts(PROMPTS)
    generate = make_generate(model, SamplingConfig(max_new_tokens=12, stop_tokens=(stop, 47)))
    out = generate(params, prompts, lengths, jax.random.key(0))
    for row, completion in enumerate(free):
        ends = [i for i, token in enumerate(completion.tokens) if token in (stop, 47)]
        n = ends[0] + 1 if ends else 12
        assert out.lengths[row] == n
        assert out.tokens[row, :n].tolist() == completion.tokens[:n]
        assert not np.any(out.tokens[row, n:])
        assert not np.any(out.logprobs[row, n:])
    assert out.lengths[2] <= 5


@pytest.mark.parametrize(("slots", "passes"), [(None, 1), (2, 5), (6, 1)])
def test_decoding_ends_when_all_rows_have(tiny, slots, passes):
    """A row that only fills the batch doesn't keep it going either. `passes` are those through the model."""
    model, params = tiny
    seen = []

    def decode(params, tokens, *args):
        jax.debug.callback(lambda: seen.append(tokens.shape))
        return model.decode(params, tokens, *args)

    config = SamplingConfig(max_new_tokens=20, stop_tokens=tuple(range(48)))
    generate = make_generate(model._replace(decode=decode), config)
    lengths = np.array([3, 0, 1, 8, 2, 2], np.int32)
    out = generate(params, np.ones((6, 8), np.int32), lengths, jax.random.key(0), slots=slots)
    assert out.lengths.tolist() == [1, 0, 1, 1, 1, 1]
    jax.effects_barrier()
    assert len(seen) == passes


def test_a_prompt_is_shown_whole_to_a_prefix_lm():
    """Its answers are others than those of the causal model with the same parameters, but after one token."""
    (model, params), (causal, _) = _model(prefix=True), _model()
    whole, left = (_completions(m, params, SamplingConfig(max_new_tokens=4)) for m in (model, causal))
    differ = [not np.allclose(a.logprobs[0], b.logprobs[0], atol=1e-3) for a, b in zip(whole, left, strict=True)]
    assert differ == [len(prompt) > 1 for prompt in PROMPTS]


@pytest.mark.parametrize(
    ("changes", "temperature"),
    [
        ({"sliding_window": (4, 0)}, 0.0),
        ({"positions": "learned", "mlp": "gelu"}, 1.0),
        ({"prefix": True, "sliding_window": (4, 0)}, 0.0),
    ],
)
def test_rows_that_take_turns_get_the_same(changes, temperature, monkeypatch):
    """Prompts of several pieces, two slots refilled together, a cache that is shifted, a row without a prompt."""
    monkeypatch.setattr(slots_lib, "_PIECE", 4)
    monkeypatch.setattr(slots_lib, "_SLACK", 3)
    monkeypatch.setattr(slots_lib, "_GROUPS", 2)
    model, params = _model(**changes)
    rng = np.random.default_rng(0)
    prompts, lengths = pad_prompts(
        [rng.integers(0, 48, n).tolist() for n in (5, 1, 9, 2, 15, 3, 7, 1, 12, 11, 6, 1)], bucket=15
    )
    lengths[7] = 0
    limits = np.array([99, 3, 99, 1, 5, 99, 99, 99, 7, 99, 0, 99], np.int32)
    generate = make_generate(model, SamplingConfig(12, temperature=temperature, stop_tokens=(7, 11, 21, 35)))
    key, rows = jax.random.key(0), np.arange(20, 32, dtype=np.int32)
    alone = jax.device_get(generate(params, prompts, lengths, key, rows))
    turns = jax.device_get(generate(params, prompts, lengths, key, rows, limits, slots=3))
    assert len(set(alone.lengths.tolist())) > 3
    np.testing.assert_array_equal(turns.lengths, np.minimum(alone.lengths, limits))
    kept = np.arange(12) < turns.lengths[:, None]
    np.testing.assert_array_equal(turns.tokens, np.where(kept, alone.tokens, 0))
    np.testing.assert_allclose(turns.logprobs, np.where(kept, alone.logprobs, 0), atol=1e-4)


@pytest.mark.parametrize("slots", [None, pytest.param(3, marks=pytest.mark.slow)])
def test_a_prompt_that_is_read_once_is_continued_as_one_read_for_each_row(tiny, slots):
    model, params = tiny
    prompts, lengths = pad_prompts(PROMPTS[:3])
    lengths[1] = 0
    rows, limits = np.arange(20, 26, dtype=np.int32), np.array([9, 4, 9, 9, 0, 9], np.int32)
    generate = make_generate(model, SamplingConfig(max_new_tokens=9, temperature=1.0), of_draws=True)
    args = (jax.random.key(0), rows, limits)
    repeated = generate(params, np.repeat(prompts, 2, axis=0), np.repeat(lengths, 2), *args, slots=slots)
    once = generate(params, prompts, lengths, *args, slots=slots, each=2)
    assert once.lengths.tolist() == [9, 4, 0, 0, 0, 9]
    np.testing.assert_array_equal(once.lengths, repeated.lengths)
    np.testing.assert_array_equal(once.tokens, repeated.tokens)
    np.testing.assert_allclose(once.logprobs, repeated.logprobs, atol=1e-5)
    assert once.tokens[0].tolist() != once.tokens[1].tolist()


def test_other_prompts_of_the_same_sizes_compile_nothing(tiny):
    model, params = tiny
    generate = make_generate(model, SamplingConfig(max_new_tokens=4, stop_tokens=(3,)))
    counts = []
    for lengths in ((8, 1, 3, 2, 2), (1, 2, 7, 3, 1, 4, 5, 2)):
        prompts = [[1] * n for n in lengths]
        generate_batches(generate, params, prompts, jax.random.key(0), batch_size=2, bucket=8)
        counts.append(generate._cache_size())
    assert counts == [1, 1]
    assert generate_batches(generate, params, [], jax.random.key(0), batch_size=2) == []


def test_padded_ids_are_never_chosen(tiny):
    model, params = tiny
    likeliest = {token for c in _completions(model, params, SamplingConfig(40)) for token in c.tokens}
    vocab_size = max(likeliest)  # the greatest id that is chosen freely is out
    prompts = [[i % vocab_size for i in prompt] for prompt in PROMPTS]
    for config in (SamplingConfig(40), SamplingConfig(40, temperature=3.0, top_k=48)):
        generate = make_generate(model, config, vocab_size)
        out = generate(params, *pad_prompts(prompts, longest=24), jax.random.key(0))
        assert np.max(out.tokens) < vocab_size
        assert np.all(np.isfinite(out.logprobs))


def _reference(logits, c):
    """Probabilities of each token by the definitions, one filter after the other."""
    p = np.exp(logits / c.temperature - np.max(logits / c.temperature))
    order = sorted(range(len(p)), key=lambda i: (-p[i], i))
    if c.top_k:
        p[order[c.top_k :]] = 0
    p /= p.sum()
    total = 0.0
    for i in order:
        if total >= c.top_p:
            p[i] = 0
        total += p[i]
    p[p < c.min_p * p.max()] = 0
    return p / p.sum()


@pytest.mark.parametrize(
    "config",
    [
        SamplingConfig(temperature=0.7),
        SamplingConfig(temperature=2.0, top_k=5),
        SamplingConfig(temperature=1.0, top_k=1000),
        SamplingConfig(temperature=1.3, top_p=0.6),
        SamplingConfig(temperature=0.8, min_p=0.2),
        SamplingConfig(temperature=0.8, min_p=1.0),
        SamplingConfig(temperature=0.8, top_p=1e-6),
        SamplingConfig(temperature=2.0, top_p=0.97),
        SamplingConfig(temperature=1.5, top_k=10, top_p=0.8, min_p=0.15),
    ],
)
def test_filters_leave_the_reference_distribution(config):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(4, 30)).astype(np.float32) * 2
    logits[3] = np.round(logits[3])  # equal probabilities, at the borders too
    kept, ids = jax.device_get(sampling.filter_logits(jnp.asarray(logits), config))
    for row in range(4):
        p = np.zeros(30)
        p[ids[row]] = jax.nn.softmax(kept[row])
        np.testing.assert_allclose(p, _reference(logits[row].astype(np.float64), config), atol=1e-6)


@pytest.mark.parametrize(("top_p", "enough"), [(0.5, True), (0.97, False)])
def test_a_nucleus_of_few_candidates_is_that_of_all(top_p, enough, monkeypatch):
    logits = jnp.asarray(np.random.default_rng(1).normal(size=(3, 30)) * 2, jnp.float32).at[1, 5:].set(-jnp.inf)
    whole, ids = sampling.filter_logits(logits, SamplingConfig(temperature=1.0, top_p=top_p))
    monkeypatch.setattr(sampling, "CANDIDATES", 8)
    kept, candidates = sampling.filter_logits(logits, SamplingConfig(temperature=1.0, top_p=top_p))
    np.testing.assert_array_equal(kept, whole)
    left = np.isfinite(whole)
    assert (left.sum(axis=1).max() <= 8) == enough
    np.testing.assert_array_equal(np.where(left, candidates, 0), np.where(left, ids, 0))


def test_draws_follow_the_distribution(tiny):
    model, params = tiny
    n, prompt = 2000, [5, 9, 2]
    config = SamplingConfig(max_new_tokens=1, temperature=1.4, top_k=12, top_p=0.9)
    prompts, lengths = pad_prompts([prompt] * n, bucket=4)
    out = make_generate(model, config)(params, prompts, lengths, jax.random.key(3))
    frequency = np.bincount(np.ravel(out.tokens), minlength=48) / n
    expected = _reference(_logits(model, params, [prompt])[0, -1].astype(np.float64), config)
    assert np.count_nonzero(expected) > 3
    assert not np.any(frequency[expected == 0])
    np.testing.assert_allclose(frequency, expected, atol=4 * 0.5 / n**0.5)  # 4 standard deviations at most


@pytest.mark.parametrize("size", [1, 2, 7, 64, 65])
def test_draws_are_as_frequent_as_they_are_probable_and_say_so(size):
    logits = jnp.asarray(np.random.default_rng(size).normal(scale=2.0, size=size), jnp.float32)
    logits = jnp.where(jnp.arange(size) % 5 == 3, -jnp.inf, logits)
    keys = jax.random.split(jax.random.PRNGKey(0), 20_000)
    draws, log_p = jax.jit(sampling.draw)(jnp.broadcast_to(logits, (len(keys), size)), keys)
    expected = np.asarray(jax.nn.softmax(logits), np.float64)
    np.testing.assert_allclose(log_p, np.log(expected[np.asarray(draws)]), rtol=1e-5, atol=1e-6)
    share = np.bincount(draws, minlength=size) / len(keys)
    assert (share[expected == 0] == 0).all()
    assert (np.abs(share - expected) < 5 * np.sqrt(expected / len(keys)) + 1e-9).all()


def test_the_numbers_of_a_draw_are_those_of_its_key_and_place():
    keys = jax.random.split(jax.random.PRNGKey(0), 3)
    expected = [[jax.random.uniform(jax.random.fold_in(key, n), (2,)) for n in range(4)] for key in keys]
    np.testing.assert_array_equal(sampling.uniforms(keys, 4), expected)


def test_what_has_no_probability_is_not_drawn_at_the_ends_of_the_random_numbers():
    weights = jnp.array([[0.0, 1.0, 0.0, 2.0, 0.0]] * 3)
    places = sampling._inverse(weights, jnp.array([0.0, 1 / 3, 1 - 2**-23], jnp.float32))
    assert places.tolist() == [1, 3, 3]


def test_sharded_over_a_mesh_it_is_the_same():
    model, params = _model(tie_embeddings=False, vocab_size=64)
    prompts, lengths = pad_prompts(PROMPTS + PROMPTS[::-1], bucket=16)
    generate = make_generate(model, SamplingConfig(max_new_tokens=10), 60)
    alone = jax.device_get(generate(params, prompts, lengths, jax.random.key(0)))
    mesh = sharding.make_mesh({"fsdp": 4, "tensor": 2})
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, params_lib.shardings(model.specs, mesh))
        out = generate(placed, prompts, lengths, jax.random.key(0))
        odd = generate_batches(generate, placed, PROMPTS[:3], jax.random.key(0), batch_size=3, bucket=16)
        turns = generate(placed, prompts, lengths, jax.random.key(0), slots=5)
    assert out.tokens.sharding.is_fully_replicated
    for made in (out, turns):
        np.testing.assert_array_equal(made.tokens, alone.tokens)
        np.testing.assert_allclose(made.logprobs, alone.logprobs, atol=1e-4)
    assert [c.tokens for c in odd] == alone.tokens[:3].tolist()


def test_a_stream_gives_the_tokens_of_generate(tiny):
    model, params = tiny
    config = SamplingConfig(max_new_tokens=11, temperature=1.0)
    generate = make_generate(model, config)
    key = jax.random.key(5)
    stopped, whole = (
        generate_batches(generate, params, [prompt], key, batch_size=1)[0].tokens for prompt in PROMPTS[:2]
    )
    stop = next(token for token in stopped if token not in whole)
    stream = make_stream(model, dataclasses.replace(config, stop_tokens=(stop,)), chunk=4)
    unstacked = jax.jit(model.unstack)(params)
    chunks = list(stream(unstacked, PROMPTS[1], key))
    assert [len(chunk) for chunk in chunks] == [1, 4, 4, 2]
    assert [token for chunk in chunks for token in chunk] == whole
    chunks = list(stream(unstacked, PROMPTS[0], key))
    assert [token for chunk in chunks for token in chunk] == stopped[: stopped.index(stop) + 1]


def test_few_shapes_are_compiled():
    shapes = []

    def generate(params, prompts, lengths, key, rows, slots):
        assert slots == 3
        shapes.append(prompts.shape)
        n = len(prompts)
        return slots_lib.Generated(np.stack([rows] * 4, axis=1), np.full(n, 2), np.zeros((n, 4)))

    def completions(lengths, first_row=0):
        prompts, done = [[1] * n for n in lengths], []
        made = generate_batches(
            generate,
            None,
            prompts,
            None,
            batch_size=3,
            bucket=8,
            longest=30,
            numbers=range(first_row, first_row + len(prompts)),
            progress=done.append,
        )
        assert [c.tokens for c in made] == [[first_row + i] * 2 for i in range(len(prompts))]
        return done

    assert completions([30, 3, 17, 8, 9, 25, 1]) == [7]
    assert completions([4, 30, *[7] * 24], first_row=5) == [24, 26]
    assert completions([2, 16]) == [2]
    assert shapes == [(12, 30), (24, 8), (3, 30), (3, 16)]


def test_prompts_are_padded_on_the_left():
    prompts, lengths = pad_prompts([[1, 2, 3], [4]], bucket=2)
    assert prompts.tolist() == [[0, 1, 2, 3], [0, 0, 0, 4]]
    assert lengths.tolist() == [3, 1]
    assert pad_prompts([[1] * 33])[0].shape == (1, 64)
    assert pad_prompts([[1] * 33], longest=40)[0].shape == (1, 40)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_new_tokens", 0),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("min_p", 1.5),
        ("stop_tokens", (3, -1)),
    ],
)
def test_impossible_values_are_named(field, value):
    with pytest.raises(InputError, match=rf"sampling.{field} = "):
        SamplingConfig(**{field: value})


def test_what_does_not_fit_is_an_error(tiny):
    model, params = tiny
    with pytest.raises(InputError, match=r"sampling.max_new_tokens = 64: leaves no room"):
        make_generate(model, SamplingConfig(max_new_tokens=64))
    with pytest.raises(InputError, match=r"sampling.stop_tokens: 48 is not below vocab_size = 48"):
        make_generate(model, SamplingConfig(stop_tokens=(48,), max_new_tokens=8))
    with pytest.raises(InputError, match=r"vocab_size = 49: the model has 48"):
        make_generate(model, SamplingConfig(max_new_tokens=8), 49)
    generate = make_generate(model, SamplingConfig(max_new_tokens=33))
    with pytest.raises(InputError, match=r"padded to 32 tokens and sampling.max_new_tokens = 33"):
        generate(params, *pad_prompts(PROMPTS), jax.random.key(0))
    with pytest.raises(InputError, match=r"slots = 0: must be at least 1"):
        generate(params, *pad_prompts(PROMPTS, bucket=16), jax.random.key(0), slots=0)
    with pytest.raises(InputError, match=r"prompt 1: has 40 tokens, and there is room for 31"):
        generate_batches(generate, params, [[1], [1] * 40], jax.random.key(0), batch_size=2, longest=31)
    with pytest.raises(InputError, match=r"prompt 0: is empty"):
        pad_prompts([[]])
