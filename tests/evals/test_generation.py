import jax
import pytest
import table_models

from research.errors import InputError
from research.evals.generation import make_generation
from research.models.sampling import SamplingConfig
from research.sources.tokenizers import TokenizerSpec, make_tokenizer
from research.sources.verification import verify_record

TOKENIZER = make_tokenizer(TokenizerSpec("byte"), lambda: iter(()))
V = TOKENIZER.size


def _says(text):
    return table_models.answering(TOKENIZER, text)


def _make(records, **kwargs):
    sampling = SamplingConfig(max_new_tokens=8, stop_tokens=(TOKENIZER.eos,))
    options = {"verify": verify_record, "template": "chat", "batch_size": 2} | kwargs
    return make_generation(table_models.make(V), sampling, TOKENIZER, records, **options)


def test_exact_match_overall_and_by_task():
    records = [
        {"prompt": "reverse: cba", "response": "abc", "task": "reverse"},
        {"prompt": "say it", "response": "abc "},
        {"prompt": "reverse: xyz", "response": "zyx", "task": "reverse"},
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "abc"}]},
        {"prompt": "long " * 20, "response": "abc", "task": "reverse"},
    ]
    metrics, samples = _make(records)(_says("abc"), jax.random.key(0))
    assert metrics == {"exact_match": 0.75, "exact_match/reverse": 0.5, "skipped_too_long": 1.0}
    assert [sample.correct for sample in samples] == [True, True, False, True]
    assert [sample.expected for sample in samples] == ["abc", "abc ", "zyx", "abc"]
    assert {sample.completion for sample in samples} == {"abc"}
    assert "reverse: xyz" in samples[2].prompt
    marked = samples[2]._replace(marked=("p", "a" + "<|eos|>" * 9 + "b"))
    assert "'a<|eos|> x 9b'" in str(marked)
    shown = str(samples[2])
    assert shown == "'<|bos|><|user|>reverse: xyz<|assistant|>' -> 'abc<|eos|>' (wrong, expected 'zyx')"


def test_an_answer_without_an_end_runs_on():
    endless = _says("ab").at[ord("b")].set(ord("a"))
    metrics, samples = _make([{"prompt": "x", "response": "ab"}])(endless, jax.random.key(0))
    assert samples[0].completion == "abababab"
    assert metrics["exact_match"] == 0


def test_each_record_may_have_a_template_of_its_own():
    records = [{"prompt": "x", "response": "ab"}] * 2  # the model answers where a prompt ends with <|assistant|>
    _, samples = _make(records, template=["plain", "chat"])(_says("ab"), jax.random.key(0))
    assert [sample.correct for sample in samples] == [False, True]


def test_no_prompt_that_fits_is_an_error():
    with pytest.raises(InputError, match=r"none of 1 prompts fits into 56 tokens"):
        _make([{"prompt": "long " * 20, "response": "abc"}])
