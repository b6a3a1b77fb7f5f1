import json

import gguf
import pytest
import tokenizers as hf

from research.errors import InputError
from research.pretrained.gguf_file import read_header
from research.sources.tokenizers import TokenizerSpec, load_pretrained, make_tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>\n{% endfor %}"
BYTES = sorted(hf.pre_tokenizers.ByteLevel.alphabet())


def write(path, model, tokens, types, *, scores=None, merges=None, pre=None, **numbers):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(model)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if scores:
        writer.add_token_scores(scores)
    if merges:
        writer.add_token_merges(merges)
    if pre:
        writer.add_tokenizer_pre(pre)
    for name, number in numbers.items():
        getattr(writer, f"add_{name}")(number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def byte_level(path, pre, **told):
    tokens = [*BYTES, "he", "ll", "hell", "Ġhell", "12", "ĊĊ", "<|im_start|>", "<|im_end|>", "<think>"]
    merges = ["h e", "l l", "he ll", "Ġ hell", "1 2", "Ċ Ċ"]
    types = [NORMAL] * (len(tokens) - 3) + [CONTROL, CONTROL, USER_DEFINED]
    numbers = {"eos_token_id": tokens.index("<|im_end|>"), "bos_token_id": tokens.index("<|im_start|>")}
    return write(path, "gpt2", tokens, types, merges=merges, pre=pre, **numbers, **told)


def sentencepiece(path, **told):
    pieces = {"▁": -9, "a": -1, "b": -2, "c": -3, "ab": -4, "bc": -5, "▁ab": -6, "abc": -7}
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces, "  ", "<end_of_turn>"]
    types = [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * len(pieces) + [USER_DEFINED, CONTROL]
    scores = [0.0] * 259 + [float(score) for score in pieces.values()] + [-1000.0, 0.0]
    numbers = {"unk_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "eot_token_id": len(tokens) - 1}
    return write(path, "llama", tokens, types, scores=scores, **numbers, **told)


def spell(tokenizer, text):
    return [tokenizer.backend.id_to_token(i) for i in tokenizer.encode(text)]


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", ["hell", "o", "Ġhell", "Ġ", "12", "Ċ", "Ċ", "x", "<think>"]),
        ("smollm", ["hell", "o", "Ġhell", "Ġ", "1", "2", "Ċ", "Ċ", "x", "<think>"]),
        ("qwen2", ["hell", "o", "Ġhell", "Ġ", "1", "2", "ĊĊ", "x", "<think>"]),
        ("llama-bpe", ["hell", "o", "Ġhell", "Ġ", "12", "ĊĊ", "x", "<think>"]),
    ],
)
def test_byte_level(tmp_path, pre, pieces):
    path = byte_level(tmp_path / "x.gguf", pre, chat_template=TEMPLATE, add_bos_token=False)
    tokenizer = make_tokenizer(TokenizerSpec(str(path)), lambda: iter(()))
    text = "hello hell 12\n\nx<think>"
    assert spell(tokenizer, text) == pieces
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.eos not in tokenizer.encode("<|im_end|>")
    assert tokenizer.bos is None
    assert tokenizer.chat_template == TEMPLATE
    assert tokenizer.stop == (tokenizer.eos,)


def test_who_adds_a_beginning(tmp_path):
    assert load_pretrained(byte_level(tmp_path / "a.gguf", "gpt-2")).bos is None
    assert load_pretrained(byte_level(tmp_path / "b.gguf", "llama-bpe")).bos is not None
    assert load_pretrained(sentencepiece(tmp_path / "c.gguf")).bos == 1
    assert load_pretrained(sentencepiece(tmp_path / "d.gguf", add_bos_token=False)).bos is None


def test_sentencepiece(tmp_path):
    tokenizer = load_pretrained(sentencepiece(tmp_path / "x.gguf"))
    assert spell(tokenizer, "abc") == ["▁ab", "c"], "ab has a better score than bc, and ▁ab than abc"
    assert spell(tokenizer, "cabc") == ["▁", "c", "abc"]
    assert spell(tokenizer, "a  b") == ["▁", "a", "  ", "▁", "b"]
    assert spell(tokenizer, "é") == ["▁", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(tokenizer.encode("cabc é")) == "cabc é"
    assert not {1, 2} & set(tokenizer.encode("<s>a</s>"))
    assert [tokenizer.backend.id_to_token(i) for i in tokenizer.stop] == ["</s>", "<end_of_turn>"]
    bare = load_pretrained(sentencepiece(tmp_path / "y.gguf", add_space_prefix=False))
    assert spell(bare, "abc") == ["abc"]
    assert load_pretrained(tmp_path / "x.gguf", eos_token="<end_of_turn>").eos == tokenizer.stop[1]


@pytest.mark.parametrize("make", [lambda p: byte_level(p, "smollm", chat_template=TEMPLATE), sentencepiece])
def test_saved_it_is_the_same_to_us_and_to_transformers(tmp_path, make):
    from transformers import AutoTokenizer

    tokenizer = load_pretrained(make(tmp_path / "x.gguf"))
    tokenizer.save(tmp_path / "saved")
    (tmp_path / "saved" / "config.json").write_text('{"config": {}}')  # a run's own
    loaded = load_pretrained(tmp_path / "saved")
    assert loaded.fingerprint() == tokenizer.fingerprint()
    assert loaded.files == tokenizer.files
    theirs = AutoTokenizer.from_pretrained(tmp_path / "saved")
    begins = [] if tokenizer.bos is None else [tokenizer.bos]
    assert theirs("hello ab é\n")["input_ids"] == begins + tokenizer.encode("hello ab é\n")
    assert (theirs.eos_token_id, theirs.chat_template) == (tokenizer.eos, tokenizer.chat_template)


def test_metadata(tmp_path):
    metadata = read_header(byte_level(tmp_path / "x.gguf", "gpt-2", rope_freq_base=1e4)).metadata
    assert metadata["general.architecture"] == "llama"
    assert metadata["llama.rope.freq_base"] == 1e4
    assert metadata["tokenizer.ggml.tokens"][256:258] == ["he", "ll"]
    assert metadata["tokenizer.ggml.token_type"][-1] == USER_DEFINED


def test_bad_files(tmp_path):
    good = byte_level(tmp_path / "good.gguf", "gpt-2").read_bytes()

    def message(name, content):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError) as e:
            load_pretrained(tmp_path / name)
        assert name in str(e.value)
        return str(e.value)

    assert "is no little-endian GGUF file" in message("a.gguf", json.dumps({"x": [1] * 99}).encode())
    for size in (0, 10, 30, len(good) // 2):
        assert "can't be read (EOFError: it " in message("b.gguf", good[:size])
    unknown = byte_level(tmp_path / "u.gguf", "smolm").read_bytes()
    assert "tokenizer.ggml.pre = 'smolm': how this cuts text isn't known. Did you mean 'smollm'?" in message(
        "c.gguf", unknown
    )
    other = write(tmp_path / "o.gguf", "bert", ["a"], [NORMAL]).read_bytes()
    assert "tokenizer.ggml.model = 'bert' is neither 'gpt2' nor 'llama'" in message("d.gguf", other)
