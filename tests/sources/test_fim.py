"""Fill in the middle: documents whose middle is at their end, whole under every tokenizer and in every row."""

import itertools
import json
from pathlib import Path

import goldens
import numpy as np
import pytest
import text_cases

from research.errors import InputError
from research.sources import store
from research.sources.dataset import DataSpec, load, with_special_tokens
from research.sources.infilling import arrange, make_infilling, make_note
from research.sources.special_tokens import FimTokens, fim_tokens
from research.sources.tokenizers import TokenizerSpec, load_tokenizer, make_tokenizer
from research.sources.views import Document, fim

KINDS = ("byte", "bpe", *(kind for kind in text_cases.BACKENDS if kind != "word piece"))


def make(kind, folder):
    if kind in ("byte", "bpe"):
        tokenizer = make_tokenizer(TokenizerSpec(kind, 600), lambda: iter(text_cases.TEXTS), cache_dir=str(folder))
    else:
        tokenizer = text_cases.make_folder(folder / "tokenizer", kind)
    return tokenizer.with_tokens(fim.special_tokens(tokenizer))


@pytest.fixture(scope="module")
def byte(tmp_path_factory):
    return make("byte", tmp_path_factory.mktemp("byte"))


def as_document(text, tokenizer):
    bos = [] if tokenizer.bos is None else [tokenizer.bos]
    tokens = np.array([*bos, *tokenizer.encode(text), tokenizer.eos], np.int32)
    return Document(tokens, np.ones(len(tokens), bool))


def see(text, tokenizer, seed=0, **options):
    view = fim.make(**{"seq_len": 4096, **options}, tokenizer=tokenizer)
    return [document.tokens.tolist() for document in view.documents(as_document(text, tokenizer), rng(seed))]


def rng(seed):
    return np.random.default_rng(seed)


def parts(tokens, tokenizer):
    """Prefix with middle, and suffix, of a piece in either order, as ids; None where it was left as it is."""
    marks = fim_tokens(tokenizer)
    if marks.middle not in tokens:
        return None
    ids = [i for i in tokens if i not in (tokenizer.bos, tokenizer.eos, marks.end)]
    last, middle = ids.index(marks.suffix), ids.index(marks.middle)
    assert ids[0] == marks.prefix
    assert last < middle
    return [*ids[1:last], *ids[middle + 1 :]], ids[last + 1 : middle]


@pytest.mark.parametrize("case", goldens.load("fim").values(), ids=lambda case: case.name)
def test_orders_are_those_of_the_reference(case):
    start, stop = case.hparams["boundaries"]
    tokens = case.inputs["tokens"].tolist()
    tokens = tokens[:-3] if case.hparams["truncate_or_pad"] else tokens  # it cuts its suffix for the three new tokens
    marks = FimTokens(case.hparams["prefix_id"], case.hparams["suffix_id"], case.hparams["middle_id"], None)
    seen = arrange(marks, tokens[:start], tokens[start:stop], tokens[stop:], spm=case.hparams["spm"])
    assert seen == case.outputs["out"].tolist()


@pytest.mark.parametrize("seq_len", [24, 4096])
@pytest.mark.parametrize("split", fim.SPLITS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_parts_are_the_text_of_the_document(kind, split, seq_len, tmp_path):
    tokenizer = make(kind, tmp_path)
    moved = shared = 0
    for seed, text in enumerate(text_cases.TEXTS[:60]):
        content = as_document(text, tokenizer).tokens[tokenizer.bos is not None : -1].tolist()
        stretches = []
        pieces = see(text, tokenizer, seed, split=split, rate=0.8, seq_len=seq_len)
        for piece in pieces:
            found = parts(piece, tokenizer)
            assert len(piece) <= seq_len or pieces == [piece]  # as it was, and cut as any other
            stretches += [piece] if found is None else found
            moved += found is not None
            if found is not None:
                assert piece[-1] == tokenizer.eos  # the middle's end, at the end of every piece
        if split == "token":
            special = (tokenizer.bos, tokenizer.eos)
            assert [i for stretch in stretches for i in stretch if i not in special] == content
            continue
        # A space that the tokenizer puts before a document is there if it has a prefix.
        texts = [tokenizer.decode_after(content), tokenizer.decode(content)]
        assert "".join(tokenizer.decode_after(stretch) for stretch in stretches) in texts
        shared += list(itertools.chain(*stretches)) != content
    assert moved > 40
    assert split == "token" or kind == "byte" or shared > 20  # cut within tokens, so that they were made anew


def test_a_cut_within_a_character_of_several_tokens_loses_nothing(tmp_path):
    """Rows end between characters as well, whatever the bytes that they have room for."""
    tokenizer = make("gpt2", tmp_path)
    text = "日本語🎉ñ" * 40
    for seq_len in range(16, 40):
        pieces = see(text, tokenizer, seq_len, rate=0.7, seq_len=seq_len)
        stretches = [stretch for piece in pieces for stretch in (parts(piece, tokenizer) or [piece])]
        texts = [tokenizer.decode(stretch) for stretch in stretches]
        assert "".join(texts) == text
        assert len(pieces) > 3


def test_rates_and_places_are_as_asked(byte):
    marks, text = fim_tokens(byte), "abcdefghi"
    seen = [piece for seed in range(4000) for piece in see(text, byte, seed, rate=0.6, spm_rate=0.25)]
    moved = [piece for piece in seen if marks.middle in piece]
    assert len(moved) / len(seen) == pytest.approx(0.6, abs=0.03)
    psm = [piece for piece in moved if piece[2] != marks.suffix]
    # An empty prefix, 19 of 100 pairs of cuts, looks the same in both orders.
    assert len(psm) / len(moved) == pytest.approx(0.75 * 0.81, abs=0.03)
    cuts = [(len(piece[2 : piece.index(marks.suffix)]), len(piece) - piece.index(marks.middle) - 2) for piece in psm]
    ends = np.bincount([start + size for start, size in cuts], minlength=10)[1:] / len(cuts)
    np.testing.assert_allclose(ends, (2 * np.arange(1, 10) - 1) / 81, atol=0.03)  # the later of two draws of 1 to 9
    assert see(text, byte, rate=0.0) == [as_document(text, byte).tokens.tolist()]
    assert all(marks.middle in piece for seed in range(50) for piece in see(text, byte, seed, rate=1))


def test_draws_are_passes_with_cuts_of_their_own(byte):
    seen = see("abcdefghijklmnopqrstuvwxyz" * 4, byte, rate=1, draws=5)
    assert len({tuple(piece) for piece in seen}) == 5
    assert all(sorted(piece) == sorted(seen[0]) for piece in seen)
    assert seen[:1] == see("abcdefghijklmnopqrstuvwxyz" * 4, byte, rate=1)


def test_what_is_not_moved_stays_as_it_was(byte):
    text = "x" * 100
    assert see(text, byte, rate=0, seq_len=16) == [as_document(text, byte).tokens.tolist()]
    assert see("", byte, rate=1) == [[byte.bos, byte.eos]]
    (one,) = see("é", byte, rate=1, spm_rate=0)
    assert sorted(one) == sorted([byte.bos, *fim_tokens(byte)[:3], *"é".encode(), byte.eos])


def test_a_middle_may_have_an_end_of_its_own(byte):
    """CodeLlama's: each piece ends with it, and the document with eos as before."""
    own = ("▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>")
    tokenizer = make_tokenizer(TokenizerSpec(), lambda: iter(())).with_tokens(own)
    end = tokenizer.special("▁<EOT>")
    *pieces, last = see("y" * 100, tokenizer, rate=1, seq_len=32)
    assert [piece[-1] for piece in pieces] == [end] * len(pieces)
    assert last[-2:] == [end, tokenizer.eos]
    assert max(map(len, pieces)) == 31  # there is room for eos as well
    assert not any(tokenizer.eos in piece for piece in pieces)


def test_an_unknown_sign_is_cut_between_tokens(tmp_path):
    """No text would give it again."""
    folder = tmp_path / "tokenizer"
    text_cases.make_folder(folder, "without prefix")
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["byte_fallback"] = False
    (folder / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = text_cases.load_pretrained(folder)
    tokenizer = tokenizer.with_tokens(fim.special_tokens(tokenizer))
    text = "the ጀ Cat, the ጀ naïve " * 3
    content = tokenizer.encode(text)
    assert tokenizer.special("<unk>") in content
    for seed in range(20):
        (piece,) = see(text, tokenizer, seed, rate=1, spm_rate=0)
        assert sorted(itertools.chain(*parts(piece, tokenizer))) == sorted(content)


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def spec(path, view, **options):
    return DataSpec("", sources={"one": {"path": path, "view": view}}, **{"seq_len": 64, "eval_fraction": 0} | options)


def test_no_row_loses_an_end(tmp_path, byte):
    """Of documents shorter and longer than a row, each segment of each packed row, the last ones too, has its end."""
    texts = [f"{i:03}" + "abcdefghij" * (i % 20) for i in range(120)]
    path = write(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    data = load(spec(path, {"kind": "fim", "rate": 1}), TokenizerSpec(), byte)
    rows, middle = data.train[0][0], fim_tokens(byte).middle
    batch = rows.batch(np.arange(len(rows)))
    ends = full = 0
    for tokens, segments in zip(batch["tokens"], batch["segment_ids"], strict=True):
        for segment in range(1, segments.max() + 1):
            piece = tokens[segments == segment].tolist()
            assert middle in piece
            assert piece[-1] == byte.eos
            assert piece.count(byte.eos) == 1
            ends += 1
        full += segments[-1] > 0
    assert full > 50  # rows whose last document ends with them
    assert ends == len(rows.length)
    assert (batch["loss_mask"] == (batch["segment_ids"] > 0)).all()
    assert data.report["train"]["bytes"] == sum(map(len, texts))


def test_what_is_drawn_depends_on_the_document_alone(tmp_path, byte):
    texts = [{"text": f"document {i} " * 9} for i in range(20)]
    paths = [write(tmp_path / "a.jsonl", texts), write(tmp_path / "b.jsonl", texts[::-1])]
    seen = []
    for path in paths:
        rows = load(spec(path, {"kind": "fim"}, pack=False, seq_len=256), TokenizerSpec(), byte).train[0][0]
        seen.append(sorted(map(tuple, rows.batch(np.arange(20))["tokens"].tolist())))
    assert seen[0] == seen[1]


def test_tokens_in_the_cache_are_of_the_code_that_spells_and_orders():
    assert {Path(file).stem for file in store._helpers(fim)} >= {"infilling", "special_tokens", "fim"}


def test_conversations_are_refused(tmp_path, byte):
    pairs = write(tmp_path / "p.jsonl", [{"prompt": "ask", "response": "reply"}])
    with pytest.raises(InputError, match=r"data.sources.one.view.kind = 'fim': is a view of plain text"):
        load(spec(pairs, {"kind": "fim"}), TokenizerSpec(), byte)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rate": 1.5}, r"view.rate = 1.5: must be in \[0, 1\]"),
        ({"spm_rate": True}, "view.spm_rate = True: must be of type float, and is bool"),
        ({"split": "charcter"}, "view.split = 'charcter': is not known. Did you mean 'character'?"),
        ({"draws": 0}, "view.draws = 0: must be at least 1"),
        ({"rates": 1}, "view.rates: no such option. Did you mean 'rate'?"),
    ],
)
def test_a_wrong_option_is_named(tmp_path, byte, options, message):
    path = write(tmp_path / "a.jsonl", [{"text": "a"}])
    with pytest.raises(InputError, match=message.replace("?", r"\?")):
        load(spec(path, {"kind": "fim", **options}), TokenizerSpec(), byte)
    with pytest.raises(InputError, match=r"view: data.seq_len = 8 leaves no room"):
        load(spec(path, {"kind": "fim"}, seq_len=8), TokenizerSpec(), byte)


def test_a_tokenizer_that_cannot_be_used_is_refused(tmp_path):
    words = text_cases.make_folder(tmp_path / "words", "word piece")
    words = words.with_tokens(fim.special_tokens(words))
    with pytest.raises(InputError, match="split = 'character': this tokenizer loses the space"):
        fim.make(tokenizer=words)
    fim.make(split="token", tokenizer=words)
    plain = make_tokenizer(TokenizerSpec(), lambda: iter(()))
    with pytest.raises(InputError, match=r"no <\|fim_prefix\|> to <\|fim_middle\|>"):
        fim.make(tokenizer=plain)


class Fixed:
    """Draws that move every middle, and cut where they are told."""

    def __init__(self, *cuts):
        self.cuts = np.array(cuts)

    def random(self, size=None):
        return 0.0 if size is None else self.cuts


@pytest.mark.parametrize("form", ["psm", "spm"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_is_what_training_showed(kind, form, tmp_path):
    """The tokens before the middle are those of a training document that is cut at the same places, and it the rest."""
    tokenizer = make(kind, tmp_path)
    infilling = make_infilling(form, tokenizer)
    view = fim.make(rate=1, spm_rate=float(form == "spm"), tokenizer=tokenizer)
    for text in ("the Cat IS in Paris", "naïve 日本語", "x)\n\treturn x[0]"):
        n = len(text)
        for start, stop in ((0, 0), (0, 5), (2, 7), (3, n), (4, 5), (n, n), (0, n), (n - 2, n - 1)):
            draws = Fixed((start + 0.5) / (n + 1), (stop + 0.5) / (n + 1))
            (piece,) = view.documents(as_document(text, tokenizer), draws)
            tokens, prompt = piece.tokens.tolist(), infilling.prompt(text[:start], text[stop:])
            assert tokens[: len(prompt)] == prompt
            assert infilling.text(tokens[len(prompt) : -1]) == text[start:stop]


def test_forms_by_what_a_tokenizer_has(byte):
    plain = make_tokenizer(TokenizerSpec(), lambda: iter(()))
    sentinels = plain.with_tokens(["<extra_id_0>", "<extra_id_1>"])
    assert make_infilling("auto", byte).form == "psm"
    asked = make_infilling("auto", sentinels)
    hole, end = (sentinels.special(f"<extra_id_{i}>") for i in range(2))
    assert asked.prompt("ab", "c") == [plain.bos, *b"ab", hole, *b"c", end]
    assert asked.prompt("ab", "") == [plain.bos, *b"ab", hole]
    modes = sentinels.with_tokens(["[R]", "[X]", "[S]"])
    assert make_infilling("sentinel", modes).prompt("ab", "")[:2] == [plain.bos, modes.special("[R]")]
    assert (asked.form, asked.extra, asked.stop) == ("sentinel", 1, (plain.eos, end))
    assert asked.text([hole, *b"xy", end]) == "xy"
    for mode, want in (("", []), ("[X]", [modes.special("[X]")])):
        noted = modes.with_infilling(make_note({"sentinel": 1.0}, mode=mode))
        assert make_infilling("auto", noted).prompt("ab", "")[: 1 + len(want)] == [plain.bos, *want]
    assert make_infilling("left", plain).prompt("ab", "c") == [plain.bos, *b"ab"]
    for form, message in [
        ("auto", "neither tokens around a prefix, a suffix and a middle, nor sentinels"),
        ("psm", "form = psm: the tokenizer has no <|fim_prefix|>"),
        ("sentinel", "form = sentinel: the tokenizer has no <|mask:0|> <|mask:1|>, "),
        ("spn", r"form = spn: is not known. Did you mean 'spm'\?"),
    ]:
        with pytest.raises(InputError, match=message):
            make_infilling(form, plain)


@pytest.mark.parametrize(
    ("view", "form", "note"),
    [
        ({"kind": "fim"}, "spm", {"forms": {"psm": 0.25, "spm": 0.25}}),
        ({"kind": "fim", "rate": 0.8, "spm_rate": 0.25}, "psm", {"forms": {"psm": 0.6, "spm": 0.2}}),
        ({"kind": "fim", "rate": 0.0}, "psm", {}),
        ({"kind": "denoise"}, "sentinel", {"forms": {"sentinel": 1.0}, "mode": ""}),
        ({"kind": "denoise", "mixture": "ul2"}, "sentinel", {"forms": {"sentinel": 0.8571}, "mode": "<|nlu|>"}),
        (
            {"kind": "denoise", "mixture": "ul2", "modes": False},
            "sentinel",
            {"forms": {"sentinel": 0.8571}, "mode": ""},
        ),
        ({"kind": "denoise", "form": "prefix"}, None, {}),
    ],
)
def test_forms_of_the_training_are_noted_and_taken(view, form, note, tmp_path):
    spec = DataSpec("", sources={"a": {"path": "x", "view": view}, "b": {"path": "y"}}, seq_len=64)
    with_special_tokens(make_tokenizer(TokenizerSpec(), lambda: iter(())), TokenizerSpec(), spec).save(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.infilling == note
    if form:
        assert make_infilling("auto", tokenizer).form == form


def test_marks_that_a_vocabulary_does_not_call_special_are_no_text(tmp_path):
    """As Qwen's."""
    folder = tmp_path / "tokenizer"
    make("gpt2", tmp_path).save(folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    for token in content["added_tokens"]:
        token["special"] = token["special"] and not token["content"].startswith("<|fim")
    (folder / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = text_cases.load_pretrained(folder)
    infilling = make_infilling("psm", tokenizer)
    marks = fim_tokens(tokenizer)
    assert tokenizer.decode([marks.suffix]) == "<|fim_suffix|>"
    assert infilling.text([*tokenizer.encode("x = 1"), marks.suffix]) == "x = 1"
    assert see("Cat", tokenizer, rate=1) == see("Cat", make("gpt2", tmp_path), rate=1)
