"""Documents in two tokenizers' tokens: compared where, and only where, both have read the same."""

import json

import numpy as np
import pytest

from research.errors import InputError
from research.sources.dataset import DataSpec, load, make_source
from research.sources.tokenizers import TokenizerSpec, make_tokenizer

WORDS = ["the cat", "sat on", "a mat", "naïve", "quite so", "no"]
BYTES = make_tokenizer(TokenizerSpec("byte"), lambda: iter(()))
PIECES = make_tokenizer(TokenizerSpec("bpe", 290), lambda: iter([" ".join(WORDS) * 20]), texts_id="words")


def conversations(n):
    rng = np.random.default_rng(0)
    say = lambda: " ".join(rng.choice(WORDS, rng.integers(1, 4)))  # noqa: E731
    roles = ("user", "assistant") * 2
    return [{"messages": [{"role": role, "content": say()} for role in roles[: 2 + 2 * (i % 2)]]} for i in range(n)]


def answers_so_far(tokens, mask, tokenizer):
    """Of each position: the supervised ids up to it as bytes, and how many ends of answers are among them."""
    read, ends, found = b"", 0, []
    for i, supervised in zip(tokens, mask, strict=True):
        if supervised:
            ends += int(i) == tokenizer.eos
            text = tokenizer.backend.id_to_token(int(i))
            read += b"" if int(i) == tokenizer.eos else text.encode()  # byte-level letters, one for each byte
        found.append((read, ends))
    return found


@pytest.mark.parametrize("pack", [True, False])
def test_positions_are_paired_where_both_have_read_the_same(pack, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in conversations(40)))
    data = load(DataSpec(str(path), seq_len=128, pack=pack), TokenizerSpec("byte"), BYTES, teacher=PIECES)
    rows = data.train[0][0]
    batch = rows.batch(np.array([*range(len(rows)), -1]))
    assert np.all(batch["teacher_at"][-1] == -1)
    paired = unpaired = 0
    for b in range(len(rows)):
        for segment in range(1, batch["segment_ids"][b].max() + 1):
            here = np.flatnonzero(batch["segment_ids"][b] == segment)
            there = np.flatnonzero(batch["teacher_segment_ids"][b] == segment)
            mask = batch["loss_mask"][b, here]
            own = rows.teacher.batch(np.array([b]))["loss_mask"][0, there]
            mine = answers_so_far(batch["tokens"][b, here], mask, BYTES)
            theirs = answers_so_far(batch["teacher_tokens"][b, there], own, PIECES)
            assert mine[-1] == theirs[-1]  # the documents are the same
            np.testing.assert_array_equal(batch["teacher_positions"][b, there], np.arange(len(there)))
            boundaries = {theirs[u] for u in range(len(there) - 1) if own[u + 1]}
            for t in range(len(here)):
                at = batch["teacher_at"][b, here[t]]
                if at >= 0:
                    assert theirs[at - there[0]] == mine[t]
                    assert own[at - there[0] + 1] == mask[t + 1] == 1
                    paired += 1
                elif t + 1 < len(here) and mask[t + 1]:
                    assert mine[t] not in boundaries
                    unpaired += 1
    assert paired > 100
    assert unpaired > 100
    source = make_source(data.train, batch_size=4, seed=0)
    made, _ = source.next(source.init())
    assert {name: (x.shape, x.dtype) for name, x in made.items()} == {
        name: (spec.shape, spec.dtype) for name, spec in source.spec.items()
    }


def test_texts_that_would_be_cut_are_an_error(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": " ".join(WORDS) * n}) + "\n" for n in (1, 2, 9)))
    with pytest.raises(InputError, match=r"data\.seq_len: 128 cuts texts of up to \d+ tokens.*same tokenizer"):
        load(DataSpec(str(path), seq_len=128), TokenizerSpec("byte"), BYTES, teacher=PIECES)
    load(DataSpec(str(path), seq_len=512), TokenizerSpec("byte"), BYTES, teacher=PIECES)
