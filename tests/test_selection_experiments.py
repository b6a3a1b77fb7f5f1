"""experiments/select.py and mixture.py: which runs their studies make, and what goes together."""

import json
from pathlib import Path

import pytest

from experiments import mixture, select
from research import cli
from research.errors import InputError
from research.studies import study


def plan(tmp_path, name, *flags):
    experiment = cli.read_experiment([f"--config=experiments/{name}", *flags])
    return study.plan(experiment.name, experiment.config, str(tmp_path / "w"), experiment.overrides)


def test_all_ways_train_on_as_many_tokens_of_what_they_keep(tmp_path):
    planned = plan(tmp_path, "select.py:wide")
    stages = {stage.name: stage for stage in planned.stages}
    by_workdir = {stage.workdir: stage for stage in planned.stages}
    data, reference = stages["data"].workdir, stages["reference"].workdir
    assert stages["reference"].settings["data"]["path"] == f"{data}/reference.jsonl"
    for pool, ways in (("pool", select.WAYS), ("clean", [way for way in select.WAYS if way != "truth"])):
        scores = stages[f"scores-{pool}"].settings["args"]
        assert scores["data"] == stages[f"current-{pool}"].settings["data"]["path"] == f"{data}/{pool}.jsonl"
        assert (scores["model"], scores["reference"]) == (stages[f"current-{pool}"].workdir, reference)
        for way in ways:
            for seed in range(5):
                settings = stages[f"{way}-{pool}-s{seed}"].settings
                assert [settings[name] for name in ("steps", "batch_size", "seq_len", "seed")] == [100, 8, 64, seed]
                assert settings["model"]["init_from"] == stages["start-large"].workdir
                assert settings["data"]["eval_path"] == f"{data}/test.jsonl"
                options = select.WAYS[way]
                kept = settings["data"]["select"]
                assert bool(kept) == ("keep" in options)
                if kept:
                    flags = by_workdir[str(Path(kept).parent)].settings["args"]
                    assert (flags["tokens"], flags["keep"]) == (0.6, options["keep"])
                    assert flags.get("seed") == (seed if options["keep"] in ("random", "gumbel") else None)
                roles = [role["init_from"] for role in settings["roles"].values()]
                assert roles == ([reference] if "objective" in options else [])
    (pools, metrics) = planned.report.args
    assert [pool.name for pool in pools] == ["pool", "clean"]
    assert tuple(metrics) == select.METRICS


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("select.py", "--config.study.ways=('random','rh')"), "study.ways: there is no way 'rh'"),
        (("select.py", "--config.study.seeds=0"), "study.seeds = 0: must be at least 1"),
        (("mixture.py", "--config.study.seeds=0"), "study.seeds = 0: must be at least 1"),
        (("select.py:rho1,wide",), "a run has one objective"),
        (("select.py:rho1",), "--config.data.path: is missing"),
        (("select.py:rho", "--config.data.path=tasks:copy"), "roles.reference.init_from: is missing"),
    ],
)
def test_what_goes_not_together_is_said(flags, words, tmp_path):
    with pytest.raises(InputError) as error:
        plan(tmp_path, *flags)
    assert words in str(error.value)


def test_the_larger_model_gets_the_weights_that_the_proxy_found(tmp_path):
    first = plan(tmp_path, "mixture.py")
    stages = {stage.name: stage for stage in first.stages}
    assert list(stages) == [
        "reference-s0",
        "proxy-s0",
        *(f"{way}-s{i}" for way in ("uniform", "bandit") for i in range(3)),
    ]
    proxy = stages["proxy-s0"]
    assert proxy.settings["roles"]["reference"]["init_from"] == stages["reference-s0"].workdir
    Path(proxy.workdir).mkdir(parents=True)
    found = dict(zip(mixture.SOURCES, (0.1, 0.2, 0.4, 0.2, 0.1), strict=True))
    metrics = {f"eval/average/{name}": weight for name, weight in found.items()}
    (Path(proxy.workdir) / "done.json").write_text(json.dumps({"step": 200, "metrics": metrics}))
    for stage in first.stages:
        if stage is not proxy:
            Path(stage.workdir).mkdir(parents=True)
            (Path(stage.workdir) / "done.json").write_text(json.dumps({"step": 200, "metrics": {}}))
    again = {stage.name: stage for stage in plan(tmp_path, "mixture.py").stages}
    for seed in range(3):
        sources = again[f"doremi-s{seed}"].settings["data"]["sources"]
        assert {name: source["weight"] for name, source in sources.items()} == found
