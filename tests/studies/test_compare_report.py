"""The report of a study that compares ways to train."""

import csv
import json
import math
import sys

import pytest
from scipy import stats

from research.errors import InputError
from research.studies import compare_report, means, plots


@pytest.fixture(autouse=True)
def no_vectors(monkeypatch):
    """PDFs and SVGs are tested once, in test_pgr.py: each takes 0.2 s."""
    monkeypatch.setattr(plots, "to_vector", lambda figure, kind: kind.encode())


def write(folder, values, metric="eval/loss"):
    folder.mkdir(parents=True)
    lines = [{"step": step, "time": 0.0, metric: value} for step, value in values.items()]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(folder)


def test_an_interval_is_that_of_a_t_test():
    values = [1.0, 1.2, 1.7]
    want = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    assert means.mean(values) == pytest.approx((1.3, want.low, want.high))
    assert math.isnan(means.mean([2.0]).low)


def test_the_table_has_the_last_values_over_seeds(tmp_path, capsys):
    runs = {
        "alone": [write(tmp_path / "a0", {0: 5.0, 10: 2.0}), write(tmp_path / "a1", {0: 5.0, 10: 3.0})],
        "taught": [write(tmp_path / "t0", {0: 5.0, 10: 1.5})],
        "other": [write(tmp_path / "o0", {10: 0.5}, "eval/exact_match")],
    }
    compare_report.report(runs, ["eval/loss", "eval/exact_match"], str(tmp_path / "out"))
    printed = capsys.readouterr().out
    assert "alone   2      2.5 [-3.853, 8.853]  -" in printed
    assert "taught  1      1.5                  -" in printed
    with open(tmp_path / "out/table.csv", newline="") as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    assert float(rows["alone"]["eval/loss"]) == 2.5
    assert rows["taught"]["eval/loss low"] == ""
    assert rows["other"]["eval/loss"] == ""
    table = {row["name"]: row for row in json.loads((tmp_path / "out/table.json").read_text())}
    assert table["taught"]["eval/loss"] == {"value": 1.5, "low": None, "high": None}
    assert table["other"]["eval/exact_match"]["value"] == 0.5
    assert table["alone"]["runs"] == runs["alone"]
    for name in ("eval_loss", "eval_loss_last", "eval_exact_match"):
        assert (tmp_path / "out" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (tmp_path / "out" / f"{name}.pdf").is_file()
    assert table["alone"]["values of seeds"]["eval/loss"] == [2.0, 3.0]
    assert r"alone & 2 & 2.5 {\scriptsize [$-$3.853, 8.853]} & - \\" in (tmp_path / "out/table.tex").read_text()
    assert "| alone | 2 | 3 | - |" in (tmp_path / "out/table.md").read_text()
    assert '2.5 <span class="interval">[-3.853, 8.853]' in (tmp_path / "out/report.html").read_text()


def test_the_gap_recovered_is_a_ratio_of_means(tmp_path):
    losses = {"weak": [4.0, 2.0], "student": [1.5, 3.0], "ceiling": [1.0, 1.0]}
    runs = {k: [write(tmp_path / f"{k}{i}", {1: x}) for i, x in enumerate(v)] for k, v in losses.items()}
    ways = [compare_report.read_way(name, seeds, ["eval/loss"]) for name, seeds in runs.items()]
    ways = compare_report.with_recovered(ways, "weak", "ceiling")
    header, rows = compare_report.table(ways, ["eval/loss"])
    assert header == ["", "seeds", "eval/loss", "PGR of eval/loss"]
    assert [row[-1] for row in rows] == ["-", "0.375", "-"]
    assert {way.name: way.recovered["eval/loss"] for way in ways} == {
        "weak": None,
        "student": pytest.approx(0.375),
        "ceiling": None,
    }


def test_differences_are_of_runs_of_one_seed(tmp_path, capsys):
    values = {"start": [1.0, 5.0, 9.0], "taught": [2.0, 6.1, 10.2], "short": [1.0]}
    runs = {k: [write(tmp_path / f"{k}{i}", {1: x}) for i, x in enumerate(v)] for k, v in values.items()}
    compare_report.report(runs, ["eval/loss"], str(tmp_path / "out"), base="start")
    want = stats.ttest_rel(values["taught"], values["start"]).confidence_interval(0.95)
    printed = capsys.readouterr().out
    assert "Differences from start, seed by seed" in printed
    assert f"taught  1.1 [{want.low:.4g}, {want.high:.4g}]" in printed
    rows = {row["name"]: row for row in json.loads((tmp_path / "out/table.json").read_text())}
    assert rows["taught"]["difference of eval/loss"] == pytest.approx(
        {"value": 1.1, "low": want.low, "high": want.high}
    )
    assert rows["short"]["difference of eval/loss"] is None
    assert "difference of eval/loss" not in rows["start"]
    assert f'1.1 <span class="interval">[{want.low:.4g}, {want.high:.4g}]' in (tmp_path / "out/report.html").read_text()
    with open(tmp_path / "out/table.csv", newline="") as file:
        cells = {row["name"]: row["difference of eval/loss"] for row in csv.DictReader(file)}
    assert cells == {"start": "", "taught": str(rows["taught"]["difference of eval/loss"]["value"]), "short": ""}
    with pytest.raises(InputError, match="base = 'strat': the study has no such way"):
        compare_report.report(runs, ["eval/loss"], str(tmp_path / "out"), base="strat")


def test_a_metric_that_nobody_has_is_named(tmp_path):
    runs = {"alone": [write(tmp_path / "a", {0: 1.0})]}
    with pytest.raises(InputError, match="eval/lss: no run of the study has this metric"):
        compare_report.report(runs, ["eval/lss"], str(tmp_path / "out"))


def test_quantiles_are_those_of_scipy():
    """Of scipy, which jax needs anyway, in tests alone."""
    for freedom in (1, 2, 3, 4, 5, 9, 10, 29, 100, 999):
        for level in (0.5, 0.95, 0.999):
            want = stats.t.ppf((1 + level) / 2, freedom)
            assert means.student_quantile(level, freedom) == pytest.approx(want, rel=1e-12)


def test_without_matplotlib_the_tables_are_there(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "research.studies.plots", None)
    monkeypatch.delattr("research.studies.plots", raising=False)
    runs = {"alone": [write(tmp_path / "a", {0: 1.0})]}
    with pytest.raises(InputError, match="plots need matplotlib"):
        compare_report.report(runs, ["eval/loss"], str(tmp_path / "out"))
    assert "alone  1" in capsys.readouterr().out
    assert (tmp_path / "out/table.csv").is_file()
    assert not (tmp_path / "out/report.html").exists()
