"""Tokenizers of many kinds, chat templates and odd texts, made for tests."""

import json
import random

import tokenizers as hf
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from research.sources.tokenizers import load_pretrained

POOLS = (
    ["🎉", "👩🏽‍🚀", "🏳️‍🌈", "🇺🇳", "❤️", "👨‍👩‍👧"],
    ["e\u0301", "n\u0303", "Z\u0361\u0322a\u0300", "\u1112\u1161\u11ab", "ﬁ", "İ", "ß"],
    ["日本語", "漢字かな", "中文。", "한국어", "「引用」", "你好，世界"],
    ["def f(", "x)", "\treturn x[0] != {'a': 1}\n", "#include <stdio.h>\n", "##", "a_b->c++;", "0x1F", "12345.678"],
    [" ", "  ", "\n", "\n\n", "\t", "\u00a0", "\u3000", "\r\n", "   \n  "],
    ["the", "Cat", "naïve", "IS", "Paris", "it's", ".", ",", "(", "?!", "العربية", "हिन्दी", "\u200b"],
    ["<|im_start|>user", "<|eos|>", "</s>", "[INST]", "<|user|>", "<|im_"],
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INST = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
PARTS = CHATML.replace("{{ m.content }}", "{% for part in m.content %}{{ part.text }}{% endfor %}")
SPECIALS = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
GPT2 = r"'(?:s|t|re|ve|m|ll|d)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def fuzz(count=200, seed=7):
    """Texts that aren't blank."""
    draw = random.Random(seed)
    texts = []
    while len(texts) < count:
        text = "".join(draw.choice(draw.choice(POOLS)) for _ in range(draw.randint(1, 20)))
        if text.strip():
            texts.append(text)
    return texts


TEXTS = fuzz()


def byte_level(pattern):
    backend = hf.Tokenizer(models.BPE())
    split = pre_tokenizers.Split(hf.Regex(pattern), behavior="isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(TEXTS, trainer)
    return backend


def qwen():
    backend = byte_level(CL100K.replace("{1,3}", ""))
    backend.normalizer = normalizers.NFC()
    return backend


def llama3():
    backend = byte_level(CL100K)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return backend


def sentencepiece(normalizer, pre_tokenizer, decoder):
    """Merges of characters, and bytes for those that the vocabulary lacks."""
    learner = hf.Tokenizer(models.BPE())
    learner.normalizer, learner.pre_tokenizer = normalizers.Replace(" ", "▁"), pre_tokenizers.Whitespace()
    learner.train_from_iterator(TEXTS[::2], trainers.BpeTrainer(vocab_size=500, show_progress=False, limit_alphabet=99))
    state = json.loads(learner.to_str())["model"]
    tokens = [*SPECIALS, *(f"<0x{i:02X}>" for i in range(256)), "▁", *state["vocab"]]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    merges = [tuple(merge) for merge in state["merges"]]
    backend = hf.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if normalizer:
        backend.normalizer = normalizer
    if pre_tokenizer:
        backend.pre_tokenizer = pre_tokenizer
    backend.decoder = decoder
    backend.add_special_tokens(SPECIALS)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return backend


WORDS = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]


def with_prefix():
    """As Llama 2's tokenizer.json has it."""
    spaces = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return sentencepiece(spaces, None, decoders.Sequence([*WORDS, decoders.Strip(" ", 1, 0)]))


def with_prefix_at_first():
    """The same as newer versions of transformers convert it: no prefix after special tokens."""
    first = {"prepend_scheme": "first", "split": False}
    strip = decoders.Strip(" ", 1, 0)
    return sentencepiece(None, pre_tokenizers.Metaspace(**first), decoders.Sequence([*WORDS, strip]))


def without_prefix():
    return sentencepiece(normalizers.Replace(" ", "▁"), None, decoders.Sequence(WORDS))


def word_piece():
    backend = hf.Tokenizer(models.WordPiece(unk_token="<unk>", max_input_chars_per_word=10_000))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(cleanup=False)
    letters = sorted(set(backend.normalizer.normalize_str("".join(TEXTS) + "<|/abcdefghijklmnopqrstuvwxyz|>")))
    trainer = trainers.WordPieceTrainer(
        vocab_size=2000, special_tokens=SPECIALS, initial_alphabet=letters, show_progress=False
    )
    backend.train_from_iterator([*TEXTS, "".join(letters)], trainer)
    return backend


BACKENDS = {
    "gpt2": lambda: byte_level(GPT2),
    "with prefix": with_prefix,
    "with prefix at first": with_prefix_at_first,
    "without prefix": without_prefix,
    "word piece": word_piece,
    "qwen": qwen,
    "llama3": llama3,
}


def make_folder(folder, kind, template="", **config):
    """Writes a tokenizer of BACKENDS and what lies beside it into a folder; returns it as it is read from there."""
    folder.mkdir(exist_ok=True)
    BACKENDS[kind]().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "bos_token": "<s>", **config}))
    if template:
        (folder / "chat_template.jinja").write_text(template)
    return load_pretrained(folder)
