"""The report of a study that selects: precision and recall where the truth is known, costs, and what can be said."""

import csv
import json
import math

import numpy as np
import pytest
import runs

from experiments import select
from research.sources import choice, scores, selected
from research.studies import planted_noise, selection_report, study
from research.studies.means import mean
from research.studies.selection_report import Dropped, Result, Way

pytestmark = pytest.mark.slow


def test_noise_is_planted_in_known_shares(tmp_path, capsys):
    flags = ["--tasks=reverse,copy", f"--output={tmp_path}", "--pool=300", "--held_out=50", "--test=40"]
    assert planted_noise.main([*flags, "--noise=0.3"]) == 0
    parts = {
        name: [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("pool", "clean", "rest", "reference", "test")
    }
    assert {name: len(part) for name, part in parts.items()} == {
        "pool": 300,
        "clean": 300,
        "rest": 210,
        "reference": 50,
        "test": 40,
    }
    kinds = [record["noise"] for record in parts["pool"]]
    assert {kind: kinds.count(kind) for kind in ("", *planted_noise.KINDS)} == {
        "": 210,
        "shuffled": 30,
        "duplicate": 30,
        "foreign": 30,
    }
    right = lambda r: r["response"] == (r["prompt"][9:][::-1] if r["task"] == "reverse" else r["prompt"][6:])  # noqa: E731
    for record in parts["pool"]:
        if record["noise"] != "foreign":
            assert right(record) == (record["noise"] != "shuffled")
    good = [record["prompt"] for record in parts["rest"]]
    assert len(set(good)) == 210
    copies = [record["prompt"] for record in parts["pool"] if record["noise"] == "duplicate"]
    assert set(copies) <= set(good)
    assert len(set(copies)) == 3
    prompts = [{r["prompt"] for r in parts[name]} for name in ("clean", "reference", "test")]
    assert not (prompts[0] & prompts[1])
    assert not (prompts[0] & prompts[2])
    assert not (prompts[1] & prompts[2])
    assert planted_noise.main([*flags, "--noise=1"]) == 2
    assert "--noise: leaves no answer of " in capsys.readouterr().err
    assert planted_noise.main([*flags, "--seed=1"]) == 0
    assert json.loads((tmp_path / "test.jsonl").read_text().splitlines()[0]) != parts["test"][0]


def test_precision_and_recall_of_what_is_dropped(tmp_path):
    """Ten records, of which 6, 7 and 9 are noise; 7, 8 and 9 are dropped."""
    noise = ["", "", "", "", "", "", "shuffled", "shuffled", "", "foreign"]
    rows = [scores.row((str(tmp_path / "x"), i), f"{i:016x}", (10 * (i + 1), 1), {"s": float(i)}) for i in range(10)]
    (tmp_path / "scores.jsonl").write_bytes(b"".join(rows))
    request = choice.Request(str(tmp_path / "scores.jsonl"), "bottom", ("s",), 7, "records")
    selected.write(tmp_path / "kept.jsonl", choice.choose(request))
    d = selection_report.dropped(noise, str(tmp_path / "kept.jsonl"), str(tmp_path / "scores.jsonl"))
    assert (d.precision, d.recall) == (pytest.approx(2 / 3), pytest.approx(2 / 3))
    assert d.by_kind["shuffled"] == 0.5
    assert d.by_kind["foreign"] == 1.0
    assert math.isnan(d.by_kind["duplicate"])
    assert d.kept_tokens == pytest.approx(280 / 550)
    clean = selection_report.dropped([""] * 10, str(tmp_path / "kept.jsonl"), str(tmp_path / "scores.jsonl"))
    assert math.isnan(clean.precision)


def result(name, values, dropped=None):
    return Result(
        Way(name, ["r"] * len(values), [], ()),
        "pool",
        {"eval/nll": mean(values)},
        {"eval/nll": values},
        {"eval/nll": None},
        dropped,
        0.5,
        1e5,
    )


def test_what_the_intervals_say_against_random():
    results = [
        result("random", [1.0, 1.01, 0.99]),
        result("rho", [0.8, 0.81, 0.79], Dropped(0.6, 0.7, 0.9, {"shuffled": 1.0})),
        result("full", [1.2, 1.21, 1.22]),
        result("band", [0.9, 1.1, 1.0]),
    ]
    said = selection_report.verdict(results, "eval/nll")
    assert said.endswith("better: rho; worse: full; not told apart: band.")
    header, rows = selection_report.table(results, ["eval/nll"])
    assert header == ["", "seeds", "eval/nll", "against random", "kept", "precision", "recall", "shuffled", "cost"]
    assert rows[1][4:] == ["0.60", "0.70", "0.90", "1.00", "0.50"]
    assert rows[0][4:] == ["-", "-", "-", "-", "0.50"]
    assert "nothing can be said" in selection_report.verdict([result("random", [1.0])], "eval/nll")
    better = [
        Result(r.way, r.pool, {"eval/test/exact_match": r.metrics["eval/nll"]}, {}, {}, None, 0.0, 0.0) for r in results
    ]
    assert selection_report.verdict(better, "eval/test/exact_match").endswith(
        "better: full; worse: rho; not told apart: band."
    )


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
def test_the_study_runs_to_its_report(tmp_path, capfd):
    ways = ("random", "rho", "rho1")
    values = runs.values_of("select", **{"study.ways": ways, "study.clean_ways": (), "study.seeds": 1})
    plan = study.Plan(str(tmp_path / "store"))
    report = select.study(values, plan)
    assert study.run_stages(plan.stages) == {}
    report(str(tmp_path / "w"))
    out = capfd.readouterr().out
    assert "nothing can be said against random with one seed" in out
    with open(tmp_path / "w/table.csv", newline="") as file:
        rows = {(row["pool"], row["name"]): row for row in csv.DictReader(file)}
    assert list(rows) == [("pool", way) for way in ways]
    assert float(rows["pool", "random"]["cost"]) == 0
    assert float(rows["pool", "rho"]["cost"]) > float(rows["pool", "rho1"]["cost"]) > 0
    assert 0.4 < float(rows["pool", "rho"]["kept tokens"]) <= 0.6
    tokens = [float(row["tokens"]) for row in rows.values()]
    assert np.ptp(tokens) / max(tokens) < 0.1
    for name in ("table.md", "report.html", "pool_eval_nll.png"):
        assert (tmp_path / "w" / name).is_file()
