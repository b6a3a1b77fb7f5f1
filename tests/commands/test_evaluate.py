import json
import math

import jax
import pytest

from research import params
from research.commands import evaluate
from research.devices import sharding
from research.evals import results as evals
from research.loading import LoadedModel
from research.models.config import ModelConfig
from research.models.transformer import make_model
from research.sources.tokenizers import TokenizerSpec, make_tokenizer

TOKENIZER = make_tokenizer(TokenizerSpec("byte"), lambda: iter(()))
MODEL = make_model(
    ModelConfig(vocab_size=384, num_layers=1, d_model=16, num_heads=2, num_kv_heads=2, d_ff=16, max_length=64)
)


@pytest.fixture
def run(monkeypatch, capsys):
    """Flags -> status, stdout, stderr."""

    def load(name, *, step, ema, mesh, adapter, check):
        values = jax.device_put(
            params.init(MODEL.specs, jax.random.key(0)), params.shardings(MODEL.specs, mesh, sharding.RULES)
        )
        return LoadedModel(MODEL, values, TOKENIZER, "chat", mesh)

    monkeypatch.setattr("research.loading.load_model", load)
    monkeypatch.setattr("research.devices.compilation.use_compilation_cache", lambda: None)

    def run(*flags):
        status = evaluate.main(["--model=m", *flags])
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def data(tmp_path):
    choices = [{"question": f"{i}?", "choices": ["x", "yz"], "answer": i % 2} for i in range(6)]
    answers = [{"prompt": f"{i} + 1 =", "response": str(i + 1)} for i in range(4)]
    for name, records in (("choice", choices), ("answer", answers)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return tmp_path


def test_several_tasks_in_a_table_and_in_files(run, data):
    output = data / "results.json"
    tasks = [
        f"--task=choice:{data}/choice.jsonl",
        f"--task=exact_match,verifier=number,max_new_tokens=4:{data}/answer.jsonl",
        f"--task=perplexity,name=text:{data}/answer.jsonl",
    ]
    status, stdout, _ = run(*tasks, f"--output={output}", "--mesh=data=4,tensor=2", "--batch_tokens=64")
    assert status == 0
    results = json.loads(output.read_text())["results"]
    assert {name: metrics["records"] for name, metrics in results.items()} == {"choice": 6, "answer": 4, "text": 4}
    samples = [json.loads(line) for line in (data / "results.samples.jsonl").read_text().splitlines()]
    assert [sample["evaluation"] for sample in samples] == ["choice"] * 6 + ["answer"] * 4 + ["text"] * 4
    right = [sample["chosen"] == sample["answer"] for sample in samples[:6]]
    assert results["choice"]["acc"] == pytest.approx(sum(right) / 6)
    header, *rows = [line.split() for line in stdout.splitlines()]
    assert header[:4] == ["task", "metric", "value", "stderr"]
    loss, error = results["text"]["loss"], results["text"]["loss_stderr"]
    expected = f"text loss {loss:.4f} {error:.4f} {loss - 1.96 * error:.4f} to {loss + 1.96 * error:.4f} 4"
    assert expected.split() in rows
    assert ["text", "tokens", "8", "4"] in rows  # without an error or interval
    assert not any(row[1].endswith("_stderr") for row in rows)

    assert results["choice"]["acc_interval"] == list(evals.wilson(sum(right), 6))
    low, high = results["answer"]["exact_match_interval"]  # a model drawn by chance has none right
    assert (results["answer"]["exact_match"], low) == (0, 0)
    assert f"answer exact_match 0.0000 0.0000 0.0000 to {high:.4f} 4".split() in rows
    assert high == pytest.approx(0.4899, abs=1e-4)

    status, _, _ = run(*tasks[:1], "--max_records=2", f"--output={output}", "--overwrite")
    assert (status, json.loads(output.read_text())["results"]["choice"]["records"]) == (0, 2)


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [(0, 10, 0, 0.2775), (10, 10, 0.7225, 1), (17, 20, 0.6396, 0.9476), (1, 2, 0.0945, 0.9055)],
)
def test_intervals_of_shares_stay_within_0_and_1(right, count, low, high):
    """Values of scipy 1.17's binomtest(right, count).proportion_ci(method="wilson"); and what an interval is."""
    interval = evals.wilson(right, count)
    assert interval == pytest.approx((low, high), abs=1e-4)
    for p in interval:  # its ends are the shares that lie 1.96 of their own standard errors from what was seen
        if 0 < p < 1:
            assert abs(right / count - p) / math.sqrt(p * (1 - p) / count) == pytest.approx(1.959964)


def test_which_metrics_are_shares():
    samples = [{"task": name, "correct": i % 2 == 0} for i, name in enumerate("aab")]
    result = evals.Result({"exact_match": 2 / 3, "exact_match/a": 1 / 2, "loss": 1.0, "loss_stderr": 0.1}, samples)
    assert evals.interval("exact_match", result) == evals.wilson(2, 3)
    assert evals.interval("exact_match/a", result) == evals.wilson(1, 2)
    assert evals.interval("loss", result) == pytest.approx((0.804, 1.196))
    harness = evals.Result(
        {"acc": 0.5, "f1": 0.75, "f1_stderr": 0.1}, [{"acc": 1.0, "f1": 1.0}, {"acc": 0.0, "f1": 0.5}]
    )
    assert evals.interval("acc", harness) == evals.wilson(1, 2)
    assert evals.interval("f1", harness) == pytest.approx((0.554, 0.946))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--task: is missing"),
        (["--taks=x"], "--taks: no such flag. Did you mean '--task'?"),
        (["--task=choise:x.jsonl"], "task choise:x.jsonl: there is no kind 'choise'. Did you mean 'choice'?"),
        (["--task=choice:none.jsonl"], "task choice:none.jsonl: there is no 'none.jsonl'"),
        (["--task=choice:x.jsonl", "--max_records=-1"], "--max_records = -1: must be a whole number, at least 0"),
        (["--task=choice:x.jsonl", "--output=no/x.json"], "--output = no/x.json: there is no folder"),
        (["--task=choice:x.jsonl", "--output=x.txt"], "--output = x.txt: must be a .json"),
        (["--task=choice:x.jsonl", "--mesh=data=3"], "mesh: data=3"),
    ],
)
def test_bad_flags(run, flags, message):
    status, stdout, stderr = run(*flags)
    assert (status, stdout) == (2, "")
    assert f"error: {message}" in stderr


def test_tasks_of_one_name(run, data):
    status, _, stderr = run(*[f"--task=choice:{data}/choice.jsonl"] * 2)
    assert status == 2
    assert "--task: 2 are named 'choice'. Tell them apart: KIND,name=NAME:DATA" in stderr


def test_a_missing_harness_is_named(run, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    status, _, stderr = run("--lm_eval=arc_easy")
    assert status == 2
    assert "the package lm_eval can't be imported" in stderr
    assert "pip install -e '.[lm-eval]'" in stderr
