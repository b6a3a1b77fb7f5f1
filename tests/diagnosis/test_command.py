"""`understudy diagnose`: of a run and of a config, its answers and statuses; and the section of the report."""

import dataclasses
import json
from pathlib import Path

import jax
import pytest
import subjects

from research.commands import diagnose as command
from research.diagnosis import diagnose, report
from research.diagnosis.types import Cause, Diagnosis, Evidence, Finding, Prediction, Relative
from research.diagnosis.watch import Watch
from research.run.run import run
from research.studies import report as page


@pytest.fixture(scope="module")
def stuck(tmp_path_factory):
    """The workdir of a run at a learning rate of 0, which looks at itself."""
    folder = tmp_path_factory.mktemp("stuck")
    path = subjects.write(folder / "answers.jsonl", subjects.answers())
    config = subjects.config(
        path,
        optimizer={"learning_rate": 0.0, "warmup_steps": 0},
        log={"every": 1, "tensorboard": False, "diagnose": 3},
    )
    run(config, str(folder / "run"), devices=jax.devices()[:1])
    return folder / "run"


def test_a_run_that_stands_still_is_told_so(stuck, tmp_path, capsys):
    before = {path: path.stat().st_mtime_ns for path in stuck.rglob("*") if path.is_file()}
    assert command.main([str(stuck), f"--output={tmp_path / 'answer.json'}"]) == 1
    said = capsys.readouterr().out
    assert f"{stuck} at step 6 (sft): " in said
    assert "1. lr_zero_schedule, observed (optimizer)" in said
    assert "learning_rate.max 0 (<= 0)" in said
    answer = json.loads((tmp_path / "answer.json").read_text())
    assert answer == json.loads((stuck / "diagnosis.json").read_text())
    assert answer["verdict"] == "cause found"
    assert answer["findings"][0]["remedy"] in " ".join(said.split())
    assert answer["signals"]["moved.max"] == 0
    after = {path: path.stat().st_mtime_ns for path in stuck.rglob("*") if path.is_file()}
    assert {path: time for path, time in after.items() if path.name != "diagnosis.json"} == before


@pytest.mark.slow
def test_the_report_shows_it_with_its_curves(stuck):
    answer = {
        "subject": "run at step 6",
        "verdict": "cause found",
        "reason": "",
        "signals": {"loss.last": 3.0},
        "findings": [
            {"cause": "<cause>", "level": "observed", "why": "why", "numbers": ["loss.last 3 (> 2)"], "rows": ["row"]}
            | {"remedy": "remedy", "source": "source", "confirmation": "", "signals": ["loss.last", "config/steps"]}
        ],
    }
    (stuck / "diagnosis.json").write_text(json.dumps(answer))
    html = Path(page.write_report([str(stuck)], str(stuck / "report"))).read_text()
    section = html[html.index("<h2>Diagnosis</h2>") : html.index("<h2>Learning</h2>")]
    assert "1. &lt;cause&gt;" in section
    assert section.count('<figure class="chart">') == 1
    for text in ("run at step 6", "loss.last 3 (&gt; 2)", "remedy", "all signals"):
        assert text in section


@pytest.mark.slow
def test_a_config_is_looked_at_before_a_run(tmp_path):
    """Four prompts with as many answers as there are records can't be learned."""
    records = [{"prompt": f"Say {i % 4}:", "response": f"{i * 37 % 101}"} for i in range(48)]
    config = subjects.config(subjects.write(tmp_path / "conflicts.jsonl", records), eval={"every": 0})
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, eval_fraction=0.0))
    diagnosis = diagnose.of_config(config, jax.devices()[:1])
    assert diagnosis.verdict == "cause found"
    assert "contradictory_duplicates" in {finding.cause.name for finding in diagnosis.findings}
    assert not diagnosis.evidence.started
    assert {"range/best", "probe/memorise", "probe/ce_recomputed"} <= diagnosis.evidence.signals.keys()


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([], "--workdir or --config: is missing"),
        (["runs/x", "--config=experiments/sft.py"], "are two subjects"),
        (["/nowhere/run"], "/nowhere/run"),
    ],
)
def test_what_can_not_be_diagnosed(argv, says, capsys):
    assert command.main(argv) == 2
    assert says in capsys.readouterr().err


def evidence(**signals):
    return Evidence("sft", True, signals, {"loss.last": ("a row",)})


def test_predictions_hold_or_not_or_are_not_known():
    seen = evidence(a=2.0, b=1.0)
    assert Prediction("a", ">", 1.5).holds(seen)
    assert Prediction("a", "<", Relative("b", 3.0)).holds(seen)
    assert not Prediction("a", "<", Relative("b", 1.0, plus=0.5)).holds(seen)
    assert Prediction("a", "between", (1, Relative("b", 2))).holds(seen)
    assert Prediction("c", ">", 0).holds(seen) is None
    assert Prediction("a", ">", Relative("c")).holds(seen) is None
    assert Prediction("c", "absent").holds(seen)
    assert not Prediction("a", "absent").holds(seen)
    assert Prediction("a", "<", Relative("b", 3.0)).text(seen) == "a 2 (< 3 x b = 3)"
    assert Prediction("nan", ">", 0).holds(evidence(nan=float("nan"))) is False


def test_an_answer_in_the_terminal():
    cause = Cause("x", "data", ("sft",), (Prediction("a", ">", 1),), 0.5, "do y", "It is so.", "here", alike="xs")
    finding = Finding(cause, "confirmed", 0.5, ("a 2 (> 1)", "b 3 (> 1)"), ("a row",), "with z, it helps.")
    shown = report.text(Diagnosis("cause found", (finding,), evidence(a=2.0)), "runs/x at step 3")
    assert shown.splitlines() == [
        "runs/x at step 3 (sft): a cause was found",
        "",
        "1. x, confirmed (data)",
        "              It is so.",
        "   evidence   a 2 (> 1)",
        "              b 3 (> 1)",
        "   rows       a row",
        "   tried      with z, it helps.",
        "   remedy     do y",
        "   alike      no signal tells it from others of the class xs",
    ]
    healthy = Diagnosis("healthy", (), evidence(), "none of the causes predicts what was measured.")
    assert report.text(healthy, "runs/x").splitlines()[0] == "runs/x (sft): healthy"
    assert report.as_json(Diagnosis("healthy", (), evidence(a=float("inf"))), "x")["signals"] == {"a": "inf"}


def test_a_watch_says_each_cause_once_and_takes_little_time(tmp_path):
    path = tmp_path / "metrics.jsonl"
    time = [0.0]

    def clock():
        time[0] += 1.0  # each look at it
        return time[0]

    def write(steps):
        zero = {"train/loss": 5.0, "train/learning_rate": 0.0, "train/grad_norm": 1.0, "train/update_ratio": 0.0}
        path.write_text("".join(json.dumps({"step": i} | zero) + "\n" for i in range(1, steps + 1)) + '{"step": 9')

    write(20)
    watch = Watch(str(path), "sft", 10, clock=clock)
    assert watch(5) == []
    [line] = [line for line in watch(10) if "lr_zero_schedule" in line]
    assert line.startswith("warning  lr_zero_schedule (observed): learning_rate.max 0 (<= 0)")
    write(40)
    time[0] += 50  # the check took 1, and a hundred times that hasn't gone by
    assert watch(20) == []
    assert watch._last == 10
    time[0] += 60
    assert not any("lr_zero_schedule" in line for line in watch(20))
    assert watch._last == 20


def test_a_run_looks_at_itself(tmp_path, stuck, capsys):
    path = subjects.write(tmp_path / "answers.jsonl", subjects.answers())
    config = subjects.config(
        path,
        optimizer={"learning_rate": 0.0, "warmup_steps": 0},
        eval={"every": 0},
        log={"every": 1, "tensorboard": False, "diagnose": 3},
    )
    run(config, str(tmp_path / "run"), devices=jax.devices()[:1])
    said = capsys.readouterr().err
    assert said.count("lr_zero_schedule (observed)") == 1
