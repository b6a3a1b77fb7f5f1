import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research import objectives, params, train
from research.errors import InputError
from research.evals.perplexity import make_perplexity, make_record_perplexity
from research.models.config import ModelConfig
from research.models.transformer import make_model
from research.sources.tokenizers import TokenizerSpec, make_tokenizer

V = 32
MODEL = make_model(ModelConfig(vocab_size=V, num_layers=1, d_model=8, num_heads=2, num_kv_heads=2, d_ff=8))
TOKEN_BYTES = np.arange(V, dtype=np.int32) % 5  # some stand for nothing
BATCHES = [
    {
        "tokens": np.array([[1, 2, 3, 4, 9, 7], [6, 7, 8, 9, 10, 11]], np.int32),
        "segment_ids": np.array([[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 1, 1]], np.int32),
        "positions": np.array([[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]], np.int32),
        "loss_mask": np.array([[0, 0, 1, 0, 1, 0], [0, 0, 0, 0, 0, 1]], np.float32),
    },
    {
        "tokens": np.array([[5, 12, 13, 14, 3, 8], [0, 0, 0, 0, 0, 0]], np.int32),
        "segment_ids": np.array([[1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]], np.int32),
        "positions": np.array([[0, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]], np.int32),
        "loss_mask": np.array([[1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]], np.float32),
    },
]
# The targets in these batches: those that follow a token of their document; of these, those in the mask.
TARGETS = {False: [2, 3, 9, 7, 8, 9, 10, 11, 12], True: [3, 9, 11, 12]}


def _eval_step(terms, model=MODEL):
    return jax.jit(train.EvalStep(objectives.load({"terms": terms}), {"policy": model}))


def _log_probs(model):
    """(parameters, batch) -> [B, T, V] of a model, compiled."""
    return jax.jit(lambda p, batch: jax.nn.log_softmax(model.hidden(p, batch) @ model.unembed(p).kernel))


@pytest.mark.parametrize(("objective", "masked"), [("next_token", False), ("sft", True)])
def test_sums_over_all_batches(objective, masked):
    values = {"policy": params.init(MODEL.specs, jax.random.key(0))}
    # A head that is large, so that tokens differ in how likely they are.
    values["policy"]["embed"] *= 50.0
    evaluate = make_perplexity(
        _eval_step({objective: 1.0}), BATCHES, TOKEN_BYTES, use_loss_mask=masked, put=jax.device_put
    )
    result = evaluate(values, {})

    log_probs, nll = _log_probs(MODEL), []
    for batch in BATCHES:
        logprobs = np.asarray(log_probs(values["policy"], batch))
        for row, t in np.ndindex(2, 5):
            same = batch["segment_ids"][row, t] == batch["segment_ids"][row, t + 1] > 0
            if same and (batch["loss_mask"][row, t + 1] or not masked):
                nll.append(-logprobs[row, t, batch["tokens"][row, t + 1]])
    assert len(nll) == len(TARGETS[masked])
    assert np.std(nll) > 0.1
    assert result["loss"] == pytest.approx(np.mean(nll), rel=1e-5)
    assert result["nll"] == pytest.approx(np.mean(nll), rel=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(np.mean(nll)), rel=1e-5)
    text_bytes = TOKEN_BYTES[TARGETS[masked]].sum()
    assert result["bits_per_byte"] == pytest.approx(sum(nll) / math.log(2) / text_bytes, rel=1e-5)
    assert 0 <= result["accuracy"] <= 1


def test_several_terms_have_a_perplexity_each():
    values = {"policy": jax.tree.map(jnp.zeros_like, params.init(MODEL.specs, jax.random.key(0)))}
    step = _eval_step({"next_token": 0.5, "sft": 2.0})
    result = make_perplexity(step, BATCHES, TOKEN_BYTES, use_loss_mask=True)(values, {})
    assert result["sft/perplexity"] == pytest.approx(V, rel=1e-5)  # all tokens are equally likely
    assert result["next_token/perplexity"] == pytest.approx(V, rel=1e-5)
    assert result["loss"] == pytest.approx(2.5 * math.log(V), rel=1e-5)
    assert "bits_per_byte" not in result


def test_nothing_to_evaluate_is_an_error():
    with pytest.raises(InputError, match=r"data: nothing is held out .*eval_fraction"):
        make_perplexity(None, [], TOKEN_BYTES, use_loss_mask=False)
    values = {"policy": params.init(MODEL.specs, jax.random.key(0))}
    blank = [{**batch, "loss_mask": np.zeros((2, 6), np.float32)} for batch in BATCHES]
    evaluate = make_perplexity(_eval_step({"sft": 1.0}), blank, TOKEN_BYTES, use_loss_mask=True)
    with pytest.raises(InputError, match="no token of the held-out data is supervised"):
        evaluate(values, {})


def test_records_one_a_row():
    tokenizer = make_tokenizer(TokenizerSpec("byte"), lambda: iter(()))
    model = make_model(
        ModelConfig(vocab_size=384, num_layers=1, d_model=8, num_heads=2, num_kv_heads=2, d_ff=8, max_length=16)
    )
    values = params.init(model.specs, jax.random.key(0))
    values["embed"] *= 50.0
    records = [("x:1", {"text": "héllo"}), ("x:2", {"prompt": "ab", "response": "c"}), ("x:3", {"text": "z" * 40})]
    metrics, samples = make_record_perplexity(model, tokenizer, records, template="plain", batch_tokens=32)(values)

    log_probs = _log_probs(model)

    def nats(tokens, first):
        ids = jnp.array(tokens, jnp.int32)[None]
        batch = {"tokens": ids, "segment_ids": jnp.ones_like(ids), "positions": jnp.arange(ids.shape[1])[None]}
        return -np.asarray(log_probs(values, batch))[0, np.arange(first - 1, len(tokens) - 1), np.array(tokens[first:])]

    bos, eos = tokenizer.bos, tokenizer.eos
    long = [bos, *b"z" * 40, eos]
    pieces = [nats(long[:17], 1), nats(long[16:33], 1), nats(long[25:42], 8)]  # the last reaches back
    rows = [nats([bos, *"héllo".encode(), eos], 1), nats([bos, *b"abc", eos], 3), np.concatenate(pieces)]
    counts, sums = np.array([len(row) for row in rows]), np.array([row.sum() for row in rows])
    assert counts.tolist() == [7, 2, 41]
    assert [sample[:2] for sample in samples] == [("x:1", 7), ("x:2", 2), ("x:3", 41)]
    np.testing.assert_allclose([sample.loss for sample in samples], sums / counts, rtol=1e-5)
    assert metrics["loss"] == pytest.approx(sums.sum() / 50, rel=1e-5)
    assert metrics["perplexity"] == pytest.approx(math.exp(sums.sum() / 50), rel=1e-4)
    assert metrics["bits_per_byte"] == pytest.approx(sums.sum() / math.log(2) / (6 + 1 + 40), rel=1e-5)
    error = math.sqrt(3 / 2 * np.square(sums - sums.sum() / 50 * counts).sum()) / 50
    assert metrics["loss_stderr"] == pytest.approx(error, rel=1e-4)
    assert metrics["perplexity_stderr"] == pytest.approx(error * metrics["perplexity"], rel=1e-4)
    assert metrics["tokens"] == 50
