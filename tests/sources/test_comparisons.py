"""Preference data: from records of several spellings to rows whose documents are compared."""

import json
import math
import re

import numpy as np
import pytest
from text_cases import CHATML, INST, make_folder

from research.errors import InputError
from research.sources import comparisons, dataset
from research.sources.records import SHOWN, BadRecord
from research.sources.spec import DataSpec
from research.sources.tokenizers import TokenizerSpec


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def read(record, **fields):
    format = comparisons.detect(record, fields)
    return format, comparisons.read(record, format, fields)


def texts(comparison):
    prompt = [(turn.role, turn.text) for turn in comparison.prompt]
    return prompt, [[turn.text for turn in answer] for answer in comparison.answers]


PLAIN = ([("user", "2 + 2?")], [["4"], ["5"]])


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"},
        {"prompt": [user("2 + 2?")], "chosen": [assistant("4")], "rejected": [assistant("5")]},
        {"chosen": [user("2 + 2?"), assistant("4")], "rejected": [user("2 + 2?"), assistant("5")]},
        {"prompt": "2 + 2?", "chosen": assistant("4"), "rejected": "5"},
        {"chosen": "\n\nHuman: 2 + 2?\n\nAssistant: 4", "rejected": "\n\nHuman: 2 + 2?\n\nAssistant: 5"},
        {"prompt": "\n\nHuman: 2 + 2?\n\nAssistant:", "chosen": " 4".strip(), "rejected": "5"},
    ],
)
def test_a_pair_is_read_in_many_spellings(record):
    format, comparison = read(record)
    assert format == "preference"
    assert texts(comparison) == PLAIN
    assert math.isnan(comparison.margin)


def test_whole_conversations_have_their_common_beginning_as_prompt():
    begin = [{"role": "system", "content": "Be brief."}, user("Hi"), assistant("Hello"), user("2 + 2?")]
    _, comparison = read(
        {"chosen": [*begin, assistant("4")], "rejected": [*begin, assistant("5"), user("?"), assistant("4")]}
    )
    prompt, answers = texts(comparison)
    assert prompt == [("system", "Be brief."), ("user", "Hi"), (SHOWN, "Hello"), ("user", "2 + 2?")]
    assert answers == [["4"], ["5", "?", "4"]]
    _, same = read({"chosen": [*begin, assistant("4")], "rejected": [*begin, assistant("4")]})
    assert texts(same)[1] == [["4"], ["4"]]
    assert same.identical
    _, longer = read(
        {"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("b"), user("c"), assistant("d")]}
    )
    assert texts(longer) == ([("user", "a")], [["b"], ["b", "c", "d"]])


def write(folder, records, name="data.jsonl"):
    path = folder / name
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def load(folder, records, **options):
    options = {"seq_len": 48, "eval_fraction": 0.0, "cache_dir": str(folder / "cache"), "template": "plain"} | options
    path = write(folder, records)
    return dataset.load(DataSpec(path=path, **options), TokenizerSpec("byte"))


def all_rows(data):
    (rows, _), *others = data.train
    assert not others
    return rows.batch(np.arange(len(rows)))


def documents(batch, tokenizer, names=()):
    """(row, pair) -> its documents in order, each its text and the values of its fields, which are the same at all of
    its tokens."""
    found = {}
    for row in range(len(batch["tokens"])):
        for segment in range(1, batch["segment_ids"][row].max() + 1):
            at = batch["segment_ids"][row] == segment
            text = tokenizer.decode(batch["tokens"][row][at].tolist())
            values = []
            for name in ("side", *names):
                value = np.unique(batch[name][row][at])
                assert len(value) == 1
                values.append(value[0].item())
            pair = np.unique(batch["pair"][row][at])
            assert len(pair) == 1
            found.setdefault((row, pair.item()), []).append((text, *values))
    return found


PAIRS = [
    {"prompt": f"q{i}:", "chosen": "c" * (1 + i % 7), "rejected": "r" * (1 + i % 5), "margin": i / 4} for i in range(23)
]


@pytest.mark.parametrize("pack", [True, False])
def test_a_pair_lies_in_one_row_and_both_answers_have_the_prompt(tmp_path, pack):
    data = load(tmp_path, PAIRS, pack=pack)
    batch = all_rows(data)
    found = documents(batch, data.tokenizer, ("margin",))
    assert sorted(sides for sides in found.values()) == sorted(
        [(p["prompt"] + p["chosen"], 0, p["margin"]), (p["prompt"] + p["rejected"], 1, p["margin"])] for p in PAIRS
    )
    most = max(pair for _, pair in found)
    assert most > 1 if pack else most == 1
    # Answers and the tokens that end them are learned, and nothing else.
    learned = sum(len(p["chosen"]) + len(p["rejected"]) + 2 for p in PAIRS)
    assert batch["loss_mask"].sum() == learned
    assert not batch["loss_mask"][batch["side"] < 0].any()


def test_pairs_that_are_too_long_go_together(tmp_path):
    long = {"prompt": "q", "chosen": "c" * 30, "rejected": "r" * 30}
    fits = {"prompt": "p", "chosen": "c" * 2, "rejected": "r" * 38}
    data = load(tmp_path, [long, fits])
    assert sorted(documents(all_rows(data), data.tokenizer).values()) == [[("pcc", 0), ("p" + "r" * 38, 1)]]
    assert data.report["train"]["too_long_dropped"] == 2
    cut = load(tmp_path, [long, fits], on_long="truncate")
    assert sorted(documents(all_rows(cut), cut.tokenizer).values())[1] == [("q" + "c" * 22, 0), ("q" + "r" * 22, 1)]
    assert cut.report["train"]["too_long_truncated"] == 2


def test_a_bad_side_takes_the_pair_along(tmp_path):
    bad = {"prompt": "b", "chosen": "c", "rejected": " "}
    with pytest.raises(InputError, match=r"data.jsonl:2: field 'rejected' is an empty rejected"):
        load(tmp_path, [PAIRS[0], bad])
    data = load(tmp_path, [PAIRS[0], bad], on_bad_record="skip")
    assert data.report["sources"][0]["bad"] == {"empty rejected": 1}
    assert data.report["train"]["examples"] == 2


def test_equal_prompts_are_on_one_side(tmp_path):
    records = [{"prompt": f"q{i % 5}", "chosen": f"c{i}", "rejected": "r"} for i in range(40)]
    data = load(tmp_path, records, eval_fraction=0.4)
    held = data.held_out.batch(np.arange(len(data.held_out)))
    prompts = [
        {text[0][:2] for text, *_ in documents(batch, data.tokenizer).values()} for batch in (all_rows(data), held)
    ]
    assert prompts[0]
    assert prompts[1]
    assert not prompts[0] & prompts[1]
    assert len(data.held_out_records) == len(prompts[1])
    assert all(record["response"] == record["chosen"] for record in data.held_out_records)


VERDICTS = [{"prompt": f"q{i // 2}:", "completion": f"{i:02}" * (1 + i % 4), "label": i % 3 > 0} for i in range(20)]


@pytest.mark.parametrize(("seq_len", "pack"), [(48, True), (24, False), (14, True)])
def test_behind_a_verdict_stands_an_answer_to_another_prompt(tmp_path, seq_len, pack):
    data = load(tmp_path, VERDICTS, seq_len=seq_len, pack=pack, mismatches=True)
    batch = all_rows(data)
    kept = [record for record in VERDICTS if len(record["prompt"] + record["completion"]) + 2 <= seq_len]
    labels = {record["prompt"] + record["completion"]: record["label"] for record in kept}
    whole, crossed, together = {}, [], 0
    for row in range(len(batch["tokens"])):
        before = ""
        for segment in range(1, batch["segment_ids"][row].max() + 1):
            at = batch["segment_ids"][row] == segment
            text = data.tokenizer.decode(batch["tokens"][row][at].tolist())
            (verdict,) = set(batch["desirable"][row][at].tolist())
            answer = at & ((batch["mismatched"] if verdict < 0 else batch["loss_mask"])[row] > 0)
            assert not (batch["loss_mask"] if verdict < 0 else batch["mismatched"])[row][at].any()
            prompt = text[: 3 if text[2] == ":" else 4] if text[1].isdigit() else text
            assert answer.sum() == at.sum() - 1 - len(prompt)
            if verdict < 0:
                crossed.append(text)
                together += before.startswith(prompt)
            else:
                whole[text] = bool(verdict)
            before = text
    assert whole == labels
    assert len(crossed) == len(labels)
    assert not set(crossed) & set(labels)
    if seq_len == 48:  # nothing was cut: each answer stands behind another prompt once
        assert sorted(text.partition(":")[2] for text in crossed) == sorted(r["completion"] for r in VERDICTS)
        assert together == len(crossed)
    assert "pair" not in batch


def test_without_an_objective_that_reads_them_no_answers_are_crossed(tmp_path):
    batch = all_rows(load(tmp_path, VERDICTS))
    assert "mismatched" not in batch
    assert set(np.unique(batch["desirable"])) == {-1, 0, 1}
    one = [{"prompt": "q", "response": str(i), "label": True} for i in range(3)]
    with pytest.raises(InputError, match="all answers are to one prompt"):
        load(tmp_path, one, mismatches=True)


def test_pairs_may_be_read_as_verdicts(tmp_path):
    data = load(tmp_path, PAIRS[:5], format="unpaired")
    batch = all_rows(data)
    assert sorted(np.unique(batch["desirable"]).tolist()) == [-1, 0, 1]
    assert "pair" not in batch
    assert data.report["train"]["examples"] == 10


def bad(record, **fields):
    format = comparisons.detect(record, fields) or "preference"
    with pytest.raises(BadRecord) as error:
        comparisons.read_all(record, format, fields)
    return error.value


@pytest.mark.parametrize(
    ("record", "reason", "fault"),
    [
        ({"chosen": "a", "rejected": "b"}, "no prompt", "isn't a conversation that begins with one"),
        ({"prompt": "q", "chosen": "", "rejected": "b"}, "empty chosen", "'chosen' is an empty chosen"),
        ({"prompt": "q", "chosen": 4, "rejected": "b"}, "wrong type", "'chosen' must be text"),
        ({"prompt": "q", "chosen": ["a"], "rejected": "b"}, "wrong type", "a list of objects with role and content"),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "margin": "1"}, "wrong margin", "'margin' must be a number"),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "margin": math.nan}, "wrong margin", "'margin' must be a"),
        (
            {"prompt": "q", "chosen": "a", "rejected": "b", "score_chosen": 1, "score_rejected": 2.5},
            "chosen has the lower score",
            "score_chosen = 1.0 is less than score_rejected = 2.5",
        ),
        (
            {"prompt": "q", "chosen": [user("q"), assistant("a")], "rejected": "b"},
            "one side a conversation",
            "one is a whole conversation and the other an answer",
        ),
        (
            {"chosen": [user("p"), assistant("a")], "rejected": [user("q"), assistant("b")]},
            "no common prompt",
            "don't begin with the same messages",
        ),
        (
            {"prompt": "x", "chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]},
            "prompt differs",
            "'prompt' isn't in what both conversations begin with",
        ),
        (
            {"prompt": "q", "chosen": [assistant("a"), assistant("b")], "rejected": "b"},
            "roles out of order",
            "message 3, of role 'assistant', follows 'assistant'",
        ),
        ({"prompt": "q", "responses": ["a"]}, "nothing to compare", "a list of two or more answers"),
        ({"prompt": "q", "responses": ["a", "b"], "scores": [1]}, "wrong scores", "a number for each of 2 answers"),
        ({"prompt": "q", "responses": ["a", "b"], "scores": [1, 1]}, "all answers tie", "all 2 answers have the score"),
        (
            {"prompt": "q", "responses": [{"text": "a", "score": 1}, {"text": "b"}]},
            "wrong scores",
            "some answers have a score, and others none",
        ),
        ({"prompt": "q", "responses": ["a", " "]}, "empty response", r"'responses\[1\]' is an empty response"),
        ({"prompt": "q", "response": "a", "label": 2, "score": 1.0}, "unknown label", "'label' is 2, and must be true"),
    ],
)
def test_what_is_wrong_with_a_record_is_said(record, reason, fault):
    error = bad(record)
    assert error.reason == reason
    assert re.search(fault, str(error))


REWARDED = {"prompt": "q", "chosen": "a", "rejected": "b", "margin": 2, "by": [-1.0, 0.5]}


def test_rewards_that_are_named_say_which_answer_is_better_and_how_probably(tmp_path):
    _, comparison = read(REWARDED, rewards="by")
    assert texts(comparison)[1] == [["b"], ["a"]]
    assert comparison.probability == pytest.approx(1 / (1 + math.exp(-1.5)))
    assert math.isnan(comparison.margin)
    assert texts(read(REWARDED)[1])[1] == [["a"], ["b"]]  # else they are another column
    (better, worse) = comparisons.read_all(REWARDED, "unpaired", {"rewards": "by"})
    assert [(turns[0].text, each.desirable) for each in (better, worse) for turns in each.answers] == [
        ("b", True),
        ("a", False),
    ]
    equal = [
        read(REWARDED | {"prompt": "q", "chosen": x, "rejected": "b", "by": [1, 1]}, rewards="by")[1] for x in "acdefgh"
    ]
    assert {(each.ties, each.probability) for each in equal} == {(True, 0.5)}
    assert len({texts(each)[1][0] == ["b"] for each in equal}) == 2  # whichever the record calls chosen
    records = [REWARDED, {"prompt": "r", "chosen": "c", "rejected": "d", "by": [3, 1]}]
    data = load(tmp_path, records, fields={"rewards": "by"})
    found = documents(all_rows(data), data.tokenizer, ("preference",))
    firsts = {sides[0][0].strip(): [p for *_, p in sides] for sides in found.values()}
    for text, p in (("q", 1.5), ("r", 2.0)):
        ((_, values),) = [(k, v) for k, v in firsts.items() if text in k]
        np.testing.assert_allclose(values, 1 / (1 + math.exp(-p)), rtol=1e-6)
    assert "preference" not in all_rows(load(tmp_path, records))


@pytest.mark.parametrize(
    ("record", "fault"),
    [
        ({"by": [1.0]}, "'by' must have two numbers"),
        ({"by": [1.0, math.nan]}, "'by' must have two numbers"),
        ({"by": None}, "'by'"),
        ({"chosen": None, "rejected": None, "responses": ["a", "b"]}, "its rewards are scores"),
        ({"response": "x", "label": True}, "rewards are of pairs"),
    ],
)
def test_rewards_that_are_none_of_a_pair_are_named(record, fault):
    whole = {key: value for key, value in (REWARDED | record).items() if key == "by" or value is not None}
    if "response" in record:
        whole = {"prompt": "q", **record, "by": [1, 2]}
    assert fault in str(bad(whole, rewards="by"))


def test_a_named_column_must_be_there():
    record = {"prompt": "q", "response": "a", "good": None}
    assert bad(record, label="good").reason == "no label"
    assert bad({"prompt": "q", "chosen": "a", "rejected": "b"}, margin="by").reason == "missing field"


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "q", "responses": ["best", "good", "bad"]},
        {"prompt": "q", "responses": ["good", "bad", "best"], "scores": [2, -1.5, 3]},
        {
            "instruction": "q",
            "completions": [
                {"response": r, "overall_score": s} for r, s in zip(("bad", "best", "good"), (1, 9.5, 4), strict=True)
            ],
        },
        {
            "prompt": [user("q")],
            "answers": [{"answer": r, "rank": k} for r, k in (("good", 1), ("bad", 2), ("best", 0))],
        },
        {"prompt": "q", "responses": [[assistant("best")], assistant("good"), "bad"]},
    ],
)
def test_lists_are_read_best_first(record):
    format, comparison = read(record)
    assert format == "ranked"
    assert texts(comparison) == ([("user", "q")], [["best"], ["good"], ["bad"]])
    assert not comparison.ties


def test_lists_are_packed_whole_with_ranks_and_scores(tmp_path):
    records = [{"prompt": f"q{i}", "responses": ["a", "b", "c", "d"], "scores": [1, 3, 3, i]} for i in range(3)]
    data = load(tmp_path, records)
    found = documents(all_rows(data), data.tokenizer, ("score",))
    assert len(found) == 3
    for sides in found.values():
        assert [side for _, side, _ in sides] == [0, 1, 2, 3]
        scores = [score for *_, score in sides]
        assert scores == sorted(scores, reverse=True)
    assert data.report["sources"][0]["ties"] == 3


def test_ultrafeedback_and_a_column_of_another_name(tmp_path):
    whole = [user("q"), assistant("good")]
    record = {"prompt": "q", "prompt_id": "x", "chosen": whole, "rejected": [user("q"), assistant("bad")]}
    record |= {"messages": whole, "score_chosen": 7.5, "score_rejected": 5.0}
    _, comparison = read(record)
    assert texts(comparison) == ([("user", "q")], [["good"], ["bad"]])
    assert (comparison.scores, comparison.margin) == ([7.5, 5.0], 2.5)
    renamed = {"question": "2 + 2?", "response_j": "4", "response_k": "5", "by": 2}
    _, comparison = read(renamed, prompt="question", chosen="response_j", rejected="response_k", margin="by")
    assert (texts(comparison), comparison.margin) == (PLAIN, 2)
    data = load(tmp_path, [record])
    assert data.report["train"]["examples"] == 2


def test_sources_with_and_without_comparisons(tmp_path):
    """A batch has one set of fields; a run of several processes, and one that goes on, see the same batches."""
    texts = [{"text": f"text {i}"} for i in range(9)]
    sources = {
        "pairs": {"path": write(tmp_path, PAIRS, "pairs.jsonl"), "weight": 2.0},
        "texts": {"path": write(tmp_path, texts, "texts.jsonl"), "weight": 1.0},
    }
    spec = DataSpec(path="", sources=sources, seq_len=48, cache_dir=str(tmp_path / "cache"), template="plain")
    data = dataset.load(spec, TokenizerSpec("byte"))
    again = dataset.load(spec, TokenizerSpec("byte"))
    assert [source["was_cached"] for source in again.report["sources"]] == [True, True]
    source = dataset.make_source(data.train, batch_size=6, seed=3)
    parts = [dataset.make_source(again.train, batch_size=6, seed=3, mine=mine) for mine in ([0, 1, 2], [3, 4, 5])]
    state, places = source.init(), [part.init() for part in parts]
    for _ in range(5):
        batch, state = source.next(state)
        halves, places = zip(*(part.next(place) for part, place in zip(parts, places, strict=True)), strict=True)
        for name, values in batch.items():
            np.testing.assert_array_equal(values, np.concatenate([half[name] for half in halves]))
        of_text = (batch["source"] == 1) & (batch["segment_ids"] > 0)
        assert of_text.any()
        assert (batch["pair"][of_text] == 0).all()
        assert (batch["side"][of_text] == -1).all()
        assert (batch["pair"][(batch["source"] == 0) & (batch["segment_ids"] > 0)] > 0).all()


def test_what_views_cannot_do_is_refused(tmp_path):
    sources = {"pairs": {"path": write(tmp_path, PAIRS), "view": {"kind": "reverse"}}}
    spec = DataSpec(path="", sources=sources, seq_len=48, cache_dir=str(tmp_path / "cache"))
    with pytest.raises(InputError, match=r"data.sources.pairs.view: a view is of single documents"):
        dataset.load(spec, TokenizerSpec("byte"))


def test_a_refused_answer_takes_its_comparison_along(tmp_path):
    """What a template refuses is seen only when the documents are written."""
    tools = {"role": "assistant", "content": "r", "name": "x"}
    records = [*PAIRS[:2], {"prompt": "b", "chosen": "c", "rejected": [tools]}, PAIRS[2]]
    data = load(tmp_path, records, on_bad_record="skip")
    assert data.report["sources"][0]["bad"] == {"has name": 1}
    assert data.report["sources"][0]["comparisons"] == 3
    assert len(documents(all_rows(data), data.tokenizer)) == 3


def test_virtual_tokens_stand_in_front_of_both_answers(tmp_path):
    path = write(tmp_path, PAIRS)
    spec = DataSpec(path=path, seq_len=48, eval_fraction=0.0, cache_dir=str(tmp_path / "cache"), template="plain")
    data = dataset.load(spec, TokenizerSpec("byte"), virtual=range(300, 303))
    batch = all_rows(data)
    for row in range(len(batch["tokens"])):
        for segment in range(1, batch["segment_ids"][row].max() + 1):
            at = batch["segment_ids"][row] == segment
            assert batch["tokens"][row][at][:3].tolist() == [300, 301, 302]
            assert len(set(batch["pair"][row][at])) == len(set(batch["side"][row][at])) == 1
            assert (batch["pair"][row][at] > 0).all()


@pytest.mark.parametrize("template", [CHATML, INST], ids=["chatml", "inst"])
def test_under_a_models_own_template_only_answers_are_learned(tmp_path, template):
    """Both documents begin with the same tokens, whatever the prompt holds; of each the last answer is learned."""
    tokenizer = make_folder(tmp_path / "model", "gpt2", template)
    begin = [user("Hi"), assistant("Hello"), user("2 + 2?")]
    records = [{"chosen": [*begin, assistant("It is 4.")], "rejected": [*begin, assistant("Five, I think.")]}]
    spec = DataSpec(
        path=write(tmp_path, records),
        seq_len=256,
        eval_fraction=0.0,
        cache_dir=str(tmp_path / "cache"),
        template="model",
    )
    batch = all_rows(dataset.load(spec, TokenizerSpec(), tokenizer))
    chosen, rejected = ((batch["side"][0] == side).nonzero()[0] for side in (0, 1))
    tokens, learned = batch["tokens"][0], batch["loss_mask"][0] > 0
    prompt = int(np.argmax(learned[chosen]))
    assert prompt > 0
    np.testing.assert_array_equal(tokens[chosen][:prompt], tokens[rejected][:prompt])
    assert not learned[rejected][:prompt].any()
    answers = [tokenizer.decode(tokens[at][learned[at]].tolist()).strip() for at in (chosen, rejected)]
    assert answers == ["It is 4.", "Five, I think."]


def test_transcripts_of_several_turns():
    begin = "\n\nHuman: Hi\n\nAssistant: Hello:\n\n1. one\n2. two\n\nHuman: And?\n\nAssistant:"
    _, comparison = read({"chosen": begin + " Three.", "rejected": begin + " No.\n\nHuman: Why?\n\nAssistant: So."})
    prompt, answers = texts(comparison)
    assert prompt == [("user", "Hi"), (SHOWN, "Hello:\n\n1. one\n2. two"), ("user", "And?")]
    assert answers == [["Three."], ["No.", "Why?", "So."]]
    error = bad({"chosen": begin + " Three.\n\nAssistant: Four.", "rejected": begin + " No."})
    assert error.reason == "roles out of order"
