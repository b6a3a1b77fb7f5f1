import json
import math
import pathlib
import re
import sys

import numpy as np
import pytest

from research.commands import report as command
from research.errors import InputError
from research.run.metrics import Writer
from research.studies import charts, plots, sections
from research.studies.groups import by_seed, load, members
from research.studies.history import Run, group_metrics, load_run
from research.studies.report import write_report
from research.studies.stages import Plan, write_stage


def make_run(workdir, scale=1.0, config=None):
    config = config or {"optimizer": {"learning_rate": scale, "betas": [0.9, 0.95]}, "seed": 0}
    with Writer(str(workdir), total_steps=40, start_step=0, tensorboard=False, run_config={}) as writer:
        for step in range(10, 50, 10):
            loss = math.nan if step == 20 else scale / step
            writer.write(step, {"train/loss": loss, "train/learning_rate": 1e-3 * step, "train/constant": 4})
            writer.write(step, {"eval/loss": scale / step, "eval/sort/exact_match": 0.5})
            writer.text(step, "sort", f"<script>{step}</script>")
    about = {"versions": {"jax": "1.2.3"}, "command": "python -m research.main --config=x.py"}
    (workdir / "config.json").write_text(json.dumps({"config": config} | about))
    return str(workdir)


def series(**values):
    return {name: (np.arange(len(v)), np.array(v, np.float64)) for name, v in values.items()}


def run_of(metrics, name="a"):
    return Run(name=name, series=metrics, samples=[], config={}, about={}, finished=False)


def test_load_run_merges_records_and_flattens_the_config(tmp_path):
    run = load_run(make_run(tmp_path / "one"))
    steps, values = run.series["train/loss"]
    assert run.name == "one"
    assert steps.tolist() == [10, 20, 30, 40]
    np.testing.assert_array_equal(values, [0.1, np.nan, 1 / 30, 0.025])
    assert run.config == {"optimizer.learning_rate": "1.0", "optimizer.betas": "[0.9, 0.95]", "seed": "0"}
    assert run.about == {"versions.jax": "1.2.3", "command": "python -m research.main --config=x.py"}
    assert (run.finished, run.last_step) == (False, 40)


def test_train_and_eval_share_a_plot_and_loss_comes_first():
    names = ["train/mfu", "train/loss", "eval/loss", "train/sft/loss", "eval/sort/exact_match", "train/odd"]
    groups = group_metrics([run_of({name: ([0], [0.0]) for name in names})])
    assert list(groups) == ["loss", "exact_match", "mfu", "odd"]
    assert groups["loss"] == ["train/loss", "train/sft/loss", "eval/loss"]


def test_parts_of_a_metric_are_in_its_plot():
    names = ["eval/exact_match", "eval/exact_match/sort", "train/grad_norm", "eval/tokens", "x"]
    groups = group_metrics([run_of({name: ([0], [0.0]) for name in names})])
    assert groups == {
        "exact_match": ["eval/exact_match", "eval/exact_match/sort"],
        "tokens": ["eval/tokens"],
        "x": ["x"],
        "grad_norm": ["train/grad_norm"],
    }


@pytest.mark.parametrize(
    "values",
    [
        {"train/loss": [1.0]},
        {"train/loss": [math.nan, math.inf]},
        {"train/loss": [0.0, -1.0, 5.0], "eval/loss": [1e-9, 1e9]},
        {"train/tokens": [8192.0] * 100},
        {"train/loss": np.random.default_rng(0).exponential(size=200)},
    ],
)
def test_any_curve_can_be_plotted(values):
    runs = [run_of(series(**values), str(i)) for i in range(10)]
    for shown in (runs[:1], runs):
        png = plots.to_png(plots.plot_curves("loss", list(values), shown, "dark"))
        assert png.startswith(b"\x89PNG")
        assert len(png) > 2000


def test_moving_mean_keeps_smooth_curves_and_gaps():
    x = np.linspace(0.0, 1.0, 120)
    assert plots.moving_mean(x**2) is None
    noisy = np.where(np.arange(120) % 2, 1.0, 3.0)
    noisy[60] = math.nan
    mean = plots.moving_mean(noisy)
    np.testing.assert_allclose(mean[20:50], 2.0, atol=0.15)
    assert np.isnan(mean).nonzero()[0].tolist() == [60]


def test_report_is_one_page_that_needs_nothing_else(tmp_path):
    path = write_report([make_run(tmp_path / "one")])
    assert path == str(tmp_path / "one/report/report.html")
    assert sorted(p.name for p in (tmp_path / "one/report").glob("*.png")) == [
        "exact_match.png",
        "learning_rate.png",
        "loss.png",
    ]
    page = (tmp_path / "one/report/report.html").read_text()
    assert not re.findall(r"(?:src|srcset|href)=|url\(|import", page)
    assert "&lt;script&gt;40&lt;/script&gt;" in page
    assert "<script>40" not in page
    charts = {chart["title"]: chart for chart in map(json.loads, re.findall(r'json">(.*?)</script>', page))}
    assert list(charts) == ["Loss", "Learning rate", "Exact match"]
    loss = {curve["name"]: curve for curve in charts["Loss"]["curves"]}
    assert loss["train"]["x"] == [10, 20, 30, 40]
    assert loss["train"]["y"] == [0.1, None, 0.033333, 0.025]
    for text in ("optimizer.learning_rate", "1.2.3", "--config=x.py", "not finished, step 40", "0.025"):
        assert text in page


def test_a_run_that_went_on_shows_what_changed_at_which_step(tmp_path):
    workdir = make_run(tmp_path / "w")
    record = json.loads((tmp_path / "w/config.json").read_text())
    first = {"step": 0, "changed": [], "command": "train", "started": "monday", "versions": {"jax": "1", "numpy": "2"}}
    again = {"step": 20, "changed": ["seed: 0 -> 1"], "command": "train --again", "started": "tuesday"}
    again["versions"] = {"jax": "3", "numpy": "2"}
    (tmp_path / "w/config.json").write_text(json.dumps(record | {"history": [first]}))
    assert "Starts" not in pathlib.Path(write_report([workdir])).read_text()
    (tmp_path / "w/config.json").write_text(json.dumps(record | {"history": [first, again]}))
    page = pathlib.Path(write_report([workdir])).read_text()
    cells = ["20", "seed: 0 -&gt; 1", "tuesday", "jax 3", "train --again"]
    assert "".join(f"<td>{cell}</td>" for cell in cells) in page
    assert "history" not in page


def test_several_runs_are_compared(tmp_path):
    workdirs = [make_run(tmp_path / "a", 1.0), make_run(tmp_path / "b", 2.0)]
    (tmp_path / "b/done.json").write_text('{"step": 40, "metrics": {}}')
    page_path = write_report(workdirs, str(tmp_path / "out"))
    page = pathlib.Path(page_path).read_text()
    assert page_path == str(tmp_path / "out/report.html")
    assert not (tmp_path / "a/report").exists()
    assert "a (learning_rate=1.0): not finished, step 40" in page
    assert "b (learning_rate=2.0): finished at step 40" in page
    unfolded = page[page.index("<h2>Config</h2>") : page.index("<details>", page.index("<h2>Config</h2>"))]
    assert "learning_rate" in unfolded
    assert "betas" not in unfolded


def test_runs_of_one_name_keep_their_paths(tmp_path):
    workdirs = [make_run(tmp_path / "x/run"), make_run(tmp_path / "y/run")]
    page = pathlib.Path(write_report(workdirs, str(tmp_path / "out"))).read_text()
    assert all(workdir in page for workdir in workdirs)


def test_bad_workdirs_are_named_and_nothing_is_written(tmp_path, capsys):
    good = make_run(tmp_path / "good")
    with pytest.raises(InputError, match=r"nowhere: there is no metrics\.jsonl"):
        write_report([good, str(tmp_path / "nowhere")])
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/metrics.jsonl").write_text("")
    with pytest.raises(InputError, match=r"empty: .*no records yet"):
        write_report([good, str(tmp_path / "empty")])
    (tmp_path / "good/config.json").write_text("{")
    with pytest.raises(InputError, match=r"config\.json: is no JSON"):
        write_report([good])
    assert not (tmp_path / "good/report").exists()
    assert command.main([f"--workdir={tmp_path / 'nowhere'}"]) == 2
    assert "error: " in capsys.readouterr().err


def test_plots_leave_pyplot_alone(tmp_path):
    sys.modules.pop("matplotlib.pyplot", None)
    plots.plot_curves("loss", ["loss"], [run_of(series(loss=[1.0, 2.0]))])
    assert "matplotlib.pyplot" not in sys.modules


def test_without_matplotlib_the_remedy_is_named(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "research.studies.plots")
    monkeypatch.delattr("research.studies.plots", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match=r"matplotlib can't be imported .*: pip install matplotlib pillow"):
        write_report([make_run(tmp_path / "one")])
    assert not (tmp_path / "one/report").exists()


def test_the_card_has_the_course_and_what_differs_from_the_defaults(tmp_path):
    workdir = make_run(tmp_path / "w", config={"steps": 40, "batch_size": 32, "seq_len": 9, "model": {"d_model": 7}})
    page = pathlib.Path(write_report([workdir])).read_text()
    assert '<dt>eval/loss</dt><dd class="course">0.1 → 0.025</dd>' in page
    assert "40 steps of 32 x 9" in page
    assert "<li>model.d_model <b>7</b> <i>256</i></li>" in page
    assert "batch_size <b>" not in page


def test_a_long_curve_keeps_its_peaks():
    values = np.ones(100_000)
    values[[77, 50_000]] = 9.0, -9.0
    values[123] = np.nan
    places = charts.thin(values)
    assert len(places) < 2000
    assert {0, 77, 123, 50_000, 99_999} <= set(places.tolist())
    assert (np.diff(places) > 0).all()


def test_metrics_have_sections():
    names = ["train/loss", "eval/loss", "eval/exact_match", "train/reward", "train/rollout/tokens", "train/tokens"]
    names += ["train/rollout/kl", "train/rollout/seconds/reward", "train/mfu", "train/grad_norm/mlp", "train/moved"]
    found = sections.of_runs([run_of({name: ([0], [0.0]) for name in names})])
    assert next(iter(found)) == "Rewards"
    assert {name: list(titles) for name, titles in found.items()} == {
        "Learning": ["loss", "mlp", "moved"],
        "Quality": ["exact_match"],
        "Rewards": ["reward", "rollout/kl", "rollout/tokens"],
        "Machine": ["mfu", "rollout/seconds"],
        "Data": ["tokens"],
    }
    pairs = ["train/margin", "train/accuracy", "eval/accuracy", "train/log_prob_chosen", "train/excess"]
    found = sections.of_runs([run_of({name: ([0], [0.0]) for name in pairs})])
    assert set(found["Preferences"]) == {"margin", "accuracy", "log_prob_chosen"}
    assert list(found["Selection"]) == ["excess"]


def test_samples_are_conversations_the_first_beside_the_last(tmp_path):
    workdir = make_run(tmp_path / "w")
    with open(tmp_path / "w/samples.jsonl", "a") as file:
        for step, right in ((0, False), (20, False), (40, True)):
            answers = [{"text": f"say <{step}>", "right": right}]
            line = {"step": step, "name": "eval/sample", "text": "t", "prompt": "<|user|>hi", "answers": answers}
            file.write(json.dumps(line | {"expected": "yes"}) + "\n")
    page = pathlib.Path(write_report([workdir])).read_text()
    card = page[page.index('<div class="sample"') :]
    assert 'data-kinds="right learned"' in card
    assert '<span class="read special">&lt;|user|&gt;</span>hi' in card
    first, last, between = (card.index(f"say &lt;{step}&gt;") for step in (0, 40, 20))
    assert first < last < between
    with open(tmp_path / "w/samples.jsonl", "a") as file:
        file.write(json.dumps(line | {"answers": [{"text": 3}]}) + "\n")
    with pytest.raises(InputError, match=r"samples\.jsonl:\d+: prompt or answers"):
        write_report([workdir])


def test_a_sweep_is_grouped_over_seeds(tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "to_vector", lambda figure, kind: kind.encode())  # see test_pgr.py
    for rate in (0.1, 0.2, 0.4):
        for seed in (0, 1):
            folder = tmp_path / f"s/learning_rate={rate},seed={seed}"
            make_run(folder, rate + seed / 10, {"optimizer": {"learning_rate": rate}, "seed": seed})
            (folder / "sweep.json").write_text("{}")
    page = pathlib.Path(write_report([str(tmp_path / "s")])).read_text()
    table = page[page.index("Over seeds") : page.index("<h2>Runs</h2>")]
    assert "<td>learning_rate=0.2</td><td>2</td><td>0.00625 <span" in table  # the mean of 0.2/40 and 0.3/40
    for kind in ("png", "svg", "pdf"):
        assert (tmp_path / f"s/report/eval_loss_over_learning_rate.{kind}").is_file()
    (loss,) = (c for c in map(json.loads, re.findall(r'json">(.*?)</script>', page)) if c["title"] == "Loss")
    assert [c["name"] for c in loss["curves"]][::2] == [f"learning_rate={rate} train" for rate in (0.1, 0.2, 0.4)]
    assert loss["curves"][1]["low"] == [0.01, 0.005, 0.0033333, 0.0025]
    (tmp_path / "empty/run").mkdir(parents=True)
    (tmp_path / "empty/run/sweep.json").write_text("{}")
    with pytest.raises(InputError, match="none of its 1 runs has metrics yet"):
        write_report([str(tmp_path / "empty")])


def test_two_fields_make_a_heat_map(tmp_path):
    for rate in (0.1, 0.2):
        for size in (8, 16):
            config = {"optimizer": {"learning_rate": rate}, "batch_size": size}
            make_run(tmp_path / f"{rate}-{size}", rate * size, config)
    runs = [str(tmp_path / f"{rate}-{size}") for rate in (0.1, 0.2) for size in (8, 16)]
    page = pathlib.Path(write_report(runs, str(tmp_path / "out"))).read_text()
    heat = page[page.index('class="heat"') :]
    assert '<td>0.2</td><td style="--part: 0.33">0.04</td><td style="--part: 1.00">0.08</td>' in heat


def test_runs_of_a_study_are_one_group_where_their_ancestry_differs_in_seeds_alone(tmp_path):
    plan = Plan(str(tmp_path / "store"))
    for way in ("warm", "cold"):
        for seed in (0, 1):
            first = plan.train(f"first-s{seed}", {"seed": seed, "steps": 2, "data": {"path": "tasks:copy"}})
            model = {"init_from": first.workdir} if way == "warm" else {}
            plan.train(f"{way}-s{seed}", {"seed": seed, "steps": 3, "data": {"path": "tasks:copy"}, "model": model})
    for stage in plan.stages:
        make_run(pathlib.Path(stage.workdir), 1.0, dict(stage.settings))
        write_stage(stage)
    entries = [{"name": s.name, "kind": s.kind, "workdir": s.workdir} for s in plan.stages]
    (tmp_path / "study.json").write_text(json.dumps({"stages": entries}))
    groups = by_seed(load(members(str(tmp_path))))
    moved = [entry | {"workdir": f"elsewhere/{pathlib.Path(entry['workdir']).name}"} for entry in entries]
    (tmp_path / "x").mkdir()
    (tmp_path / "x/study.json").write_text(json.dumps({"stages": moved}))
    assert members(str(tmp_path / "x")) == members(str(tmp_path))
    assert [(group.name, len(group.runs)) for group in groups] == [("first", 2), ("warm", 2), ("cold", 2)]
