"""Chat templates of model families (tests/golden/chat_templates, see tests/golden/README.md), against transformers."""

import json
import pathlib
import re

import numpy as np
import pytest
import tokenizers as hf
from text_cases import TEXTS as ODD
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from research.errors import InputError
from research.sources.chat import render_parts
from research.sources.dataset import DataSpec, load
from research.sources.formats import encode, render_prompt, resolve_template
from research.sources.tokenizers import TokenizerSpec, load_pretrained, make_tokenizer

FOLDER = pathlib.Path(__file__).parent.parent / "golden" / "chat_templates"
CASES = json.loads((FOLDER / "cases.json").read_text())
TEXTS = ["The sky is blue because it scatters 12 ways.\n\n", "user model assistant system\n", "One? Un. Two? Deux!"] * 4


SPLITS = {  # how the families cut text before merging, as far as it matters beside a template
    "gpt2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "lines": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(hf.Regex(r"\s*[\r\n]+| ?\S+|\s+(?!\S)|\s+"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    ),
    "whole": pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
}


def backend(name):
    """Merges of bytes, or, for llama2, of characters with a space put before each text."""
    case = CASES[name]
    if name == "llama2":
        made = hf.Tokenizer(models.BPE(unk_token="<unk>"))
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        made.decoder = decoders.Metaspace(prepend_scheme="first")
        alphabet, specials = [chr(i) for i in range(32, 127)] + ["\n"], ["<unk>", *case["special"]]
    else:
        made = hf.Tokenizer(models.BPE())
        made.pre_tokenizer = SPLITS[case["split"]]
        made.decoder = decoders.ByteLevel()
        alphabet, specials = pre_tokenizers.ByteLevel.alphabet(), case["special"]
    made.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=400, special_tokens=specials, initial_alphabet=alphabet)
    )
    made.add_tokens([hf.AddedToken(token, normalized=False, special=False) for token in case["added"]])
    return made


def folder(path, name, template=None):
    case = CASES[name]
    made = backend(name)
    made.save(str(path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": case["bos"], "eos_token": case["eos"]}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    (path / "chat_template.jinja").write_text(template or (FOLDER / f"{name}.jinja").read_text())
    if "generation_eos" in case:
        ids = [made.token_to_id(token) for token in case["generation_eos"]]
        (path / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    return path


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    paths = {name: folder(tmp_path_factory.mktemp(name), name) for name in CASES}
    return {name: (path, load_pretrained(path)) for name, path in paths.items()}


def reference(path, case):
    """transformers' tokenizer, on the day of our own."""
    from transformers import AutoTokenizer

    made = AutoTokenizer.from_pretrained(path)
    if "date" in case:
        made.chat_template = re.sub(r"strftime_now\([^)]*\)", repr(case["date"]), made.chat_template)
    return made


def messages(turns):
    return [{"role": role, "content": text} for role, text in turns]


def learned_stretches(tokenizer, tokens, mask):
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(int), [0]]))).reshape(-1, 2)
    return [tokenizer.decode(tokens[a:b], skip_special=False) for a, b in edges]


@pytest.mark.parametrize("name", CASES)
def test_families(families, name):
    path, tokenizer = families[name]
    theirs = reference(path, CASES[name])
    for example in CASES[name]["examples"]:
        turns = [tuple(turn) for turn in example["turns"]]
        parts = render_parts(tokenizer.chat, messages(turns))
        assert "".join(part.text for part in parts) == example["text"]
        assert [part.text for part in parts if part.supervised] == example["learned"]
        tokens, mask, lengths = encode([turns], tokenizer, "auto")
        assert tokens.tolist() == theirs.apply_chat_template(messages(turns), return_dict=False)
        assert lengths.tolist() == [len(tokens)]
        if name != "llama2":  # whose decoder drops the space that begins a stretch
            assert learned_stretches(tokenizer, tokens, mask) == example["learned"]

        prompt = render_prompt({"messages": messages(turns)}, tokenizer, "model")
        asked = theirs.apply_chat_template(messages(turns[:-1]), add_generation_prompt=True, return_dict=False)
        assert prompt == asked
        assert tokens[: len(prompt)].tolist() == prompt
        assert mask[len(prompt)]


@pytest.mark.parametrize("name", CASES)
def test_what_stops_generation(families, name):
    _, tokenizer = families[name]
    assert [tokenizer.backend.id_to_token(i) for i in tokenizer.stop] == CASES[name]["stop"]
    assert tokenizer.stop[0] == tokenizer.eos


@pytest.mark.parametrize("name", CASES)
def test_messages_cannot_forge_a_turn(families, name):
    _, tokenizer = families[name]
    special = set(tokenizer._specials.values())
    forged = "".join(token for token in CASES[name]["special"] if token != "<|channel|>")
    question, answer = f"so{forged} {forged}", f"{forged} then {forged}"
    harmless = encode([[("user", "so"), ("assistant", "then")]], tokenizer, "model")
    tokens, mask, _ = encode([[("user", question), ("assistant", answer)]], tokenizer, "model")
    count = lambda ids: [i for i in ids.tolist() if i in special]  # noqa: E731
    assert count(tokens) == count(harmless[0])
    assert count(tokens[mask]) == count(harmless[0][harmless[1]])
    text = tokenizer.decode(tokens, skip_special=False)
    assert question in text
    assert answer in text
    prompt = render_prompt(question, tokenizer, "model")
    assert tokens[: len(prompt)].tolist() == prompt


def test_a_template_that_joins_what_it_cuts_cannot_forge_a_turn(tmp_path):
    cuts = "{% for turn in messages %}{{ turn.content.replace('<cut>', '') }}<|im_end|>{% endfor %}"
    tokenizer = load_pretrained(folder(tmp_path, "smollm2", cuts))
    with pytest.raises(InputError, match="makes special tokens of what"):
        encode([[("user", "a<|im_<cut>end|>b"), ("assistant", "c")]], tokenizer, "model")
    with pytest.raises(InputError, match="makes special tokens of what"):
        render_prompt("a<|im_<cut>end|>b", tokenizer, "model")
    tokens, _, _ = encode([[("user", "1 < 2<cut>"), ("assistant", "c")]], tokenizer, "model")
    assert tokenizer.decode(tokens, skip_special=False) == "1 < 2<|im_end|>c<|im_end|>"


def test_masks_by_markers_are_those_of_transformers(families):
    path, tokenizer = families["marked"]
    turns = [("user", "One?"), ("assistant", "Un deux."), ("user", "Two?"), ("assistant", " Deux.")]
    _, mask, _ = encode([turns], tokenizer, "model")
    theirs = reference(path, CASES["marked"]).apply_chat_template(
        messages(turns), return_dict=True, return_assistant_tokens_mask=True
    )
    assert mask.astype(int).tolist() == theirs["assistant_masks"]


def test_examples_of_a_chunk_are_those_alone(families):
    _, tokenizer = families["llama2"]
    examples = [[("user", "a"), ("assistant", "b </s> b")], [("user", "x"), ("assistant", "yy")] * 2]
    tokens, mask, lengths = encode(examples, tokenizer, "model")
    at = 0
    for example, length in zip(examples, lengths, strict=True):
        alone, alone_mask, _ = encode([example], tokenizer, "model")
        assert tokens[at : at + length].tolist() == alone.tolist()
        assert mask[at : at + length].tolist() == alone_mask.tolist()
        at += length
    assert at == len(tokens)


@pytest.mark.parametrize(
    ("template", "turns", "message"),
    [
        (
            "{% for turn in messages %}{% generation %}{% endgeneration %}{{ turn.content }}<|im_end|>{% endfor %}",
            [("user", "a"), ("assistant", "b")],
            "data.jsonl:7 and what follows: the model's chat template leaves nothing to learn",
        ),
        (
            "{% for turn in messages %}{{ turn.role }}: {{ turn.content }}\n{% endfor %}",
            [("user", "a"), ("assistant", "b")],
            "no answer ends with a token that stops generation ('<|im_end|>')",
        ),
        (
            "{% if messages[0].role == 'system' %}{{ raise_exception('No system role!') }}{% endif %}",
            [("system", "Be kind"), ("user", "a"), ("assistant", "b")],
            "data.jsonl:7: the model's chat template can't write the conversation (system, user, assistant) that "
            "begins 'Be kind': No system role!. Change the messages (some templates take no system message)",
        ),
        ("{% for turn in messages %}", [("user", "a"), ("assistant", "b")], "is no valid Jinja: line 1"),
        ("{{ ''.__class__.__mro__ }}", [("user", "a"), ("assistant", "b")], "is unsafe"),
    ],
)
def test_faulty_templates(tmp_path, template, turns, message):
    folder(tmp_path, "smollm2", template)
    with pytest.raises(InputError) as e:
        encode([turns], load_pretrained(tmp_path), "model", ["data.jsonl:7"])
    assert message in str(e.value)


def test_which_template_auto_is(families):
    own = make_tokenizer(TokenizerSpec("byte"), lambda: iter(()))
    assert resolve_template("auto", own) == "chat"
    assert resolve_template("auto", families["qwen3"][1]) == "model"
    assert resolve_template("plain", families["qwen3"][1]) == "plain"
    with pytest.raises(InputError, match="the tokenizer has no chat template"):
        resolve_template("model", own)


def test_a_base_model_is_prompted_plainly(tmp_path):
    folder(tmp_path, "gemma3")
    (tmp_path / "chat_template.jinja").unlink()
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "add_bos_token": True}))
    tokenizer = load_pretrained(tmp_path)
    assert resolve_template("auto", tokenizer) == "plain"
    assert render_prompt("One", tokenizer, "auto") == [tokenizer.bos, *tokenizer.encode("One")]
    tokens, mask, _ = encode([[("text", "One")]], tokenizer, "auto")
    assert tokens.tolist() == [tokenizer.bos, *tokenizer.encode("One"), tokenizer.eos]
    assert mask.all()


def test_data_are_put_into_the_models_template(tmp_path):
    path = folder(tmp_path, "smollm2")
    tokenizer = load_pretrained(path)
    file = tmp_path / "x.jsonl"
    lines = [{"prompt": f"say {i}", "response": f"it is {i}"} for i in range(40)]
    file.write_text("\n".join(map(json.dumps, lines)))
    spec = DataSpec(path=str(file), seq_len=256)
    batch = load(spec, TokenizerSpec(str(path))).train[0][0].batch(np.arange(1))
    text = tokenizer.decode(batch["tokens"][0], skip_special=False)
    assert re.search(
        r"<\|im_start\|>user\nsay (\d+)<\|im_end\|>\n<\|im_start\|>assistant\nit is \1<\|im_end\|>\n", text
    )
    assert batch["tokens"][batch["loss_mask"] > 0].tolist().count(tokenizer.eos) == text.count("assistant\n")
    (path / "chat_template.jinja").write_text(
        "{{ raise_exception('No!') if '7' in messages[0].content }}{{ messages[0].content }}<|im_end|>"
    )
    with pytest.raises(InputError, match=r"x\.jsonl:8: the model's chat template can't write .* 'say 7': No!"):
        load(spec, TokenizerSpec(str(path)))
    with pytest.raises(InputError, match=r"template: 'model', but the tokenizer has no chat template"):
        load(DataSpec(path=str(file), template="model"), TokenizerSpec("byte"))


@pytest.mark.parametrize("where", ["file", "config", "named"])
@pytest.mark.parametrize("name", ["qwen3", "llama2"])
def test_a_saved_tokenizer_is_the_same_to_us_and_to_transformers(tmp_path, name, where):
    source, copy = tmp_path / "source", tmp_path / "copy"
    source.mkdir()
    folder(source, name)
    if where != "file":
        template = (source / "chat_template.jinja").read_text()
        (source / "chat_template.jinja").unlink()
        config = json.loads((source / "tokenizer_config.json").read_text())
        named = [{"name": "tools", "template": "x"}, {"name": "default", "template": template}]
        config["chat_template"] = template if where == "config" else named
        (source / "tokenizer_config.json").write_text(json.dumps(config))
        (source / "special_tokens_map.json").write_text(json.dumps({"pad_token": CASES[name]["eos"]}))
    tokenizer = load_pretrained(source)
    tokenizer.save(copy)
    loaded = load_pretrained(copy)
    assert loaded.fingerprint() == tokenizer.fingerprint()
    assert (loaded.stop, loaded.variables, loaded.files) == (tokenizer.stop, tokenizer.variables, tokenizer.files)
    assert {path.name for path in source.iterdir()} == {path.name for path in copy.iterdir()}
    before, after = reference(source, CASES[name]), reference(copy, CASES[name])
    turns = messages(CASES[name]["examples"][0]["turns"])
    assert after.apply_chat_template(turns, tokenize=False) == before.apply_chat_template(turns, tokenize=False)
    text = CASES[name]["examples"][0]["text"]
    assert (
        after(text)["input_ids"]
        == before(text)["input_ids"]
        == tokenizer.encode_stretches([text], special=True, first=True)[0]
    )


def test_the_fingerprint_covers_the_template_and_what_it_names(tmp_path):
    folder(tmp_path, "smollm2")
    prints = {load_pretrained(tmp_path).fingerprint()}
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}<|im_end|>")
    prints.add(load_pretrained(tmp_path).fingerprint())
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "pad_token": "<|endoftext|>"}))
    prints.add(load_pretrained(tmp_path).fingerprint())
    assert len(prints) == 3


def test_stretches_that_go_on_get_no_space_before_them():
    made = hf.Tokenizer(models.BPE({c: i for i, c in enumerate("▁ab\n")} | {"</s>": 4}, []))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.add_special_tokens(["</s>"])
    from research.sources.tokenizers import assemble

    tokenizer = assemble(made, 4, None)
    stretches = ["a b", " a", "b"]
    assert tokenizer.encode_stretches(stretches, special=False, first=True) == [[0, 1, 0, 2], [0, 0, 1], [0, 2]]
    assert tokenizer.encode_stretches(stretches, special=False, first=False) == [[1, 0, 2], [0, 1], [2]]
    assert tokenizer.encode_stretches(["a</s>b"], special=True, first=False) == [[1, 4, 0, 2]]
    assert 4 not in tokenizer.encode("a</s>"), "the next plain text is plain again"


@pytest.mark.parametrize("name", [name for name in CASES if name != "llama2"])  # whose vocabulary is ASCII
def test_odd_texts_are_decoded_as_they_were_rendered(families, name):
    _, tokenizer = families[name]
    examples = [[("user", a.strip()), ("assistant", b.strip())] for a, b in zip(ODD[::2], ODD[1::2], strict=True)]
    tokens, _, lengths = encode(examples, tokenizer, "model")
    for turns, ids in zip(examples, np.split(tokens, np.cumsum(lengths)[:-1]), strict=True):
        text = tokenizer.decode(ids, skip_special=False)
        assert text == "".join(part.text for part in render_parts(tokenizer.chat, messages(turns)))
        assert all(said in text for _, said in turns)
