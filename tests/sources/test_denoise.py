"""The view `denoise`: what a text becomes, that it fits and comes back, UL2's mixtures, and what is refused."""

import contextlib
import dataclasses
import itertools
import json
from collections import Counter

import numpy as np
import pytest

from research.errors import InputError
from research.sources import corruption, special_tokens, views
from research.sources.dataset import DataSpec, load, with_special_tokens
from research.sources.infilling import make_infilling
from research.sources.tokenizers import TokenizerSpec, load_tokenizer, make_tokenizer
from research.sources.views import Document, denoise

BYTE = make_tokenizer(TokenizerSpec(), lambda: iter(()))
TEXT = "Thank you for inviting me to your party last week. 𝄞🏳️‍🌈 Grüße!"  # with signs of four bytes, and a joined one


def view(seq_len, tokenizer=BYTE, **options):
    """The view, and a tokenizer with the special tokens that it needs."""
    tokenizer = tokenizer.with_tokens(denoise.special_tokens(tokenizer, seq_len, **options))
    return views.load({"kind": "denoise", **options}, "data.sources.a.view", seq_len, tokenizer), tokenizer


def document(text, tokenizer=BYTE):
    ids = np.array([tokenizer.bos, *(tokenizer.encode(text) if isinstance(text, str) else text), tokenizer.eos])
    return Document(ids.astype(np.int32), np.ones(len(ids), bool))


def parts(seen, tokenizer=BYTE):
    """Inputs and targets of a document that the view gives, without the tokens that begin and end it."""
    assert seen.tokens[0] == tokenizer.bos
    assert seen.tokens[-1] == tokenizer.eos
    shown = int(np.sum(~seen.mask))
    assert not seen.mask[:shown].any()
    np.testing.assert_array_equal(seen.fields["prefix"], ~seen.mask)
    return seen.tokens[1:shown], seen.tokens[shown:-1]


def test_what_a_text_becomes(monkeypatch):
    """The example of T5's paper (figure 2), in bytes: what is shown is the prefix, the rest is to be predicted."""
    text = "Thank you for inviting me to your party last"
    mask = np.zeros(len(text), bool)
    mask[10:22] = mask[40:] = True
    monkeypatch.setattr(corruption, "span_mask", lambda *_: mask)
    seeing, tokenizer = view(128)
    (seen,) = seeing.documents(document(text), np.random.default_rng(0))
    inputs, targets = (tokenizer.decode(part.tolist(), skip_special=False) for part in parts(seen))
    assert inputs == "Thank you <|mask:0|> me to your party <|mask:1|>"
    assert targets == "<|mask:0|>for inviting<|mask:1|>last"


@pytest.mark.parametrize("form", sorted(denoise.FORMS))
def test_any_text_comes_back_and_fits(form):
    """Whatever the lengths of text and row, density and spans, the pieces hold the text, and none is too long."""
    rng = np.random.default_rng(0)
    for _ in range(60):
        options = {} if form == "deshuffle" else {"density": rng.uniform(0.01, 0.99)}
        options |= {} if form in ("deshuffle", "prefix") else {"mean_span": rng.uniform(1, 12)}
        seq_len = int(rng.integers(12, 120))
        seeing, tokenizer = view(seq_len, form=form, **options)
        text = rng.integers(0, 256, rng.integers(2, 300))
        marks = np.array(special_tokens.sentinels(tokenizer, special_tokens.sentinel_count(tokenizer)), np.int32)
        pieces = []
        for seen in seeing.documents(document(text), rng):
            inputs, targets = parts(seen)
            assert len(seen.tokens) <= seq_len
            if form in ("spans", "single"):
                pieces.append(corruption.restored(inputs, targets, marks))
            elif form == "mask":
                hidden = inputs == marks[0]
                assert 0 < hidden.sum() < len(inputs)
                np.testing.assert_array_equal(inputs[~hidden], targets[~hidden])
                pieces.append(targets)
            elif form == "deshuffle":
                np.testing.assert_array_equal(np.sort(inputs), np.sort(targets))
                pieces.append(targets)
            elif form == "prefix":
                pieces.append(np.concatenate([inputs, targets]))
            else:
                pieces.append(text[sum(map(len, pieces)) :][: len(inputs) + len(targets)])
                assert is_merge(pieces[-1].tolist(), inputs.tolist(), targets.tolist())
            assert min(len(inputs), len(targets)) > 0
        np.testing.assert_array_equal(np.concatenate(pieces), text)


def is_merge(whole, first, second):
    """Whether a list holds two others, each in its order, and nothing else."""
    ends = {(0, 0)}
    for item in whole:
        ends = {
            end
            for i, j in ends
            for end, part, at in (((i + 1, j), first, i), ((i, j + 1), second, j))
            if at < len(part) and part[at] == item
        }
    return (len(first), len(second)) in ends


def test_signs_of_several_bytes_come_back():
    seeing, tokenizer = view(512, density=0.5, mean_span=1.5)
    (seen,) = seeing.documents(document(TEXT), np.random.default_rng(0))
    marks = special_tokens.sentinels(tokenizer, special_tokens.sentinel_count(tokenizer))
    assert tokenizer.decode(corruption.restored(*parts(seen), marks).tolist()) == TEXT


@pytest.mark.parametrize(
    ("form", "seq_len"), list(itertools.product(("spans", "single", "mask", "drop", "prefix"), (40, 130)))
)
def test_a_long_text_is_cut_into_the_longest_pieces_that_fit(form, seq_len):
    seeing, _ = view(seq_len, form=form)
    seen = seeing.documents(document([65] * 1000), np.random.default_rng(0))
    (each,) = denoise._denoisers({"form": form})
    length = denoise._longest(each, seq_len, BYTE)
    assert each.size(length) + 2 <= seq_len < each.size(length + 1) + 2
    assert {len(piece.tokens) for piece in seen[:-2]} == {each.size(length) + 2}


def test_very_short_texts():
    """A text of one token leaves nothing to hide or to show; the least that does has one of either."""
    for form in denoise.FORMS:
        seeing, _ = view(64, form=form)
        assert seeing.documents(document(""), np.random.default_rng(0)) == []
        assert seeing.documents(document("a"), np.random.default_rng(0)) == []
        (seen,) = seeing.documents(document("ab"), np.random.default_rng(0))
        assert seen.mask.sum() == {"spans": 3, "single": 3, "mask": 3, "deshuffle": 3}.get(form, 2)


def test_draws_hide_other_parts_and_equal_documents_the_same():
    once, _ = view(128)
    thrice, _ = view(128, draws=3)
    first = once.documents(document(TEXT), np.random.default_rng(7))
    seen = thrice.documents(document(TEXT), np.random.default_rng(7))
    again = thrice.documents(document(TEXT), np.random.default_rng(7))
    assert len(seen) == 3 * len(first) == 3
    np.testing.assert_array_equal(seen[0].tokens, first[0].tokens)
    assert len({each.tokens.tobytes() for each in seen}) == 3
    assert [each.tokens.tobytes() for each in seen] == [each.tokens.tobytes() for each in again]


def test_the_mixtures_are_those_of_the_papers():
    """UL2, table 1; UL2R, section 2.3."""
    table = {(d.mode, d.form, d.mean_span if d.form == "spans" else None, d.density) for d in denoise.MIXTURES["ul2"]}
    spans = {("R", 3, 0.15), ("R", 8, 0.15), ("X", 3, 0.5), ("X", 8, 0.5), ("X", 64, 0.15), ("X", 64, 0.5)}
    assert table == {(mode, "spans", mean, density) for mode, mean, density in spans} | {("S", "prefix", None, 0.25)}
    assert len({d.weight for d in denoise.MIXTURES["ul2"]}) == 1
    shares = Counter()
    for each in denoise.MIXTURES["ul2r"]:
        shares[each.mode] += each.weight
    assert shares == {"S": 0.5, "R": 0.25, "X": 0.25}


def test_a_mixture_draws_denoisers_by_their_weights_and_says_which():
    seeing, tokenizer = view(64, mixture="ul2r")
    modes = special_tokens.mode_tokens(tokenizer)
    seen = seeing.documents(document([65] * 100_000), np.random.default_rng(0))
    counts = Counter(int(each.tokens[1]) for each in seen)
    for mode, share in ((modes.sequential, 0.5), (modes.regular, 0.25), (modes.extreme, 0.25)):
        assert abs(counts[mode] / len(seen) - share) < 4 * np.sqrt(share * (1 - share) / len(seen))
    hidden = {mode: [each.mask.mean() for each in seen if each.tokens[1] == mode] for mode in counts}
    assert np.std(hidden[modes.regular][:-1]) < 0.02 < np.std(hidden[modes.sequential])
    without, plain = view(64, mixture="ul2r", modes=False)
    assert plain.special("<|nlu|>") is None
    assert {int(each.tokens[1]) for each in without.documents(document([65] * 5000), np.random.default_rng(0))} == {65}


def test_a_mixture_of_ones_own():
    chosen = [{"form": "prefix", "density": 0.25, "mode": "S", "weight": 3}, {"form": "drop", "density": 0.3}]
    seeing, tokenizer = view(40, mixture=chosen)
    modes = special_tokens.mode_tokens(tokenizer)
    seen = seeing.documents(document([65] * 20_000), np.random.default_rng(0))
    share = np.mean([each.tokens[1] == modes.sequential for each in seen])
    assert abs(share - 0.75) < 0.1
    assert special_tokens.sentinel_count(tokenizer) == 0


def test_as_many_sentinels_are_added_as_the_longest_text_needs():
    for seq_len, density in ((64, 0.15), (256, 0.15), (256, 0.5)):
        seeing, tokenizer = view(seq_len, density=density)
        count = special_tokens.sentinel_count(tokenizer)
        seen = seeing.documents(document([65] * 2000), np.random.default_rng(0))
        marks = special_tokens.sentinels(tokenizer, count)
        assert max(np.isin(each.tokens, marks).sum() for each in seen) == 2 * count
        assert marks[-1] in seen[0].tokens


def test_a_tokenizer_with_too_few_sentinels_is_refused():
    few = BYTE.with_tokens(["<|mask:0|>", "<|mask:1|>"])
    message = r"data.sources.a.view\W+a text that fills a row .* 6 spans, .* the tokenizer has 2 sentinels"
    with pytest.raises(InputError, match=message):
        views.load({"kind": "denoise"}, "data.sources.a.view", 128, few)
    views.load({"kind": "denoise"}, "data.sources.a.view", 40, few)
    views.load({"kind": "denoise", "form": "single"}, "data.sources.a.view", 128, few)


def test_the_order_of_sentinels():
    """T5's have names that rise and ids that fall; by default names count."""
    t5 = BYTE.with_tokens([f"<extra_id_{i}>" for i in reversed(range(10))])
    first = t5.special("<extra_id_9>")
    for numbering, want in (("named", [9, 8, 7]), ("down", [9, 8, 7]), ("up", [0, 1, 2])):
        seeing, same = view(70, tokenizer=t5, numbering=numbering)
        assert same.size == t5.size
        (seen,) = seeing.documents(document("a" * 60), np.random.default_rng(0))
        inputs, targets = parts(seen)
        assert [int(i) - first for i in inputs if i >= first] == want
        assert [int(i) - first for i in targets if i >= first] == want


@pytest.mark.parametrize(
    ("numbering", "t5", "ours"), [("named", (9, 8), (0, 1)), ("down", (9, 8), (9, 8)), ("up", (0, 1), (0, 1))]
)
def test_who_asks_for_a_middle_begins_with_the_same_sentinel(tmp_path, numbering, t5, ours):
    texts = DataSpec("", sources={"a": {"path": "x", "view": {"kind": "denoise", "numbering": numbering}}}, seq_len=40)
    for form, order, want in (("<extra_id_{}>", reversed(range(10)), t5), ("<|mask:{}|>", range(10), ours)):
        before = BYTE.with_tokens([form.format(i) for i in order])
        after = with_special_tokens(before, TokenizerSpec(), texts)
        assert after.size == before.size
        after.save(tmp_path)
        holes = make_infilling("sentinel", load_tokenizer(tmp_path)).holes
        assert tuple(hole - BYTE.size for hole in holes) == want


def test_a_model_has_one_first_sentinel():
    up, down = ({"path": "x", "view": {"kind": "denoise", "numbering": each}} for each in ("up", "down"))
    other = {"path": "x", "view": {"kind": "denoise", "form": "prefix"}}  # it has none
    for sources, fails in (({"a": up, "b": down}, True), ({"a": down, "b": down, "c": other}, False)):
        spec = DataSpec("", sources=sources, seq_len=40)
        with (
            pytest.raises(InputError, match="give both views the same numbering") if fails else contextlib.nullcontext()
        ):
            with_special_tokens(BYTE, TokenizerSpec(), spec)


def test_a_tokenizer_without_bos():
    bare = dataclasses.replace(BYTE, bos=None)
    seeing, _ = view(64, tokenizer=bare, form="prefix")
    tokens = np.array([*b"abcd", bare.eos], np.int32)
    (seen,) = seeing.documents(Document(tokens, np.ones(5, bool)), np.random.default_rng(0))
    np.testing.assert_array_equal(seen.tokens, tokens)
    assert seen.mask.sum() > 1


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def spec(path, **options):
    view = {"kind": "denoise", **options.pop("view", {})}
    return DataSpec("", sources={"one": {"path": path, "view": view}}, **{"seq_len": 48, "eval_fraction": 0} | options)


def test_batches_hold_what_the_view_shows_with_its_prefix(tmp_path):
    """The tokenizer has the sentinels, every text comes back from the rows, and the cache knows length and options."""
    texts = [f"{i:03} " + "words and more, " * (i % 6) for i in range(30)]
    path = write(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    data = load(spec(path), TokenizerSpec())
    rows, tokenizer = data.train[0][0], data.tokenizer
    batch = rows.batch(np.arange(len(rows)))
    marks = special_tokens.sentinels(tokenizer, special_tokens.sentinel_count(tokenizer))
    assert len(marks) == 2
    real = batch["segment_ids"] > 0
    np.testing.assert_array_equal(batch["prefix"][real], 1 - batch["loss_mask"][real])
    assert not batch["prefix"][~real].any()
    pieces = Counter()
    for row, segments in enumerate(batch["segment_ids"]):
        for number in range(1, segments.max() + 1):
            tokens, prefix = batch["tokens"][row, segments == number], batch["prefix"][row, segments == number]
            assert (tokens[0], tokens[-1]) == (tokenizer.bos, tokenizer.eos)
            text = corruption.restored(tokens[1 : prefix.sum()], tokens[prefix.sum() : -1], marks)
            pieces[tokenizer.decode(text.tolist())] += 1
    length = denoise._longest(denoise.Denoiser(), 48, tokenizer)
    assert pieces == Counter(text[i : i + length] for text in texts for i in range(0, len(text), length))
    assert load(spec(path), TokenizerSpec()).report["sources"][0]["was_cached"]
    for other in ({"seq_len": 40}, {"view": {"draws": 2}}):
        assert not load(spec(path, **other), TokenizerSpec()).report["sources"][0]["was_cached"]


def test_conversations_and_labels_are_refused(tmp_path):
    pairs = write(tmp_path / "p.jsonl", [{"prompt": "ask", "response": "reply"}])
    labelled = write(tmp_path / "l.jsonl", [{"text": "a text", "label": i} for i in range(2)])
    for path, format in ((pairs, "auto"), (labelled, "labelled")):
        with pytest.raises(InputError, match=r"data.sources.one.view.kind = 'denoise': is a view of plain text"):
            load(spec(path, format=format), TokenizerSpec())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0}, r"view.density = 0: must be in \(0, 1\)"),
        ({"density": 1.0}, r"view.density = 1.0: must be"),
        ({"density": True}, r"view.density = True: must be"),
        ({"density": "0.1"}, r"view.density = '0.1': must be"),
        ({"mean_span": 0.5}, r"view.mean_span = 0.5: must be at least 1"),
        ({"mean_span": float("nan")}, r"view.mean_span = nan: must be"),
        ({"form": "span"}, r"view.form = 'span': is not known. Did you mean 'spans'"),
        ({"form": "deshuffle", "density": 0.3}, r"view.density = 0.3: the form 'deshuffle' has none"),
        ({"form": "prefix", "mean_span": 3}, r"view.mean_span = 3: the form 'prefix' has none"),
        ({"numbering": "upward"}, r"view.numbering = 'upward': is not known"),
        ({"numbering": "up", "form": "drop"}, r"view.numbering = 'up': the form 'drop' has no sentinels"),
        ({"draws": 0}, r"view.draws = 0: must be at least 1"),
        ({"draws": 1.5}, r"view.draws = 1.5: must be"),
        ({"mixture": "ul3"}, r"view.mixture = 'ul3': is not known. Did you mean 'ul2'"),
        ({"mixture": "ul2", "density": 0.5}, r"view.density: the denoisers of mixture have their own"),
        ({"mixture": 3}, r"view.mixture = 3: must be"),
        ({"mixture": []}, r"view.mixture = \[\]: must be"),
        ({"mixture": "ul2", "modes": "no"}, r"view.modes = 'no': must be of type bool or None"),
        ({"modes": True}, r"view.modes: is of mixture='ul2'"),
        ({"mixture": [{"mode": "R"}], "modes": True}, r"view.modes: is of mixture='ul2'"),
        ({"mixture": [{"mode": "T"}]}, r"view.mixture: the denoiser .* mode = 'T': is not known"),
        ({"mixture": [{"weight": 0}]}, r"view.mixture: the denoiser .* weight = 0: must be"),
        ({"mixture": [{"spans": 3}]}, r"view.mixture: the denoiser .* spans: no such option"),
        ({"mean": 3}, r"view.mean: no such option. Did you mean 'mean_span'"),
    ],
)
def test_what_cannot_be_honoured_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        views.load({"kind": "denoise", **options}, "data.sources.a.view", 64)


def test_a_row_that_is_too_short():
    with pytest.raises(InputError, match=r"a text of 3 tokens needs data.seq_len = 7, and it is 6. Raise it"):
        view(6)
    view(7)
