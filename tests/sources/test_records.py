from collections import Counter

import pytest

from research.errors import InputError
from research.sources.entries import locate
from research.sources.examples import read_examples
from research.sources.records import (
    CONFIG_SETTINGS,
    BadRecord,
    Turn,
    check,
    detect_format,
    parse,
)


@pytest.mark.parametrize(
    ("raw", "reason", "message"),
    [
        (b'{"text": "a"', "invalid JSON", "Expecting ',' delimiter at column 13"),
        (b'{"text": "\xff"}', "invalid UTF-8", "at byte 10"),
        (b'["a"]', "not an object", "holds a list"),
    ],
)
def test_lines_that_are_no_records(raw, reason, message):
    with pytest.raises(BadRecord) as e:
        parse(raw)
    assert e.value.reason == reason
    assert message in str(e.value)


def conversation(*roles):
    return {"messages": [{"role": role, "content": "x"} for role in roles]}


@pytest.mark.parametrize(
    ("format", "record", "reason", "message"),
    [
        (
            "text",
            {"txet": "a"},
            "missing field",
            "no field 'text'. Did you mean 'txet'? Name the column in data.fields: {",
        ),
        ("text", {"text": " \n"}, "empty text", "is an empty text"),
        ("text", {"text": None}, "wrong type", "must be text, but is null"),
        ("text", {"text": "\ud800"}, "invalid UTF-8", "surrogates"),
        ("text", {"text": b"\xff"}, "invalid UTF-8", "not valid UTF-8"),
        ("prompt_response", {"prompt": "a", "response": 7}, "wrong type", "but is a number (7). Write it in quotes"),
        ("prompt_response", {"prompt": "a", "response": ""}, "empty response", "Fill or drop"),
        ("prompt_response", {"prompt": "", "response": "a"}, "empty prompt", "'prompt'"),
        ("messages", {"messages": "hi"}, "wrong type", "must be a list of objects"),
        ("messages", {"messages": []}, "no assistant turn at the end", "0 messages"),
        ("messages", conversation("user", "asistant"), "unknown role", "message 2 has role 'asistant'. Did you mean"),
        ("messages", conversation("assistant"), "roles out of order", "comes first; allowed there: system or user"),
        ("messages", conversation("user", "user"), "roles out of order", "message 2, of role 'user', follows 'user'"),
        ("messages", conversation("user", "system"), "roles out of order", "'system', follows 'user'"),
        ("messages", conversation("user"), "no assistant turn at the end", "must end with an assistant turn"),
        (
            "messages",
            {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": ""}]},
            "empty response",
            "'content'",
        ),
        ("messages", {"messages": [{"role": "user"}]}, "missing field", "no field 'content'"),
    ],
)
def test_bad_records(format, record, reason, message):
    with pytest.raises(BadRecord) as e:
        check(record, format, {})
    assert e.value.reason == reason
    assert message in str(e.value.at("", **CONFIG_SETTINGS))
    assert "data." not in str(e.value)  # not every command has the config's fields


def test_formats_are_detected_under_renamed_columns():
    assert detect_format({"text": "", "prompt": "", "response": ""}, {}) == "prompt_response"
    assert detect_format({"messages": [], "prompt": ""}, {}) == "messages"
    fields = {"prompt": "question", "response": "answer"}
    assert detect_format({"question": "", "answer": "", "id": 1}, fields) == "prompt_response"
    turns = [Turn("user", "a"), Turn("assistant", "b")]
    assert check({"question": "a", "answer": "b"}, "prompt_response", fields) == turns
    with pytest.raises(BadRecord, match=r"has the fields 'question', 'answer', but needs .* Rename its columns.") as e:
        detect_format({"question": "", "answer": ""}, {})
    said = {name: str(e.value.at("x:1", fields=name)) for name in ("data.fields", "--fields")}
    for name, text in said.items():
        assert text.startswith("x:1: has the fields 'question', 'answer', but needs ")
        assert text.endswith(f'Name its columns, as in {name}={{"prompt": "question", "response": "answer"}}.')


DEEP = "[" * 100_000 + "]" * 100_000
LONG = "9" * 5000


@pytest.mark.parametrize(
    ("value", "reason"),
    [(DEEP, "nested too deep"), ('{"a":' * 150 + "1" + "}" * 150, "nested too deep"), (LONG, "number too long")],
    ids=["100,000 deep", "150 deep", "5,000 digits"],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_what_passes_the_limits_of_json_is_a_bad_record_like_any_other(value, reason, suffix, tmp_path):
    rows = ['{"text": "a, [b"}', f'{{"text": "x", "n": {value}}}', '{"text": "c\\"]"}']
    text = "\n".join(rows) if suffix == ".jsonl" else f"[{', '.join(rows)}]\n"
    (tmp_path / f"x{suffix}").write_text(text)
    origin = locate(str(tmp_path / f"x{suffix}"), count=0, seed=0)
    counts = Counter()
    good = list(read_examples(origin, "auto", {}, "skip", counts))
    assert [example.record["text"] for example in good] == ["a, [b", 'c"]']
    assert counts == {"records": 3, f"bad: {reason}": 1}
    place = ":2: " if suffix == ".jsonl" else ": record 2: "
    with pytest.raises(InputError, match=rf"x\{suffix}{place}holds .* Or set data.on_bad_record='skip'"):
        list(read_examples(origin, "auto", {}, "error", Counter()))


def test_a_json_file_that_is_no_list_at_all(tmp_path):
    read = lambda file: [parse(raw) for _, raw in locate(str(file), count=0, seed=0).read()]  # noqa: E731
    (tmp_path / "x.json").write_text(f'{{"text": {DEEP}}}')
    with pytest.raises(InputError, match=r"x\.json: holds an object that can't be read, not a list"):
        read(tmp_path / "x.json")
    (tmp_path / "y.json").write_text(f"[{LONG}, [], {{}}]")
    with pytest.raises(BadRecord, match=r"more than 4,300 digits"):
        read(tmp_path / "y.json")


@pytest.mark.parametrize(
    ("value", "remedy"),
    [
        (None, "is null. Write a text, or drop the record."),
        (["a"], "is a list (['a']). Write its text alone, or drop the record."),
        ({"a": 1}, "is an object ({'a': 1}). Write its text alone, or drop the record."),
        (True, "is a boolean (True). Write it in quotes."),
    ],
)
def test_remedies_fit_the_value(value, remedy):
    for format, record in (
        ("text", {"text": value}),
        ("prompt_response", {"prompt": "a", "response": value}),
    ):
        with pytest.raises(BadRecord) as error:
            check(record, format, {})
        assert remedy in str(error.value)
