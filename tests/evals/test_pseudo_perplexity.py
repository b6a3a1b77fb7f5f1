"""Each token masked in turn: against one row a token, computed by hand."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from encoders import CONFIG, MASK, TOKENIZER

from research import params
from research.errors import InputError
from research.evals import tasks
from research.models.transformer import make_model
from research.sources.tokenizers import TokenizerSpec, make_tokenizer

LONGEST = 16
MODEL = make_model(dataclasses.replace(CONFIG, max_length=LONGEST, vocab_size=TOKENIZER.size + 3))
VALUES = params.init(MODEL.specs, jax.random.key(0))
VALUES["embed"] = VALUES["embed"] * 30  # so that tokens differ in how likely they are
TEXTS = ["a", "hello", "naïve, 日", "this text is longer than the model reads"]


@jax.jit
def log_probs(batch):
    """log p of every token at every place of a row."""
    return jax.nn.log_softmax(MODEL.unembed(VALUES).logits(MODEL.hidden(VALUES, batch)))


def one_by_one(tokens, scored):
    """-log p of each scored token of a sequence, in rows of one sequence each."""
    nats = []
    for at in scored:
        stop = min((at // LONGEST + 1) * LONGEST, len(tokens))
        start = max(0, stop - LONGEST)
        row = np.zeros((1, LONGEST), np.int32)
        row[0, : stop - start] = tokens[start:stop]
        row[0, at - start] = MASK
        positions = np.arange(LONGEST, dtype=np.int32)[None]
        batch = {"tokens": row, "segment_ids": (positions < stop - start).astype(np.int32), "positions": positions}
        nats.append(-float(log_probs(batch)[0, at - start, tokens[at]]))
    return nats


@pytest.mark.parametrize("batch_tokens", [64, 1024])
def test_pseudo_perplexity_is_that_of_each_token_masked_in_turn(batch_tokens, tmp_path):
    path = tmp_path / "x.jsonl"
    records = [{"text": text} for text in TEXTS] + [{"prompt": "2 + 2", "response": "four"}]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    spec = f"pseudo_perplexity,template=plain:{path}"
    name, evaluate = tasks.load(spec, MODEL, TOKENIZER, "chat", batch_tokens=batch_tokens)
    metrics, samples = evaluate(VALUES, jax.random.key(0))
    expected = []
    for record in records:
        before, text = (TOKENIZER.encode(record.get(field, "")) for field in ("prompt", "response"))
        text = TOKENIZER.encode(record["text"]) if "text" in record else text
        tokens = [TOKENIZER.bos, *before, *text, TOKENIZER.eos]
        first = 1 + len(before)
        expected.append(one_by_one(tokens, range(first, first + len(text))))
    assert name == "x"
    assert [sample.count for sample in samples] == [len(nats) for nats in expected]
    assert [sample.loss for sample in samples] == pytest.approx([np.mean(nats) for nats in expected], rel=1e-4)
    sums, counts = np.array([np.sum(nats) for nats in expected]), np.array([len(nats) for nats in expected])
    loss = sums.sum() / counts.sum()
    assert np.std(np.concatenate(expected)) > 0.5
    assert metrics["loss"] == pytest.approx(loss, rel=1e-5)
    assert metrics["pseudo_perplexity"] == pytest.approx(np.exp(loss), rel=1e-4)
    assert metrics["tokens"] == counts.sum()
    error = np.sqrt(5 / 4 * np.sum((sums - counts * loss) ** 2)) / counts.sum()
    assert metrics["loss_stderr"] == pytest.approx(error, rel=1e-3)
    assert metrics["pseudo_perplexity_stderr"] == pytest.approx(error * np.exp(loss), rel=1e-3)


def test_other_models_and_tokenizers_are_refused(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "some"}\n')
    causal = make_model(dataclasses.replace(CONFIG, causal=True))
    with pytest.raises(InputError, match="is a language model, and doesn't see what follows a masked token"):
        tasks.load(f"pseudo_perplexity:{path}", causal, TOKENIZER, "plain")
    with pytest.raises(InputError, match="is an encoder, which reads in both directions, and doesn't predict the next"):
        tasks.load(f"perplexity:{path}", MODEL, TOKENIZER, "plain")
    bare = make_tokenizer(TokenizerSpec("byte"), lambda: iter(()))
    with pytest.raises(InputError, match=r"task pseudo_perplexity:.*: tokenizer: has 0 of the 1 mask tokens"):
        tasks.load(f"pseudo_perplexity:{path}", MODEL, bare, "plain")
