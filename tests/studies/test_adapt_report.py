"""The report of a study that compares ways to adapt."""

import csv
import json
import math

import pytest

from research.errors import InputError
from research.studies import adapt_report, plots
from research.studies.adapt_report import Way

pytestmark = pytest.mark.slow

METRIC = "eval/test/exact_match"


@pytest.fixture(autouse=True)
def no_vectors(monkeypatch):
    """PDFs and SVGs are tested once, in test_pgr.py: each takes 0.2 s."""
    monkeypatch.setattr(plots, "to_vector", lambda figure, kind: kind.encode())


def write(folder, quality, loss=0.5, trained=1000.0):
    folder.mkdir(parents=True)
    lines = [
        {"step": 0, "startup/trained_parameters": trained, "startup/step_bytes": 3 * 2.0**20},
        {"step": 0, METRIC: 0.125, "eval/loss": 4.0},
        {"step": 10, "train/tokens": 400.0},  # the first line may have no speed
        {"step": 20, "train/tokens": 400.0, "train/tokens_per_second": 8000.0},
        {"step": 30, "train/tokens": 400.0, "train/tokens_per_second": 4000.0},
        {"step": 40, "train/tokens": 400.0, "train/tokens_per_second": 5000.0},
        {"step": 40, METRIC: quality, "eval/loss": loss},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps({"time": 0.0, **line}) + "\n" for line in lines))
    return str(folder)


def test_the_table_has_quality_and_costs(tmp_path, capsys):
    lora = [write(tmp_path / f"lora{i}", quality) for i, quality in enumerate((0.5, 0.75, 1.0))]
    norms = [write(tmp_path / "norms", 0.25, loss=0.75, trained=10.0)]
    ways = [
        Way("lora", 0.01, {0.001: 0.9, 0.01: 0.5, 0.1: math.inf}, lora),
        Way("norms", 0.1, {0.01: 0.9, 0.1: 0.75}, norms),
    ]
    adapt_report.report(ways, [METRIC, "eval/loss"], str(tmp_path / "out"))
    assert "lora & 0.01 & 3 & 0.75 {" in (tmp_path / "out/table.tex").read_text()
    printed = capsys.readouterr().out
    cells = {line.split()[0]: line for line in printed.splitlines() if line.startswith(("lora", "norms"))}
    assert cells["lora"].split()[1:6] == ["0.01", "3", "0.75", "[0.129,", "1.37]"]
    assert cells["lora"].split()[-3:] == ["1,000", "3.0", "80"]  # the median of 50, 100 and 80 ms
    assert cells["norms"].split() == ["norms", "0.1", "1", "0.25", "0.75", "10", "3.0", "80"]
    assert "so that another may be better: norms." in printed
    assert "Diverged, which counts as the worst loss: lora at 0.1." in printed
    with open(tmp_path / "out/table.csv", newline="") as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    assert (rows["lora"][f"{METRIC} before"], rows["norms"][f"{METRIC} low"]) == ("0.125", "")
    table = json.loads((tmp_path / "out/table.json").read_text())
    assert table[0]["rates"] == {"0.001": 0.9, "0.01": 0.5, "0.1": None}
    assert (rows["lora"]["diverged at"], rows["norms"]["diverged at"]) == ("0.1", "")
    assert table[1]["eval/loss"] == {"value": 0.75, "low": None, "high": None}
    for name in ("eval_test_exact_match_over_trained.png", "eval_loss_over_step_bytes.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")
    assert "0.001: 0.9, 0.01: 0.5, 0.1: diverged" in (tmp_path / "out/report.html").read_text()


def test_a_run_without_the_metric_is_named(tmp_path):
    run = write(tmp_path / "run", 0.5)
    with pytest.raises(InputError, match="run: has no metric eval/other"):
        adapt_report.report([Way("lora", 0.1, {0.1: 0.5}, [run])], ["eval/other"], str(tmp_path / "out"))
