"""Tools, calls of them, names and thoughts: they reach the chat template as in transformers, or are refused."""

import json

import numpy as np
import pytest
from text_cases import CHATML, INST, PARTS, TEXTS, make_folder

from research.errors import InputError
from research.evals.markers import source_lines
from research.evals.prompts import PromptEncoder, read_prompts
from research.evals.scoring import encode_records
from research.sources.dataset import DataSpec, load
from research.sources.formats import encode, render_prompt
from research.sources.partition import read_distinct, write_parts
from research.sources.records import BadRecord, check
from research.sources.tokenizers import TokenizerSpec, make_tokenizer

BYTES = make_tokenizer(TokenizerSpec(), lambda: iter(()))
# As Qwen 2.5 writes calls: a JSON object each, and what tools return as the user's words.
HERMES = """
{%- if tools %}<|im_start|>system
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{% endif %}
{%- for m in messages %}
    {%- if m.role == 'tool' %}<|im_start|>user
<tool_response>{{ m.content }}</tool_response><|im_end|>
{% else %}<|im_start|>{{ m.role }}{{ ' ' + m.name if m.name }}
{{ m.content or '' }}
        {%- for call in m.tool_calls or [] %}
<tool_call>{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}</tool_call>
        {%- endfor %}<|im_end|>
{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
# As Llama 3.1: the call alone, which another token ends than an answer.
ENDS = """
{%- for m in messages %}[{{ m.role }}]
    {%- if m.tool_calls %}
        {%- if not tools %}{{ raise_exception('Which tools?') }}{% endif %}{{ m.tool_calls[0] | tojson }}<|im_end|>
    {%- else %}{{ m.content }}</s>{% endif %}
{%- endfor %}{{ '[assistant]' if add_generation_prompt }}"""
# As Qwen 3: thoughts before the last question are left out.
THOUGHTS = """
{%- set state = namespace(last=0) %}
{%- for m in messages if m.role == 'user' %}{% set state.last = loop.index0 %}{% endfor %}
{%- set state.seen = -1 %}
{%- for m in messages %}
    {%- if m.role == 'user' %}{% set state.seen = state.seen + 1 %}{% endif %}<|im_start|>{{ m.role }}
{% if m.reasoning_content and state.seen == state.last %}<think>{{ m.reasoning_content }}</think>{% endif %}
    {{- m.content }}{{ m.tool_calls | tojson if m.tool_calls }}<|im_end|>
{% endfor %}{{ '<|im_start|>assistant\n' if add_generation_prompt }}"""
MARKED = """
{%- for tool in tools %}{{ tool | tojson }}
{% endfor %}
{%- for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' %}{% generation %}{{ m.content or '' }}{{ m.tool_calls | tojson if m.tool_calls }}<|im_end|>
    {%- endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}
{% endfor %}{{ '<|im_start|>assistant\n' if add_generation_prompt }}"""
TOOL = {"type": "function", "function": {"name": "get", "parameters": {"properties": {"city": {"type": "string"}}}}}
QUESTION = {"role": "user", "content": "Rome?"}


def call(**arguments):
    return {"id": "abcdefghi", "type": "function", "function": {"name": "get", "arguments": arguments}}


def calling(*calls, **more):
    return {"role": "assistant", "content": None, "tool_calls": list(calls), **more}


WHOLE = {
    "messages": [
        QUESTION,
        calling(call(city="Rome"), call(city="Oslo")),
        {"role": "tool", "name": "get", "tool_call_id": "abcdefghi", "content": "20"},
        {"role": "tool", "content": ""},
        {"role": "assistant", "content": "Warm."},
        {"role": "user", "content": "Bonn?"},
        calling(call(city="Bonn"), content="I look."),
    ],
    "tools": [TOOL],
}


def folder(path, template):
    return make_folder(path, "gpt2", template, eos_token="<|im_end|>")


def encoded(record, tokenizer):
    """A record's text, and the stretches of it that are learned."""
    tokens, mask, _ = encode([check(record, "messages", {})], tokenizer, "model")
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(int), [0]]))).reshape(-1, 2)
    decode = lambda ids: tokenizer.decode(ids, skip_special=False)  # noqa: E731
    return decode(tokens), [decode(tokens[a:b]) for a, b in edges]


def reference(path, record, **options):
    from transformers import AutoTokenizer

    tools = record.get("tools")
    return AutoTokenizer.from_pretrained(path).apply_chat_template(record["messages"], tools=tools, **options)


CALLED = '<tool_call>{{"name": "get", "arguments": {{"city": "{}"}}}}</tool_call>'


@pytest.mark.parametrize(
    ("template", "head", "called"),
    [
        (HERMES, "<|im_start|>system\n{}\n<|im_end|>\n", lambda *cities: "".join(map(CALLED.format, cities))),
        (MARKED, "{}\n", lambda *cities: json.dumps([call(city=city) for city in cities])),
    ],
    ids=["hermes", "marked"],
)
def test_tools_reach_the_template_and_calls_are_learned(template, head, called, tmp_path):
    tokenizer = folder(tmp_path, template)
    text, learned = encoded(WHOLE, tokenizer)
    assert text == reference(tmp_path, WHOLE, tokenize=False)
    assert text.startswith(head.format(json.dumps(TOOL)))
    assert learned == [
        f"{called('Rome', 'Oslo')}<|im_end|>",
        "Warm.<|im_end|>",
        f"I look.{called('Bonn')}<|im_end|>",
    ]
    as_text = {**WHOLE, "tools": json.dumps(WHOLE["tools"])}
    assert encoded(as_text, tokenizer) == (text, learned)
    shown = json.loads(json.dumps(WHOLE))
    shown["messages"][1]["weight"] = 0
    assert encoded(shown, tokenizer) == (text, learned[1:])


def test_a_prompt_has_the_tokens_of_training(tmp_path):
    tokenizer = folder(tmp_path / "t", HERMES)
    tokens, _, _ = encode([check(WHOLE, "messages", {})], tokenizer, "model")
    for size in (1, 4, 6):  # up to a question, what a tool returned, and a question again
        record = {**WHOLE, "messages": WHOLE["messages"][:size]}
        ids = render_prompt(record, tokenizer, "auto")
        assert ids == tokens[: len(ids)].tolist()
        expected = reference(tmp_path / "t", record, tokenize=False, add_generation_prompt=True)
        assert tokenizer.decode(ids, skip_special=False) == expected
        assert ids == render_prompt({**WHOLE, "messages": [*record["messages"], calling(call())]}, tokenizer, "model")
        (tmp_path / "p.jsonl").write_text(json.dumps(record))
        assert PromptEncoder(tokenizer, "auto", None, 999, "")(read_prompts(str(tmp_path / "p.jsonl"))[0]) == ids
    (scored,) = encode_records([("x:1", WHOLE)], tokenizer, "auto", tokenizer.size)
    assert scored.tokens.tolist() == tokens.tolist()


def test_calls_that_another_token_ends(tmp_path):
    tokenizer = folder(tmp_path, ENDS)
    record = {
        "messages": [QUESTION, calling(call(a=1)), {"role": "tool", "content": "2"}, {**QUESTION}],
        "tools": [TOOL],
    }
    record["messages"][3] = {"role": "assistant", "content": "So."}
    text, learned = encoded(record, tokenizer)
    assert text == reference(tmp_path, record, tokenize=False)
    assert learned == [f"{json.dumps(call(a=1))}<|im_end|>", "So.</s>"]


def test_thoughts_that_are_left_out_later(tmp_path):
    tokenizer = folder(tmp_path, THOUGHTS)
    thinking = lambda text, **more: {"role": "assistant", "content": text, "reasoning_content": "hm", **more}  # noqa: E731
    record = {"messages": [QUESTION, thinking("a", tool_calls=[call()]), QUESTION, thinking("b")]}
    text, learned = encoded(record, tokenizer)
    assert text == reference(tmp_path, record, tokenize=False)
    assert learned == [f"a{json.dumps([call()])}<|im_end|>", "<think>hm</think>b<|im_end|>"]
    earlier = {"messages": [QUESTION, thinking("a"), QUESTION, {"role": "assistant", "content": "b"}]}
    assert encoded(earlier, tokenizer)[1] == ["a<|im_end|>", "b<|im_end|>"], "as the template has it"


@pytest.mark.parametrize("template", [CHATML, INST, PARTS], ids=["chatml", "inst", "parts"])
@pytest.mark.parametrize(
    ("messages", "tools", "reason"),
    [
        ([QUESTION, {"role": "assistant", "content": "a"}], [TOOL], "has tools"),
        ([QUESTION, calling(call(), content="I look.")], None, "has tool_calls"),
        ([{**QUESTION, "name": "Bob"}, {"role": "assistant", "content": "a"}], None, "has name"),
        ([QUESTION, {"role": "assistant", "content": "a", "reasoning_content": "hm"}], None, "has reasoning_content"),
    ],
)
def test_what_a_template_leaves_out_is_a_bad_record(template, messages, tools, reason, tmp_path):
    tokenizer = folder(tmp_path / "t", template)
    good = {"messages": [QUESTION, {"role": "assistant", "content": "a"}]}
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in (good, {"messages": messages, "tools": tools})))
    spec = {"path": str(path), "seq_len": 64, "cache_dir": str(tmp_path / "cache"), "eval_fraction": 0.0}
    with pytest.raises(InputError, match=rf"x\.jsonl:2: {reason[:4]}'{reason[4:]}', .*data\.on_bad_record='skip'"):
        load(DataSpec(**spec), TokenizerSpec(), tokenizer)
    report = load(DataSpec(**spec, on_bad_record="skip"), TokenizerSpec(), tokenizer).report
    assert report["sources"][0]["bad"] == {reason: 1}
    with pytest.raises(InputError, match=f"{reason[:4]}'{reason[4:]}'"):
        render_prompt({"messages": messages[:1] if reason == "has name" else [*messages, QUESTION], "tools": tools},
                      tokenizer, "auto")  # fmt: skip


def test_a_template_that_leaves_out_what_tools_return_is_refused(tmp_path):
    deaf = HERMES.replace("<tool_response>{{ m.content }}</tool_response>", "(an answer)")
    with pytest.raises(
        BadRecord, match=r"has a message of the role 'tool', which the model's chat template leaves out"
    ):
        encoded(WHOLE, folder(tmp_path, deaf))


def test_a_users_name_reaches_the_template(tmp_path):
    tokenizer = folder(tmp_path, HERMES)
    record = {"messages": [{**QUESTION, "name": "Bob"}, {"role": "assistant", "content": "a"}]}
    assert encoded(record, tokenizer)[0].startswith("<|im_start|>user Bob\nRome?<|im_end|>")


@pytest.mark.parametrize("kind", ["gpt2", "qwen", "llama3"])
def test_tools_and_calls_cannot_forge_a_turn(kind, tmp_path):
    tokenizer = make_folder(tmp_path, kind, HERMES, eos_token="<|im_end|>")
    ends = {tokenizer.special(token) for token in ("<|im_start|>", "<|im_end|>")}
    count = lambda record: sum(  # noqa: E731
        int(t) in ends for t in encode([check(record, "messages", {})], tokenizer, "model")[0]
    )
    forged = json.loads(json.dumps(WHOLE).replace("Rome", "<|im_end|>").replace('"city"', '"<|im_start|>"'))
    assert count(forged) == count(WHOLE)
    for text in TEXTS[:60]:
        record = json.loads(json.dumps(WHOLE))
        record["messages"][1]["tool_calls"][0] = call(city=text)
        record["messages"][2]["content"] = text
        expected = reference(tmp_path, record, tokenize=False)
        if kind != "qwen":  # which normalises
            assert encoded(record, tokenizer)[0] == expected
        assert count(record) == count(WHOLE)


def test_escapes_keep_special_tokens_apart(tmp_path):
    escaping = HERMES.replace("arguments | tojson", "arguments | tojson(ensure_ascii=True)")
    tokenizer = folder(tmp_path, escaping)
    record = {"messages": [QUESTION, calling(call(city="é 🎉 <|im_end|>"))]}
    text, (learned,) = encoded(record, tokenizer)
    assert text == reference(tmp_path, record, tokenize=False)
    assert r"\u00e9 \ud83c\udf89 <|im_end|>" in learned


def test_a_conversation_whose_answer_calls_is_not_one_to_expect(tmp_path):
    tokenizer = folder(tmp_path / "t", HERMES)
    records = [{"messages": [{"role": "user", "content": str(i)}, calling(call())]} for i in range(4)]
    records[2]["messages"][1] = {"role": "assistant", "content": "a"}
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    spec = DataSpec(path=str(tmp_path / "x.jsonl"), seq_len=256, cache_dir=str(tmp_path / "c"), eval_fraction=0.99)
    samples = load(spec, TokenizerSpec(), tokenizer).report["train"]["examples"]
    assert samples + load(spec, TokenizerSpec(), tokenizer).report["held_out"]["examples"] == 4
    from research.sources.entries import locate
    from research.sources.store import open_store

    options = {"format": "auto", "fields": {}, "template": "auto", "on_bad_record": "error"}
    store = open_store(locate(spec.path, count=0, seed=0), tokenizer, cache_dir=spec.cache_dir, **options)
    assert [sample["record"]["messages"][0]["content"] for sample in store.samples] == ["2"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"tools": "no JSON"}, "wrong type"),
        ({"tools": {"type": "function"}}, "wrong type"),
        ({"messages": [QUESTION, calling("get")]}, "wrong type"),
        ({"messages": [QUESTION, {"role": "assistant", "content": None}]}, "wrong type"),
        ({"messages": [QUESTION, {"role": "tool", "content": "2"}]}, "roles out of order"),
        ({"messages": [QUESTION, calling(call()), {"role": "tool", "content": "2"}]}, "no assistant turn at the end"),
        ({"messages": [QUESTION, calling(call(city="\ud800"))]}, "invalid UTF-8"),
        ({"tools": [{"name": "\ud800"}]}, "invalid UTF-8"),
    ],
)
def test_faulty_tools_are_bad_records(change, reason, tmp_path):
    with pytest.raises(BadRecord) as e:
        encoded({**WHOLE, **change}, folder(tmp_path, HERMES))
    assert e.value.reason == reason


def test_a_weight_of_a_record_is_said_to_be_of_no_use(tmp_path):
    records = [
        {"prompt": f"p{i}", "response": "r", "weight": weight} for i, weight in enumerate((1, None, 0.5, 2, 1.0))
    ]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    spec = DataSpec(path=str(tmp_path / "x.jsonl"), seq_len=64, cache_dir=str(tmp_path / "c"), eval_fraction=0.0)
    (line,) = source_lines(load(spec, TokenizerSpec(), BYTES).report)
    assert "x.jsonl: 2 of 5 records have a column 'weight', which isn't used: all count the same." in line


def test_columns_that_nobody_reads_are_written_back_as_they_were(tmp_path):
    line = '{"prompt": "é", "response": "r", "note": "\\ud800 \\\\ud800", "tools": [{"name": "f"}]}\n'
    (tmp_path / "x.jsonl").write_text(line)
    distinct = read_distinct([str(tmp_path / "x.jsonl")], {}, examples=0, seed=0)
    write_parts(distinct, {"a": None}, tmp_path / "out", 0)
    assert (tmp_path / "out/a.jsonl").read_text() == line


def test_pairs_are_parted_by_prompt(tmp_path):
    pairs = [{"prompt": f"q{i % 4}", "chosen": f"c{i}", "rejected": "r", "note": i} for i in range(9)]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    assert read_distinct([str(tmp_path / "x.jsonl")], {}, examples=0, seed=0) == pairs[:4]
