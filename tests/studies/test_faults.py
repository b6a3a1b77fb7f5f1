"""The study of planted faults: its data, what it counts, and some faults planted end to end."""

import json
import math
from pathlib import Path

import jax
import pytest

from research import config as config_lib
from research import objectives as objectives_lib
from research.diagnosis import ranking
from research.run import run
from research.sources.tokenizers import TokenizerSpec
from research.sources.tokenizers.making import make_tokenizer
from research.studies.faults import files, healthy, plants, report, setups, signatures, trials

GOLDEN = Path(__file__).parent.parent / "golden/fault_signatures.json"


def golden():
    """Fault -> column -> number, as they were measured with another program; and those of its healthy run."""
    runs = {row["fault"]: row for row in json.loads(GOLDEN.read_text())["runs"]}
    return runs, runs.pop("healthy")


def outcome(planted, found, key="test/k", **fields):
    values = {"others": (), "verdict": "cause found", "noticed": 0, "signed": True, "part": "test", "setup": "text"}
    return report.Outcome(planted, found, key=key, **{**values, **fields})


@pytest.mark.slow
def test_the_data_has_the_faults_that_it_is_said_to_have():
    made = files.contents("dev")
    answers: dict[str, set[str]] = {}
    for record in made["conflicts"]:
        answers.setdefault(record["prompt"], set()).add(record["response"])
    assert min(map(len, answers.values())) > 1
    assert len({json.dumps(record) for record in made["duplicates"]}) == 40
    pairs = zip(made["tasks"], made["shuffled"], strict=True)
    assert sum(a["response"] != b["response"] for a, b in pairs) > 0.9 * len(made["tasks"])
    assert all(pair["chosen"] == pair["rejected"] for pair in made["same"])
    assert all(len(pair["chosen"]) >= len(pair["rejected"]) for pair in made["longer"])
    prompts = {name: {record["prompt"] for record in made[name]} for name in ("tasks", "eval")}
    assert not prompts["tasks"] & prompts["eval"]
    assert files.answers(files.LEARNED["test"], 50, 2) != made["tasks"][:50]


def test_tokenizers_with_a_fault(tmp_path):
    files.write_tokenizers(tmp_path, 1)
    text = "Upper: aBc"
    plain = make_tokenizer(TokenizerSpec(kind="byte"), lambda: iter(()))
    permuted, lower = (
        make_tokenizer(TokenizerSpec(kind=str(tmp_path / n)), lambda: iter(())) for n in ("permuted", "lower")
    )
    assert permuted.decode(permuted.encode(text)) == text
    assert permuted.encode(text) != plain.encode(text)
    assert permuted.size == plain.size
    assert lower.decode(lower.encode(text)) == text.lower()


def test_trials_are_planted_ones_and_healthy_ones_of_both_parts():
    starts = {name: f"starts/{name}" for name in setups.STARTS}
    parts = {part: list(trials.trials(part, "data", starts, 1)) for part in files.PARTS}
    for made in parts.values():
        keys = [each.key for each in made]
        assert len(keys) == len(set(keys))
        planted = {each.plant.cause for each in made if each.plant}
        assert planted == {plant.cause for plant in plants.PLANTS}
        configs = [setups.parse(dict(each.values)) for each in made]
        assert all(config.steps >= setups.STEPS for config in configs)
        objectives = {json.dumps(config.objective, default=str): config.objective for config in configs}
        assert all(map(objectives_lib.load, objectives.values()))
    assert sum(each.plant is None for each in parts["test"]) >= 190
    assert {each.values["seed"] for each in parts["dev"]}.isdisjoint({each.values["seed"] for each in parts["test"]})
    assert set(healthy.VARIATIONS) == set(setups.SETUPS)


def test_trials_go_on_where_they_were_stopped(tmp_path, monkeypatch):
    keys = []
    monkeypatch.setattr(trials, "run", lambda each, shared: keys.append(each.key) or {"key": each.key, "seconds": 0.0})
    monkeypatch.setattr(trials.compilation, "use_compilation_cache", lambda folder: None)
    monkeypatch.setattr(jax, "clear_caches", lambda: None)
    starts, output = json.dumps(dict.fromkeys(setups.STARTS, "start")), tmp_path / "out"
    argv = ["--part=dev", f"--data={tmp_path}", f"--starts={starts}", "--setups=scratch", f"--output={output}"]
    assert trials.main(argv) == 0
    path, whole = output / trials.TRIALS_FILE, list(keys)
    assert len(whole) > 2
    path.write_text(path.read_text()[:-5])
    assert trials.main(argv) == 0
    assert keys == [*whole, whole[-1]]
    assert [line["key"] for line in trials.read(path)] == whole


def test_values_are_filled_in():
    values = {"roles": {"teacher": {"init_from": "{weak}"}}, "data.path": "{data}/x", "steps": 3}
    filled = trials.filled(values, {"data": "d", "weak": "w"})
    assert filled == {"roles": {"teacher": {"init_from": "w"}}, "data.path": "d/x", "steps": 3}


@pytest.mark.parametrize(
    ("count", "total", "low", "high"),
    [(0, 190, 0.0, 0.01564), (190, 190, 0.98436, 1.0), (2, 10, 0.02521, 0.55610), (5, 50, 0.03328, 0.21814)],
)
def test_exact_intervals(count, total, low, high):
    assert report.exact_interval(count, total) == pytest.approx((low, high), abs=2e-5)


def test_what_is_counted():
    outcomes = [
        outcome("frozen_all", "frozen_all", "test/a", noticed=5),
        outcome("frozen_all", "lr_too_small", "test/b", others=("frozen_all",), noticed=None),
        outcome("random_labels", "answers_of_other_prompts", "test/c", noticed=60),
        outcome(trials.HEALTHY, report.NOTHING, "test/d", verdict="healthy", noticed=None),
        outcome(trials.HEALTHY, "lr_too_small", "test/e", noticed=None),
    ]
    rows = {row[0]: row[1:] for row in report.summary(outcomes)}
    assert rows["with a signature"][0].startswith("2 of 3")
    assert rows["with a signature"][1].startswith("3 of 3")
    assert rows["false alarms"][0].startswith("1 of 2")
    assert rows["precision"][0].startswith("2 of 4")
    assert dict(zip(*report.moments(outcomes), strict=True))["5"] == "1 (33%)"
    assert report.by_kind(outcomes)[1] == ["text", "3", "2", "2", "1"]
    matrix = report.confusion(outcomes)
    assert matrix[0] == ["planted", "answers_of_other_prompts", "frozen_all", "lr_too_small", "nothing"]
    assert ["frozen_all", "0", "1", "1", "0"] in matrix
    page = report.page(outcomes)
    assert page.endswith("Taken for another:\n\n- b: lr_too_small, frozen_all\n\nFalse alarms:\n\n- e: lr_too_small\n")


def test_signatures_are_those_of_the_measurements_of_another_program():
    runs, healthy_run = golden()
    assert set(signatures.SIGNATURES) == set(runs) == {plant.cause for plant in plants.SIGNED}
    for fault, columns in signatures.SIGNATURES.items():
        for column, direction in columns.items():
            value, beside = (
                math.nan if row[column] is None else float(row[column]) for row in (runs[fault], healthy_run)
            )
            assert signatures.moved(value, beside, direction), (fault, column)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """(folder of the data, starts) of runs that begin with a model of few steps."""
    folder = tmp_path_factory.mktemp("faults")
    assert files.main(["--part=dev", f"--output={folder}"]) == 0
    values = setups.start("text", "dev", str(folder)) | {"steps": 30, "eval.every": 0}
    run.run(setups.parse(values), str(folder / "start"), devices=jax.devices()[:1])
    return str(folder), dict.fromkeys(setups.STARTS, str(folder / "start"))


# By kind of run, few in each, which share its programs; others need a longer start.
FAULTS = {
    "text": ("lr_zero_schedule", "optimizer_holds_stale_params"),
    "sft": ("all_labels_masked", "nan_batches_skipped"),
}


@pytest.mark.slow
@pytest.mark.parametrize("setup", FAULTS)
@pytest.mark.usefixtures("one_device")
def test_faults_planted_end_to_end(study, setup):
    """Each is found, and moves what is measured in the direction of its signature."""
    shared, lines, faults = {}, {}, FAULTS[setup]
    for each in trials.trials("dev", *study, 1):
        if each.setup == setup and each.title in (*faults, "healthy-0-0"):
            lines[each.title] = json.loads(json.dumps(trials.run(each, shared)))
    healthy_run = lines.pop("healthy-0-0")
    assert set(lines) == set(faults)
    if setup == "text":  # what the other kind begins with knows nothing of prompts
        assert report.outcome(healthy_run).found == report.NOTHING
    for title, line in lines.items():
        made = report.outcome(line)
        assert made.found == title
        assert made.noticed <= 60
        moved = signatures.directions(signatures.signals(line), signatures.signals(healthy_run), title)
        assert all(moved.values()), (title, moved)
    table = signatures.table([healthy_run, *lines.values()])
    assert len(table) == 1 + len(faults)
    assert {row[0] for row in ranked(lines.values())} == set(faults)


def test_a_fault_of_adapters_is_beside_a_run_in_which_all_is_trained():
    def line(cause, setup, **after):
        return {"cause": cause, "setup": setup, "part": "dev", "after": after}

    still = {"grad_norm.median": 0.0, "parameters/changed": 0.0, "setup/trained_share": 0.1}
    rows = signatures.table(
        [
            line(trials.HEALTHY, "lora", **{**still, "grad_norm.median": 1.0, "parameters/changed": 1.0}),
            line(trials.HEALTHY, "sft", **{name: 1.0 for name in still}),
            line("lora_both_zero", "lora", **still),
        ]
    )
    assert rows[1][0] == "lora_both_zero"
    assert rows[1][-1] == "3 of 3"


def ranked(lines):
    """(cause that is ranked first, its level) of each line."""
    findings = [ranking.diagnose(trials.evidence(line)).findings[0] for line in lines]
    return [(each.cause.name, each.level) for each in findings]


def test_the_experiment_is_planned():
    from experiments import faults
    from research.studies import study as study_lib

    config = faults.get_config("debug")
    assert config_lib.parse({k: v for k, v in config.to_dict().items() if k != "study"}).steps == 2
    planned = study_lib.plan("experiments/faults.py:debug", config, "w", {})
    names = [stage.name for stage in planned.stages]
    assert names[0] == "data-dev"
    assert "trials-text-dev" in names
