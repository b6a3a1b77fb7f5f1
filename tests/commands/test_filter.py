"""Completions become training data."""

import json

import pytest

from research.commands import filter as filter_


def completion(prompt, text, logprob=-1.0, tokens=2, **more):
    return {"prompt": prompt, **more, "completion": text, "tokens": list(range(tokens)), "logprob": logprob}


def run(tmp_path, records, *flags):
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    status = filter_.main(
        [f"--data={tmp_path / 'in.jsonl'}", f"--output={tmp_path / 'out.jsonl'}", "--overwrite", *flags]
    )
    if status:
        return status
    return [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]


def test_empty_cut_off_and_wrong_completions_are_dropped(tmp_path, capsys):
    records = [
        completion("copy: ab", "ab", response="ab", task="copy"),
        completion("copy: cd", "dc", response="cd", task="copy"),
        completion("q", " Yes ", response="Yes"),
        completion("q", "yes", response="yes", tokens=9),
        completion("q", "  ", response="yes"),
    ]
    assert run(tmp_path, records, "--verified", "--ended=9") == [
        {"prompt": "copy: ab", "task": "copy", "response": "ab"},
        {"prompt": "q", "response": " Yes "},
    ]
    assert "2 records kept, dropped: 1 wrong, 1 cut off, 1 empty" in capsys.readouterr().err
    assert len(run(tmp_path, records)) == 4


def test_the_likeliest_per_token_are_kept_in_their_order(tmp_path):
    logprobs = {"a": (-4.0, 4), "b": (-3.0, 1), "c": (-1.0, 2), "d": (-8.0, 4)}
    records = [completion(name, "x", logprob, tokens) for name, (logprob, tokens) in logprobs.items()]
    assert [r["prompt"] for r in run(tmp_path, records, "--keep=0.5")] == ["a", "c"]


def test_a_conversation_gets_a_new_last_answer(tmp_path):
    asked = [{"role": "user", "content": "hi"}]
    for messages in (asked, [*asked, {"role": "assistant", "content": "old"}]):
        record = {**completion(None, "new"), "messages": messages}
        del record["prompt"]
        assert run(tmp_path, [record]) == [{"messages": [*asked, {"role": "assistant", "content": "new"}]}]


def several(prompt, texts, rewards=None, **more):
    """A record as `generate --n` writes it, and `score --reward` after that."""
    added = {} if rewards is None else {"rewards": rewards, "rewards_std": [0.1] * len(rewards)}
    n = len(texts)
    return {"prompt": prompt, **more, "completions": texts, "tokens": [[1, 2]] * n, "logprob": [-1.0] * n, **added}


def test_answers_are_kept_by_rewards_of_the_file(tmp_path, capsys):
    records = [
        several("p", ["a", "b", "c", ""], [0.5, 2.0, 2.0, 9.0], id=7),
        several("q", ["a", "b"], [-1, -1]),
        several("r", ["e"], [0.5]),
    ]
    assert run(tmp_path, records, "--best") == [
        {"prompt": "p", "id": 7, "response": "b"},
        {"prompt": "q", "response": "a"},
        {"prompt": "r", "response": "e"},
    ]
    assert "3 records kept, dropped: 1 empty, 3 not the best" in capsys.readouterr().err
    assert [r["response"] for r in run(tmp_path, records, "--min_reward=0.5")] == ["a", "b", "c", "e"]
    assert [r["response"] for r in run(tmp_path, records, "--min_reward=0.5", "--best")] == ["b", "e"]
    assert [r["response"] for r in run(tmp_path, records)] == ["a", "b", "c", "a", "b", "e"]
    capsys.readouterr()
    assert run(tmp_path, records, "--pairs") == [
        {"prompt": "p", "id": 7, "chosen": "b", "rejected": "a", "score_chosen": 2.0, "score_rejected": 0.5}
    ]
    assert "1 empty, 1 neither best nor worst, 3 of equal rewards" in capsys.readouterr().err


def test_answers_are_kept_by_rewards_that_are_computed(tmp_path, capsys):
    code = tmp_path / "mine.py"
    code.write_text("def short(sample):\n    return 1 / 0 if sample.answer == 'fault' else -len(sample.answer)\n")
    asked = [{"role": "user", "content": "q"}]
    records = [
        several("copy: ab", ["ba", "ab", "ab "], response="ab", task="copy"),
        {**several("", ["xyz", "fault", "xy"], [5, 4, 3]), "messages": asked},
    ]
    del records[1]["prompt"]
    spec = json.dumps({"exact_match": 1, "short": {"reward": f"{code}:short", "weight": 0.1}})
    assert run(tmp_path, records, "--best", f"--rewards={spec}") == [
        {"prompt": "copy: ab", "task": "copy", "response": "ab"},
        {"messages": [*asked, {"role": "assistant", "content": "xy"}]},
    ]
    assert "dropped: 1 not judged, 3 not the best" in capsys.readouterr().err
    assert run(tmp_path, records, "--pairs", f"--rewards={spec}")[1] == {
        "prompt": asked,
        "chosen": "xy",
        "rejected": "xyz",
        "score_chosen": pytest.approx(-0.2),
        "score_rejected": pytest.approx(-0.3),
    }


@pytest.mark.parametrize(
    ("records", "flags", "words"),
    [
        ([{"prompt": "a"}], [], ["in.jsonl:1", "has no completion"]),
        ([completion("a", "b")], ["--verified"], ["in.jsonl:1", "`response`"]),
        ([completion("a", "")], [], ["nothing is left (1 empty)"]),
        ([completion("a", "b")], ["--keep=2"], ["--keep = 2:"]),
        ([completion("a", "b")], ["--best"], ["has no rewards", "understudy score --reward"]),
        ([completion("a", "b", reward=1.0)], ["--best", "--pairs"], ["--best: is of answers that are kept by"]),
        ([completion("a", "b", reward=1.0)], ["--pairs", "--keep=0.5"], ["--keep: is of answers"]),
        ([completion("a", "b", reward=1.0)], ["--pairs"], ["nothing is left (1 of equal rewards)"]),
        ([completion("a", "b", reward="1")], ["--best"], ["in.jsonl:1: reward = '1': isn't what"]),
        ([completion("a", "b")], ['--rewards={"exact_match": 1}'], ["--rewards: nothing is chosen by them"]),
        (
            [completion("a", "b")],
            ["--best", '--rewards={"reward_model": 1}'],
            ["is the reward of a model in a run"],
        ),
        ([completion("a", "b")], ["--best", "--rewards=exact_match"], ["must be a JSON object, such as"]),
        ([completion("a", "b")], ["--best", '--rewards={"exact": 1}'], ["rewards.exact: no module", "'exact_match'"]),
        (
            [{"prompt": "a", "completions": ["b", "c"], "tokens": [[1]], "logprob": [-1.0, 0]}],
            [],
            ["lists of one length"],
        ),
        ([completion("a", "b")], ["--verifed"], ["--verifed", "--verified"]),
    ],
)
def test_what_is_wrong_is_named(tmp_path, capsys, records, flags, words):
    assert run(tmp_path, records, *flags) == 2
    error = capsys.readouterr().err
    for word in words:
        assert word in error


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "invalid JSON"),
        ('{"n": ' + "9" * 5000 + "}", "4,300 digits"),
        ('{"n": ' + "[" * 100_000 + "]" * 100_000 + "}", "100 deep"),
    ],
    ids=["broken", "5,000 digits", "100,000 deep"],
)
def test_a_line_that_is_no_record_is_named(line, words, tmp_path, capsys):
    (tmp_path / "in.jsonl").write_text(json.dumps(completion("a", "b")) + "\n" + line + "\n")
    assert filter_.main([f"--data={tmp_path / 'in.jsonl'}", f"--output={tmp_path / 'out.jsonl'}"]) == 2
    error = capsys.readouterr().err
    assert "in.jsonl:2: " in error
    assert words in error
    assert not (tmp_path / "out.jsonl").exists()
