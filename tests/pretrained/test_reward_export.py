"""Reward models and classifiers as transformers reads them: at the last token that isn't the pad."""

import dataclasses
import json
from pathlib import Path

import goldens
import jax
import numpy as np
import pytest

from research import params
from research.devices import sharding
from research.models.config import ModelConfig
from research.models.transformer import make_model
from research.pretrained import export, load
from research.sources.tokenizers import TokenizerSpec, load_tokenizer, make_tokenizer

LLAMA = Path(goldens.__file__).parent / "golden/hf_tiny/llama/config.json"
BYTES = make_tokenizer(TokenizerSpec("byte"), lambda: iter(()))
SIZE = {"num_layers": 1, "d_model": 16, "num_heads": 2, "num_kv_heads": 2, "d_ff": 16, "max_length": 64}
MODEL = make_model(ModelConfig(**SIZE, vocab_size=BYTES.size, num_labels=1))
VALUES = params.init(MODEL.specs, jax.random.PRNGKey(0))


def write(folder, tokenizer=BYTES, config=MODEL.config, origin=None):
    return export.export(folder, config, VALUES, origin or {}, tokenizer)


def rewards_of(folder):
    """The rewards that the model in a folder gives."""
    found = load.open_pretrained(str(folder))
    model = make_model(dataclasses.replace(found.config, dtype="float32"))
    values = load.load(found, model.specs, params.shardings(model.specs, sharding.make_mesh({}, jax.devices()[:1])))
    return rewards(model, values)


TEXTS = ("a", "some text", "and a longer one")


def ids(text):
    return [BYTES.bos, *BYTES.encode(text), BYTES.eos]


def rewards(model, values):
    """The rewards of the texts, each at its last token."""
    batch = {name: np.zeros((len(TEXTS), 24), np.int32) for name in ("tokens", "segment_ids", "positions")}
    for row, tokens in enumerate(map(ids, TEXTS)):
        batch["tokens"][row, : len(tokens)] = tokens
        batch["segment_ids"][row, : len(tokens)] = 1
        batch["positions"][row] = np.arange(24)
    logits = jax.jit(lambda values, batch: model.unembed(values).logits(model.hidden(values, batch)))(values, batch)
    return np.array([logits[row, len(ids(text)) - 1, 0] for row, text in enumerate(TEXTS)])


@pytest.mark.parametrize(
    ("names", "pad", "why"),
    [
        ({}, "<|pad|>", "there was no pad, and now it is <|pad|> (261)"),
        ({"pad_token": "<|eos|>"}, "<|pad|>", "the pad <|eos|> ends documents, and now it is <|pad|> (261)"),
        ({"pad_token": "<|eos|>", "unk_token": "<|user|>"}, "<|user|>", "ends documents, and now it is <|user|>"),
        ({"pad_token": "<|system|>"}, "<|system|>", ""),
    ],
)
def test_the_pad_ends_no_document(names, pad, why, tmp_path):
    out = write(tmp_path / "m", BYTES.with_variables(names) if names else BYTES)
    config, tokenizer = json.loads((tmp_path / "m/config.json").read_text()), load_tokenizer(tmp_path / "m")
    assert out.architecture == "LlamaForSequenceClassification"
    assert (why in out.pad) if why else not out.pad
    assert (config["id2label"], config["label2id"]) == ({"0": "LABEL_0"}, {"LABEL_0": 0})
    assert config["pad_token_id"] == tokenizer.special(pad) != config["eos_token_id"]
    assert tokenizer.variables["pad_token"] == pad
    assert config["vocab_size"] == BYTES.size + (pad == "<|pad|>")  # it has an embedding, if one of zeros


def test_an_export_gives_the_same_rewards(tmp_path):
    write(tmp_path / "m")
    np.testing.assert_array_equal(rewards_of(tmp_path / "m"), rewards(MODEL, VALUES))


def test_a_head_on_a_language_model_is_written_as_one_of_its_family(tmp_path):
    origin = json.loads(LLAMA.read_text())
    c = load.open_pretrained(str(LLAMA.parent)).config
    model = make_model(dataclasses.replace(c, num_labels=2))
    values = params.init(model.specs, jax.random.PRNGKey(0))
    out = export.export(tmp_path / "m", model.config, values, {"config": origin}, None)
    written = json.loads((tmp_path / "m/config.json").read_text())
    assert out.architecture == written["architectures"][0] == "LlamaForSequenceClassification"
    assert written["id2label"] == {"0": "LABEL_0", "1": "LABEL_1"}
    assert {k: v for k, v in written.items() if k in ("rms_norm_eps", "bos_token_id", "vocab_size")} == {
        k: origin[k] for k in ("rms_norm_eps", "bos_token_id", "vocab_size")
    }
    assert load.open_pretrained(str(tmp_path / "m")).config.num_labels == 2


@pytest.mark.slow
@pytest.mark.parametrize("side", ["left", "right"])
def test_transformers_gives_the_same_rewards_of_padded_rows(side, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    write(tmp_path / "m", BYTES.with_variables({"pad_token": "<|eos|>"}))
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "m").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "m", padding_side=side)
    batch = tokenizer.pad({"input_ids": [ids(text) for text in TEXTS]}, return_tensors="pt")
    with torch.no_grad():
        theirs = model(**batch).logits[:, 0].numpy()
    np.testing.assert_allclose(theirs, rewards(MODEL, VALUES), atol=1e-5)
