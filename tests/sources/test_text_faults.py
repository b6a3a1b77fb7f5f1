"""What a user's text, its messages and its chat template say has an effect on tokens, or is refused."""

import codecs
import gzip
import json

import pytest
from text_cases import CHATML, INST, PARTS, TEXTS, make_folder

from research.errors import InputError
from research.evals.markers import say_markers
from research.evals.prompts import PromptEncoder, read_prompts
from research.evals.scoring import encode_pair, encode_records
from research.files import read_json
from research.sources import encoding
from research.sources.dataset import DataSpec, load
from research.sources.entries import locate
from research.sources.formats import answer_decoder, encode, render_prompt, resolve_template
from research.sources.records import SHOWN, BadRecord, Turn, check, parse
from research.sources.store import open_store
from research.sources.tokenizers import TokenizerSpec, load_pretrained, make_tokenizer

BYTES = make_tokenizer(TokenizerSpec(), lambda: iter(()))
QUESTION = {"role": "user", "content": "q"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tokenizers")


@pytest.fixture(scope="module", params=["with prefix", "with prefix at first"])
def prefixed(request, folder):
    return make_folder(folder / request.param.replace(" ", "_"), request.param)


def answer(content="a", **more):
    return {"role": "assistant", "content": content, **more}


def open_file(path, tokenizer=BYTES, **kw):
    options = {"format": "auto", "fields": {}, "template": "auto", "on_bad_record": "error"} | kw
    return open_store(locate(str(path), count=10, seed=0), tokenizer, cache_dir=str(path.parent / "cache"), **options)


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def strings(tokenizer, tokens):
    return [tokenizer.backend.id_to_token(int(i)) for i in tokens]


@pytest.mark.parametrize("prompt", ["def f(", "the answer is", "日本", "a\n"])
@pytest.mark.parametrize("response", ["x)", " Paris", "語", "  two"])
def test_only_the_first_piece_has_a_prefix(prefixed, prompt, response):
    (scored,) = encode_records([("x:1", {"prompt": prompt, "response": response})], prefixed, "plain", prefixed.size)
    assert prefixed.decode(scored.tokens) == prompt + response
    assert strings(prefixed, scored.tokens)[1].startswith("▁"), "the text begins as the tokenizer has it"
    learned = scored.tokens[scored.mask]
    assert answer_decoder(prefixed, "plain")(learned) == response
    assert render_prompt(prompt, prefixed, "plain") == scored.tokens[: -len(learned)].tolist()


def test_score_and_choice_measure_the_same(prefixed):
    (scored,) = encode_records([("x:1", {"prompt": "it is", "response": " Paris"})], prefixed, "plain", prefixed.size)
    choice = encode_pair(prefixed, "it is", " Paris")
    assert choice.tokens.tolist() == scored.tokens[:-1].tolist()
    assert choice.mask.tolist() == scored.mask[:-1].tolist()


def test_a_space_before_every_stretch_is_known_where_line_breaks_are_spaces():
    import tokenizers as hf

    from research.sources.tokenizers import assemble

    backend = hf.Tokenizer(hf.models.BPE({c: i for i, c in enumerate(["▁", "a", "b", "(", "</s>"])}, []))
    backend.normalizer = hf.normalizers.Replace("\n", " ")
    backend.pre_tokenizer = hf.pre_tokenizers.Metaspace()
    backend.add_special_tokens(["</s>"])
    tokenizer = assemble(backend, 4, None)
    assert tokenizer.encode_stretches(["ab", "b"], special=False, first=True) == [[0, 1, 2], [0, 2]]
    assert tokenizer.encode_stretches(["ab", " b", ""], special=False, first=False) == [[1, 2], [0, 2], []]


@pytest.mark.parametrize("kind", ["gpt2", "with prefix at first"])
def test_templates_get_parts_where_they_want_them(tmp_path, kind):
    parts = make_folder(tmp_path / "parts", kind, PARTS)
    text = make_folder(tmp_path / "text", kind, CHATML)
    turns = [("system", "s"), ("user", "q </s> r"), ("assistant", "a"), ("user", "r"), ("assistant", "b")]
    tokens, mask, _ = encode([turns], parts, "model")
    expected, expected_mask, _ = encode([turns], text, "model")
    assert tokens.tolist() == expected.tolist()
    assert mask.tolist() == expected_mask.tolist()
    assert render_prompt("what?", parts, "auto") == render_prompt("what?", text, "auto")
    assert (parts.chat.parts_of, text.chat.parts_of) == (frozenset({"system", "user", "assistant"}), frozenset())


def test_parts_for_one_role_only(tmp_path):
    template = INST.replace("[INST] {{ m.content }}", "[INST] {{ m.content[0]['text'] }}")
    tokenizer = make_folder(tmp_path, "gpt2", template)
    assert tokenizer.chat.parts_of == {"user"}
    tokens, _, _ = encode([[("user", "why?"), ("assistant", "so")]], tokenizer, "model")
    assert tokenizer.decode(tokens, skip_special=False) == "[INST] why? [/INST]so</s>"


def test_what_a_template_leaves_out_is_refused(tmp_path):
    no_system = CHATML.replace("in messages %}", "in messages if m.role != 'system' %}")
    tokenizer = make_folder(tmp_path / "a", "gpt2", no_system)
    assert (tokenizer.chat.deaf_to, tokenizer.chat.parts_of) == ({"system"}, frozenset())
    assert encode([[("user", "q"), ("assistant", "a")]], tokenizer, "model")[1].any()
    with pytest.raises(InputError, match="x:1: the model's chat template leaves out what a system message says"):
        encode([[("system", "s"), ("user", "q"), ("assistant", "a")]], tokenizer, "model", ["x:1"])
    other_parts = PARTS.replace("part.text", "part.words")
    tokenizer = make_folder(tmp_path / "b", "gpt2", other_parts)
    with pytest.raises(InputError, match="leaves out what a user message says"):
        render_prompt("q", tokenizer, "auto")
    raises = "{% if messages[0].role == 'system' %}{{ raise_exception('No system!') }}{% endif %}" + CHATML
    assert make_folder(tmp_path / "c", "gpt2", raises).chat.deaf_to == frozenset()


def test_named_templates_without_a_default_are_refused(tmp_path):
    named = [{"name": "rag", "template": CHATML}, {"name": "tools", "template": CHATML}]
    tokenizer = make_folder(tmp_path, "gpt2", chat_template=named)
    for template in ("auto", "model"):
        with pytest.raises(InputError, match="the chat templates 'rag', 'tools', and none called 'default'"):
            resolve_template(template, tokenizer)
    assert resolve_template("plain", tokenizer) == "plain"
    make_folder(tmp_path, "gpt2")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text(CHATML)
    with pytest.raises(InputError, match="the chat templates 'rag', and none called 'default'"):
        resolve_template("auto", load_pretrained(tmp_path))
    named[0]["name"] = "default"
    assert resolve_template("auto", make_folder(tmp_path, "gpt2", chat_template=named)) == "model"


@pytest.mark.parametrize("template", [5, [5], [{"name": "default"}], [{"name": "default", "template": 5}], {"a": "b"}])
def test_a_chat_template_of_another_type_is_refused(tmp_path, template):
    with pytest.raises(InputError, match=r"tokenizer_config\.json: chat_template = .* is neither text nor a list"):
        make_folder(tmp_path, "gpt2", chat_template=template)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"messages": [QUESTION, answer()], "tools": [{"type": "function"}]}, "has tools"),
        ({"messages": [QUESTION, answer(tool_calls=[{"name": "f"}])]}, "has tool_calls"),
        ({"messages": [QUESTION, answer(None, tool_calls=[{"name": "f"}])]}, "has tool_calls"),
        ({"messages": [QUESTION, answer(reasoning_content="hm")]}, "has reasoning_content"),
        ({"messages": [{**QUESTION, "images": ["x.png"]}, answer()]}, "has images"),
        ({"messages": [QUESTION, answer(train=False)]}, "has train"),
        ({"prompt": "q", "response": "a", "tools": [{"type": "function"}]}, "has tools"),
        ({"messages": [{**QUESTION, "name": "Bob"}, answer()]}, "has name"),
        ({"prompt": "q", "response": "a", "functions": [{"name": "f"}]}, "has functions"),
    ],
)
def test_what_no_template_of_ours_writes_is_refused_everywhere(tmp_path, record, reason):
    kind = "messages" if "messages" in record else "prompt_response"
    with pytest.raises(BadRecord) as e:
        encode([check(record, kind, {})], BYTES, "auto")
    assert e.value.reason == reason
    path = write_lines(tmp_path / "x.jsonl", [record, {**record, "messages": [QUESTION, answer()], "tools": None}])
    with pytest.raises(InputError, match=rf"x\.jsonl:1: .*has '{reason[4:]}'"):
        open_file(path, format=kind)
    with pytest.raises(InputError, match=rf"x:1: .*has '{reason[4:]}'"):
        encode_records([("x:1", record)], BYTES, "chat", BYTES.size)
    if kind == "messages":  # which aren't a prompt's last answer
        write_lines(path, [{**record, "messages": [*record["messages"], QUESTION]}])
    prompt = read_prompts(str(path))[0]
    for system in (None, "be kind"):
        with pytest.raises(InputError, match=rf"x\.jsonl:1: .*has '{reason[4:]}'"):
            PromptEncoder(BYTES, "chat", system, 99, "")(prompt)


def test_empty_columns_of_other_records_are_nothing(tmp_path):
    record = {"messages": [QUESTION, answer(tool_calls=None, weight=None, train=True)], "tools": []}
    assert check(record, "messages", {}) == [Turn("user", "q"), Turn("assistant", "a")]


MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    + ("</s>{% endgeneration %}{% else %}{{ m.content }}</s>{% endif %}{% endfor %}")
)


@pytest.mark.parametrize("template", ["chat", "plain", CHATML, MARKED], ids=["chat", "plain", "model", "marked"])
@pytest.mark.parametrize("first", [0, 1])
def test_a_weight_of_0_masks_an_answer(tmp_path, template, first):
    tokenizer = BYTES if template in ("chat", "plain") else make_folder(tmp_path, "gpt2", template)
    name = template if tokenizer is BYTES else "model"
    weights = (first, 1 - first)
    messages = [QUESTION, answer("one", weight=weights[0]), QUESTION, answer("two", weight=weights[1])]
    turns = check({"messages": messages}, "messages", {})
    assert [turn.role for turn in turns if turn.role != "user"] == ["assistant" if w else SHOWN for w in weights]
    tokens, mask, _ = encode([turns], tokenizer, name)
    all_learned = [("user", "q"), ("assistant", "one"), ("user", "q"), ("assistant", "two")]
    same, whole_mask, _ = encode([all_learned], tokenizer, name)
    assert tokens.tolist() == same.tolist(), "the model reads the same"
    assert mask.sum() < whole_mask.sum()
    end = "<|eos|>" if tokenizer is BYTES else "</s>"
    learned = "one" if weights[0] else "two"
    assert tokenizer.decode(tokens[mask], skip_special=False) == learned + end


@pytest.mark.parametrize("weight", [0.5, 2, -1, float("nan"), "0", [1]])
def test_other_weights_are_refused(weight):
    with pytest.raises(BadRecord, match=r"message 2, of role 'assistant', has weight .*1, to be learned, or 0"):
        check({"messages": [QUESTION, answer(weight=weight)]}, "messages", {})


def test_nobody_learns_what_a_user_says():
    assert check({"messages": [{**QUESTION, "weight": 0}, answer()]}, "messages", {})[0] == Turn("user", "q")
    with pytest.raises(BadRecord, match="message 1, of role 'user', has weight 1; it must be 0"):
        check({"messages": [{**QUESTION, "weight": 1}, answer()]}, "messages", {})


def test_an_answer_of_weight_0_is_not_one_to_expect(tmp_path):
    records = [{"messages": [{"role": "user", "content": f"q{i}"}, answer(weight=i % 2)]} for i in range(4)]
    opened = open_file(write_lines(tmp_path / "x.jsonl", records))
    assert sorted(sample["record"]["messages"][0]["content"] for sample in opened.samples) == ["q1", "q3"]
    assert (opened.supervised > 0).tolist() == [False, True, False, True]


PAIRS = [{"prompt": f"p{i}", "response": f"r{i}"} for i in range(3)]


def test_skip_skips_every_kind_of_bad_record(tmp_path):
    refusing = "{% if '7' in messages[0].content %}{{ raise_exception('No!') }}{% endif %}" + CHATML
    tokenizer = make_folder(tmp_path / "tokenizer", "gpt2", refusing)
    lines = [
        {"version": 1},
        *PAIRS,
        {"prompt": "7", "response": "r"},
        {"prompt": "a", "response": "r", "tools": [{"name": "f"}]},
        {"prompt": "last", "response": "r"},
    ]
    path = write_lines(tmp_path / "x.jsonl", lines)
    with open(path, "a") as file:
        file.write('{"prompt": ' + "9" * 5000 + "}\n" + "[" * 100_000 + "\n")
    with pytest.raises(InputError, match=r"x\.jsonl:1: has the fields 'version'.*data\.on_bad_record='skip'"):
        open_file(path, tokenizer)
    opened = open_file(path, tokenizer, on_bad_record="skip")
    assert opened.counts["records"] == 9
    assert opened.counts["bad"] == {
        "unknown format": 1,
        "refused by the chat template": 1,
        "has tools": 1,
        "nested too deep": 1,
        "number too long": 1,
    }
    assert len(opened.length) == len(opened.key) == 4
    assert tokenizer.decode(opened.tokens[-opened.length[-1] :]) == "user\nlast\nassistant\nr\n"
    with pytest.raises(InputError, match=r"y\.jsonl:2: .*No!.*data\.on_bad_record='skip'"):
        open_file(write_lines(tmp_path / "y.jsonl", [PAIRS[0], lines[4]]), tokenizer)
    with pytest.raises(InputError, match=r"no usable record \(1 bad: refused by the chat template\)"):
        open_file(write_lines(tmp_path / "z.jsonl", [lines[4]]), tokenizer, on_bad_record="skip")


def test_chunks_that_are_skipped_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "_CHUNK_EXAMPLES", 1)
    refusing = "{% if '7' in messages[0].content %}{{ raise_exception('No!') }}{% endif %}" + CHATML
    tokenizer = make_folder(tmp_path / "tokenizer", "gpt2", refusing)
    path = write_lines(tmp_path / "x.jsonl", [{"prompt": "7", "response": "r"}, *PAIRS])
    assert len(open_file(path, tokenizer, on_bad_record="skip").length) == 3


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x.json", "x.txt"])
def test_byte_order_marks_of_data_are_dropped(tmp_path, name):
    text = {"x.txt": "word", "x.json": '[{"text": "word"}]'}.get(name, '{"text": "word"}\n')
    content = codecs.BOM_UTF8 + text.encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    ((_, raw),) = locate(str(tmp_path / name), count=1, seed=0).read()
    assert check(parse(raw), "text", {}) == [Turn("text", "word")]
    assert BYTES.decode(open_file(tmp_path / name).tokens) == "word"


def test_byte_order_marks_of_prompts_and_models_are_dropped(tmp_path):
    (tmp_path / "p.txt").write_bytes(codecs.BOM_UTF8 + b"one\ntwo\n")
    (tmp_path / "p.jsonl").write_bytes(codecs.BOM_UTF8 + b'{"prompt": "one"}\n')
    assert [prompt.record for prompt in read_prompts(str(tmp_path / "p.txt"))] == ["one", "two"]
    assert read_prompts(str(tmp_path / "p.jsonl"))[0].record == {"prompt": "one"}
    (tmp_path / "config.json").write_bytes(codecs.BOM_UTF8 + b'{"model_type": "llama"}')
    assert read_json(tmp_path / "config.json") == {"model_type": "llama"}
    model = tmp_path / "model"
    plain = make_folder(model, "gpt2", CHATML)
    (model / "special_tokens_map.json").write_text('{"pad_token": "</s>"}')
    (model / "generation_config.json").write_text('{"eos_token_id": 2}')
    plain = load_pretrained(model)
    for file in model.iterdir():
        file.write_bytes(codecs.BOM_UTF8 + file.read_bytes())
    marked = load_pretrained(model)
    assert marked.fingerprint() == plain.fingerprint()
    assert marked.files == plain.files
    assert render_prompt("q", marked, "model") == render_prompt("q", plain, "model")


def test_rendered_text_is_counted_and_said(tmp_path, capsys):
    tokenizer = make_folder(tmp_path / "tokenizer", "gpt2", CHATML)
    rendered = "<|im_start|>user\nq</s>"
    records = [{"text": rendered}, {"text": "a < b"}, {"text": f"{rendered}{rendered}"}]
    counts = open_file(write_lines(tmp_path / "x.jsonl", records), tokenizer).counts
    assert (counts["markers"], counts["marker"], counts["records"]) == (2, "<|im_start|>", 3)
    again = open_file(tmp_path / "x.jsonl", tokenizer)
    assert again.was_cached
    assert again.counts == counts
    prompts = [rendered, "fine", {"prompt": rendered}, {"messages": [{"role": "user", "content": rendered}]}]
    say_markers("--data", prompts, tokenizer)
    assert capsys.readouterr().err.startswith(
        "--data: 3 of 4 records spell special tokens of this tokenizer, such as '<|im_start|>', and are read as plain"
    )
    say_markers("prompts", [{"prefix": "a", "suffix": "<|im_start|>user"}, {"prefix": "a", "suffix": ""}], tokenizer)
    assert "prompts: 1 of 2 records" in capsys.readouterr().err
    say_markers("--data", ["fine"], tokenizer)
    assert not capsys.readouterr().err


def test_answers_keep_the_space_that_begins_them(prefixed):
    ids = prefixed.encode_stretches([" Paris"], special=False, first=False)[0]
    assert prefixed.decode(ids) == "Paris"
    assert prefixed.decode_after(ids) == " Paris"
    assert prefixed.decode_after([]) == ""
    assert answer_decoder(BYTES, "chat")(list(b" x")) == " x"


def test_policy_and_teacher_read_the_same_records(tmp_path):
    refusing = "{% if '7' in messages[0].content %}{{ raise_exception('No!') }}{% endif %}" + CHATML
    teacher = make_folder(tmp_path / "teacher", "gpt2", refusing)
    path = write_lines(tmp_path / "x.jsonl", [{"prompt": f"p{i}", "response": "r"} for i in range(12)])
    spec = DataSpec(path=str(path), seq_len=64, on_bad_record="skip", cache_dir=str(tmp_path / "cache"))
    with pytest.raises(InputError, match=r"data\.path: '.*x\.jsonl' has records that the chat template of the policy"):
        load(spec, TokenizerSpec(), BYTES, teacher=teacher)


@pytest.mark.parametrize("kind", ["gpt2", "with prefix"])
def test_a_prompt_begins_as_in_training_where_no_token_parts_the_turns(tmp_path, kind):
    bare = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    bare += "{{ '[assistant]' if add_generation_prompt else '</s>' }}"
    tokenizer = make_folder(tmp_path, kind, bare)
    for i in range(0, 80, 4):
        texts = zip(["user", "assistant"] * 2, TEXTS[i : i + 4], strict=True)
        said = [{"role": role, "content": text} for role, text in texts]
        tokens, _, _ = encode([check({"messages": said}, "messages", {})], tokenizer, "model")
        prompt = render_prompt({"messages": said[:3]}, tokenizer, "model")
        assert tokens[: len(prompt)].tolist() == prompt
