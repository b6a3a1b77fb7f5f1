"""Programs of the grammar: what they are made of, and that their middles can be known."""

import itertools
import re

import pytest

from research.errors import InputError
from research.sources import entries, grammar

PROGRAM = re.compile(
    r"def (?P<f>\w+)\((?P<a>\w+), (?P<b>\w+)\):\n    return (?P=a) (?P<op>[-+*%]) (?P=b)\n\n"
    r"assert (?P=f)\((?P<x>\d+), (?P<y>\d+)\) == (?P=x) (?P=op) (?P=y)\n"
)
SOME = list(grammar.records("functions", 300, seed=3))


def test_records_are_programs_in_three_parts():
    for record in SOME:
        assert PROGRAM.fullmatch(record["text"])
        assert record["prefix"] + record["middle"] + record["suffix"] == record["text"]
        assert record["middle"]
    assert len({record["text"] for record in SOME}) == len(SOME)
    assert SOME[:20] == list(grammar.records("functions", 20, seed=3)) != list(grammar.records("functions", 20, seed=4))


def test_middles_of_a_size_are_of_the_same_programs():
    for record, small in zip(SOME, grammar.records("functions/1", 300, seed=3), strict=True):
        assert (small["text"], len(small["middle"])) == (record["text"], 1)


def test_a_middle_is_all_that_fits():
    """Whatever else is put in place of a word that the middle takes from, the whole is no program any more."""
    others = [PROGRAM.fullmatch(record["text"]).groupdict() for record in SOME[:40]]
    for record in SOME[:100]:
        words = PROGRAM.fullmatch(record["text"]).groupdict()
        for name, other in itertools.product(words, others):
            text = _written(words | {name: other[name]})
            hole = text[len(record["prefix"]) : len(text) - len(record["suffix"])]
            if text.startswith(record["prefix"]) and text.endswith(record["suffix"]):
                assert hole == record["middle"]


@pytest.mark.parametrize(
    ("hole", "determined"),
    [
        ("def |pola(ki, b|u", True),  # pola stands below, and ki and bu in the next line
        ("def |pola(ki, bu):\n    return k|i", False),  # ki is taken twice
        ("assert pola(7, 2) == |7 - 2\n|", True),
        ("assert pola(7, 2|) == 7 - 2\n|", False),  # the end of the first 2 is out of sight: it may be 27
    ],
)
def test_what_is_taken_twice_is_not_determined(hole, determined):
    words = {"f": "pola", "a": "ki", "b": "bu", "op": "-", "x": "7", "y": "2"}
    parts = [(part, words[part]) if part in words else ("", part) for part in grammar.PARTS["functions"]]
    before, middle, after = hole.split("|")
    at = _written(words).index(before + middle + after) + len(before)
    assert grammar.is_determined(parts, at, at + len(middle)) is determined


@pytest.mark.parametrize("name", ["function", "functions/0", "functions/20", "functions/x", "functions/"])
def test_a_grammar_that_is_not_there_is_refused(name):
    with pytest.raises(InputError, match=r"Use functions/1 to functions/19|Did you mean 'functions'"):
        list(grammar.records(name, 1, 0))


def test_data_names_a_grammar():
    origin = entries.locate("grammar:functions", count=20, seed=3)
    assert [record for _, record in origin.read()] == SOME[:20]


def _written(words):
    return "".join(words.get(part, part) for part in grammar.PARTS["functions"])
