"""Cached teachers: they say what the live one says wherever a token lies, and survive a kill."""

import dataclasses
import json
import re
import shutil
import types

import jax
import numpy as np
import pytest
from runs import load

from research import config, digests, loading, params
from research.commands import annotate
from research.errors import InputError
from research.evals import teacher_annotations
from research.models import transformer
from research.objectives.types import next_token_targets
from research.ops import divergences, losses
from research.run import metrics, resolve, run
from research.sources import annotations, dataset

LIVE = {"terms": {"distill": 1.0}, "distill": {"kind": "jsd", "temperature": 2.0, "beta": 0.3, "on": "all"}}
CACHED = {**LIVE, "distill": {**LIVE["distill"], "cached": True}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With data of both kinds, and the workdir of a teacher."""
    path = tmp_path_factory.mktemp("annotate")
    rng = np.random.default_rng(0)
    words = ["".join(chr(97 + i) for i in rng.integers(0, 26, 5)) for _ in range(400)]
    (path / "text.jsonl").write_text(
        "".join(json.dumps({"text": " ".join(words[i : i + n])}) + "\n" for i, n in enumerate((50, 3, 20, 9, 31)))
    )
    pairs = [{"prompt": words[i], "response": words[i][: 1 + i % 5]} for i in range(60)]
    (path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    few = {"steps": 1, "eval.every": 0, "checkpoint.best_metric": "", "data.path": str(path / "pairs.jsonl")}
    run.run(load("sft", **few, **{"model.init_std": 0.3, "optimizer.warmup_steps": 0}), str(path / "teacher"))
    return path


def setup(folder, objective=LIVE, **overrides):
    values = config.to_dict(load("sft", **{"eval.generate": 0, "eval.every": 2, "checkpoint.best_metric": ""}))
    data = {"path": f"{folder}/pairs.jsonl", "max_records": 0, "eval_fraction": 0.2}
    roles = {} if objective is CACHED else {"teacher": {"init_from": str(folder / "teacher")}}
    values |= {"objective": objective, "roles": roles, "seq_len": 64, "log": {"every": 1, "tensorboard": False}}
    values["data"] |= data | overrides.pop("data", {})
    return config.parse({**values, **overrides})


@pytest.fixture(scope="module")
def whole(folder):
    """Annotations of all tokens and the whole vocabulary."""
    annotate.annotate(setup(folder), str(folder / "whole"), k=261, temperature=2.0, on="all")
    return str(folder / "whole")


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
def test_a_run_from_the_cache_is_the_run_with_the_teacher(folder, whole, tmp_path):
    """Rows in other order and with other neighbours than when they were annotated."""
    other = {"seed": 5, "batch_size": 16}
    run.run(setup(folder, **other), str(tmp_path / "live"))
    run.run(setup(folder, CACHED, **other, data={"annotations": whole}), str(tmp_path / "cached"))
    live, cached = (metrics.read_metrics(str(tmp_path / name)) for name in ("live", "cached"))
    cached = [{re.sub(r"_top\d+$", "", name): x for name, x in record.items()} for record in cached]
    names = ("train/loss", "train/grad_norm", "train/divergence", "eval/loss", "eval/agreement")
    pick = lambda records: [r[n] for r in records for n in names if n in r]  # noqa: E731
    assert len(pick(live)) >= 10
    np.testing.assert_allclose(pick(cached), pick(live), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("on", ["supervised", "all"])
def test_every_token_has_what_the_teacher_says_alone(folder, on, tmp_path):
    """Two stores, one of texts that are cut; each document by itself gives the same."""
    data = {"path": f"{folder}/pairs.jsonl", "eval_path": f"{folder}/text.jsonl", "shuffle": True}
    annotate.annotate(setup(folder, data=data), str(tmp_path / "out"), k=3, on=on)
    c = setup(folder, data={**data, "annotations": str(tmp_path / "out")})
    tokenizer = loading.find(str(folder / "teacher")).tokenizer()
    found = dataset.load(config.data_spec(c), c.tokenizer, tokenizer, seed=9)
    teacher = loading.load_model(str(folder / "teacher"))

    @jax.jit
    def top_k(batch):
        head = teacher.model.unembed(teacher.params)
        return divergences.top_k(teacher.model.hidden(teacher.params, batch), head, 3, vocab_size=tokenizer.size)

    for rows in (found.train[0][0], found.held_out):
        batch = rows.batch(np.concatenate([np.arange(len(rows)), np.full(8 - len(rows) % 8, -1)]))
        segments, mask = batch["segment_ids"], batch["loss_mask"]
        wanted = np.zeros(segments.shape, bool)
        wanted[:, :-1] = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
        if on == "supervised":
            wanted[:, :-1] &= mask[:, 1:] > 0
        assert wanted.any()
        for first in range(0, len(segments), 8):
            here = slice(first, first + 8)
            names = ("tokens", "segment_ids", "positions")
            ids, log_probs, rest = (np.asarray(x) for x in top_k({name: batch[name][here] for name in names}))
            there = wanted[here]
            np.testing.assert_array_equal(batch["teacher_ids"][here][there], ids[there])
            np.testing.assert_allclose(batch["teacher_log_probs"][here][there], log_probs[there], rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(batch["teacher_rest"][here][there], rest[there], rtol=1e-3, atol=1e-5)
        assert np.isneginf(batch["teacher_log_probs"][~wanted]).all()
        assert not batch["teacher_rest"][~wanted].any()


def test_a_prefix_lm_reads_prompts_whole(folder, tmp_path):
    """What it says isn't what it says as a causal model; data without prefixes are refused."""
    roles = {"teacher": {"init_from": str(folder / "teacher"), "prefix": True}}
    view = {"path": "", "sources": {"one": {"path": f"{folder}/pairs.jsonl", "view": {"kind": "prompt"}}}}
    with pytest.raises(InputError, match="is a prefix LM, and nothing says what a document's prefix is"):
        annotate.annotate(setup(folder, roles=roles), str(tmp_path / "out"), k=3)
    annotate.annotate(setup(folder, roles=roles, data=view), str(tmp_path / "out"), k=3)
    c = setup(folder, data={**view, "annotations": str(tmp_path / "out")})
    teacher = loading.load_model(str(folder / "teacher"))
    found = dataset.load(config.data_spec(c), c.tokenizer, teacher.tokenizer, seed=9)
    batch = found.train[0][0].batch(np.arange(4))
    wanted = (batch["segment_ids"] > 0) & (batch["teacher_log_probs"][:, :, 0] > -np.inf)
    assert wanted.sum() > 10
    for prefix in (True, False):
        model = transformer.make_model(dataclasses.replace(teacher.model.config, prefix=prefix))
        names = ("tokens", "segment_ids", "positions", "prefix")
        hidden = model.hidden(teacher.params, {name: batch[name] for name in names})
        out = divergences.top_k(hidden, model.unembed(teacher.params), 3, vocab_size=teacher.tokenizer.size)
        same = np.allclose(batch["teacher_log_probs"][wanted], np.asarray(out.log_probs)[wanted], rtol=1e-4, atol=1e-5)
        assert same == prefix


def files(path):
    return {str(f.relative_to(path)): f.read_bytes() for f in sorted(path.rglob("*")) if f.is_file()}


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
def test_a_killed_run_ends_with_the_bytes_of_one_that_was_left_alone(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(teacher_annotations, "_GROUP_TOKENS", 64)  # fewer than a batch of rows has
    flags = ["--config=experiments/sft.py:debug", f"--config.data.path={folder}/pairs.jsonl", "--k=4"]
    flags += [f"--teacher={folder}/teacher", "--config.seq_len=32", "--config.batch_size=8"]
    assert annotate.main([*flags, f"--output={tmp_path}/whole"]) == 0
    mark, marked = teacher_annotations._mark, []

    def die(path, done, segments, *entries):
        if done and len(marked) % 2:  # the files are written; that they are isn't known
            marked.append(done)
            raise KeyboardInterrupt
        marked.append(done)
        mark(path, done, segments, *entries)

    monkeypatch.setattr(teacher_annotations, "_mark", die)
    statuses = []
    while len(statuses) < 10 and 0 not in statuses:
        statuses.append(annotate.main([*flags, f"--output={tmp_path}/cut"]))
        for path in (tmp_path / "cut").glob("*/log_probs.bin"):  # a torn write beyond what is marked
            done = json.loads((path.parent / "progress.json").read_text())["done"]
            content = path.read_bytes()
            path.write_bytes(content[: 16 * done] + b"\xff" * (len(content) - 16 * done))
    assert statuses.count(130) >= 2
    assert statuses[-1] == 0
    assert files(tmp_path / "cut") == files(tmp_path / "whole")
    before = len(marked)
    assert annotate.main([*flags, f"--output={tmp_path}/cut"]) == 0
    assert len(marked) == before
    told = capsys.readouterr().err
    assert "bytes on disk, 0 of them there already" in told
    flags[flags.index("--k=4")] = "--k=5"
    assert annotate.main([*flags, f"--output={tmp_path}/cut"]) == 2
    assert "was begun by another command: k was 4, and is 5 now" in capsys.readouterr().err


def test_annotations_that_are_damaged_are_named(folder, whole, tmp_path):
    """A digit of JSON, or a bit of an array; and a file that is cut."""
    path = shutil.copytree(whole, tmp_path / "annotated")
    c = setup(folder, CACHED, data={"annotations": str(path)})
    tokenizer = loading.find(str(folder / "teacher")).tokenizer()

    def read():
        data = dataset.load(config.data_spec(c), c.tokenizer, tokenizer, seed=c.seed)
        for rows in (data.train[0][0], data.held_out):
            rows.batch(np.arange(len(rows)))

    read()
    for name in ("meta.json", "progress.json", "segments.npy", "at.npy", "ids.bin", "log_probs.bin", "rest.bin"):
        (file,) = path.rglob(name)
        before = file.read_bytes()
        file.write_bytes(before[: len(before) // 2])
        with pytest.raises(InputError, match=rf"{name}\W"):
            read()
        is_json, middle = name.endswith("json"), len(before) // 2
        at = next(i for i in range(middle, len(before)) if not is_json or chr(before[i]).isdigit())
        file.write_bytes(before[:at] + bytes([before[at] ^ 1]) + before[at + 1 :])
        with pytest.raises(InputError, match=rf"{name}\W.*it is damaged"):
            read()
        file.write_bytes(before)
    read()


def test_the_size_is_told_and_must_fit(folder, tmp_path, monkeypatch, capsys):
    annotate.annotate(setup(folder), str(tmp_path / "out"), k=4)
    size = sum(f.stat().st_size for f in (tmp_path / "out").rglob("*.bin"))
    told = int(capsys.readouterr().err.split(" bytes = ")[1].split(" ")[0].replace(",", ""))
    extra = sum(f.stat().st_size for f in (tmp_path / "out").rglob("*.npy"))
    assert size < told <= size + extra
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=1000))
    with pytest.raises(InputError, match=r"needs [\d,]+ more bytes, and 1,000 are free\. Lower --k=4"):
        annotate.annotate(setup(folder), str(tmp_path / "none"), k=4)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"template": "plain"}, r"was made with data\.template = 'auto', and this run has 'plain'"),
        ({"path": "text.jsonl"}, r"was made with data\.path = '.*pairs\.jsonl', and this run has '.*text\.jsonl'"),
        ({"path": "changed.jsonl"}, r"was made with data\.path"),
    ],
)
def test_other_data_than_was_annotated_is_an_error(folder, whole, data, message):
    (folder / "changed.jsonl").write_text(
        (folder / "pairs.jsonl").read_text().upper().replace("PROMPT", "prompt").replace("RESPONSE", "response")
    )
    data = {name: str(folder / value) if name == "path" else value for name, value in data.items()}
    c = setup(folder, CACHED, data={**data, "annotations": whole})
    with pytest.raises(InputError, match=message):
        dataset.load(config.data_spec(c), c.tokenizer, seed=0)


def test_texts_cut_elsewhere_and_files_that_changed_are_errors(folder, tmp_path):
    path = tmp_path / "t.jsonl"
    shutil.copy(folder / "text.jsonl", path)
    annotate.annotate(setup(folder, data={"path": str(path)}), str(tmp_path / "out"), k=2)
    c = setup(folder, CACHED, data={"path": str(path), "annotations": str(tmp_path / "out")})
    tokenizer = loading.find(str(folder / "teacher")).tokenizer()
    dataset.load(config.data_spec(c), c.tokenizer, tokenizer, seed=0)
    with pytest.raises(InputError, match="was made with seq_len = 64, and this run has 32: documents are cut"):
        dataset.load(dataclasses.replace(config.data_spec(c), seq_len=32), c.tokenizer, tokenizer, seed=0)
    path.write_text(json.dumps({"text": "something else " * 9}) + "\n" + json.dumps({"text": "again"}) + "\n")
    with pytest.raises(InputError, match="was made of other data under the same names"):
        dataset.load(config.data_spec(c), c.tokenizer, tokenizer, seed=0)


def test_what_the_objective_wants_must_be_there(folder, whole, tmp_path):
    other = {**CACHED, "distill": {**CACHED["distill"], "temperature": 1.0}}
    c = setup(folder, CACHED, data={"annotations": whole})
    for changed, message in (
        (
            dataclasses.replace(c, objective=other),
            r"made with --temperature=2\.0, and objective\.distill asks for temper",
        ),
        (setup(folder, CACHED), r"objective\.distill\.cached = True: .* Name their folder in data\.annotations"),
        (setup(folder, CACHED, data={"annotations": str(tmp_path)}), "holds no annotations"),
    ):
        with pytest.raises(InputError, match=message):
            run.run(changed, str(tmp_path / "w"))
    assert not (tmp_path / "w").exists()
    with pytest.raises(InputError, match=r"made with --on=all, and objective\.x asks for on = other"):
        annotations.check(whole, "objective.x", {"on": "other"})
    unfinished = tmp_path / "unfinished"
    shutil.copytree(whole, unfinished)
    progress = next(unfinished.glob("*/progress.json"))
    progress.write_text(json.dumps({"done": 5, "segments": 1}))
    with pytest.raises(InputError, match=r"is unfinished, 5 of [\d,]+ tokens of part 1 of 1"):
        run.run(setup(folder, CACHED, data={"annotations": str(unfinished)}), str(tmp_path / "w"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--outptu=x"], "outptu"),
        ([], "--config, --output: are missing"),
        (["--config=experiments/sft.py:debug", "--output=x"], "--teacher: names no model"),
        (
            ["--config=experiments/sft.py:debug", "--output=x", "--k=400", "--teacher=TEACHER"],
            "--k=400: must be in 1..261",
        ),
        (
            ["--config=experiments/sft.py:debug", "--output=x", "--on=some", "--teacher=TEACHER"],
            "--on = some: no such choice",
        ),
        (["--config=experiments/sft.py:debug", "--output=x", "--config.sed=1"], "Did you mean 'seed'"),
    ],
)
def test_flags_that_can_not_be(folder, flags, message, capsys, monkeypatch):
    assert annotate.main([flag.replace("TEACHER", str(folder / "teacher")) for flag in flags]) == 2
    assert message in capsys.readouterr().err


PREFERENCE = {"terms": {"preference": 1.0}, "preference": {"cached": True}}


@pytest.fixture(scope="module")
def compared(folder):
    """Pairs of answers, and a run on them that begins with the teacher and reads its log-probs from a folder."""
    lines = ({"prompt": f"{i} ", "chosen": "a" * (1 + i % 7), "rejected": "b" * (1 + i % 3)} for i in range(30))
    (folder / "compared.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    began = config.to_dict(setup(folder, PREFERENCE, data={"path": f"{folder}/compared.jsonl"}))
    began |= {"roles": {}, "model": {**began["model"], "init_from": str(folder / "teacher")}}
    annotate.annotate(config.parse(began), str(folder / "reference"), k=0)
    began["data"]["annotations"] = str(folder / "reference")
    return began


@pytest.mark.slow
def test_cached_log_probs_of_a_reference_are_those_of_the_live_one(folder, compared, tmp_path):
    inputs = resolve.resolve(config.parse(compared), str(tmp_path / "run"))
    batch, _ = inputs.source.next(inputs.source.init())
    batch = {name: jax.numpy.asarray(x) for name, x in batch.items()}
    model = transformer.make_model(inputs.bases["policy"].config)
    weights = inputs.bases["policy"].read(model.specs, params.shardings(model.specs, inputs.mesh))
    targets, counted = next_token_targets(batch, batch["loss_mask"])
    live = losses.target_log_probs(model.hidden(weights, batch), model.unembed(weights), targets).target
    assert counted.sum() > 20
    np.testing.assert_allclose(batch["reference_log_prob"], np.where(counted > 0, live, 0), rtol=1e-4, atol=1e-5)


def test_log_probs_of_another_reference_are_refused(folder, compared, tmp_path):
    shutil.copytree(folder / "reference", tmp_path / "reference")
    meta = json.loads((tmp_path / "reference/meta.json").read_text())
    (tmp_path / "reference/meta.json").write_text(
        json.dumps(digests.seal({**meta, "source": {"step": 1, "content": "else"}}))
    )
    other = {**compared, "data": {**compared["data"], "annotations": str(tmp_path / "reference")}}
    with pytest.raises(InputError, match=r"is another model, or has other parameters.*annotate --reference"):
        resolve.resolve(config.parse(other), str(tmp_path / "run"))


def test_annotations_of_another_kind_are_refused(folder, compared, tmp_path):
    with pytest.raises(InputError, match=r"holds a reference's log-probs, and objective.distill reads a teacher's"):
        resolve.resolve(config.parse({**compared, "objective": CACHED}), str(tmp_path / "run"))


def test_flags_of_a_teacher_have_no_effect_on_a_reference(folder, tmp_path, capsys):
    argv = ["--config=experiments/sft.py", "--reference", "--k=4", f"--output={tmp_path / 'x'}"]
    assert annotate.main(argv) != 0
    assert "--k: is of a teacher" in capsys.readouterr().err
