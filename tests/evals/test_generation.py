import jax
import jax.numpy as jnp
import pytest

from research.devices.sharding import RULES
from research.errors import InputError
from research.evals.generation import make_generation
from research.models.config import ModelConfig
from research.models.sampling import SamplingConfig
from research.models.transformer import Model
from research.ops.head import Head
from research.sources.tokenizers import TokenizerSpec, make_tokenizer
from research.sources.verification import verify_record

TOKENIZER = make_tokenizer(TokenizerSpec("byte"), lambda: iter(()))
V = TOKENIZER.size


def _table_model(max_length=64):
    """A model whose next token is params[last token]."""
    return Model(
        config=ModelConfig(vocab_size=V, max_length=max_length),
        specs=None,
        hidden=None,
        hidden_at=None,
        attention_inputs=None,
        rules=RULES,
        unembed=lambda params: Head(jnp.eye(V), None, 0.0),
        init_cache=lambda batch_size, length: ((jnp.zeros((batch_size, length, 1)),) * 2,),
        unstack=lambda params: params,
        decode=lambda params, tokens, positions, mask, cache, index: (jax.nn.one_hot(params[tokens], V), cache),
    )


def _says(text):
    """Parameters of a model that answers everything with `text`, whose characters all differ."""
    ids = [TOKENIZER.special("<|assistant|>"), *TOKENIZER.encode(text), TOKENIZER.eos]
    return jnp.zeros(V, jnp.int32).at[jnp.array(ids[:-1])].set(jnp.array(ids[1:]))


def _make(records, **kwargs):
    sampling = SamplingConfig(max_new_tokens=8, stop_tokens=(TOKENIZER.eos,))
    options = {"verify": verify_record, "template": "chat", "batch_size": 2} | kwargs
    return make_generation(_table_model(), sampling, TOKENIZER, records, **options)


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
    assert str(samples[2]) == "'reverse: xyz' -> 'abc' (wrong, expected 'zyx')"


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
