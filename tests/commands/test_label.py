"""Classifiers made of language models, and the labels that they write."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from fake_vllm import FakeServer, OwnModel

from experiments import base
from research import config, loading
from research.commands import label
from research.evals import labels
from research.models import virtual
from research.objectives.classes import class_logits
from research.objectives.types import Forward
from research.run import checkpoint, run

pytestmark = pytest.mark.slow

NAMES = ("red", "green", "blue")
TEXTS = [f"text number {i} " + "more " * (i % 5) for i in range(60)]


def train(workdir, **changes):
    values = base.get_config()
    base.debug(values)
    values.update(seq_len=64)
    values.eval.update(every=0)
    values.checkpoint.update(best_metric="")
    values.log.tensorboard = False
    values.update_from_flattened_dict(changes)
    run.run(config.parse(values.to_dict()), str(workdir))
    return workdir


@pytest.fixture(scope="module", autouse=True)
def one_device():
    """As the fixture of this name for every test, for the runs and commands of fixtures too."""
    first = jax.devices()[:1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *backend: first)
        patch.setattr(jax, "device_count", lambda *backend: 1)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("label")


@pytest.fixture(scope="module")
def data(folder):
    path = folder / "x.jsonl"
    lines = [{"id": i, "text": text, "label": NAMES[i % 3]} for i, text in enumerate(TEXTS)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def language_model(folder):
    return train(folder / "lm", **{"data.path": "tasks:copy", "optimizer.learning_rate": 1e-2})


def classify(workdir, data, language_model, **changes):
    options = {
        "model.init_from": str(language_model),
        "model.num_layers": 24,  # the defaults: debug had changed them
        "model.num_labels": 3,
        "objective": {"terms": {"classify": 1.0}},
        "data.path": str(data),
        "data.format": "labelled",
        "data.template": "plain",
        "data.labels": NAMES,
        "data.prompt": "{text}?",
        "data.max_records": 0,
        "optimizer.learning_rate": 1e-2,
        "steps": 4,
    }
    defaults = config.defaults()["model"]
    options |= {f"model.{k}": defaults[k] for k in ("num_layers", "d_model", "num_heads", "num_kv_heads", "d_ff")}
    return train(workdir, **(options | changes))


@pytest.fixture(scope="module")
def classifier(folder, data, language_model):
    return classify(folder / "classifier", data, language_model, trainable="head")


def restored(workdir):
    with ocp.StandardCheckpointer() as reader:
        step = checkpoint.steps(workdir)[-1]
        return reader.restore(workdir.resolve() / checkpoint.FOLDER / str(step) / "state")


def test_a_probe_changes_the_head_alone(language_model, classifier):
    before, after = restored(language_model), restored(classifier)
    assert after["params"]["policy"].keys() == {"head"}
    body = dict(loading.load_model(str(classifier), check=None).params)
    head = body.pop("head")
    jax.tree.map(np.testing.assert_array_equal, body, before["params"]["policy"])
    np.testing.assert_array_equal(head, after["params"]["policy"]["head"])
    assert head.shape == (64, 3)
    moments = {x.shape for x in jax.tree.leaves(after["opt_state"]) if getattr(x, "ndim", 0)}
    assert moments == {(64, 3)}


def test_all_of_it_may_train(folder, data, language_model):
    after = restored(classify(folder / "whole", data, language_model))
    assert not np.array_equal(after["params"]["policy"]["embed"], restored(language_model)["params"]["policy"]["embed"])


def run_label(model, data, output, *flags):
    assert label.main([f"--model={model}", f"--data={data}", f"--output={output}", *flags]) == 0
    return [json.loads(line) for line in output.read_text().splitlines()]


@pytest.fixture(scope="module")
def labelled(folder, data, classifier):
    return run_label(classifier, data, folder / "labels.jsonl")


def test_probabilities_are_those_of_each_text_alone(labelled, classifier):
    assert [(r["id"], r["text"], r["gold"]) for r in labelled] == [(i, t, i % 3) for i, t in enumerate(TEXTS)]
    assert all("label" not in record for record in labelled)
    loaded = loading.load_model(str(classifier), check=None)
    for record in labelled[::17]:
        ids = loaded.tokenizer.encode(record["text"] + "?")
        ids = ids if loaded.tokenizer.bos is None else [loaded.tokenizer.bos, *ids]
        tokens = jnp.asarray([ids], jnp.int32)
        batch = {"tokens": tokens, "segment_ids": jnp.ones_like(tokens), "positions": jnp.arange(len(ids))[None]}
        logits = class_logits(Forward({"policy": loaded.model}, {"policy": loaded.params}, batch))
        np.testing.assert_allclose(record["probs"], jax.nn.softmax(logits[0, -1]), atol=2e-6)
    assert len({tuple(record["probs"]) for record in labelled}) > 50


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_a_classifier_with_something_in_front_of_texts_labels(kind, folder, data, language_model):
    adapter = {"kind": kind, "tokens": 3, "also": "head"}
    workdir = classify(folder / kind, data, language_model, adapter=adapter)
    records = run_label(workdir, data, folder / f"{kind}.jsonl")
    loaded = loading.load_model(str(workdir), check=None)
    for record in records[::17]:
        ids = loaded.tokenizer.encode(record["text"] + "?")
        ids = ids if loaded.tokenizer.bos is None else [loaded.tokenizer.bos, *ids]
        tokens = jnp.asarray([ids], jnp.int32)
        batch = {"tokens": tokens, "segment_ids": jnp.ones_like(tokens), "positions": jnp.arange(len(ids))[None]}
        logits = virtual.hidden(loaded.model, loaded.params, batch)[0, -1] @ loaded.params["head"]
        np.testing.assert_allclose(record["probs"], jax.nn.softmax(logits), atol=2e-5)


@pytest.mark.slow
def test_several_models_are_averaged(folder, data, classifier, labelled):
    other = classify(folder / "other", data, classifier, trainable="head", seed=1, steps=8)
    alone = run_label(other, data, folder / "other.jsonl")
    both = run_label(f"{classifier},{other}", data, folder / "both.jsonl")
    want = (np.array([r["probs"] for r in alone]) + np.array([r["probs"] for r in labelled])) / 2
    np.testing.assert_allclose([r["probs"] for r in both], want, atol=2e-6)
    assert not np.allclose(want, [r["probs"] for r in labelled], atol=1e-4)


def test_the_most_confident_of_each_class_are_kept(folder, data, classifier, labelled):
    kept = run_label(classifier, data, folder / "kept.jsonl", "--keep=0.25")
    of_class = [[r for r in labelled if np.argmax(r["probs"]) == c] for c in range(3)]
    want = [r for rs in of_class for r in sorted(rs, key=lambda r: -max(r["probs"]))[: -(-len(rs) // 4)]]
    assert kept == sorted(want, key=lambda r: r["id"])


def test_a_killed_run_goes_on(folder, data, classifier, labelled, monkeypatch):
    monkeypatch.setattr(labels, "_TOGETHER", 16)
    real, calls = labels.probabilities, []

    def dies(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(labels, "probabilities", dies)
    output = folder / "killed.jsonl"
    flags = [f"--model={classifier}", f"--data={data}", f"--output={output}"]
    assert label.main(flags) == 130
    partial = folder / "killed.jsonl.partial"
    assert len(partial.read_text().splitlines()) == 32
    partial.write_text(partial.read_text() + '{"id": 32, "te')
    assert label.main([*flags, "--keep=0.5"]) == 2  # another command
    again = run_label(classifier, data, output)
    assert len(calls) == 5
    assert [r["id"] for r in again] == list(range(60))
    np.testing.assert_allclose([r["probs"] for r in again], [r["probs"] for r in labelled], atol=2e-6)
    assert not partial.exists()
    assert label.main(flags) == 2  # it is there
    assert run_label(classifier, data, output, "--overwrite") == again


def test_a_language_model_labels_by_words(folder, data, language_model):
    flags = ["--words= red, green, blue", "--prompt={text} is", '--fields={"label": "none"}']
    with pytest.raises(AssertionError):  # one token for each, and bytes all begin with the space
        run_label(language_model, data, folder / "words.jsonl", *flags)
    flags[0] = "--words=red,green,blue"
    records = run_label(language_model, data, folder / "words.jsonl", *flags)
    assert all(len(record["probs"]) == 3 for record in records)
    assert "gold" not in records[0]


@pytest.mark.slow
def test_servers_label_as_the_devices_here(folder, data, language_model, classifier, capsys):
    flags = ["--words=red,green,blue", "--prompt={text} is", '--fields={"label": "none"}', "--max_records=6"]
    here = run_label(language_model, data, folder / "here.jsonl", *flags)
    loaded = loading.load_model(str(language_model))
    model = OwnModel(loaded.model, longest=64)
    with FakeServer(model, loaded.model.config.vocab_size, loaded.params) as server:
        flags.append(f"--servers={server.url}")
        served = run_label(language_model, data, folder / "served.jsonl", *flags)
        assert len(server.requests) == 1 + 6
        np.testing.assert_allclose([r["probs"] for r in served], [r["probs"] for r in here], atol=2e-6)
        assert [r["id"] for r in served] == list(range(6))
        server.fault = lambda number, reply: {"choices": [{"logprobs": {"content": []}}]} if number > 7 else reply
        for models, message in (
            (language_model, "shows no log-probabilities"),
            (classifier, "labels by a head"),
            (f"{language_model},{classifier}", "servers have one model"),
        ):
            named = [f"--model={models}", f"--data={data}", f"--output={folder / 'none.jsonl'}"]
            assert label.main(named + (flags if models is language_model else flags[-1:])) == 2
            assert message in capsys.readouterr().err


def test_what_is_wrong_is_named(folder, data, classifier, language_model, capsys):
    output = folder / "no.jsonl"
    shutil.copy(data, folder / "bad.jsonl")
    (folder / "headline.jsonl").write_text('{"headline": "a"}\n')
    (folder / "classes.jsonl").write_text('{"text": "a", "label": "red"}\n{"text": "b", "label": "pink"}\n')
    with open(folder / "bad.jsonl", "a") as file:
        file.write('{"text": 3}\n')
    for flags, words in {
        (f"--model={language_model}", f"--data={data}"): ["is a language model", "--words"],
        (f"--model={classifier}", "--data=none.jsonl"): ["--data", "none.jsonl"],
        (f"--model={classifier}", f"--data={folder / 'bad.jsonl'}"): ["bad.jsonl:61"],
        (f"--model={classifier}", f"--data={folder / 'headline.jsonl'}"): [
            "headline.jsonl:1: has no field 'text'.",
            'Name the column in --fields: {"text": ...}.\n',
        ],
        (f"--model={classifier}", f"--data={folder / 'classes.jsonl'}"): [
            "classes.jsonl:2: field 'label' is 'pink', and none of the classes red, green, blue. Mend it.\n"
        ],
        (f"--model={classifier}", f"--data={data}", "--step=best"): ["no best checkpoint"],
        (f"--model={classifier}", f"--data={data}", "--step=99"): ["99"],
        (f"--model={classifier}", f"--data={data}", "--keep=0"): ["--keep"],
    }.items():
        assert label.main([*flags, f"--output={output}"]) == 2
        error = capsys.readouterr().err
        assert "Traceback" not in error
        assert "data." not in error.replace(str(data), "")  # a field of the config, which the command doesn't have
        for word in words:
            assert word in error
    assert not output.exists()


def test_the_data_s_classes_are_the_model_s(folder, data, language_model):
    with pytest.raises(config.InputError, match=r"num_classes: 2 is fewer than data.labels names, 3"):
        classify(folder / "two", data, language_model, **{"model.num_labels": 2})
    with pytest.raises(config.InputError, match=r"model.num_labels = 4, and the labels .* have 3 classes"):
        classify(folder / "four", data, language_model, **{"model.num_labels": 4, "data.num_classes": 3})
    with pytest.raises(config.InputError, match=r"trainable = 'haed': matches none of the parameters"):
        classify(folder / "none", data, language_model, trainable="haed")
    assert not (folder / "none").exists()
