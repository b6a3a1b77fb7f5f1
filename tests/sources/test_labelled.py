"""Text with classes: records, their places in packed batches, and what is wrong with them."""

import json

import numpy as np
import pytest

from research.errors import InputError
from research.sources import dataset
from research.sources.tokenizers import TokenizerSpec

BYTES = TokenizerSpec("byte")


def load(tmp_path, records, **options):
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    spec = dataset.DataSpec(
        path=str(path),
        **({"format": "labelled", "template": "plain", "seq_len": 32, "eval_fraction": 0.0} | options),
        cache_dir=str(tmp_path / "cache"),
    )
    return dataset.load(spec, BYTES)


def documents(data, batch_size=4):
    """text -> class probabilities, of one batch; everywhere but at a document's last token they are 0."""
    batch, _ = (source := dataset.make_source(data.train, batch_size=batch_size, seed=0)).next(source.init())
    assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {k: (s.shape, s.dtype) for k, s in source.spec.items()}
    found = {}
    for tokens, segments, mask, probs in zip(
        batch["tokens"], batch["segment_ids"], batch["loss_mask"], batch["label_probs"], strict=True
    ):
        for segment in range(1, segments.max() + 1):
            (here,) = np.nonzero(segments == segment)
            np.testing.assert_array_equal(mask[here], [0] * (len(here) - 1) + [1])
            np.testing.assert_array_equal(probs[here[:-1]], 0)
            found[data.tokenizer.decode(tokens[here].tolist())] = probs[here[-1]].tolist()
        np.testing.assert_array_equal(probs[segments == 0], 0)
    return found


def test_a_label_lies_at_the_last_token_of_each_packed_document(tmp_path):
    data = load(tmp_path, [{"text": "ab" * i, "label": i % 3} for i in range(1, 7)], prompt="{text}?")
    want = {"ab" * i + "?": [float(i % 3 == c) for c in range(3)] for i in range(1, 7)}
    assert documents(data, batch_size=8) == want
    assert data.report["train"]["supervised_tokens"] == 6
    assert data.report["train"]["rows"] < 6


def test_labels_are_numbers_names_or_probabilities(tmp_path):
    named = load(tmp_path, [{"text": "a", "label": "no"}, {"text": "b", "label": "yes"}], labels=("yes", "no"))
    assert documents(named) == {"a": [0.0, 1.0], "b": [1.0, 0.0]}
    weak = [{"text": "a", "probs": [0.25, 0.75]}, {"text": "b", "probs": [1, 0]}]
    assert documents(load(tmp_path, weak)) == {"a": [0.25, 0.75], "b": [1.0, 0.0]}
    both = [{"text": "a", "probs": [0.25, 0.75], "label": 0}, {"text": "b", "probs": [1, 0], "label": 1}]
    assert documents(load(tmp_path, both, fields={"label": "label"}))["a"] == [1.0, 0.0]
    assert documents(load(tmp_path, both, fields={"probs": "probs"}))["a"] == [0.25, 0.75]
    assert documents(load(tmp_path, weak, num_classes=4))["a"] == [0.25, 0.75, 0.0, 0.0]


def test_a_long_text_loses_its_beginning_or_is_dropped(tmp_path):
    records = [{"text": "x" * 40 + "end", "label": 1}, {"text": "short", "label": 0}]
    assert set(documents(load(tmp_path, records))) == {"short"}
    kept = documents(load(tmp_path, records, on_long="truncate", prompt="{text}!"))
    assert kept["x" * 28 + "end!"] == [0.0, 1.0]


@pytest.mark.parametrize(
    ("record", "options", "words"),
    [
        ({"text": "a"}, {}, ["x.jsonl:2", "neither of 'label' and 'probs'"]),
        ({"text": "a", "label": 0, "probs": [1, 0]}, {}, ["both of 'label' and 'probs'", "data.fields"]),
        ({"text": "a", "label": "maybe"}, {"labels": ("yes", "no")}, ["'maybe'", "data.labels = ('yes', 'no')"]),
        ({"text": "a", "label": "yes"}, {}, ["'yes'", "data.labels"]),
        ({"text": "a", "label": -1}, {}, ["-1", "from 0 on"]),
        ({"text": "a", "label": 2}, {"labels": ("0", "1")}, ["2", "data.labels"]),
        ({"text": "a", "probs": [0.5, 0.6]}, {}, ["[0.5, 0.6]", "add up to 1"]),
        ({"text": "a", "probs": [0.5, 0.5]}, {"labels": ("a", "b", "c")}, ["3 probabilities"]),
        ({"text": "a", "label": 3}, {"num_classes": 2}, ["data.num_classes: 2", "4"]),
        ({"text": "a", "label": 0}, {"prompt": "text"}, ["data.prompt", "{text}"]),
    ],
)
def test_what_is_wrong_is_named(tmp_path, record, options, words):
    first = {"text": "ok", "label": options.get("labels", [0])[0]}
    with pytest.raises(InputError) as raised:
        load(tmp_path, [first, record], **options)
    for word in words:
        assert word in str(raised.value)
