"""A run that goes on: what changed has its effect and is said, or is refused before anything is touched."""

import collections
import contextlib
import dataclasses
import importlib
import json
import shutil

import jax
import numpy as np
import pytest
import runs
from test_docs import ROOT
from test_docs import load as load_script

from research import config, files
from research.errors import InputError
from research.models.config import ModelConfig
from research.pretrained import wholeness
from research.rollouts import experience
from research.run import checkpoint, resume, run
from research.run.resume import Effect

ONE = jax.devices()[:1]
SMALL = {
    **{"steps": 4, "batch_size": 4, "seq_len": 64, "log.every": 1, "log.tensorboard": False},
    **{"checkpoint.every": 2, "checkpoint.keep_last": 9, "eval.every": 2, "eval.batches": 1, "eval.generate": 0},
    **{"data.max_records": 0, "data.pack": False, "optimizer.name": "adamw", "ema_decay": 0.5},
    **{"model.num_layers": 1, "model.d_model": 32, "model.num_heads": 2, "model.num_kv_heads": 2, "model.d_ff": 32},
}


def write_data(path, count):
    records = ({"prompt": f"Question {i}?", "response": f"Answer {i}."} for i in range(count))
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def train(workdir, **options):
    return run.run(runs.load("sft", **(SMALL | options)), str(workdir), devices=ONE)


def stop_at_two(workdir):
    """Leaves what a run that was killed after its second step leaves."""
    shutil.rmtree(workdir / "checkpoints/4")
    (workdir / "done.json").unlink()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with the data, and a workdir at its fourth and last step."""
    folder = tmp_path_factory.mktemp("resume")
    train(folder / "w", **{"data.path": write_data(folder / "good.jsonl", 40)})
    return folder


@pytest.fixture
def begun(finished, tmp_path):
    """The same, stopped at step 2 of 4; the workdir, and the options that it ran with."""
    shutil.copytree(finished, tmp_path / "x")
    stop_at_two(tmp_path / "x/w")
    return tmp_path / "x/w", {"data.path": str(finished / "good.jsonl")}


def contents(workdir):
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in workdir.rglob("*") if path.is_file()}


@contextlib.contextmanager
def untouched(workdir):
    before = contents(workdir)
    yield
    assert contents(workdir) == before


# Rules: each field has one.


def fields():
    """Every field of a config, as docs/configs.md has them."""
    sections = load_script(ROOT / "docs/make_configs.py").sections()
    return [field.name for section in sections for field in section.fields]


FIELDS = [name for name in fields() if not name.startswith("data.sources.")]


def test_every_field_has_a_rule_and_every_rule_a_field():
    assert set(FIELDS) == set(resume.FIELDS), "say in research/run/resume.py what becomes of a change of the field"
    for name in fields():
        resume.rule_of(name)
    # Architectures may be set against a checkpoint in those fields that a run may change as it goes on, and init_std.
    said = {f"model.{f.name}" for f in dataclasses.fields(ModelConfig)} & set(resume.FIELDS)
    said = {name for name in said if resume.FIELDS[name].effect != Effect.REFUSED} | {"model.init_std"}
    assert said | {"model.rope_scaling"} == {f"model.{name}" for name in config._FREE}


OTHER = {
    "rollout.engine": "vllm",
    "rollout.transfer": "nccl",
    "rollout.servers": ("http://a",),
    "roles": {"teacher": {"init_from": "x"}},
    "objective": {"terms": {"sft": 2.0}},
    "data.sources": {"a": {"path": "a.jsonl"}},
    "data.fields": {"prompt": "question"},
    "optimizer.groups": {"head": {"match": "policy/head.*"}},
    "plan.prices": {"v4": 1.0},
    "rules": {"embed": None},
    "mesh.data": 1,
    "model.prefix": True,
    "model.rope_scaling.factor": 2.0,
    "adapter": {"kind": "bias"},
    "rewards": {"exact_match": 0.5},
    "rollout.truncated": "mask",
    "advantage.kind": "batch",
    "advantage.scale": "batch",
    "advantage.whiten": "answers",
    "advantage.combine": "advantages",
    "advantage.clip": (0.0, 1.0),
    "advantage.kl.estimator": "k2",
    "eval.sets": {"x": "y"},
}


def other_value(field, value):
    """A value of the same type that isn't this one."""
    if field in OTHER:
        return OTHER[field]
    match value:
        case bool():
            return not value
        case int():
            return value + 1
        case float():
            return value + 0.25 if value < 0.7 else value - 0.25
        case tuple() | list():
            return (*value, "x" if field in ("eval.tasks", "data.labels", "tokenizer.added_tokens") else 1)
    return value + "x"


def changed(values, field):
    """The values with another one in this field; and what it was, and is."""
    values = json.loads(json.dumps(values))
    *sections, name = field.split(".")
    inner = values
    for section in sections:
        inner = inner[section]
    before = inner[name]
    inner[name] = other_value(field, before)
    return values, before, inner[name]


@pytest.mark.parametrize("field", [name for name in FIELDS if not name.startswith("roles.NAME.")])
def test_a_change_of_each_field_is_said_refused_or_free(field):
    defaults = config.defaults()
    defaults["optimizer"] |= {"weight_decay": 0.1, "clip_norm": 1.0}
    defaults["ema_decay"] = 0.5
    defaults["rewards"] = {"exact_match": 1.0} if field == "rewards" else {}
    values, before, now = changed(defaults, field)
    assert before != now
    old, new, rule = config.parse(defaults), config.parse(values), resume.FIELDS[field]
    if rule.effect == Effect.REFUSED:
        with pytest.raises(
            InputError, match=rf"^{field}(\.head|\.kind)? = .*can't change in w, .* with model.init_from=w"
        ):
            resume.check("w", old, new)
        return
    said = resume.check("w", old, new)
    assert all(change.field.startswith(field) for change in said)
    assert bool(said) == (rule.effect != Effect.FREE)
    if rule.effect in (Effect.FREE, Effect.HOW):
        assert resume.is_finished("w", 1000, old, new)
    elif field != "steps":
        with pytest.raises(InputError, match=f"w: is finished at step 1000, so that {field}"):
            resume.is_finished("w", 1000, old, new)


@pytest.mark.parametrize("field", ["ema_decay", "optimizer.weight_decay", "optimizer.clip_norm"])
def test_what_is_switched_on_or_off_is_refused(field):
    values = config.defaults()
    *sections, name = field.split(".")
    inner = values[sections[0]] if sections else values
    inner[name] = 0.0
    without = config.parse(values)
    inner[name] = 0.5
    for pair in ((without, config.parse(values)), (config.parse(values), without)):
        with pytest.raises(InputError, match=f"^{field} = .* can't change"):
            resume.check("w", *pair)


def test_a_role_is_as_the_policy():
    of = lambda role: config.parse({"roles": {"teacher": role}})  # noqa: E731
    for a, b in (({}, {"d_model": 64}), ({"init_from": "a"}, {"init_from": "b"}), ({}, {"of": "policy"})):
        with pytest.raises(InputError, match=r"roles\.teacher\.\w+ = .* can't change"):
            resume.check("w", of(a), of(b))
    (change,) = resume.check("w", of({}), of({"dtype": "bfloat16"}))
    assert str(change) == "roles.teacher.dtype: 'auto' -> 'bfloat16'"


# Runs: what is said has its effect, what is refused touches nothing.

EFFECTS = {  # field -> another value
    "batch_size": 2,
    "steps": 5,
    "optimizer.learning_rate": 1.0,
    "optimizer.clip_norm": 1e-3,
    "ema_decay": 0.9,
    "objective.sft.label_smoothing": 0.5,
    "model.rope_theta": 10.0,
}


_EACH_RUN = ("steps", "batch_size", "optimizer.learning_rate")  # the others are slow tests: each is a run


@pytest.mark.parametrize(
    "field", [pytest.param(field, marks=() if field in _EACH_RUN else pytest.mark.slow) for field in EFFECTS]
)
def test_a_change_that_is_said_has_its_effect_from_there(field, begun, finished, capfd):
    workdir, options = begun
    train(workdir, **options, **{field: EFFECTS[field]})
    before = wholeness.read_record(str(finished / "w"))["config"]
    for name in field.split("."):
        before = before[name]
    line = f"{field}: {before!r} -> {EFFECTS[field]!r}"
    assert f"changed  {line}" in capfd.readouterr().err
    starts = wholeness.read_record(str(workdir))["history"]
    assert [(start["step"], start["changed"]) for start in starts] == [(0, []), (2, [line])]
    assert all(start["versions"]["jax"] == jax.__version__ for start in starts)
    last = checkpoint.steps(workdir)[-1]
    assert last == (5 if field == "steps" else 4)
    a, b = runs.parameters(finished / "w"), runs.parameters(workdir)
    assert a.keys() == b.keys()
    name = next(k for k in a if k.startswith("['ema']" if field == "ema_decay" else "['params']") and "embed" in k)
    assert not np.array_equal(a[name], b[name])


def test_what_is_free_changes_and_says_nothing(begun, finished, capfd):
    workdir, options = begun
    free = {"log.every": 2, "checkpoint.every": 4, "max_bad_steps": 9, "microbatches": 1, "eval.show": 0}
    train(workdir, **options, **free)
    assert "changed" not in capfd.readouterr().err
    runs.assert_same(finished / "w", workdir)


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("seed", 1, r"seed = 0 -> 1: can't change"),
        ("seq_len", 32, r"seq_len = 64 -> 32: .* rows would be laid out anew"),
        ("tokenizer.kind", "bpe", r"tokenizer.kind = 'byte' -> 'bpe': .* the tokens that the run began with"),
        ("model.d_model", 64, r"model.d_model = 32 -> 64: .* trained as"),
        ("model.mlp", "geglu", r"model.mlp = 'swiglu' -> 'geglu'"),
        ("model.init_std", 0.5, r"model.init_std = .* would have no effect"),
        ("trainable", "head", r"trainable = '' -> 'head'"),
        ("optimizer.name", "sgd", r"optimizer.name = 'adamw' -> 'sgd': .* state in the checkpoint is of another kind"),
        ("optimizer.mu_dtype", "bfloat16", r"optimizer.mu_dtype = "),
        (
            "optimizer.groups",
            {"e": {"match": "policy/embed", "learning_rate": 0.1}},
            r"optimizer.groups.e = None -> .*kind",
        ),
        ("ema_decay", 0.0, r"ema_decay = 0.5 -> 0.0: .* moving average"),
        ("optimizer.weight_decay", 0.0, r"optimizer.weight_decay = 0.1 -> 0.0"),
        ("data.pack", True, r"data: isn't what .* began with \(data.pack = False -> True\): \d+ rows -> \d+;"),
        ("data.shuffle", False, r"data.shuffle = True -> False\): rows are laid out in another way"),
        ("data.eval_fraction", 0.5, r"data.eval_fraction = 0.05 -> 0.5\): \d+ rows -> \d+; \d+ held-out rows -> \d+"),
        ("data.template", "plain", r"good.jsonl: 40 records as before, but not the same tokens"),
        ("data.max_records", 30, r"good.jsonl: 40 records -> 30"),
        ("steps", 1, r"steps = 1: .* has a checkpoint of step 2 already"),
        ("checkpoint.best_metric", "train/loss", r"must be a metric of the evaluation"),
    ],
)
def test_what_is_refused_touches_nothing(field, value, says, begun):
    workdir, options = begun
    with untouched(workdir), pytest.raises(InputError, match=says):
        train(workdir, **options, **{field: value})


def test_another_model_to_begin_with_is_refused(begun, finished):
    workdir, options = begun
    with untouched(workdir), pytest.raises(InputError, match=r"model.init_from = '' -> '.*w'"):
        train(workdir, **options, **{"model.init_from": str(finished / "w")})


# Data


def test_data_that_grew_is_refused_with_its_numbers(begun, tmp_path):
    workdir, _ = begun
    grown = write_data(tmp_path / "good.jsonl", 60)
    with untouched(workdir), pytest.raises(InputError, match=r"good.jsonl: 40 records -> 60.* Its order and"):
        train(workdir, **{"data.path": grown})


def test_data_that_is_the_same_elsewhere_goes_on(begun, finished, tmp_path, capfd):
    workdir, _ = begun
    moved = write_data(tmp_path / "moved.jsonl", 40)
    train(workdir, **{"data.path": moved, "data.on_bad_record": "skip"})
    err = capfd.readouterr().err
    assert "changed  data.path: " in err
    assert "changed  data.on_bad_record: 'error' -> 'skip'" in err
    runs.assert_same(finished / "w", workdir)


def test_data_of_which_a_word_changed_is_refused(begun, tmp_path):
    workdir, _ = begun
    path = tmp_path / "good.jsonl"
    write_data(path, 40)
    path.write_text(path.read_text().replace("Answer 7.", "Answer 8."))
    with untouched(workdir), pytest.raises(InputError, match=r"40 records as before, but not the same tokens"):
        train(workdir, **{"data.path": str(path)})


def test_a_run_from_before_data_was_noted_goes_on_with_the_same_names_only(begun, finished, tmp_path):
    workdir, options = begun
    record = json.loads((workdir / "config.json").read_text())
    before = {name: record[name] for name in record if name not in ("data", "history", "digest")}
    (workdir / "config.json").write_text(json.dumps(before))
    with untouched(workdir), pytest.raises(InputError, match=r"data.path = .*can't be known"):
        train(workdir, **{"data.path": write_data(tmp_path / "moved.jsonl", 40)})
    train(workdir, **options)
    runs.assert_same(finished / "w", workdir)
    starts = json.loads((workdir / "config.json").read_text())["history"]
    assert [start["step"] for start in starts] == [0, 2]
    assert starts[0]["versions"] == before["versions"]


@pytest.mark.slow
def test_a_task_with_other_records_is_said(begun, tmp_path, capfd):
    workdir, options = begun
    file = tmp_path / "t.jsonl"
    task = f"perplexity,name=t:{file}"
    options |= {"eval.tasks": (task,), "eval.every": 1}
    file.write_text('{"text": "one"}\n')
    train(workdir, **options, steps=2 + 1)
    first = capfd.readouterr().err
    assert f"changed  eval.tasks: [] -> [{task!r}]" in first
    file.write_text('{"text": "two"}\n')
    train(workdir, **options, steps=4)
    err = capfd.readouterr().err
    assert f"changed  eval.tasks.{task}: '1 records' -> '1 records, but others'" in err
    assert "step 3/4  eval" in err, "measured anew before it goes on"


# Frozen roles


@pytest.fixture(scope="module")
def taught(finished, tmp_path_factory):
    """A folder with a teacher at step 2, and the workdir of a run that was distilled from it up to step 4."""
    folder = tmp_path_factory.mktemp("taught")
    shutil.copytree(finished / "w", folder / "teacher")
    stop_at_two(folder / "teacher")
    train(folder / "w", **distilled(finished, folder))
    return folder


def distilled(finished, folder):
    role = {"teacher": {"init_from": str(folder / "teacher")}}
    return {"data.path": str(finished / "good.jsonl"), "roles": role, "objective": {"terms": {"distill": 1.0}}}


def test_a_teacher_that_is_as_it_was_goes_on(taught, finished, tmp_path):
    shutil.copytree(taught / "w", tmp_path / "w")
    stop_at_two(tmp_path / "w")
    assert json.loads((tmp_path / "w/config.json").read_text())["frozen"]["teacher"]["step"] == 2
    train(tmp_path / "w", **distilled(finished, taught))
    runs.assert_same(taught / "w", tmp_path / "w")


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["step", "bytes"])
def test_a_teacher_that_isnt_what_it_was_is_refused(fault, taught, finished, tmp_path):
    shutil.copytree(taught / "w", tmp_path / "w")
    stop_at_two(tmp_path / "w")
    says = r"roles.teacher.init_from: has other parameters under this name than when .*w began"
    teacher = taught / "teacher/checkpoints"
    if fault == "step":
        shutil.copytree(finished / "w/checkpoints/4", teacher / "4")
        says += r" \(it was at step 2, and is at 4\)"
    else:
        file = max(
            (path for path in (teacher / "2/state").rglob("*") if path.is_file()), key=lambda p: p.stat().st_size
        )
        whole = file.read_bytes()
        file.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
    try:
        with untouched(tmp_path / "w"), pytest.raises(InputError, match=says):
            train(tmp_path / "w", **distilled(finished, taught))
    finally:
        shutil.rmtree(teacher)
        shutil.copytree(finished / "w/checkpoints", teacher)
        shutil.rmtree(teacher / "4")
    record = json.loads((tmp_path / "w/config.json").read_text())
    del record["frozen"], record["digest"]  # as of a run from before this was kept, which can't know
    (tmp_path / "w/config.json").write_text(json.dumps(record))
    train(tmp_path / "w", **distilled(finished, taught))


def test_a_fingerprint_samples_big_files(tmp_path):
    content = bytearray(np.random.default_rng(0).bytes(3 << 20))
    (tmp_path / "x").write_bytes(content)
    whole = files.fingerprint(tmp_path, [tmp_path / "x"])
    for at in (0, len(content) // 2, len(content) - 1):
        other = content.copy()
        stretch = slice(max(0, at - len(content) // 256), at + 1)
        other[stretch] = bytes(byte ^ 1 for byte in content[stretch])
        (tmp_path / "x").write_bytes(other)
        assert files.fingerprint(tmp_path, [tmp_path / "x"]) != whole
    (tmp_path / "y").write_bytes(content)
    assert files.fingerprint(tmp_path, [tmp_path / "y"]) != whole
    (tmp_path / "x").write_bytes(content)
    assert files.fingerprint(tmp_path, [tmp_path / "x"]) == whole


# Rows


def rows_read(workdir, **options):
    """Trains; returns the prompt of each row that was read, in order."""
    seen = []

    def watched(batches, spec, rollout):
        plain = experience.make(batches, spec, rollout)

        def step(state, frozen, place):
            batch, place, out = plain.next(state, frozen, place)
            seen.extend(bytes(int(t) for t in row if t < 256).split(b"?")[0] for row in np.asarray(batch["tokens"]))
            return batch, place, out

        return plain._replace(next=step)

    c = runs.load("sft", **(SMALL | {"eval.every": 0, "checkpoint.best_metric": ""} | options))
    run.run(c, str(workdir), devices=ONE, make_experience=watched)
    return seen


@pytest.mark.slow
def test_every_row_is_read_once_an_epoch_though_the_batch_changes(tmp_path):
    options = {"data.path": write_data(tmp_path / "a.jsonl", 40), "data.eval_fraction": 0.0}
    whole = rows_read(tmp_path / "whole", steps=10, batch_size=8, **options)
    first = rows_read(tmp_path / "w", steps=2, batch_size=4, **options)
    assert len(first) == 8
    shutil.copytree(tmp_path / "w", tmp_path / "again")
    for workdir, size in (("w", 2), ("again", 8)):
        rest = rows_read(tmp_path / workdir, steps=2 + 32 // size, batch_size=size, **options)
        assert collections.Counter(first + rest) == collections.Counter(dict.fromkeys(whole[:40], 1))
        assert first + rest == whole[:40]


def test_an_option_of_a_group_is_as_that_of_all():
    plain = {"optimizer": {"groups": {"e": {"match": "policy/embed", "learning_rate": 0.1, "clip_norm": 1.0}}}}
    of = lambda **options: config.parse({"optimizer": {"groups": {"e": plain["optimizer"]["groups"]["e"] | options}}})  # noqa: E731
    (change,) = resume.check("w", config.parse(plain), of(learning_rate=0.2))
    assert str(change) == "optimizer.groups.e.learning_rate: 0.1 -> 0.2"
    for options in ({"match": "policy/head"}, {"clip_norm": 0.0}):
        with pytest.raises(
            InputError, match=r"optimizer\.groups\.e\.\w+ = .*: the optimizer's state in the checkpoint"
        ):
            resume.check("w", config.parse(plain), of(**options))


def test_a_state_of_another_kind_is_said_in_one_line():
    count = np.zeros(3)
    state = {"opt_state": [{"count": count}], "carry": {}}
    assert checkpoint._difference(state, state) == ""
    other = {"opt_state": [{}, {"count": count}], "carry": {}}
    assert checkpoint._difference(state, other) == "it lacks opt_state/1/count, and it has opt_state/0/count"
    assert checkpoint._difference(state, {**state, "carry": {"x": count}}) == "it lacks carry/x"
    other = {"opt_state": [{"count": np.zeros(4)}], "carry": {}}
    assert checkpoint._difference(state, other) == "its opt_state/0/count is [3] and not [4]"


def test_a_place_in_steps_is_read_with_the_batch_size_of_its_run():
    run_item = {"source": {"step": 6}, "config": {"batch_size": 4}}
    assert checkpoint._source(run_item) == {"row": 24}
    assert checkpoint._source({"source": {"row": 6}, "config": {"batch_size": 4}}) == {"row": 6}


# Finished runs, best metrics


def test_a_finished_run_is_left_as_it_is(finished, tmp_path, capfd):
    shutil.copytree(finished / "w", tmp_path / "w")
    options = {"data.path": str(finished / "good.jsonl")}
    with untouched(tmp_path / "w"):
        with pytest.raises(InputError, match=r"is finished at step 4, so that optimizer.learning_rate = .* Raise"):
            train(tmp_path / "w", **options, **{"optimizer.learning_rate": 0.5})
        with pytest.raises(InputError, match=r"steps = 3: .* has a checkpoint of step 4 already"):
            train(tmp_path / "w", **options, steps=3)
    before = (tmp_path / "w/config.json").read_bytes()
    last = json.loads((tmp_path / "w/done.json").read_text())
    assert train(tmp_path / "w", **options, **{"log.every": 7}) == last["metrics"]
    assert "finished at step 4 already" in capfd.readouterr().err
    assert (tmp_path / "w/config.json").read_bytes() == before
    assert json.loads((tmp_path / "w/done.json").read_text()) == last


def test_a_best_metric_that_no_evaluation_gives_is_an_error_before_anything_is_written(finished, tmp_path):
    options = {"data.path": str(finished / "good.jsonl"), "checkpoint.best_metric": "eval/los"}
    with pytest.raises(InputError, match=r"best_metric = 'eval/los': the evaluation gives no such .* mean 'eval/loss'"):
        train(tmp_path / "w", **options)
    assert not (tmp_path / "w").exists()


def test_a_best_metric_that_changes_is_looked_for_before_the_next_step(begun):
    workdir, options = begun
    before = {name: (workdir / name).read_bytes() for name in ("config.json", "metrics.jsonl")}
    with pytest.raises(InputError, match=r"best_metric = 'eval/los'"):
        train(workdir, **options, **{"checkpoint.best_metric": "eval/los"})
    assert checkpoint.steps(workdir) == [2]
    assert before == {name: (workdir / name).read_bytes() for name in before}
    train(workdir, **options, **{"checkpoint.best_metric": "eval/accuracy", "checkpoint.best_mode": "max"})
    assert checkpoint.best_step(workdir) == 4  # the one before has no such metric


def test_nothing_held_out_is_said_before_anything_is_written(finished, tmp_path):
    options = {"data.path": str(finished / "good.jsonl"), "data.eval_fraction": 0.0}
    with pytest.raises(InputError, match=r"data.eval_fraction = 0.0: nothing is held out .* eval.every = 0"):
        train(tmp_path / "w", **options)
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize("name", ["evaluate", "export", "generate", "label", "score", "serve"])
def test_the_best_checkpoint_can_be_asked_for_wherever_a_model_is(name):
    command = importlib.import_module(f"research.commands.{name}").COMMAND
    (step,) = [flag for flag in command.flags if flag.name == "step"]
    assert step.parse("best") == "best"


def test_no_other_command_takes_a_model():
    names = (path.stem for path in (ROOT / "research/commands").glob("*.py") if path.stem != "__init__")
    commands = [importlib.import_module(f"research.commands.{name}").COMMAND for name in names]
    named = {command.name for command in commands if {"model", "step"} & {flag.name for flag in command.flags}}
    models = {"evaluate", "export", "generate", "label", "score", "serve"}
    assert named == models | {"preview", "train"}  # a step of the data, and a model's own


@pytest.mark.parametrize(
    ("before", "now", "message"),
    [
        ({}, {"rewards": {"length": {"most": 4}}}, r"^rewards = \{\} -> .*: can't change in w"),
        ({"rewards": {"exact_match": 1.0}}, {}, r"^rewards = \{'exact_match': 1.0\} -> \{\}: can't change in w"),
        (
            {"rewards": {"exact_match": 1.0}},
            {"rewards": {"exact_match": 1.0}, "batch_size": 8},
            "^batch_size = 32 -> 8",
        ),
        (
            {"advantage": {"kl": {"weight": 0.1, "target": 5.0}}},
            {"advantage": {"kl": {"weight": 0.2, "target": 5.0}}},
            r"^advantage\.kl\.weight = 0\.1 -> 0\.2: can't change in w.*is where the controller begins",
        ),
        (
            {"rewards": {"exact_match": 1.0}},
            {"rewards": {"exact_match": 1.0}, "rollout": {"temperature": 0.5}},
            r"^rollout\.temperature = 1\.0 -> 0\.5: can't change in w",
        ),
    ],
)
def test_a_rollout_that_is_not_trained_on_yet_stays_what_it_is(before, now, message):
    with pytest.raises(InputError, match=message):
        resume.check("w", config.parse(before), config.parse(now))
