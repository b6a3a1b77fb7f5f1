import json

import jax
import numpy as np
import pytest
import table_models

from research import params
from research.errors import InputError
from research.evals import lm_eval_adapter
from research.evals.multiple_choice import make_multiple_choice
from research.evals.scoring import Example, make_token_scorer
from research.models.config import ModelConfig
from research.models.transformer import make_model
from research.sources.formats import render_prompt
from research.sources.tokenizers import TokenizerSpec, make_tokenizer

lm_eval = pytest.importorskip("lm_eval")
instance = pytest.importorskip("lm_eval.api.instance")

TOKENIZER = make_tokenizer(TokenizerSpec("byte"), lambda: iter(()))
V = TOKENIZER.size
MODEL = make_model(
    ModelConfig(vocab_size=V, num_layers=1, d_model=16, num_heads=2, num_kv_heads=2, d_ff=16, max_length=48)
)
TASK = """
task: local_{name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
output_type: {kind}
test_split: test
doc_to_text: "{{{{question}}}}"
"""
CHOICE = """
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}, {metric: acc_norm}, {metric: acc_bytes}]
"""
GENERATE = """
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 6, do_sample: false}
metric_list: [{metric: exact_match}]
"""


@pytest.fixture(scope="module")
def values():
    values = params.init(MODEL.specs, jax.random.key(1))
    return {**values, "embed": values["embed"] * 30.0}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Local tasks and their data, of which some questions are too long for the model."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    words = ["red", "blue sky", "é", "日本 river", "no", "yes it is"]
    records = [
        {
            "question": f"what is {words[i % 6]} {'very ' * (i % 12)}?" + " " * (i % 3),
            "choices": [words[(i + k) % 6] for k in range(4)],
            "answer": i % 4,
        }
        for i in range(24)
    ]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    for name, kind, rest in (("choice", "multiple_choice", CHOICE), ("answer", "generate_until", GENERATE)):
        (tmp_path / f"{name}.yaml").write_text(TASK.format(name=name, kind=kind, path=path) + rest)
    return tmp_path


def _request(kind, *arguments):
    return instance.Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


def test_a_local_task_agrees_with_our_own(values, folder):
    lm = lm_eval_adapter.make_lm(MODEL, values, TOKENIZER, template="plain")
    out = lm_eval_adapter.evaluate(lm, ["local_choice"], include_path=str(folder))
    theirs = lm_eval_adapter.plain_metrics(out["results"]["local_choice"])
    records = [json.loads(line) for line in (folder / "data.jsonl").read_text().splitlines()]
    ours, samples = make_multiple_choice(MODEL, TOKENIZER, records, template="plain")(values)
    assert ours["truncated"] > 0
    for name in ("acc", "acc_norm", "acc_bytes"):
        assert 0 < ours[name] < 1
        assert theirs[name] == ours[name]
        assert theirs[f"{name}_stderr"] == pytest.approx(ours[f"{name}_stderr"])
    for sample in out["samples"]["local_choice"]:
        found = [response[0][0] for response in sample["resps"]]
        assert found == pytest.approx(samples[sample["doc_id"]].loglikelihoods, abs=1e-4)


def test_rolling_log_likelihood_predicts_every_token_once(values):
    lm = lm_eval_adapter.make_lm(MODEL, values, TOKENIZER, template="plain")
    texts = ["short", "x y z " * 30]
    found = lm.loglikelihood_rolling([_request("loglikelihood_rolling", text) for text in texts])
    windows = pytest.importorskip("lm_eval.utils").get_rolling_token_windows
    score = make_token_scorer(MODEL)
    for text, total in zip(texts, found, strict=True):
        expected = 0.0
        for inputs, targets in windows(TOKENIZER.encode(text), TOKENIZER.bos, 48, 1):
            ids = np.array([*inputs, targets[-1]], np.int32)
            expected += score(values, [Example(ids, np.arange(len(ids)) >= len(ids) - len(targets))])[0].sum()
        assert total == pytest.approx(expected, rel=1e-5)


def test_generation_ends_where_the_task_says():
    model, values = table_models.make(V, max_length=48), table_models.answering(TOKENIZER, "ab. cde", after=":")
    lm = lm_eval_adapter.make_lm(model, values, TOKENIZER, template="plain")
    options = [{"until": []}, {"until": [".", "b"]}, {"until": ". c"}, {"until": ["z"], "max_gen_toks": 3}, {}]
    contexts = ["x:", "y" * 100 + ":", "zz:", "x:", "x:"]
    requests = [_request("generate_until", *pair) for pair in zip(contexts, options, strict=True)]
    assert lm.generate_until(requests) == ["ab. cde", "a", "ab", "ab.", "ab. cde"]
    with pytest.raises(InputError, match="a task asks for num_beams = 4"):
        lm.generate_until([_request("generate_until", "x:", {"num_beams": 4})])


def test_chat_templates_put_special_tokens_into_the_text(values):
    lm = lm_eval_adapter.make_lm(MODEL, values, TOKENIZER, template="chat")
    messages = [{"role": "user", "content": "hi"}]
    text = lm.apply_chat_template(messages)
    assert text == "<|bos|><|user|>hi<|assistant|>"
    begun = lm.apply_chat_template([*messages, {"role": "assistant", "content": "I"}], add_generation_prompt=False)
    assert begun == text + "I"
    ids = render_prompt({"prompt": "hi"}, TOKENIZER, "chat")
    ((nats, _),) = lm.loglikelihood([_request("loglikelihood", text, "yo")])
    example = Example(np.array([*ids, *b"yo"], np.int32), np.arange(len(ids) + 2) >= len(ids))
    assert nats == pytest.approx(float(make_token_scorer(MODEL)(values, [example])[0].sum()), rel=1e-5)
    assert lm.tokenizer_name != lm_eval_adapter.make_lm(MODEL, values, TOKENIZER, template="plain").tokenizer_name


def test_generated_answers_of_a_local_task_in_chat(folder, values):
    lm = lm_eval_adapter.make_lm(MODEL, values, TOKENIZER, template="chat")
    out = lm_eval_adapter.evaluate(lm, ["local_answer"], include_path=str(folder), limit=3, chat=True)
    assert len(out["samples"]["local_answer"]) == 3
    assert all("<|assistant|>" in sample["arguments"][0][0] for sample in out["samples"]["local_answer"])


def test_an_unknown_task_is_named(values, folder):
    lm = lm_eval_adapter.make_lm(MODEL, values, TOKENIZER, template="plain")
    with pytest.raises(InputError, match=r"--lm_eval: there is no task 'local_choise'. Did you mean 'local_choice'"):
        lm_eval_adapter.evaluate(lm, ["local_choise"], include_path=str(folder))
