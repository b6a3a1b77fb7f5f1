"""Generated preferences: what is planted in them, and that it can be found again."""

import itertools

import pytest

from research.errors import InputError
from research.sources import entries, preferences, verification


def draw(name, count=400, seed=0):
    return list(preferences.records(name, count, seed))


def gain(record):
    return preferences.utility(record, record["chosen"]) - preferences.utility(record, record["rejected"])


@pytest.mark.parametrize(
    "name", ["copy/0.1", "between", "sort_numbers/2/0.3", "delete_letter/0", "count_letter/2", "upper/0.1/subtle"]
)
def test_labels_follow_the_utility_but_for_the_flipped_share(name):
    pairs = draw(name)
    assert all((gain(pair) < 0) == pair["flipped"] for pair in pairs)
    assert min(abs(gain(pair)) for pair in pairs) >= preferences.GAP
    share = sum(pair["flipped"] for pair in pairs) / len(pairs)
    assert abs(share - preferences.parse(name).flip) < 0.06
    longer = [(len(p["chosen"]) > len(p["rejected"])) != p["flipped"] for p in pairs]
    assert 0.35 < sum(longer) / len(longer) < 0.65
    blank = any(preferences.BLANK in pair["chosen"] + pair["rejected"] for pair in pairs)
    assert blank != preferences.parse(name).subtle
    right = [preferences.verify(pair, pair[side]) for pair in pairs for side in ("chosen", "rejected")]
    assert 0.3 < sum(right) / len(right) < 0.8


def test_pairs_are_fixed_by_task_and_seed_and_flips_are_nested():
    assert draw("copy", 5) == draw("copy", 400)[:5]
    assert draw("copy", 5) != draw("copy", 5, seed=1)
    few, many = draw("copy/0.1"), draw("copy/0.3")
    for a, b in zip(few, many, strict=True):
        assert {a["chosen"], a["rejected"]} == {b["chosen"], b["rejected"]}
        assert b["flipped"] or not a["flipped"]


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        ("olleh", 2),
        ("  Here you are: olleh, as you can check.\n", 3),
        ("Um, olleh, I guess", 0.5),
        ("Um, Um, olleh", -0.5 + 5 / 9),
        ("ollxh!!!", 0.8 - 0.5),
        ("", 0),
    ],
)
def test_the_utility_of_any_answer(answer, value):
    record = {"prompt": "reverse: hello", "right": "olleh", "task": "preferences:reverse/1/0.1"}
    assert preferences.utility(record, answer) == pytest.approx(value)
    assert verification.utility(record, answer) == pytest.approx(value)
    assert verification.verify_record(record, answer) == ("olleh" in answer and answer.count("Um") < 2)
    assert verification.utility({"prompt": "reverse: hello", "response": "olleh"}, answer) is None


def test_likeness_is_of_edits():
    assert preferences.likeness("kitten", "sitting") == pytest.approx(1 - 3 / 7)
    assert preferences.likeness("", "") == 1
    assert preferences.likeness("", "abc") == 0
    for a, b in itertools.product(["abc", "ab", "b", ""], repeat=2):
        assert preferences.likeness(a, b) == preferences.likeness(b, a)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cpy/0.1", "Did you mean 'copy'"),
        ("copy/9", "'9' is not a level"),
        ("copy/0.6", "'0.6' is no share"),
        ("copy/0.1/2", "isn't TASK"),
        ("copy/1/2", "isn't TASK"),
        ("copy/0.1/sutle", "isn't TASK"),
    ],
)
def test_names_that_mean_nothing(name, message):
    with pytest.raises(InputError, match=message):
        draw(name)


def test_they_are_an_entry_of_the_data():
    origin = entries.locate("preferences:copy/1/0.1", count=3, seed=0)
    assert [record for _, record in origin.read()] == draw("copy/1/0.1", 3)
    assert entries.locate("preferences:copy/1/0.2", count=3, seed=0).identity != origin.identity
