"""Whole runs: every experiment builds, runs and traces at full size; what is stopped and resumed loses nothing."""

import importlib
import inspect
import json
import signal

import jax
import numpy as np
import pytest
from runs import EXPERIMENTS, STUDIES, assert_same, load, parameters, values_of

from experiments import denoise
from research import config, loading, objectives, optim
from research.devices import compilation, sharding
from research.run import assemble, checkpoint, metrics, run
from research.sources import fields, special_tokens
from research.sources.tokenizers import TokenizerSpec, make_tokenizer
from research.studies import study


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of the workdirs of experiments, by name."""
    return tmp_path_factory.mktemp("experiments")


@pytest.mark.parametrize("name", sorted(set(EXPERIMENTS) - set(STUDIES)))
def test_experiment_takes_two_steps(name, folder):
    experiment, workdir = load(name), folder / name
    final = run.run(experiment, str(workdir))
    assert np.isfinite(final["train/loss"])
    # What is learned from rewards has no loss of held-out data.
    assert np.isfinite(final["train/reward" if experiment.rewards else "eval/loss"])
    assert final["train/mfu"] > 0
    record = json.loads((workdir / "config.json").read_text())
    assert record["config"]["steps"] == 2
    assert record["versions"]["jax"] == jax.__version__
    assert json.loads((workdir / "done.json").read_text())["step"] == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "students", "files"),
    [
        ("weak_to_strong", ("confidence",), ["table.csv", "report.html"]),
        ("distill", ("mixed",), ["eval_test_loss.png"]),
    ],
)
@pytest.mark.usefixtures("one_device")
def test_study_runs_to_its_report(name, students, files, tmp_path, capfd):
    overrides = {"study.students": students, "study.seeds": 1}
    if name == "weak_to_strong":
        overrides["study.weak"] = ("xs",)
    else:
        (tmp_path / "x.jsonl").write_text("".join(f'{{"text": "this is text {i}"}}\n' for i in range(200)))
        overrides |= {"study.data": str(tmp_path / "x.jsonl"), "study.teacher_model.num_layers": 1, "eval.every": 2}
    values = values_of(name, **overrides)
    module = importlib.import_module(f"experiments.{name}")
    plan = study.Plan(str(tmp_path / "store"))
    report = module.study(values, plan)
    assert study.run_stages(plan.stages) == {}
    report(str(tmp_path / "w"))
    assert students[0] in capfd.readouterr().out
    for file in files:
        assert (tmp_path / "w" / file).is_file()


@pytest.mark.parametrize("name", STUDIES)
def test_study_adds_up_at_full_size(name, tmp_path):
    """Every stage of every variant is a config that parses, with all that it names made by a stage before it."""
    module = importlib.import_module(f"experiments.{name}")
    for arg in ("", "tasks") if name == "distill" else ("",):
        plan = study.Plan(str(tmp_path / "store"))
        values = values_of(name, arg)
        report = module.study(values, plan)
        if inspect.isgenerator(report):  # what follows needs what the first stages find
            next(report)
        assert len({stage.id for stage in plan.stages}) == len(plan.stages) > 6


WAYS = [*(f"denoise:{way}" for way in denoise.WAYS), *(f"preference:{way}" for way in ("kto", "orpo")), "select:rho1"]


LARGE = {"fsdp": 8, "tensor": 4}


@pytest.mark.parametrize(("name", "mesh"), [("sft", {"data": 1}), *((name, LARGE) for name in (*EXPERIMENTS, *WAYS))])
def test_experiment_traces_at_full_size(name, mesh):
    name, _, arg = name.partition(":")
    needed = {"data.path": "x.jsonl", "roles.reference.init_from": "x"} if name == "select" and arg else {}
    c = load(name, arg, **needed, **{f"mesh.{axis}": size for axis, size in mesh.items()})
    devices = int(np.prod(list(mesh.values())))
    c = config.parse({**config.to_dict(c), "batch_size": 32 * c.microbatches})
    config.check(c, num_devices=devices)
    tokenizer = make_tokenizer(TokenizerSpec("byte"), lambda: iter(())).with_tokens([special_tokens.MASK])
    terms = objectives.load(c.objective, tokenizer)
    names = {*fields.group("text"), *(name for term in terms.values() for name in term.objective.fields)}
    if any(source.get("view", {}).get("kind") == "denoise" for source in c.data.sources.values()):
        names.add("prefix")
    if len(c.data.sources) > 1:
        names.add("source")
    spec = fields.spec(sorted(names), c.batch_size, {"time": c.seq_len, "labels": c.model.num_labels})
    abstract = sharding.make_abstract_mesh(mesh, devices)
    with jax.sharding.use_abstract_mesh(abstract):
        parts = assemble.assemble(c, terms, abstract, spec, vocab_size=300)
        state, out = jax.eval_shape(parts.step, parts.state, parts.frozen, parts.batch, parts.rates)
    assert out["loss"][0].shape == ()
    jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype) or pytest.fail(f"{a} {b}"), state, parts.state)


@pytest.mark.slow
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path, monkeypatch):
    options = {"steps": 6, "checkpoint.every": 2, "eval.every": 2, "ema_decay": 0.9, "log.every": 1}
    run.run(load("sft", **options), str(tmp_path / "whole"))

    advance = metrics.Writer.advance

    def stop_at_three(self, step):
        advance(self, step)
        if step == 3:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(metrics.Writer, "advance", stop_at_three)
        with pytest.raises(run.Preempted, match="saved step"):
            run.run(load("sft", **options), str(tmp_path / "cut"))
    assert not (tmp_path / "cut/done.json").exists()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    run.run(load("sft", **options), str(tmp_path / "cut"))
    assert_same(tmp_path / "whole", tmp_path / "cut")

    def losses(workdir):
        return [(r["step"], r["train/loss"]) for r in metrics.read_metrics(str(workdir)) if "train/loss" in r]

    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
def test_a_finished_run_is_left_alone_until_it_gets_more_steps(tmp_path, capfd):
    first = run.run(load("sft"), str(tmp_path))
    before = parameters(tmp_path)
    again = run.run(load("sft"), str(tmp_path))
    assert again["eval/loss"] == first["eval/loss"]
    np.testing.assert_equal(parameters(tmp_path), before)
    assert "changed" not in capfd.readouterr().err
    run.run(load("sft", steps=3), str(tmp_path))
    assert checkpoint.steps(tmp_path)[-1] == 3
    assert "changed  steps: 2 -> 3" in capfd.readouterr().err


@pytest.mark.slow
def test_sharded_run_has_the_losses_of_a_single_device(tmp_path):
    def losses(name, devices, **mesh):
        c = load("sft", steps=4, **{"eval.every": 0, "checkpoint.best_metric": "", "optimizer.warmup_steps": 0}, **mesh)
        run.run(c, str(tmp_path / name), devices=devices)
        return [r["train/loss"] for r in metrics.read_metrics(str(tmp_path / name)) if "train/loss" in r]

    single = losses("single", jax.devices()[:1])
    mixed = losses("mixed", None, **{"mesh.data": 1, "mesh.fsdp": 4, "mesh.tensor": 2})
    assert len(single) == 4
    assert single[-1] < single[0]
    np.testing.assert_allclose(mixed, single, rtol=2e-5)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name == "muon" else pytest.mark.slow) for name in optim.OPTIMIZERS],
)
def test_every_optimizer_trains_on_a_mesh(name, tmp_path):
    mesh = {"mesh.data": 1, "mesh.fsdp": 4, "mesh.tensor": 2}
    rate = {"sgd": 0.3}.get(name, 3e-3)
    optimizer = {"optimizer.name": name, "optimizer.learning_rate": rate, "optimizer.warmup_steps": 0}
    c = load("sft", steps=4, **mesh, **optimizer, **{"eval.every": 0, "checkpoint.best_metric": ""})
    run.run(c, str(tmp_path))
    losses = [r["train/loss"] for r in metrics.read_metrics(str(tmp_path)) if "train/loss" in r]
    assert losses[-1] < losses[0]


def test_a_run_that_is_never_finite_ends_and_says_so(tmp_path):
    c = load(
        "sft",
        steps=20,
        max_bad_steps=3,
        **{
            "optimizer.learning_rate": 1e30,
            "optimizer.clip_norm": 0.0,
            "optimizer.warmup_steps": 0,
            "eval.every": 0,
            "checkpoint.best_metric": "",
        },
    )
    with pytest.raises(run.Diverged, match="not finite 3 times in a row"):
        run.run(c, str(tmp_path), devices=jax.devices()[:1])
    assert all(np.isfinite(v).all() for k, v in parameters(tmp_path).items() if "params" in k)


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
def test_init_from_takes_the_parameters_of_another_run(tmp_path):
    run.run(load("sft"), str(tmp_path / "a"))
    c = load("sft", steps=1, **{"model.init_from": str(tmp_path / "a"), "optimizer.learning_rate": 1e-9})
    run.run(c, str(tmp_path / "b"))
    a, b = parameters(tmp_path / "a"), parameters(tmp_path / "b")
    name = next(k for k in a if "embed" in k and "params" in k)
    np.testing.assert_allclose(a[name], b[name], atol=1e-6)


def test_load_model_reads_back_what_was_trained(folder):
    workdir = str(folder / "sft")
    run.run(load("sft"), workdir)  # nothing where it is finished already
    loaded = loading.load_model(workdir)
    saved = parameters(workdir)
    name = next(k for k in saved if k.endswith("['embed']") and "params" in k and "opt" not in k)
    np.testing.assert_array_equal(loaded.params["embed"], saved[name])
    assert loaded.template == "auto"


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
def test_on_policy_distillation_is_resumed_bit_for_bit(tmp_path):
    run.run(load("sft", **{"eval.every": 0, "checkpoint.best_metric": ""}), str(tmp_path / "teacher"))
    changes = {"steps": 4, "eval.every": 0, "checkpoint.best_metric": "", "data.pack": False, "log.every": 1, "seed": 1}
    changes |= {"rollout.share": 0.5, "rollout.max_new_tokens": 8, "rollout.temperature": 1.0}
    changes |= {"roles": {"teacher": {"init_from": str(tmp_path / "teacher")}}}
    changes |= {"objective": {"terms": {"distill": 1.0}, "distill": {"kind": "reverse_kl"}}}
    changes |= {"optimizer.schedule": "constant", "optimizer.warmup_steps": 0}
    whole = run.run(load("sft", **changes), str(tmp_path / "whole"))
    assert whole["train/divergence"] > 0
    run.run(load("sft", **(changes | {"steps": 2})), str(tmp_path / "cut"))
    run.run(load("sft", **changes), str(tmp_path / "cut"))
    assert_same(tmp_path / "whole", tmp_path / "cut")
    off_policy = run.run(load("sft", **(changes | {"rollout.share": 0.0, "steps": 1})), str(tmp_path / "off"))
    first = next(r for r in metrics.read_metrics(str(tmp_path / "whole")) if "train/loss" in r)
    assert off_policy["train/supervised_fraction"] != first["train/supervised_fraction"]


def test_options_for_cpus_are_those_that_this_xla_knows(monkeypatch):
    mesh = sharding.make_mesh({axis: 1 for axis in sharding.AXES}, jax.devices()[:1])
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setattr(compilation, "_EMITTERS", "xla_cpu_no_such_option")
    compilation._older_emitters.cache_clear()
    assert compilation.compiler_options(mesh) == {"xla_backend_optimization_level": 2}
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")
    assert compilation.compiler_options(mesh) == {}
    compilation._older_emitters.cache_clear()
