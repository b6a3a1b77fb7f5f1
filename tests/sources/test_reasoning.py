import ast
import json
import subprocess
import sys

import pytest

from research.errors import InputError
from research.sources import reasoning, verification


def test_without_the_package_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(InputError, match=r"pip install -e '\.\[reasoning-gym\]'"):
        next(reasoning.records("chain_sum", 1, seed=0))


def test_a_record_without_its_entry():
    record = {"prompt": "1 + 1", "response": "2", "task": "reasoning_gym:chain_sum"}
    with pytest.raises(InputError, match="lacks 'entry'"):
        verification.verify_record(record, "2")


@pytest.fixture
def gym():
    return pytest.importorskip("reasoning_gym")


@pytest.mark.parametrize(
    "name",
    [
        "chain_sum",
        "rearc",  # Its entry holds tuples.
        "prime_factorization",  # Its scorer raises on text.
        "graph_color",  # It gives an example in place of an answer.
        "game_of_life_halting",  # Its scorer takes any text.
    ],
)
@pytest.mark.usefixtures("gym")
def test_the_stored_response_is_right_and_others_are_wrong(name):
    records = list(reasoning.records(name, 3, seed=1))
    assert len(records) == 3
    for record in json.loads(json.dumps(records)):
        assert record["task"] == f"reasoning_gym:{name}"
        assert verification.verify_record(record, f" {record['response']}\n")
        assert not verification.verify_record(record, "certainly wrong")
        assert not verification.verify_record(record, "")


@pytest.mark.usefixtures("gym")
def test_several_answers_are_right():
    (record,) = reasoning.records("countdown?operators=+&max_numbers=4", 1, seed=0)
    backwards = " + ".join(reversed(record["response"].split(" + ")))
    assert backwards != record["response"]
    assert verification.verify_record(record, backwards)


@pytest.mark.usefixtures("gym")
def test_partial_credit_is_not_right():
    (record,) = reasoning.records("chain_sum", 1, seed=0)
    assert not verification.verify_record(record, f"I think {record['response']}")


@pytest.mark.usefixtures("gym")
def test_records_are_fixed_by_seed_in_every_process_and_not_by_count(monkeypatch):
    # Under a random hash seed this dataset differs from process to process.
    first = list(reasoning.records("isomorphic_strings", 3, seed=5))
    monkeypatch.setenv("PYTHONHASHSEED", "77")
    code = """
import json
from research.sources import reasoning
print(json.dumps(list(reasoning.records("isomorphic_strings", 5, seed=5))))
"""
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert json.loads(other.stdout)[:3] == first
    near = {record["prompt"] for record in reasoning.records("isomorphic_strings", 3, seed=6)}
    assert near.isdisjoint(record["prompt"] for record in first)


@pytest.mark.usefixtures("gym")
def test_options_reach_the_dataset():
    name = "chain_sum?min_terms=3&max_terms=3&max_digits=1&allow_negation=true"
    for record in reasoning.records(name, 5, seed=0):
        difficulty = ast.literal_eval(record["entry"])["metadata"]["difficulty"]
        assert difficulty == {"num_terms": (3, 3), "num_digits": (1, 1)}


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("chain_sun", "Did you mean 'chain_sum'"),
        ("chain_sum?max_term=3", "no option 'max_term'. Did you mean 'max_terms'"),
        ("chain_sum?seed=3", "no option 'seed'"),
        ("chain_sum?max_terms=few", "max_terms=few does not read as <class 'int'>"),
        ("chain_sum?allow_negation=1", "allow_negation=1 does not read as <class 'bool'>"),
        ("chain_sum?max_terms=1", "refuses the options {'max_terms': 1}: max_terms must be >= min_terms"),
        ("basic_arithmetic?format_style=bad", "format_style=bad does not read as typing.Literal"),
        ("time_intervals?min_date=2000-01-01", "min_date=2000-01-01 does not read"),
        ("rush_hour", "no answers to learn from"),
        ("aiw?task_types=siblings", "failed to generate 1 records"),
    ],
)
@pytest.mark.usefixtures("gym")
def test_bad_names(name, says):
    with pytest.raises(InputError, match=says.replace("?", r"\?")):
        next(reasoning.records(name, 1, seed=0))
