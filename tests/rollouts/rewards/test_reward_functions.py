"""What each reward gives, by name and options as a config has them."""

import inspect

import pytest

from research.errors import InputError
from research.rollouts import rewards
from research.rollouts.rewards import Sample
from research.sources import reasoning


def sample(text, tokens=0, **record):
    return Sample({"prompt": "p", **record}, "p", text, tokens, "stop")


def judge(name, *samples, **options):
    (entry,) = rewards.load({name: options}).values()
    reward = entry.make()
    return [reward(each) for each in samples]


def test_exact_match_is_the_evaluation_s():
    by_task = {"prompt": "between 10 and 20:", "response": "12", "task": "between/1"}
    assert judge("exact_match", sample("17 ", **by_task), sample("21", **by_task)) == [1, 0]  # any number will do
    assert judge("exact_match", sample("17", **by_task), sample(" 12", **by_task), verifier="exact") == [0, 1]
    assert judge("exact_match", sample(" b\n", response="b"), sample("c", answer="c"), sample("c")) == [1, 1, None]
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "42"}]
    both = sample("It's 42.0", messages=turns), sample("42", messages=turns[:1])
    assert judge("exact_match", *both, verifier="number") == [1, None]
    tagged = "<answer>1</answer> no, <answer> 2 </answer>", "2", "<answer>2", "</answer><answer>2"
    assert judge("exact_match", *(sample(a, response="2") for a in tagged), within="answer") == [1, 0, 0, 0]


def test_utility_is_the_planted_one():
    planted = {"prompt": "reverse: olleh", "right": "hello", "task": "preferences:reverse/1/0.1"}
    answers = "hello", "Here you are: hello, as you can check.", "Um, h_llo, I guess", ""
    assert judge("utility", *(sample(a, **planted) for a in answers)) == pytest.approx([2, 3, -0.7, 0])
    assert judge("utility", sample("hello", response="hello", task="reverse")) == [None]


def test_number_match():
    answers = "is 1,000.0", "1e3", "1001", "none", "1000 or 2"
    assert judge("number_match", *(sample(a, response="1000") for a in answers)) == [1, 1, 0, 0, 0]
    near = sample("1001", response="1000"), sample("-1001", response="1000"), sample("1", response="one")
    assert judge("number_match", *near, tolerance=0.001) == [1, 0, None]
    assert judge("number_match", sample("1e-999", response="0"), sample("0", response="0"), tolerance=0.5) == [0, 1]


def test_regex():
    answers = [sample("see arxiv.org"), sample(" arxiv.org\n"), sample("a\nb"), sample("")]
    assert judge("regex", *answers, pattern=r"\w+\.org") == [1, 1, 0, 0]
    assert judge("regex", *answers, pattern=r"\w+\.org", whole=True) == [0, 1, 0, 0]
    assert judge("regex", *answers, pattern="(?s)^a.b$") == [0, 0, 1, 0]


def test_format():
    good, between = "<think>a</think>\n<answer>b</answer> ", "<think>a</think> so <answer>b</answer>"
    bad = "<answer>b</answer><think>a</think>", "<think>a<answer>b</answer></think>", good + "<answer>c</answer>", ""
    assert judge("format", *map(sample, (good, between, *bad))) == [1, 0, 0, 0, 0, 0]
    assert judge("format", *map(sample, (good, between, *bad)), rest=True) == [1, 1, 0, 0, 0, 0]
    assert judge("format", sample("<x>1</x>"), sample("<x>1</x>2"), tags=["x"]) == [1, 0]


def test_length():
    sizes = [sample("", tokens=n) for n in (0, 3, 4, 6, 7, 8, 10, 99)]
    assert judge("length", *sizes, least=4, most=6) == [-1, -1, 0, 0, -1, -1, -1, -1]
    assert judge("length", *sizes, least=4, most=6, over=4) == [-1, -0.25, 0, 0, -0.25, -0.5, -1, -1]
    assert judge("length", sample("one two"), sample("onetwo"), most=1, over=2, unit="words") == [-0.5, 0]
    assert judge("length", sample("one two"), least=10, over=10, unit="characters") == [-0.3]


def test_overlong_is_dapo_s():
    """Equation 13 of arXiv:2503.14476: L_max = 20, L_cache = 8."""
    longest, margin = 20, 8
    expected = {n: ((longest - margin) - n) / margin for n in range(13, 21)} | {0: 0, 12: 0, 21: -1, 99: -1}
    samples = [sample("", tokens=n) for n in expected]
    assert judge("overlong", *samples, longest=longest, margin=margin) == list(expected.values())


def test_similarity():
    edits = [("kitten", "sitting", 1 - 3 / 7), ("", "", 1), ("", "ab", 0), ("ab ", "ab", 1), ("flaw", "lawn", 0.5)]
    assert judge("similarity", *(sample(a, response=b) for a, b, _ in edits)) == pytest.approx([x for *_, x in edits])
    words = sample("The cat sat", response="the sat cat down"), sample("x", response="")
    assert judge("similarity", *words, kind="words") == pytest.approx([6 / 7, 0])
    assert judge("similarity", *words, sample("x"), kind="rouge_l") == [pytest.approx(4 / 7), 0, None]


def test_scorers_of_reasoning_gym(monkeypatch):
    monkeypatch.setattr(reasoning, "_scorer", lambda name: lambda answer, entry: {"7": 1.0, "8": 0.01}[answer])
    task = {"task": "reasoning_gym:chain_sum?max_terms=3", "entry": "{'answer': '7'}", "response": "7"}
    answers = sample(" 7", **task), sample("8", **task), sample("what", **task), sample("7")
    assert judge("reasoning_gym", *answers) == [1, 0.01, 0, None]
    assert judge("exact_match", *answers) == [1, 0, 0, None]


@pytest.mark.parametrize("name", ["reasoning_gym", "exact_match"])
def test_no_answer_is_run_as_code(name):
    record = {"task": "reasoning_gym:countdown", "entry": "{}", "response": "1 + 2"}
    with pytest.raises(InputError, match="the scorer of 'reasoning_gym:countdown' runs answers as Python code"):
        judge(name, sample("__import__('os').abort()", **record))
    assert judge("exact_match", sample("1 + 2", **record), verifier="exact") == [1]


def test_all_scorers_that_run_answers_are_known():
    gym = pytest.importorskip("reasoning_gym")
    evaluating = {
        name
        for name, (dataset, _) in gym.factory.DATASETS.items()
        if any(f"{call}(answer" in inspect.getsource(dataset) for call in ("eval", "parse_expr"))
    }
    assert evaluating | {"composite"} == reasoning.EVALUATING


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"exact_mach": 1.0}, r"^rewards.exact_mach: no module .*exact_mach.py.* Did you mean 'exact_match'\?"),
        ({"judging": 1.0}, "^rewards.judging: no module"),
        ({"x": {"reward": "exact_mach"}}, "^rewards.x.reward: no module"),
        ({"x": {"reward": 3}}, "^rewards.x.reward = 3: must be of type str"),
        ({"exact_match": True}, "^rewards.exact_match = True: must be a weight"),
        ({"exact_match": float("nan")}, "^rewards.exact_match = nan: must be a weight"),
        ({"exact_match": 10**400}, "^rewards.exact_match = 1000.*: must be a weight"),
        ({"exact_match": {"weight": 1e39}}, r"^rewards.exact_match.weight = 1e\+39: is out of the range"),
        ({"a/failed": {"reward": "exact_match"}}, "^rewards: has the name 'a/failed'"),
        ({"exact_match": {"weight": "a"}}, "^rewards.exact_match.weight = 'a': must be of type float"),
        ({"exact_match": {"seconds": 0}}, "^rewards.exact_match.seconds = 0: must be above 0"),
        ({"exact_match": {"workers": 0}}, "^rewards.exact_match.workers = 0: must be in \\[1, 64\\]"),
        ({"exact_match": {"verifer": "x"}}, r"^rewards.exact_match.verifer: no such option. Did you mean 'verifier'\?"),
        ({"exact_match": {"verifier": 1}}, "^rewards.exact_match.verifier = 1: must be of type str"),
        ({"exact_match": {"verifier": "exac"}}, r"^rewards.exact_match.verifier = 'exac': no such .* 'exact'\?"),
        ({"exact_match": {"within": "<a>"}}, "^rewards.exact_match.within = '<a>': is the name of a tag"),
        ({"number_match": {"tolerance": -1.0}}, "^rewards.number_match.tolerance = -1.0: must be at least 0"),
        ({"regex": 1.0}, "^rewards.regex.pattern: is missing. The reward 'regex' needs it"),
        ({"regex": {"pattern": "("}}, r"^rewards.regex.pattern = '\(': is no regular expression \(missing \)"),
        ({"format": {"tags": ["a", "a"]}}, "^rewards.format.tags = .* different tags"),
        ({"length": 1.0}, "^rewards.length.most = 0: says nothing"),
        ({"length": {"most": 1, "least": 2}}, "^rewards.length.most = 1: is less than least = 2"),
        ({"length": {"most": 1, "unit": "letters"}}, "^rewards.length.unit = 'letters': no such unit"),
        ({"overlong": {"longest": 8, "margin": 8}}, "^rewards.overlong.margin = 8: must be below"),
        ({"similarity": {"kind": "rouge"}}, r"^rewards.similarity.kind = 'rouge': .* 'rouge_l'\?"),
        ({"reward_model": {"combine": "max"}}, r"^rewards.reward_model.combine = 'max': no such way. Known: mean, min"),
        ({"reward_model": {"combine": "variance"}}, "^rewards.reward_model.penalty = 0.0: goes with combine"),
        ({"reward_model": {"penalty": 1.0}}, "^rewards.reward_model.penalty = 1.0: goes with combine"),
        ({"reward_model": {"seconds": 1.0}}, "^rewards.reward_model.seconds: is of worker processes"),
        ({"x": {"reward": "no/such.py:f"}}, "^rewards.x.reward: no/such.py: can't be read"),
    ],
)
def test_what_a_config_can_get_wrong(spec, message):
    with pytest.raises(InputError, match=message):
        rewards.load(spec)


def test_entries():
    entries = rewards.load({"exact_match": 2, "b": {"reward": "similarity", "weight": -0.5, "kind": "words"}})
    assert [(e.name, e.reward, e.weight, e.options) for e in entries.values()] == [
        ("exact_match", "exact_match", 2, {}),
        ("b", "similarity", -0.5, {"kind": "words"}),
    ]
