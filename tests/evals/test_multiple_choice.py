import jax
import numpy as np
import pytest

from research import params
from research.errors import InputError
from research.evals.multiple_choice import make_multiple_choice, read_question
from research.models.config import ModelConfig
from research.models.transformer import make_model
from research.sources.formats import render_prompt
from research.sources.tokenizers import TokenizerSpec, make_tokenizer

TOKENIZER = make_tokenizer(TokenizerSpec("byte"), lambda: iter(()))
MODEL = make_model(
    ModelConfig(vocab_size=261, num_layers=1, d_model=16, num_heads=2, num_kv_heads=2, d_ff=16, max_length=64)
)
HIDDEN = jax.jit(MODEL.hidden)
RECORDS = [
    {"question": "one?", "choices": ["a", "bb", "é"], "answer": 1},
    {"prompt": "two? ", "choices": ["yes", "no"], "answer": "B"},
    {"question": "three?", "choices": ["long answer indeed", "x", "日本", "no"], "answer": "日本"},
]


@pytest.fixture(scope="module")
def values():
    values = params.init(MODEL.specs, jax.random.key(1))
    return {**values, "embed": values["embed"] * 30.0}


def _logprob(values, context, continuation):
    ids = np.zeros((1, 64), np.int32)  # what comes after isn't seen
    inputs = [*context, *continuation][:-1]
    ids[0, : len(inputs)] = inputs
    batch = {"tokens": ids, "segment_ids": np.ones_like(ids), "positions": np.arange(64, dtype=np.int32)[None]}
    whole = np.asarray(jax.nn.log_softmax(HIDDEN(values, batch)[0] @ MODEL.unembed(values).kernel))
    return sum(whole[len(context) + i - 1, token] for i, token in enumerate(continuation))


def test_choices_are_compared_by_likelihood_raw_and_by_length(values):
    metrics, samples = make_multiple_choice(MODEL, TOKENIZER, RECORDS, template="plain", batch_tokens=64)(values)
    right = {"acc": [], "acc_norm": [], "acc_bytes": [], "acc_tokens": []}
    for record, sample, answer in zip(RECORDS, samples, (1, 1, 2), strict=True):
        question = record.get("question", record.get("prompt"))
        context = [TOKENIZER.bos, *question.rstrip().encode()]
        spaces = b" " * (2 if question.endswith(" ") else 1)
        nats = np.array([_logprob(values, context, spaces + choice.encode()) for choice in record["choices"]])
        np.testing.assert_allclose(sample.loglikelihoods, nats, atol=1e-4)
        sizes = {
            "acc": [1 for choice in record["choices"]],
            "acc_norm": [len(choice) for choice in record["choices"]],
            "acc_bytes": [len(choice.encode()) for choice in record["choices"]],
            "acc_tokens": [len(spaces) + len(choice.encode()) for choice in record["choices"]],
        }
        for name, size in sizes.items():
            right[name].append(float(np.argmax(nats / size) == answer))
        assert (sample.question, sample.choices, sample.answer) == (question, record["choices"], answer)
        assert (sample.chosen, sample.chosen_norm) == (np.argmax(nats), np.argmax(nats / sizes["acc_norm"]))
    for name, found in right.items():
        assert metrics[name] == pytest.approx(np.mean(found))
        assert metrics[f"{name}_stderr"] == pytest.approx(np.std(found, ddof=1) / 3**0.5)
    assert metrics["truncated"] == 0
    assert len({tuple(found) for found in right.values()}) > 1  # they do differ here


def test_under_a_chat_template_the_model_says_the_choice(values):
    _, samples = make_multiple_choice(MODEL, TOKENIZER, RECORDS[:1], template="chat")(values)
    context = render_prompt({"prompt": "one?"}, TOKENIZER, "chat")
    nats = [_logprob(values, context, choice.encode()) for choice in RECORDS[0]["choices"]]
    np.testing.assert_allclose(samples[0].loglikelihoods, nats, atol=1e-4)


def test_a_long_question_loses_its_beginning(values):
    record = {"question": "x" * 40 + "y" * 60, "choices": ["a", "bb"], "answer": 0}
    metrics, samples = make_multiple_choice(MODEL, TOKENIZER, [record], template="plain")(values)
    assert metrics["truncated"] == 1
    assert "acc_stderr" not in metrics
    for nats, choice in zip(samples[0].loglikelihoods, (" a", " bb"), strict=True):
        kept = (record["question"].encode() + choice.encode())[-65 : -len(choice)]
        assert nats == pytest.approx(_logprob(values, kept, choice.encode()), abs=1e-4)


@pytest.mark.parametrize(
    ("choices", "answer", "expected"),
    [
        (["x", "y"], 1, 1),
        (["x", "y"], "A", 0),
        (["B", "A"], "A", 1),  # a text comes before a letter
        (["5", "1", "0"], "1", 1),
    ],
)
def test_answers_are_texts_numbers_or_letters(choices, answer, expected):
    assert read_question({"question": "?", "choices": choices, "answer": answer}).answer == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"question": None}, "has no text in 'question' or 'prompt'"),
        ({"choices": ["a"]}, "field 'choices' must be a list of two or more"),
        ({"choices": ["a", ""]}, "none empty"),
        ({"choices": "ab"}, "field 'choices' must be a list"),
        ({"answer": 2}, "field 'answer' is 2, but must be one of the choices, 0 to 1, or 'A' to 'B'"),
        ({"answer": -1}, "field 'answer' is -1"),
        ({"answer": True}, "field 'answer' is True"),
        ({"answer": "C"}, "field 'answer' is 'C'"),
        ({"answer": None}, "field 'answer' is None"),
    ],
)
def test_a_faulty_question(change, message):
    with pytest.raises(InputError, match=message):
        read_question({"question": "?", "choices": ["x", "y"], "answer": 0, **change})
