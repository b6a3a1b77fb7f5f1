"""Rewards of records, by one model and by an ensemble; and whether the best of several answers is the right one."""

import json

import jax
import numpy as np
import pytest

from research import params
from research.commands import score
from research.devices import sharding
from research.errors import InputError
from research.evals import best_of, record_rewards, tasks
from research.loading import LoadedModel
from research.models.config import ModelConfig
from research.models.transformer import make_model
from research.sources.records import Turn
from research.sources.tokenizers import TokenizerSpec, make_tokenizer

TOKENIZER = make_tokenizer(TokenizerSpec("byte"), lambda: iter(()))
SIZE = {"vocab_size": 384, "num_layers": 1, "d_model": 16, "num_heads": 2, "num_kv_heads": 2, "d_ff": 16}
MODEL = make_model(ModelConfig(**SIZE, max_length=64, num_labels=2))
MESH = sharding.make_mesh({}, jax.devices()[:1])
RECORDS = [
    {"prompt": "one", "chosen": "two", "rejected": "three", "score_chosen": 1, "score_rejected": 2},
    {"prompt": "one", "responses": [{"text": "two", "score": 1}, {"text": "three", "score": 5}, {"text": "x"}][:2]},
    {"prompt": "one", "response": "three", "label": True},
    {"text": "a text"},
    {"messages": [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]},
]


def values(seed):
    own = params.init(MODEL.specs, jax.random.PRNGKey(seed))
    return {**own, "head": 50 * own["head"]}


VALUES = {"a": values(0), "b": values(1)}


@pytest.fixture(scope="module")
def alone():
    """(model, text) -> the rewards of a document by a pass of its own."""
    logits = jax.jit(lambda own, batch: MODEL.unembed(own).logits(MODEL.hidden(own, batch)))

    def read(model, text):
        turns = [Turn("user", text[0]), Turn("assistant", text[1])] if isinstance(text, tuple) else [Turn("text", text)]
        (((tokens, _),),) = record_rewards.encode([record_rewards.Answers([turns], False)], TOKENIZER, "chat", ["x"])
        row = np.zeros((3, 1, 64), np.int32)
        row[:, 0, : len(tokens)] = tokens, np.ones(len(tokens)), np.arange(len(tokens))
        out = logits(VALUES[model], dict(zip(("tokens", "segment_ids", "positions"), row, strict=True)))
        return np.asarray(out[0, len(tokens) - 1])

    return read


@pytest.fixture
def run(monkeypatch, tmp_path):
    def load(name, **options):
        options["check"](MODEL.config, name)
        return LoadedModel(MODEL, VALUES[name], TOKENIZER, "chat", MESH)

    monkeypatch.setattr("research.loading.load_model", load)
    monkeypatch.setattr("research.devices.compilation.use_compilation_cache", lambda: None)

    def run(records, *flags, output="y.jsonl"):
        data = tmp_path / "x.jsonl"
        data.write_text("".join(json.dumps(record) + "\n" for record in records))
        status = score.main(["--reward", f"--data={data}", f"--output={tmp_path / output}", *flags])
        path = tmp_path / output
        return status, [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else None

    return run


def test_rewards_of_records_are_those_at_the_last_token(run, alone):
    status, lines = run(RECORDS, "--model=a,b")
    assert status == 0
    read = lambda text: np.concatenate([alone("a", text), alone("b", text)])  # noqa: E731
    two, three = read(("one", "two")), read(("one", "three"))
    for line, record in zip(lines, RECORDS, strict=True):
        assert {name: line[name] for name in record} == record
    for line in lines[:2]:  # in the record's own order, whatever its scores say
        np.testing.assert_allclose(line["rewards"], [two.mean(), three.mean()], atol=1e-5)
        np.testing.assert_allclose(line["rewards_std"], [two.std(), three.std()], atol=1e-5)
    for line, wanted in zip(lines[2:], (three, read("a text"), two), strict=True):
        np.testing.assert_allclose((line["reward"], line["reward_std"]), (wanted.mean(), wanted.std()), atol=1e-5)
    assert abs(two.mean() - three.mean()) > 0.01


@pytest.mark.parametrize(
    ("records", "flags", "words"),
    [
        ([{"text": "x" * 70}], (), "x.jsonl:1: has 72 tokens, and the model takes 64"),
        ([{"text": "x", "reward": 1}], (), "x.jsonl:1: has a field 'reward' already"),
        ([{"prompt": "x", "chosen": "y"}], (), "x.jsonl:1: "),
        ([], (), "--data: holds no record"),
        (RECORDS, ("--per_token",), "--per_token: a reward is of a whole answer"),
        (RECORDS, ("--on_long=split",), "--on_long = split: a reward is of a whole answer"),
    ],
)
def test_bad_records_and_flags_are_named(run, records, flags, words, capsys):
    status, lines = run(records, "--model=a", *flags)
    assert (status, lines) == (2, None)
    assert words in capsys.readouterr().err


def test_implicit_rewards_are_of_the_answers_log_probs(run, monkeypatch):
    model = make_model(ModelConfig(**SIZE, max_length=64))
    weights = {name: params.init(model.specs, jax.random.PRNGKey(i)) for i, name in enumerate(("policy", "start"))}
    weights = jax.tree.map(lambda x: 6 * x, weights)

    def load(name, **options):
        return LoadedModel(model, weights[name], TOKENIZER, "chat", MESH)

    monkeypatch.setattr("research.loading.load_model", load)
    status, (pair, _, one, *_) = run(RECORDS, "--model=policy", "--reference=start", "--beta=0.5")
    assert status == 0
    assert pair["rewards"][1] == one["reward"]  # of the same answer
    turns = [Turn("user", "one"), Turn("assistant", "two")]
    (((tokens, mask),),) = record_rewards.encode([record_rewards.Answers([turns], False)], TOKENIZER, "chat", ["x"])
    assert TOKENIZER.decode(tokens[mask].tolist()).startswith("two")
    row = np.stack([tokens, np.ones(len(tokens), int), np.arange(len(tokens))])[:, None].astype(np.int32)
    batch = dict(zip(("tokens", "segment_ids", "positions"), row, strict=True))
    log_p = jax.jit(lambda own: jax.nn.log_softmax(model.unembed(own).logits(model.hidden(own, batch)))[0])
    at = np.flatnonzero(mask)
    sums = [np.asarray(log_p(weights[name]))[at - 1, tokens[at]].sum() for name in ("policy", "start")]
    np.testing.assert_allclose(pair["rewards"][0], 0.5 * (sums[0] - sums[1]), atol=1e-4)
    assert abs(pair["rewards"][0]) > 0.1


def test_flags_of_implicit_rewards_go_together(run, capsys):
    for flags, words in (
        (("--model=a", "--beta=0.5"), "--beta = 0.5: is of --reference"),
        (("--model=a", "--reference=b", "--beta=0"), "--beta"),
    ):
        assert run(RECORDS, *flags) == (2, None)
        assert words in capsys.readouterr().err


def test_a_language_model_is_no_reward_model():
    with pytest.raises(InputError, match="m: is a language model, and no reward model"):
        record_rewards.check_reward_model(ModelConfig(**SIZE), "m")


def test_the_score_of_ties_is_that_of_rewardbench():
    """The values come from process_single_model of allenai/reward-bench at 05a9005e, run on these rewards."""
    rng, questions = np.random.default_rng(0), {}
    for n in range(6):
        questions[f"ref:{n}"] = rng.normal(size=4) + np.array([1.5, 0, 0, 0]), 1
        questions[f"tied:{n}"] = rng.normal(size=7) * 0.3 + np.array([2, 2, 2, 0, 0, 0, 0]), 3
    assert best_of.ties_score(questions)["score"] == pytest.approx(0.8363756143170578, rel=1e-12)
    equal = {"ref:1": (np.array([1.0, 0.0]), 1), "tied:1": (np.array([1.0, 1.0, 0.0]), 2)}
    assert best_of.ties_score(equal) == pytest.approx(
        {"score": 1.01, "ref": 1, "tied": 1, "preferred": 1, "preferred_hard": 1, "margin": 1}
    )
    with pytest.raises(InputError, match="no two records 'ref:N' and 'tied:N'"):
        best_of.ties_score({"ref:1": equal["ref:1"], "tied:2": equal["tied:1"]})


def test_the_best_of_equals_counts_in_part():
    assert best_of.score(np.array([2.0, 1.0, 0.0]), 1) == 1.0
    assert best_of.score(np.array([2.0, 2.0, 2.0, 0.0]), 1) == pytest.approx(1 / 3)
    assert best_of.score(np.array([2.0, 2.0, 2.0, 0.0]), 2) == pytest.approx(2 / 3)
    assert best_of.score(np.array([1.0, 2.0]), 1) == 0.0


def test_best_of_as_a_task(tmp_path, alone):
    words = [["two", "three", "four", "five"], ["six", "two", "one", "nine"]]
    records = [
        {"prompt": "one", "chosen": w[:1], "rejected": w[1:], "subset": "Math", "id": str(i)}
        for i, w in enumerate(words)
    ]
    records += [
        {"prompt": "one", "chosen": ["two"], "rejected": ["four"], "subset": "Ties", "id": "ref:7"},
        {"prompt": "one", "chosen": ["two", "six"], "rejected": ["four"], "subset": "Ties", "id": "tied:7"},
    ]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    task = tasks.load(f"best_of:{tmp_path / 'x.jsonl'}", MODEL, TOKENIZER, "chat")
    with jax.set_mesh(MESH):
        metrics, samples = task.evaluate(VALUES["a"], None)
    reward = lambda word: float(alone("a", ("one", word)).mean())  # noqa: E731
    np.testing.assert_allclose(samples[1].rewards, [reward(w) for w in words[1]], atol=1e-5)
    right = [max(w, key=reward) == w[0] for w in words]
    assert metrics["accuracy"] == metrics["accuracy/Math"] == pytest.approx(np.mean(right))
    assert metrics["score"] == pytest.approx((np.mean(right) + metrics["ties"]) / 2)
    assert metrics["ties/ref"] == float(reward("two") > reward("four"))
    with pytest.raises(InputError, match="the model: is a language model, and no reward model"):
        tasks.check_kind("best_of:x.jsonl", ModelConfig(**SIZE), "the model")


def test_the_right_answers_of_lists_and_pairs():
    last = lambda question: [turns[-1].text for turns in question.answers.turns]  # noqa: E731
    scored = best_of.read_question({"prompt": "x", "responses": ["a", "b", "c"], "scores": [1, 3, 3]})
    assert (sorted(last(scored)[:2]), scored.right) == (["b", "c"], 2)
    ranked = best_of.read_question({"prompt": "x", "responses": ["a", "b", "c"]})
    assert (last(ranked), ranked.right) == (["a", "b", "c"], 1)
    pair = best_of.read_question({"prompt": "x", "chosen": "a", "rejected": "b", "subset": "Math"})
    assert (last(pair), pair.right, pair.subset) == (["a", "b"], 1, "Math")


def test_a_record_without_several_answers_is_named():
    with pytest.raises(InputError, match="has no answers to choose from"):
        best_of.read_question({"prompt": "x", "response": "y"})
    with pytest.raises(InputError, match="must be 'ref:N' or 'tied:N'"):
        best_of.read_question({"prompt": "x", "chosen": ["y"], "rejected": ["z"], "subset": "Ties", "id": "5"})


def test_answers_that_a_model_has_written_get_rewards():
    """What `understudy generate --output` writes: never the record's own response, an empty answer too."""
    written = {"tokens": [1], "logprob": -1.0, "response": "no"}
    read = record_rewards.read_answers
    several = read({"prompt": "p", **written, "completions": ["a", ""]})
    assert [[(turn.role, turn.text) for turn in turns] for turns in several.turns] == [
        [("user", "p"), ("assistant", "a")],
        [("user", "p"), ("assistant", "")],
    ]
    assert several.several
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    for record in ({"messages": messages}, {"messages": [*messages, {"role": "assistant", "content": "old"}]}):
        one = read({**record, **written, "completion": "a"})
        assert [turn.text for turn in one.turns[0]] == ["s", "q", "a"]
        assert not one.several
    assert read({"text": "t ", **written, "completion": "a"}).turns[0][0].text == "t a"
    with pytest.raises(InputError, match="completions: must be a list of texts"):
        read({"prompt": "p", **written, "completions": [1]})
    with pytest.raises(InputError, match="messages: must be a list of objects"):
        read({"messages": ["q"], **written, "completion": "a"})
