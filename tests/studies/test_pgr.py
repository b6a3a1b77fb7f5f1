import csv
import json
import math

import numpy as np
import pytest

from research.errors import InputError
from research.studies import pgr, pgr_report
from research.studies.pgr import estimate, measure, read_predictions, resample

N = 60


def write(path, gold, chosen, classes=2):
    probs = np.full((len(gold), classes), 0.1) + np.eye(classes)[chosen]
    rows = ({"gold": int(g), "probs": p.tolist(), "text": "x"} for g, p in zip(gold, probs, strict=True))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def answers(gold, accuracy):
    """Right on the first part of the examples."""
    return np.where(np.arange(len(gold)) < accuracy * len(gold), gold, 1 - gold)


@pytest.fixture
def cells(tmp_path):
    """Two losses, two seeds; and a pair without a gap."""
    gold = np.arange(N) % 2
    made = []
    for strong, ceiling in (("large", 0.9), ("same", 0.6)):
        for seed in range(2):
            weak = write(tmp_path / f"weak{seed}", gold, answers(gold, 0.6))
            top = write(tmp_path / f"{strong}{seed}", gold, answers(gold, ceiling))
            for loss, accuracy in (("hard", 0.7), ("soft", 0.8)):
                student = write(tmp_path / f"{strong}-{loss}{seed}", gold, answers(gold, accuracy + 0.1 * seed))
                sizes = {"weak_size": "tiny", "strong_size": strong, "weak_params": 10, "strong_params": 200.0}
                paths = {"weak": weak, "student": student, "ceiling": top}
                made.append({"loss": loss, "seed": seed} | sizes | paths)
    return made


def test_bootstrap_is_that_of_a_plain_loop(monkeypatch):
    rng = np.random.default_rng(0)
    parts = (rng.random((2, 3, 7)) < 0.6).astype(np.float32)
    monkeypatch.setattr(pgr, "_CHUNK", 7)  # so that the draws come in several pieces
    got = resample(parts, draws=11, seed=5)
    seeds = np.random.default_rng([5, 0]).integers(3, size=(11, 3))
    examples = np.random.default_rng([5, 1]).integers(7, size=(11, 7))
    for r in range(11):
        for q in range(2):
            values = [float(parts[q, s, n]) for s in seeds[r] for n in examples[r]]
            assert got[r, q] == pytest.approx(sum(values) / len(values), abs=1e-12)


def test_interval_of_one_seed_is_that_of_a_binomial():
    rng = np.random.default_rng(1)
    gold = np.zeros(2000, int)
    said = (rng.random((1, 2000)) < 0.3).astype(int)  # right in 70 %
    value, low, high = estimate(said, said, said, gold)["weak"]
    error = 1.96 * math.sqrt(value * (1 - value) / 2000)
    assert value == (said == 0).mean()
    assert (value - low, high - value) == pytest.approx((error, error), rel=0.1)


def test_seeds_that_differ_widen_the_interval_and_pairs_stay_together():
    gold = np.zeros(4000, int)
    rng = np.random.default_rng(2)
    said = (rng.random((4, 4000)) < np.array([[0.1], [0.2], [0.3], [0.4]])).astype(int)
    got = estimate(said, said, said, gold)
    assert got["weak"].high - got["weak"].low > 0.15  # of examples alone: 0.03
    assert got["gap"] == (0, 0, 0)  # the same files, so no draw may tell them apart


def test_pgr_of_known_answers():
    gold = np.zeros(100, int)
    at = np.arange(100)
    weak, student, ceiling = (np.where(at < n, 0, 1) for n in (60, 75, 90))
    got = estimate(np.stack([weak, weak]), np.stack([student, ceiling]), np.stack([ceiling, ceiling]), gold)
    assert got["pgr"].value == pytest.approx((0.825 - 0.6) / (0.9 - 0.6))
    assert got["agreement"].value == pytest.approx((0.85 + 0.7) / 2)
    assert got["agreement_right"].value == 1
    assert got["agreement_wrong"].value == pytest.approx((25 + 10) / 80)
    assert 0 < got["pgr"].low < got["pgr"].value < got["pgr"].high <= 1


def test_pgr_is_a_ratio_of_means():
    gold = np.zeros(100, int)
    at = np.arange(100)
    said = lambda *counts: np.stack([np.where(at < n, 0, 1) for n in counts])  # noqa: E731
    got = estimate(said(50, 50), said(60, 51), said(90, 52), gold)
    assert got["pgr"].value == pytest.approx((10 + 1) / (40 + 2))  # the mean of ratios is 0.375


def test_clipped_and_undefined_values():
    gold, at = np.zeros(100, int), np.arange(100)
    weak, student, ceiling = (np.where(at < n, 0, 1)[None] for n in (60, 99, 80))
    got = estimate(weak, student, ceiling, gold)
    assert got["pgr"].value == pytest.approx(39 / 20)
    assert (got["pgr_clipped"].value, got["pgr_clipped"].high) == (1, 1)
    perfect = estimate(gold[None], student, ceiling, gold)  # a supervisor that is never wrong
    assert all(math.isnan(x) for x in perfect["agreement_wrong"])
    assert perfect["agreement_right"].value == 0.99


def test_measure_groups_over_seeds_and_gives_reasons(cells, tmp_path):
    cells.append(cells[0] | {"seed": 7, "student": str(tmp_path / "none"), "ceiling": str(tmp_path / "nor")})
    groups, missing = measure(cells)
    assert [(g.strong_size, g.loss, g.seeds, g.examples) for g in groups] == [
        ("large", "hard", (0, 1), N),
        ("large", "soft", (0, 1), N),
        ("same", "hard", (0, 1), N),
        ("same", "soft", (0, 1), N),
    ]
    assert groups[0].excluded == ""
    assert groups[0].estimates["pgr"].value == pytest.approx(0.5)
    assert groups[2].excluded == "ceiling 0.6000 <= weak 0.6000"
    assert math.isnan(groups[2].estimates["pgr"].value)
    assert groups[2].estimates["student"].value == pytest.approx(0.75)
    assert [(m.cell["seed"], m.reason) for m in missing] == [
        (7, f"student: there is no {tmp_path}/none; ceiling: there is no {tmp_path}/nor")
    ]


def test_a_gap_that_may_be_nothing_is_excluded(tmp_path):
    rng = np.random.default_rng(0)
    gold = np.zeros(50, int)
    said = {name: (rng.random(50) < p).astype(int) for name, p in (("weak", 0.5), ("student", 0.5), ("ceiling", 0.4))}
    paths = {name: write(tmp_path / name, gold, chosen) for name, chosen in said.items()}
    sizes = {"weak_size": "a", "strong_size": "b", "weak_params": 1, "strong_params": 2, "loss": "x", "seed": 0}
    ((group,), _) = measure([sizes | paths])
    assert group.estimates["gap"].low < 0 < group.estimates["gap"].value
    assert group.excluded.startswith("the interval of ceiling - weak, [-0.")
    assert math.isnan(group.estimates["pgr"].value)


def test_several_classes_and_ties(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"gold": 2, "probs": [0.2, 0.4, 0.4]}\n{"gold": 0, "probs": [0.5, 0.3, 0.2]}\n')
    got = read_predictions(str(path))
    assert (got.gold.tolist(), got.answers.tolist()) == ([2, 0], [1, 0])


def test_rewards_of_a_pair_are_read_as_answers(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text("".join(f'{{"rewards": {pair}, "chosen": "a"}}\n' for pair in ([2.0, -1], [-3, -2.5], [1, 1])))
    got = read_predictions(str(path))
    assert (got.gold.tolist(), got.answers.tolist()) == ([0, 0, 0], [0, 1, 1])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"rewards": [1, 2, 3]}', "x:1: rewards = .* a pair has two"),
        ("{", "x:1: no .*JSONDecodeError"),
        ('{"gold": 1}', "x:1: no .*KeyError: 'probs'"),
        ('{"gold": null, "probs": [1.0]}', "x:1: no .*TypeError"),
        ('{"gold": 2, "probs": [0.5, 0.5]}', "x:1: gold = 2"),
        ('{"gold": 0, "probs": [NaN, 0.5]}', r"x:1: .*nan.*finite"),
        ("", "x: is empty"),
    ],
)
def test_files_that_hold_no_predictions(tmp_path, line, message):
    (tmp_path / "x").write_text(line)
    with pytest.raises(InputError, match=message):
        read_predictions(str(tmp_path / "x"))


def test_cells_that_cannot_be_compared(cells, tmp_path):
    gold = np.arange(N) % 2
    other = cells[0] | {"student": write(tmp_path / "other", 1 - gold, gold)}
    with pytest.raises(InputError, match=r"weak0 and .*other aren't about the same test records"):
        measure([other])
    other = cells[2] | {"ceiling": write(tmp_path / "short", gold[1:], gold[1:])}
    with pytest.raises(InputError, match=r"weak0 and .*short aren't about the same .* 60 and 59 lines"):
        measure([cells[0], other])
    with pytest.raises(InputError, match="with seed 0 comes twice"):
        measure([cells[0], cells[0]])
    with pytest.raises(InputError, match="lacks ceiling, weak_params"):
        measure([{k: v for k, v in cells[0].items() if k not in ("ceiling", "weak_params")}])


def test_report_writes_everything_and_lists_what_is_left_out(cells, tmp_path, capsys):
    folder = tmp_path / "store/student-abc"
    cells.append(cells[0] | {"loss": "late", "student": str(folder / "p.jsonl")})
    cells.append(cells[1] | {"loss": "<once>"})
    stage = {"name": "student-s0", "workdir": str(folder), "state": "failed", "error": "diverged"}
    (tmp_path / "out").mkdir()
    (tmp_path / "out/study.json").write_text(json.dumps({"stages": [stage, stage | {"workdir": str(tmp_path / "s")}]}))
    pgr_report.report(cells, str(tmp_path / "out"))

    printed = capsys.readouterr().out
    assert "tiny  large   soft    2 " in printed
    assert "1 (examples only)" in printed
    left_out = [line for line in printed.splitlines() if line.startswith("left out")]
    assert left_out == [
        "left out: PGR of tiny -> same, hard: ceiling 0.6000 <= weak 0.6000",
        "left out: PGR of tiny -> same, soft: ceiling 0.6000 <= weak 0.6000",
        f"left out: tiny -> large, late, seed 0: student: there is no {folder}/p.jsonl "
        "(stage student-s0: failed: diverged)",
    ]
    with open(tmp_path / "out/table.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert [(row["strong_size"], row["loss"], row["seeds"]) for row in rows[:2]] == [
        ("large", "hard", "2"),
        ("large", "soft", "2"),
    ]
    assert float(rows[0]["pgr"]) == pytest.approx(0.5)
    assert float(rows[0]["gap"]) == pytest.approx(0.3)
    assert float(rows[0]["student_low"]) < float(rows[0]["student"]) < float(rows[0]["student_high"])
    excluded = next(row for row in rows if row["strong_size"] == "same")
    assert excluded["pgr"] == ""
    assert excluded["excluded"].startswith("ceiling")
    stored = json.loads((tmp_path / "out/table.json").read_text())
    assert stored["groups"][0]["estimates"]["pgr"]["value"] == pytest.approx(0.5)
    assert stored["missing"][0]["cell"]["loss"] == "late"
    page = (tmp_path / "out/report.html").read_text()
    assert page.count("data:image/png;base64,") == 6  # three plots, light and dark
    assert "&lt;once&gt;" in page
    assert "<once>" not in page
    assert 'src="data' in page
    for name in ("accuracy", "pgr", "calibration"):
        assert (tmp_path / f"out/{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (tmp_path / f"out/{name}.pdf").read_bytes().startswith(b"%PDF")
        assert "<svg" in (tmp_path / f"out/{name}.svg").read_text()
    for text in (r"soft, tiny $\rightarrow$ large & 2 & ", r"\textless{}once\textgreater{}"):
        assert text in (tmp_path / "out/table.tex").read_text()
    assert "| soft, tiny -> large | 0 | " in (tmp_path / "out/table.md").read_text()


def test_report_of_nothing(cells, tmp_path, capsys):
    pgr_report.report([cells[0] | {"weak": "none"}], str(tmp_path / "out"))
    assert "seed 0: weak: there is no none" in capsys.readouterr().out
    assert (tmp_path / "out/report.html").is_file()


def test_a_difference_is_paired_by_seeds_and_examples(cells):
    groups, _ = measure(cells)
    by_name = {(group.strong_size, group.loss): group for group in groups}
    hard, soft = by_name["large", "hard"], by_name["large", "soft"]
    first, other = (hard, soft) if soft.base else (soft, hard)
    assert (first.base, first.difference, other.base) == ("", None, first.loss)
    students = [np.array(group.points["student"]) for group in (other, first)]
    assert other.difference.value == pytest.approx((students[0] - students[1]).mean())
    assert other.difference.low <= other.difference.value <= other.difference.high
    assert np.mean(hard.points["weak"]) == pytest.approx(hard.estimates["weak"].value)


def test_a_supervisor_is_calibrated_where_it_is_right_as_often_as_it_is_sure(tmp_path):
    lines = [{"gold": int(i % 10 >= 8), "probs": [0.8, 0.2]} for i in range(50)]
    lines += [{"gold": 0, "probs": [0.5 - 0.05, 0.5 + 0.05]} for i in range(50)]
    path = tmp_path / "weak"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    cell = {"weak_size": "xs", "loss": "soft", "weak": str(path)}
    (found,) = pgr.calibrations([cell, cell | {"loss": "hard"}])
    assert (found.name, found.seeds) == ("xs", 1)
    assert found.bins[:, 2].tolist() == [50, 50]
    np.testing.assert_allclose(found.bins[:, :2], [[0.55, 0.0], [0.8, 0.8]], atol=1e-9)
    assert found.errors == (pytest.approx(0.275),)
    rewards = tmp_path / "pairs"
    rewards.write_text('{"rewards": [1.0, -1.0]}\n')
    assert read_predictions(str(rewards)).confidence.tolist() == [pytest.approx(1 / (1 + math.exp(-2)))]
