import json

import jax
import pytest
import table_models

from research import params
from research.errors import InputError
from research.evals import tasks
from research.models.config import ModelConfig
from research.models.transformer import make_model
from research.sources.tokenizers import TokenizerSpec, load_pretrained, make_tokenizer

TOKENIZER = make_tokenizer(TokenizerSpec("byte"), lambda: iter(()))
V = TOKENIZER.size
MODEL = make_model(
    ModelConfig(vocab_size=384, num_layers=1, d_model=8, num_heads=2, num_kv_heads=2, d_ff=8, max_length=64)
)
KEY = jax.random.key(0)


def _says(text):
    return table_models.make(V), table_models.answering(TOKENIZER, text)


def _file(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.mark.parametrize(
    ("verifier", "says", "right"),
    [
        ("number", "is 42.0", [True, False, True]),
        ("exact", "42 ", [True, False, False]),
        ("contains", "Is 42.", [True, False, False]),
        ("task", "42", [True, False, False]),
    ],
)
def test_exact_match_with_a_verifier(tmp_path, verifier, says, right):
    records = [
        {"prompt": "a?", "response": "42"},
        {"question": "b?", "answer": -4},
        {"messages": [{"role": "user", "content": "c?"}, {"role": "assistant", "content": "It's 42."}]},
    ]
    path = _file(tmp_path / "some.nums.jsonl", *records)
    model, values = _says(says)
    name, evaluate = tasks.load(f"exact_match,verifier={verifier},max_new_tokens=10:{path}", model, TOKENIZER, "chat")
    metrics, samples = evaluate(values, KEY)
    assert name == "some.nums"
    assert [sample.correct for sample in samples] == right
    assert [sample.expected for sample in samples] == ["42", "-4", "It's 42."]
    p = sum(right) / 3
    assert metrics["exact_match"] == pytest.approx(p)
    assert metrics["exact_match_stderr"] == pytest.approx((p * (1 - p) / 2) ** 0.5)


def test_generated_tasks_with_their_verifiers():
    model, values = _says("abc")
    name, evaluate = tasks.load("exact_match,max_new_tokens=8,limit=30:tasks:compare/2", model, TOKENIZER, "chat")
    metrics, samples = evaluate(values, KEY)
    assert name == "compare_2"
    assert len(samples) == 30
    assert metrics["exact_match/compare/2"] == metrics["exact_match/compare/2_stderr"] == 0
    _, evaluate = tasks.load("exact_match,max_new_tokens=8:tasks:copy", model, TOKENIZER, "chat", limit=2)
    assert len(evaluate(values, KEY)[1]) == 2


def test_choice_and_perplexity(tmp_path):
    values = params.init(MODEL.specs, jax.random.key(0))
    choice = _file(tmp_path / "c.jsonl", *({"question": f"{i}?", "choices": ["x", "y"], "answer": 0} for i in range(5)))
    name, evaluate = tasks.load(f"choice,name=mine,template=plain,limit=3:{choice}", MODEL, TOKENIZER, "chat")
    metrics, samples = evaluate(values, KEY)
    assert (name, len(samples)) == ("mine", 3)
    assert 0 <= metrics["acc"] <= 1
    texts = _file(tmp_path / "t.jsonl", {"text": "abc"}, {"tokens": [1, 2, 3]})
    metrics, samples = tasks.load(f"perplexity:{texts}", MODEL, TOKENIZER, "chat").evaluate(values, KEY)
    assert [sample.count for sample in samples] == [4, 2]
    assert metrics["tokens"] == 6
    (tmp_path / "p.txt").write_text("abc\n\n \nde\nfg\n\n")
    split = tasks.load(f"perplexity,split=paragraph:{tmp_path / 'p.txt'}", MODEL, TOKENIZER, "chat")
    assert [(x.where.split("/")[-1], x.count) for x in split.evaluate(values, KEY)[1]] == [
        ("p.txt:1, paragraph 1", 4),
        ("p.txt:1, paragraph 2", 6),
    ]
    ids = _file(tmp_path / "i.jsonl", {"tokens": [1, 2, 3]})
    metrics, _ = tasks.load(f"perplexity:{ids}", MODEL, None, "chat").evaluate(values, KEY)
    assert "bits_per_byte" not in metrics


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("choise:{}", r"task choise:.*: there is no kind 'choise'. Did you mean 'choice'\?"),
        ("choice", "task choice: names no data. Write choice:x.jsonl"),
        ("perplexity,split=line:{}", "split=line isn't known"),
        ("choice,verifier=exact:{}", "choice has no option 'verifier'"),
        ("exact_match,verifer=exact:{}", "has no option 'verifer'. Did you mean 'verifier'"),
        ("exact_match,verifier:{}", "option 'verifier' has no value"),
        ("exact_match,verifier=numbr:{}", "verifier=numbr isn't known. Did you mean 'number'"),
        ("choice,template=plane:{}", "template=plane isn't known. Did you mean 'plain'"),
        ("choice,limit=x:{}", "limit=x: must be a whole number"),
        ("exact_match,max_new_tokens=0:{}", "max_new_tokens=0: must be a whole number, at least 1"),
        ("exact_match:nothing.jsonl", "task exact_match:nothing.jsonl: there is no 'nothing.jsonl'"),
        ("choice:{}", "x.jsonl:1: has no text in 'question'|x.jsonl:1: field 'choices'"),
        ("exact_match:{}", "x.jsonl:2: has neither 'response' nor 'answer'"),
        ("exact_match,verifier=number:{}", "x.jsonl:1: has no number in its answer 'none'"),
        ("perplexity:{}", "x.jsonl:2: has the fields 'prompt', but needs"),
    ],
)
def test_faults_are_named(tmp_path, spec, message):
    path = _file(tmp_path / "x.jsonl", {"prompt": "a", "response": "none"}, {"prompt": "b"})
    with pytest.raises(InputError, match=message):
        tasks.load(spec.format(path), MODEL, TOKENIZER, "chat")


def test_a_model_without_a_tokenizer_needs_ids(tmp_path):
    path = _file(tmp_path / "x.jsonl", {"question": "?", "choices": ["x", "y"], "answer": 0})
    with pytest.raises(InputError, match="needs text, and the model has no tokenizer"):
        tasks.load(f"choice:{path}", MODEL, None, "plain")


@pytest.mark.parametrize(
    ("spec", "record", "message"),
    [
        ("choice", {"question": "", "choices": ["x", "y"], "answer": 0}, "field 'question' is empty"),
        ("choice", {"prompt": " \n", "choices": ["x", "y"], "answer": 0}, "field 'prompt' is empty"),
        ("exact_match", {"question": "", "answer": "x"}, "field 'question' is an empty prompt"),
        ("exact_match", {"prompt": "x", "answer": ""}, "field 'answer' is an empty response"),
        ("exact_match", {"messages": [{"role": "user", "content": ""}]}, "field 'content' is an empty user message"),
        ("perplexity", {"prompt": "", "response": "x"}, "field 'prompt' is an empty prompt"),
    ],
)
def test_an_empty_text_is_named_by_file_line_and_field(tmp_path, spec, record, message):
    fine = {"question": "?", "choices": ["x", "y"], "answer": "x", "prompt": "q", "response": "x"}
    path = _file(tmp_path / "x.jsonl", fine, record)
    with pytest.raises(InputError, match=rf"task {spec}:\S+: \S+x\.jsonl:2: {message}"):
        tasks.load(f"{spec}:{path}", MODEL, TOKENIZER, "chat")


def test_an_empty_question_scores_its_choices_as_texts(tmp_path):
    path = _file(tmp_path / "x.jsonl", {"question": "", "choices": ["x", "y"], "answer": 0})
    metrics, _ = tasks.load(f"choice:{path}", MODEL, TOKENIZER, "plain").evaluate(
        params.init(MODEL.specs, jax.random.key(1)), KEY
    )
    assert metrics["acc"] in (0.0, 1.0)


def test_what_a_chat_template_refuses_is_named_by_file_and_line(tmp_path):
    TOKENIZER.save(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(
        "{% if messages[0].content == '7' %}{{ raise_exception('No!') }}{% endif %}"
        "{% for m in messages %}{{ m.content }}<|eos|>{% endfor %}"
    )
    tokenizer = load_pretrained(tmp_path)
    fine, refused = ({"prompt": p, "response": "x", "choices": ["x", "y"], "answer": "x"} for p in ("6", "7"))
    path = _file(tmp_path / "x.jsonl", fine, refused)
    for spec in ("choice", "exact_match", "perplexity"):
        with pytest.raises(InputError, match=rf"task {spec}:\S+: \S+x\.jsonl:2: the model's chat template .*No!"):
            tasks.load(f"{spec}:{path}", MODEL, tokenizer, "model")


def test_tasks_say_how_many_records_are_rendered_already(tmp_path, capsys):
    path = _file(tmp_path / "x.jsonl", {"question": "<|user|>a?", "choices": ["x", "y"], "answer": 0})
    tasks.load(f"choice:{path}", MODEL, TOKENIZER, "chat")
    assert "1 of 1 records spell special tokens of this tokenizer, such as '<|user|>'" in capsys.readouterr().err


def test_an_answer_of_weight_0_is_none_to_expect(tmp_path):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 0}]
    path = _file(tmp_path / "x.jsonl", {"messages": turns})
    with pytest.raises(InputError, match=r"x\.jsonl:1: has a last turn of weight 0"):
        tasks.load(f"exact_match:{path}", MODEL, TOKENIZER, "chat")
