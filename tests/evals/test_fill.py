"""Masks of a text are filled in with what the model finds likeliest; texts become the tokens of training."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import text_cases
from encoders import MASK, TOKENIZER
from test_pseudo_perplexity import MODEL, VALUES

from research.commands import generate
from research.errors import InputError
from research.evals.fill import Filler
from research.evals.prompts import Prompt
from research.loading import LoadedModel
from research.sources.tokenizers import TokenizerSpec, load_pretrained, make_tokenizer

LOADED = LoadedModel(MODEL, VALUES, TOKENIZER, "plain", mesh=None)


@pytest.fixture
def run(monkeypatch, capsys):
    def load(name, *, step, ema, check, adapter):
        check(MODEL.config, name)
        return LOADED

    monkeypatch.setattr("research.loading.load_model", load)

    def command(*flags):
        status = generate.main(["--model=x", *flags])
        return status, *capsys.readouterr()

    return command


def by_hand(text, count):
    """(token, probability) of the likeliest for each mask of a text."""
    pieces = [TOKENIZER.encode(piece) for piece in text.split("[MASK]")]
    tokens = [TOKENIZER.bos, *pieces[0]]
    for piece in pieces[1:]:
        tokens += [MASK, *piece]
    row = jnp.asarray([*tokens, TOKENIZER.eos], jnp.int32)[None]
    batch = {"tokens": row, "segment_ids": jnp.ones_like(row), "positions": jnp.arange(row.shape[1])[None]}
    logits = np.asarray(MODEL.unembed(VALUES).logits(MODEL.hidden(VALUES, batch)))[0, :, : TOKENIZER.size]
    probabilities = np.asarray(jax.nn.softmax(logits))
    texts = np.where(np.isin(np.arange(TOKENIZER.size), TOKENIZER.special_ids), -1.0, probabilities)  # others are none
    order = np.argsort(-texts, axis=1)[:, :count]
    return [[(int(i), probabilities[at, i]) for i in order[at]] for at in np.flatnonzero(np.asarray(row)[0] == MASK)]


def test_the_likeliest_of_each_mask(run, tmp_path):
    texts = ["ab[MASK]c", "a[MASK] [MASK]é", "[MASK]"]
    (tmp_path / "texts.txt").write_text("\n".join(texts).replace("[MASK]c", "<|mask|>c"))
    output = tmp_path / "out.jsonl"
    assert run(f"--data={tmp_path}/texts.txt", f"--output={output}", "--top_k=3", "--batch_size=2")[0] == 0
    for text, line in zip(texts, output.read_text().splitlines(), strict=True):
        record, expected = json.loads(line), by_hand(text, 3)
        assert [[c["token"] for c in mask] for mask in record["masks"]] == [[i for i, _ in mask] for mask in expected]
        ours = np.array([[c["probability"] for c in mask] for mask in record["masks"]])
        np.testing.assert_allclose(ours, [[p for _, p in mask] for mask in expected], rtol=1e-4)
        assert record["prompt"].replace("<|mask|>", "[MASK]") == text
    assert len(np.unique(ours)) == 3
    masks = [json.loads(line)["masks"] for line in output.read_text().splitlines()]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text, "id": 1}) + "\n" for text in texts))
    assert run(f"--data={tmp_path}/texts.jsonl", f"--output={tmp_path}/o", "--top_k=3", "--batch_size=2")[0] == 0
    again = [json.loads(line) for line in (tmp_path / "o").read_text().splitlines()]
    assert [(record["text"], record["id"], record["masks"]) for record in again] == [
        (text, 1, each) for text, each in zip(texts, masks, strict=True)
    ]


def test_no_special_token_is_an_answer(run):
    shown = run("--fill=a[MASK]b", "--top_k=256")[1]
    assert len(shown.splitlines()) == 257
    assert "<|" not in shown


def test_the_command_shows_five_for_each(run):
    status, shown, _ = run("--fill=a[MASK] [MASK]é")
    lines = shown.splitlines()
    assert status == 0
    assert lines[0] == "a[MASK] [MASK]é"
    assert [line.split()[:2] for line in lines if "mask" in line] == [["mask", "1"], ["mask", "2"]]
    assert len(lines) == 11
    first = by_hand("a[MASK] [MASK]é", 1)[0][0]
    assert f"{first[1]:.4f}" in lines[1]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--fill=nothing"], "--fill: has no [MASK]. Write it where a token is missing."),
        (["--fill=12345678901234[MASK]"], "--fill: is 17 tokens long, and the model reads 16"),
        (["--fill=[MASK]", "--temperature=1"], "--temperature: is of answers"),
        (["--fill=[MASK]", "--stop=x"], "--stop: is of answers"),
        (["--fill=[MASK]", "--top_k=1000"], "--top_k = 1000: must be from 1 to the 256 tokens that a text can have"),
        (["--prompt=[MASK]"], "x: is an encoder, which reads in both directions, and doesn't predict the next token."),
        (["--fill=[MASK]", "--prompt=a"], "--prompt and --fill given: use one of"),
    ],
)
def test_what_cannot_be_filled_in(flags, says, run):
    status, shown, error = run(*flags)
    assert status == 2
    assert not shown
    assert error.startswith(f"error: {says}")


@pytest.mark.parametrize("kind", ["bpe", "word piece"])
def test_a_mask_stands_for_a_word_and_the_space_before_it(kind, tmp_path):
    """Tokens are those of a text in which one is masked, as in training."""
    if kind == "bpe":
        texts = ["the Cat saw a Cat in Paris"] * 9
        tokenizer = make_tokenizer(TokenizerSpec("bpe", 300), lambda: iter(texts))
    else:
        tokenizer = text_cases.make_folder(tmp_path, kind)
    tokenizer = tokenizer.with_tokens(["<|mask|>"])
    ids, cat = tokenizer.encode("the Cat in Paris"), len(tokenizer.encode("the"))
    assert tokenizer.decode_after(ids[cat : cat + 1]).strip().lower() == "cat"
    ids[cat] = tokenizer.special("<|mask|>")
    filler = Filler(LOADED._replace(tokenizer=tokenizer), 1)
    begin = [] if tokenizer.bos is None else [tokenizer.bos]
    assert filler.encode(Prompt("here", "the [MASK] in Paris")) == [*begin, *ids, tokenizer.eos]


def test_the_spelling_of_the_vocabulary_is_a_mask_too(tmp_path):
    backend = text_cases.word_piece()
    backend.add_special_tokens(["[MASK]"])
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "mask_token": "[MASK]"}))
    tokenizer = load_pretrained(tmp_path)
    filler = Filler(LOADED._replace(tokenizer=tokenizer), 1)
    encoded = filler.encode(Prompt("here", {"prompt": "[MASK] cat"}))
    assert encoded == [tokenizer.special("[MASK]"), *tokenizer.encode("cat"), tokenizer.eos]
    with pytest.raises(InputError, match="here: is no text"):
        filler.encode(Prompt("here", {"messages": []}))
