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


@pytest.mark.parametrize(
    ("records", "flags", "words"),
    [
        ([{"prompt": "a"}], [], ["in.jsonl:1", "has no completion"]),
        ([completion("a", "b")], ["--verified"], ["in.jsonl:1", "`response`"]),
        ([completion("a", "")], [], ["nothing is left (1 empty)"]),
        ([completion("a", "b")], ["--keep=2"], ["--keep = 2:"]),
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
