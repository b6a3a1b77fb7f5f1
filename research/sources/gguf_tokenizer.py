"""The tokenizer inside a .gguf file: its vocabulary is stored there, and how to use it only by name.

Formats: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. What a name stands for is llama.cpp's to say
(src/llama-vocab.cpp); where the models' own tokenizer.json differs from that (NFC in Qwen's), it is followed.
"""

import math
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from research.errors import InputError, did_you_mean
from research.pretrained.gguf_file import read_header

_LONGEST_TOKEN = 4096
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # types of tokens

# How text is cut before merges apply: one pattern, or several, one after the other.
_SPACES = r"\s+(?!\S)|\s+"
_SIGNS = r" ?[^\s\p{L}\p{N}]+"
_SHORT = r"'(?:s|t|re|ve|m|ll|d)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*")
_GPT2 = rf"{_SHORT}| ?\p{{L}}+| ?\p{{N}}+|{_SIGNS}|{_SPACES}"


def _cl100k(digits: str) -> str:
    return rf"(?i:{_SHORT})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}|{_SIGNS}[\r\n]*|\s*[\r\n]+|{_SPACES}"


_LLAMA3, _QWEN2 = _cl100k(r"\p{N}{1,3}"), _cl100k(r"\p{N}")
_TEKKEN = rf"{'|'.join(_CASED)}|\p{{N}}|{_SIGNS}[\r\n/]*|\s*[\r\n]+|{_SPACES}"
_GPT4O = (
    "|".join(rf"{word}(?i:{_SHORT})?" for word in _CASED) + rf"|\p{{N}}{{1,3}}|{_SIGNS}[\r\n/]*|\s*[\r\n]+|{_SPACES}"
)
_SPLITS = (
    dict.fromkeys(("gpt-2", "phi-2", "olmo", "mpt", "jais"), (_GPT2,))
    | dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"), (r"\p{N}", _GPT2))
    | dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "dbrx", "smaug-bpe"), (_LLAMA3,))
    | dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2"), (_QWEN2,))
    | {"tekken": (_TEKKEN,), "gpt-4o": (_GPT4O,), "llama4": (_GPT4O,)}
)
_WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "tekken")  # taken whole, merges or not


def make(path: str | Path) -> tuple[tokenizers.Tokenizer, dict[str, Any], str | None, list[int]]:
    """Builds the tokenizer that a .gguf file describes.

    Returns:
      the tokenizer; what its tokenizer_config.json would say; its chat template, if it has one; and the ids that end
      an answer.

    Raises:
      InputError: the file can't be read, has no tokenizer, or one of a kind that isn't known here.
    """
    metadata = read_header(path).metadata
    prefix = "tokenizer.ggml."
    settings = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    elsewhere = "Give the folder of the original model's tokenizer as tokenizer.kind."
    _check_settings(path, settings, metadata.get("tokenizer.chat_template"))
    kind, pre = settings.get("model"), settings.get("pre")
    tokens = settings.get("tokens")
    if not tokens:
        raise InputError(f"{path}: holds no vocabulary (tokenizer.ggml.tokens). {elsewhere}")
    types = settings.get("token_type") or [_NORMAL] * len(tokens)
    if kind == "gpt2":
        if str(pre) not in _SPLITS:
            raise InputError(
                f"{path}: tokenizer.ggml.pre = {pre!r}: how this cuts text isn't known."
                f"{did_you_mean(str(pre), _SPLITS)} {elsewhere}"
            )
    elif kind != "llama":
        raise InputError(f"{path}: tokenizer.ggml.model = {kind!r} is neither 'gpt2' nor 'llama'. {elsewhere}")
    try:
        backend = _byte_level(settings, pre) if kind == "gpt2" else _sentencepiece(settings, types)
    except Exception as error:  # the package raises bare Exception
        raise InputError(f"{path}: its tokenizer can't be made ({error!s:.200}). {elsewhere}") from error
    backend.add_special_tokens([_whole(t, True) for t, kind in zip(tokens, types, strict=True) if kind == _CONTROL])
    backend.add_tokens([_whole(t, False) for t, kind in zip(tokens, types, strict=True) if kind == _USER_DEFINED])

    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {short: settings.get(f"{name}_token_id") for short, name in names.items()}
    config = {f"{name}_token": tokens[i] for name, i in ids.items() if i is not None}
    adds_bos = settings.get("add_bos_token", kind == "llama" or pre in _WHOLE_WORDS) and ids["bos"] is not None
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(
            single="$bos $A".replace("$bos", config["bos_token"]),
            pair="$bos $A $bos:1 $B:1".replace("$bos", config["bos_token"]),
            special_tokens=[(config["bos_token"], ids["bos"])],
        )
    config |= {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": bool(adds_bos),
        "clean_up_tokenization_spaces": False,
    }
    ends = [settings[name] for name in ("eos_token_id", "eot_token_id") if name in settings]
    return backend, config, metadata.get("tokenizer.chat_template"), ends


def _check_settings(path: str | Path, settings: dict[str, Any], template: Any) -> None:
    """Raises InputError where something isn't of the type, number or size that a vocabulary's is to be."""
    size = len(settings.get("tokens") or ())
    for name, kind in (("tokens", str), ("merges", str), ("token_type", int), ("scores", float)):
        values = settings.get(name, [])
        ofkind = isinstance(values, list) and all(type(value) is kind for value in values)
        if not ofkind or (values and name != "merges" and len(values) != size):
            raise InputError(
                f"{path}: tokenizer.ggml.{name}: isn't a list of {kind.__name__}, one for each token. Copy it anew."
            )
    tokens, merges = settings.get("tokens", []), settings.get("merges", [])
    if len(set(tokens)) < size or max(map(len, tokens), default=0) > _LONGEST_TOKEN:
        raise InputError(
            f"{path}: tokenizer.ggml.tokens: holds a token twice, or one of more than {_LONGEST_TOKEN:,} characters. "
            "Copy it anew."
        )
    if not all(merge.count(" ") == 1 for merge in merges):
        raise InputError(f"{path}: tokenizer.ggml.merges: one isn't of the form 'LEFT RIGHT'. Copy it anew.")
    if not all(math.isfinite(score) for score in settings.get("scores", [])):
        raise InputError(f"{path}: tokenizer.ggml.scores: one isn't finite. Copy it anew.")
    for name, i in settings.items():
        if name.endswith("_token_id") and not (type(i) is int and 0 <= i < size):
            raise InputError(f"{path}: tokenizer.ggml.{name} = {i!r:.40}: there are {size:,} tokens. Copy it anew.")
    if template is not None and not isinstance(template, str):
        raise InputError(f"{path}: tokenizer.chat_template: is no text. Copy it anew.")


def _whole(token: str, special: bool) -> tokenizers.AddedToken:
    return tokenizers.AddedToken(token, normalized=False, special=special)


def _byte_level(settings: dict[str, Any], pre: str) -> tokenizers.Tokenizer:
    vocab = {token: i for i, token in enumerate(settings["tokens"])}
    merges = [tuple(merge.split(" ")) for merge in settings.get("merges", [])]
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges, ignore_merges=pre in _WHOLE_WORDS))
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated") for pattern in _SPLITS[pre]]
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(settings: dict[str, Any], types: list[int]) -> tokenizers.Tokenizer:
    """SentencePiece's BPE merges whichever neighbours give the token of the highest score (Kudo & Richardson 2018)."""
    tokens, scores = settings["tokens"], settings.get("scores") or [0.0] * len(settings["tokens"])
    normal = {token for token, kind in zip(tokens, types, strict=True) if kind == _NORMAL}
    best_first = sorted((i for i, token in enumerate(tokens) if token in normal), key=lambda i: -scores[i])
    merges = [
        (token[:at], token[at:])
        for token in (tokens[i] for i in best_first)
        for at in range(1, len(token))
        if token[:at] in normal and token[at:] in normal
    ]
    unknown = settings.get("unknown_token_id")
    model = models.BPE(
        {token: i for i, token in enumerate(tokens)},
        merges,
        unk_token=None if unknown is None else tokens[unknown],
        fuse_unk=True,
        byte_fallback=True,
    )
    backend = tokenizers.Tokenizer(model)
    spaces = [normalizers.Replace(" ", "▁")]
    words = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if settings.get("add_space_prefix", True):
        spaces.insert(0, normalizers.Prepend("▁"))
        words.append(decoders.Strip(" ", 1, 0))
    backend.normalizer = normalizers.Sequence(spaces)
    backend.decoder = decoders.Sequence(words)
    return backend
