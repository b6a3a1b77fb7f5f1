import pytest

from research.errors import InputError
from research.sources import tasks, verification

EVERY = [f"{name}/{level}" for name, task in tasks.TASKS.items() for level in range(1, task.max_level + 1)]


@pytest.mark.parametrize("name", EVERY)
def test_the_stored_response_is_right_and_others_are_wrong(name):
    for record in tasks.records(name, 20, seed=1):
        prompt, response = record["prompt"], record["response"]
        assert record["task"] == name
        assert verification.verify_record(record, f" {response}\n")
        for wrong in ("", "-1", "?", response + "?", response + " 1", "1 " + response, response[:-1] + "_"):
            assert not verification.verify_record(record, wrong), (prompt, wrong)


def answer(prompt):
    """What the prompt asks for, worked out from its text alone."""
    match prompt.replace(":", "").split():
        case ["copy", word]:
            return word
        case ["reverse", word]:
            return "".join(reversed(word))
        case ["upper", word]:
            return word.upper()
        case ["sort", "letters", word]:
            return "".join(sorted(word))
        case ["sort", "numbers", *words]:
            return " ".join(sorted(words, key=int))
        case ["larger", a, "or", b]:
            return max(a, b, key=int)
        case [a, "+", b, "="]:
            return str(int(a) + int(b))
        case [a, "-", b, "="]:
            return str(int(a) - int(b))
        case ["count", letter, word]:
            return str(word.count(letter))
        case ["delete", letter, word]:
            return word.replace(letter, "")
        case ["between", low, "and", _]:
            return str(int(low) + 1)
    raise AssertionError(f"unknown form of prompt: {prompt}")


@pytest.mark.parametrize("name", EVERY)
def test_an_answer_worked_out_from_the_prompt_is_right(name):
    for record in tasks.records(name, 20, seed=2):
        assert answer(record["prompt"])
        assert verification.verify_record(record, answer(record["prompt"]))


def test_between_accepts_every_number_between_and_no_other():
    right = [n for n in range(-30, 120) if tasks.verify("between", "between 12 and 20:", "15", str(n))]
    assert right == list(range(13, 20))
    assert not tasks.verify("between", "between 12 and 20:", "15", "15.5")


@pytest.mark.parametrize(
    ("name", "response", "completion", "right"),
    [
        ("addition", "12", "+012", True),
        ("addition", "12", "12.", False),
        ("addition", "12", "1 2", False),
        ("addition", "12", "1_2", False),
        ("addition", "12", "1" * 5000, False),
        ("sort_numbers", "1 2 30", "1  2\n30", True),
        ("sort_numbers", "1 2 30", "1 30 2", False),
        ("sort_numbers", "1 2 30", "1 2", False),
        ("upper", "AB", "ab", False),
    ],
)
def test_how_answers_are_compared(name, response, completion, right):
    assert tasks.verify(name, "", response, completion) is right


@pytest.mark.parametrize("name", tasks.TASKS)
def test_prompts_grow_with_the_level(name):
    def characters(level):
        return sum(len(r["prompt"]) for r in tasks.records(f"{name}/{level}", 200, seed=0))

    sizes = [characters(level) for level in range(1, tasks.TASKS[name].max_level + 1)]
    assert sizes == sorted(set(sizes))


@pytest.mark.parametrize("name", ["copy", "reverse", "upper", "sort_letters", "delete_letter", "compare"])
def test_level_one_has_thousands_of_prompts(name):
    assert len({r["prompt"] for r in tasks.records(name, 20_000, seed=0)}) > 5000


def test_records_are_fixed_by_name_and_seed_and_not_by_count():
    first = list(tasks.records("reverse", 50, seed=3))
    assert first == list(tasks.records("reverse", 80, seed=3))[:50]
    assert first != list(tasks.records("reverse", 50, seed=4))
    # A fixed value, as a run that resumes in another process must meet the same data.
    assert first[0]["prompt"] == next(tasks.records("reverse/1", 1, seed=3))["prompt"] == "reverse: wrbe"


def test_records_without_a_task_are_compared_as_text():
    assert verification.verify_record({"prompt": "hi", "response": "hello "}, " hello\n")
    assert not verification.verify_record({"prompt": "hi", "response": "hello"}, "Hello")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("revers", "Did you mean 'reverse'"),
        ("zzz", "Known: addition, between"),
        ("reverse/0", "'0' is not a level. Use reverse/1 to reverse/8"),
        ("reverse/9", "'9' is not a level"),
        ("reverse/", "'' is not a level"),
        ("reverse/two", "'two' is not a level"),
    ],
)
def test_bad_names(name, says):
    with pytest.raises(InputError, match=says):
        next(tasks.records(name, 1, seed=0))
    with pytest.raises(InputError, match=says):
        tasks.verify(name, "", "", "")


def test_a_task_that_is_not_ours_is_judged_by_the_response():
    record = {"prompt": "sentiment?", "response": "good", "task": "classification"}
    assert verification.verify_record(record, " good\n")
    assert not verification.verify_record(record, "bad")
