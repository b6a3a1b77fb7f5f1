"""Scorers that read texts: DSIR's numbers, duplicates, overlap with evaluation data, lengths."""

import json

import goldens
import numpy as np
import pytest

from research.errors import InputError
from research.evals import scored_rows
from research.evals.record_scores import Item
from research.evals.scorers import Chunk, Inputs, Scorer, dsir, duplicates, load, overlap
from research.evals.scorers.inputs import Compared, bytes_encoder
from research.sources import entries

DSIR = {name: case for name, case in goldens.load("data_selection").items() if name.startswith("dsir")}


def chunk(texts, first=0):
    return Chunk(first, [Item(f"a.jsonl:{i}", b"", {"text": text}) for i, text in enumerate(texts)])


def compared(tmp_path, texts):
    path = tmp_path / "other.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return Compared(str(path), "--target", entries.locate(str(path), count=0, seed=0))


def scored(scorer, texts, size=7):
    """Columns of records that are shown and scored a few at a time."""
    parts = [chunk(texts[i : i + size], i) for i in range(0, len(texts), size)]
    for part in parts:
        scorer.observe(part)
    scorer.prepare()
    columns = [scorer.score(part) for part in parts]
    return {name: [x for column in columns for x in column[name]] for name in scorer.columns}


@pytest.mark.parametrize("name", DSIR)
def test_dsir_is_that_of_its_package(name, tmp_path):
    case = DSIR[name]
    buckets, ngrams = case.hparams["num_buckets"], case.hparams["ngrams"]
    scorer = dsir.Dsir(compared(tmp_path, case.inputs["target_texts"]), buckets, ngrams)
    values = scored(scorer, case.inputs["raw_texts"])["dsir"]
    np.testing.assert_allclose(values, case.outputs["log_importance_weights"], rtol=1e-9)
    first = np.bincount(dsir.features(case.inputs["raw_texts"][0], buckets, ngrams), minlength=buckets)
    np.testing.assert_array_equal(first, case.outputs["features_first"])
    p, q = case.outputs["target_probs"], case.outputs["raw_probs"]
    np.testing.assert_allclose(scorer._ratio, np.log(p + 1e-8) - np.log(q + 1e-8), rtol=1e-9, atol=1e-12)


def test_copies_and_what_is_nearly_one():
    words = [f"word{i}" for i in range(200)]
    text, near = " ".join(words), " ".join(["another", *words[1:]])
    other = " ".join(f"else{i}" for i in range(200))
    out = scored(duplicates.make(), [text, other, near, text, "one", "two", "one"], size=3)
    assert out["copies_before"] == [0, 0, 0, 1, 0, 0, 1]
    alike = out["near_duplicate"]
    assert (alike[0], alike[1], alike[3], alike[4], alike[5], alike[6]) == (0, 0, 1, 0, 0, 1)
    assert alike[2] > 0.9  # 195 of 197 n-grams


def test_min_hashes_estimate_the_share_in_common():
    hashes = duplicates.Hashes(4096, 0)
    values = np.random.default_rng(1).integers(0, 2**32, 400, np.uint64)
    a, b = values[:300], values[100:]
    alike = np.mean(hashes.signature(a) == hashes.signature(b))
    assert abs(alike - 200 / 400) < 4 * np.sqrt(0.25 / 4096)


def test_overlap_with_evaluation_data(tmp_path):
    test = "the quick brown fox jumps over the lazy dog again and again today"
    scorer = overlap.Overlap(compared(tmp_path, [test, "Short one!"]), 5)
    texts = [
        "He said: the Quick, brown fox jumps -- over!",
        "nothing of it",
        "a short one here",
        "quick brown fox jumps",
    ]
    out = scored(scorer, texts, size=3)
    assert out["overlap"] == [6 / 8, 0, 2 / 4, 0]
    assert out["overlap_records"] == [1, 0, 1, 0]
    assert "2 of 4 records share 5 words" in scorer.summary()
    assert "with 2 records" in scorer.summary()


def test_an_empty_target_is_refused(tmp_path):
    with pytest.raises(InputError, match="holds no record"):
        scored(dsir.Dsir(compared(tmp_path, []), 10, 1), ["a"])


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"x": [1.0]}, "gives 1 values of 'x' for 2 records"),
        ({"y": [1.0, 2.0]}, r"gives \['y'\], and says that it gives \['x'\]"),
        ({"x": [1.0, "a"]}, "x = 'a': must be a number"),
    ],
)
def test_a_scorer_that_gives_something_else_than_it_says_is_named(values, words, tmp_path):
    class Own(Scorer):
        columns = ("x",)

        def score(self, chunk):
            return values

    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{"text": "b"}\n')
    rows = scored_rows.RowScorer({"own": Own()}, {}, bytes_encoder(), 1)
    with pytest.raises(InputError, match=f"--with = own: {words}"):
        rows.write(entries.locate(str(path), count=0, seed=0), tmp_path / "scores.jsonl")


def test_a_column_of_every_row_is_no_scorers(tmp_path, monkeypatch):
    (tmp_path / "counted.py").write_text(
        "from research.evals.scorers import Scorer\n\n\n"
        "def make():\n    scorer = Scorer()\n    scorer.columns = ('tokens',)\n    return scorer\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match=r"--with = counted: its column 'tokens' is in every row already"):
        load(["counted"], {}, Inputs(None, None, None))
