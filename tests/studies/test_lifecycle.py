"""What is measured after the stages of a model's life, and the report of it."""

import itertools
import json
import math

import numpy as np
import pytest

from research.errors import InputError
from research.studies import lifecycle, lifecycle_report, plots
from research.studies.lifecycle import Curve, Phase, Scale

SEEDS = 3


def line(number, reward, utility, right=0.0, length=4, kl=0.5):
    said = {"number": number, "prompt": f"p{number}", "completion": f"a|{reward}", "ended": 1.0}
    return {**said, "reward": reward, "utility": utility, "exact_match": right, "length": length, "kl": kl}


def draw(seed, n=4, prompts=5):
    rng = np.random.default_rng(seed)
    return [
        line(p, *map(float, rng.normal(size=2)), length=int(rng.integers(1, 9)))
        for p in range(prompts)
        for _ in range(n)
    ]


def test_the_best_of_n_is_the_mean_over_all_choices_of_n():
    answers = draw(0)
    for n in (1, 2, 3, 4):
        best = [
            max(choice, key=lambda each: each["reward"])
            for p in range(5)
            for choice in itertools.combinations([each for each in answers if each["number"] == p], n)
        ]
        measured = lifecycle.best_of_n(answers, n)
        for measure, field in (("utility", "utility"), ("reward", "reward"), ("length", "length")):
            assert measured[f"answers/{measure}"] == pytest.approx(np.mean([each[field] for each in best]))
        assert measured["answers/kl"] == pytest.approx(math.log(n) - (n - 1) / n)


def test_the_scale_gives_the_proxy_the_truths_mean_and_deviation():
    answers = draw(1)
    scaled = lifecycle.scale_of(answers)(np.array([each["reward"] for each in answers]))
    true = [each["utility"] for each in answers]
    assert (scaled.mean(), scaled.std()) == pytest.approx((np.mean(true), np.std(true)))
    assert lifecycle.scale_of([line(0, 2.0, 1.0), line(1, 2.0, 3.0)]) == Scale(0.0, 1.0)


def test_a_fall_is_measured_where_the_other_seeds_are_the_best():
    kl = np.array([[0.0, 1.0, 4.0]] * 3)
    true = np.array([[1.0, 2.0, 0.5], [1.0, 2.5, 0.5], [1.0, 2.0, 9.0]])
    fall = lifecycle.fall(Curve(kl, 2 * true, true))  # of the first and second the last place, of the third the middle
    assert fall.true.value == pytest.approx((0 + 0 + 7.0) / 3)
    assert fall.proxy.value == pytest.approx(2 * fall.true.value)
    assert (fall.kl_at_best, fall.kl_at_end) == (3.0, 4.0)
    alone = lifecycle.fall(Curve(kl[:1], true[:1], true[:1]))
    assert (alone.true.value, alone.kl_at_best) == (-1.5, 1.0)


@pytest.fixture(autouse=True)
def no_vectors(monkeypatch):
    """PDFs and SVGs are tested once, in test_pgr.py: each takes 0.2 s."""
    monkeypatch.setattr(plots, "to_vector", lambda figure, kind: kind.encode())


@pytest.fixture
def phases(tmp_path):
    """Three seeds of a life in which PPO is better and then overoptimised, and DPO is worse."""

    def write(name, lines):
        folder = tmp_path / "store" / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "metrics.jsonl").write_text("".join(json.dumps({"time": 0.0, **each}) + "\n" for each in lines))
        (folder / "cost.json").write_text(json.dumps({"seconds": 10.0, "cpu_seconds": 4.0}))
        return folder

    def answers(name, seed, text, utility, reward, n=1):
        each = [line(p, reward + 0.1 * p + 0.01 * i, utility + 0.1 * p, 1.0) for p in range(3) for i in range(n)]
        means = {
            f"answers/{field}": float(np.mean([x[field] for x in each])) for field in each[0] if field not in TEXTS
        }
        folder = write(f"{name}-answers-{seed}", [{"step": 0, "text/loss": text + 0.01 * seed, **means}])
        (folder / "answers.jsonl").write_text("".join(json.dumps(x) + "\n" for x in each))
        return str(folder)

    def run(name, seed, *lines):
        return str(write(f"{name}-{seed}", lines))

    def life(seed):
        way = [(0.0, 1.0, 1.0), (1.0, 2.0, 1.5 + 0.01 * seed), (4.0, 3.0, 0.5)]
        rollouts = [
            {"step": i, "train/rollout/kl": kl, "train/reward/proxy": proxy, "train/reward/true": true}
            for i, (kl, proxy, true) in enumerate(way)
        ]
        evaluated = [{"step": 0, "eval/text/loss": 5.5}, {"step": 9, "eval/text/loss": 0.5}]
        return [
            (run("pretrain", seed, *evaluated), answers("pretrain", seed, 0.5, 0.25, 0.5)),
            (run("sft", seed, {"step": 9, "train/loss": 1.0}), answers("sft", seed, 0.75, 1.0, 1.0)),
            (run("reward", seed, {"step": 9, "eval/utility/accuracy": 0.75 + 0.01 * seed}), ""),
            (run("ppo", seed, *rollouts), answers("ppo", seed, 1.5, 1.25 + 0.01 * seed, 3.0)),
            (run("dpo", seed, {"step": 9, "train/loss": 1.0}), answers("dpo", seed, 1.5, 0.5 + 0.01 * seed, 3.0)),
            ("", answers("best", seed, 9.0, 1.1 + seed, 3.0, n=4)),
        ]

    named = (("pretrain", "pretrain"), ("sft", "sft"), ("reward model", "reward"), ("ppo", "policy"), ("dpo", "policy"))
    named += (("best of 4", "best_of"),)
    lives = [life(seed) for seed in range(SEEDS)]
    return [
        Phase(*name, *(tuple(filter(None, (each[i][part] for each in lives))) for part in (0, 1)))
        for i, name in enumerate(named)
    ]


TEXTS = ("number", "prompt", "completion")


def test_the_report_says_of_each_stage_whether_it_gave_what_it_is_for(phases, tmp_path, capsys):
    lifecycle_report.report(phases, "sft", str(tmp_path / "out"))
    printed = capsys.readouterr().out
    content = json.loads((tmp_path / "out/table.json").read_text())
    verdicts = {gain["stage"]: (gain["before"], gain["verdict"]) for gain in content["gains"]}
    assert verdicts == {
        "pretrain": ("before its first step", "better"),
        "sft": ("pretrain", "can't be told"),  # as right as before
        "reward model": ("chance", "better"),
        "ppo": ("sft", "better"),
        "dpo": ("sft", "worse"),
        "best of 4": ("sft", "can't be told"),
    }
    assert {name: fall["verdict"] for name, fall in content["falls"].items()} == {
        "ppo": "overoptimised",
        "best of 4": "can't be told",
    }
    stages = {stage["name"]: stage for stage in content["stages"]}
    assert stages["best of 4"]["text/loss"] == stages["sft"]["text/loss"]
    assert stages["best of 4"]["answers/kl"] == [math.log(4) - 0.75] * SEEDS
    assert "answers/utility" not in stages["reward model"]
    sft = next(text for text in printed.splitlines() if text.startswith("sft "))
    assert "0.76 [0.735, 0.785]" in sft
    page = (tmp_path / "out/report.html").read_text()
    assert "The same prompts after each stage" in page
    assert "data:image/png" in page
    assert "| sft | 3 | 0.76 [0.735, 0.785] |" in (tmp_path / "out/table.md").read_text()
    assert r"\begin{tabular}" in (tmp_path / "out/table.tex").read_text()
    samples = (tmp_path / "out/samples.md").read_text().splitlines()
    assert samples[2] == r"| p0 | 'a\|0.5' 0.25 | 'a\|1.0' 1 | 'a\|3.0' 1.2 | 'a\|3.0' 0.5 | 'a\|3.03' 1.1 |"
    assert (tmp_path / "out/costs.csv").read_text().splitlines()[1] == "pretrain,30,12,30,12"
    for name in ("rewards_over_kl", "rewards_by_stage"):
        assert (tmp_path / f"out/{name}.png").read_bytes().startswith(b"\x89PNG")


def test_a_report_made_again_is_the_same_and_knows_no_folder(phases, tmp_path):
    for out in ("one", "two"):
        lifecycle_report.report(phases, "sft", str(tmp_path / out))
    for name in ("table.md", "table.csv", "table.json", "samples.md", "rewards_over_kl.png"):
        content = (tmp_path / "one" / name).read_bytes()
        assert content == (tmp_path / "two" / name).read_bytes()
        assert str(tmp_path).encode() not in content


def test_one_seed_has_no_verdict_and_a_model_that_is_named_no_beginning(phases, tmp_path):
    phases = [Phase(p.name, p.kind, p.runs[:1], p.answers[:1]) for p in phases]
    phases[0] = Phase("as it is", "pretrain", (), phases[0].answers)
    life = lifecycle_report.read(phases, "sft")
    gains = {gain.stage: gain for gain in life.gains()}
    assert (gains["sft"].before, gains["sft"].verdict) == ("as it is", "one seed")
    assert "as it is" not in gains
    assert {row[-1] for row in lifecycle_report.fall_table(life)[1:]} == {"one seed"}


def test_what_is_missing_is_named(phases, tmp_path):
    broken = [*phases[:-1], Phase("best of 4", "best_of", (), (phases[3].runs[0],))]
    with pytest.raises(InputError, match=r"ppo-0: holds no answers\.jsonl"):
        lifecycle_report.read(broken, "sft")
    broken = [*phases[:2], Phase("reward model", "reward", phases[1].runs, ())]
    with pytest.raises(InputError, match="sft-0: has no metric eval/utility/accuracy"):
        lifecycle_report.read(broken, "sft")
