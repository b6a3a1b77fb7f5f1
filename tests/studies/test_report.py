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
from research.studies import plots
from research.studies.history import Run, group_metrics, load_run
from research.studies.report import write_report


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
        png = plots.plot_curves("loss", list(values), shown, "dark")
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
    sources = re.findall(r"(?:src|srcset|href)=\"([^\"]{0,30})", page)
    assert len(sources) == 6
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert "&lt;script&gt;40&lt;/script&gt;" in page
    assert "<script" not in page
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
    assert "a: not finished, step 40" in page
    assert "b: finished at step 40" in page
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
