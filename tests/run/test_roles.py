"""Runs in which a part of a role is trained, several roles are, or a role is another's trunk."""

import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs

from research import config, loading
from research.commands import export
from research.errors import InputError
from research.run import checkpoint, metrics
from research.run.run import run

MODEL = {"num_layers": 3, "d_model": 16, "num_heads": 2, "num_kv_heads": 1, "d_ff": 16}
VALUE = {"of": "policy", "num_labels": 1}
TWO = {"objective": {"terms": {"two_roles": 1.0}}}
REFERENCE = {"objective": {"terms": {"two_roles": 1.0}, "two_roles": {"reference": True}}}
HEAD = {"head": {"match": "value/head", "learning_rate": 0.05, "weight_decay": 0.0, "clip_norm": 0.5}}
CASES = {
    "layer": {"trainable": "layers/1/.*"},
    "attention of layers": {"trainable": "layers/[12]/attention/.*|final_norm/.*", "ema_decay": 0.5},
    "two models": {**TWO, "roles": {"value": {**MODEL, "num_layers": 1, "num_labels": 1}}},
    "head on the trunk": {**TWO, "roles": {"value": VALUE}, "optimizer": {"groups": HEAD}},
    "parts of both": {
        **TWO,
        "roles": {"value": {**MODEL, "num_labels": 1}},
        "trainable": {"policy": "layers/2/.*", "value": "head|layers/0/mlp/.*"},
    },
    "reference": {**REFERENCE, "roles": {"value": VALUE, "reference": {"of": "policy"}}, "trainable": "layers/[12]/.*"},
    "groups of layers": {
        "optimizer": {"groups": {"low": {"match": "policy/(embed|layers/0/.*)", "learning_rate": 1e-4}}}
    },
}


def config_of(case, **fields):
    model = {**MODEL, "vocab_size": 264, "tie_embeddings": False}
    optimizer = {"learning_rate": 1e-2, "warmup_steps": 1, **case.get("optimizer", {})}
    return runs.small(**{"model": model, **case, **fields, "optimizer": optimizer})


def parts_of(case, **fields):
    return runs.parts_of(config_of(case, **fields))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Name of a case -> the workdir of its run on one device."""
    return runs.Finished(tmp_path_factory, lambda name, **fields: config_of(CASES[name], **fields))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["attention of layers", "head on the trunk", "parts of both", "reference"])
def test_half_a_run_and_the_rest_are_the_whole(name, finished, tmp_path):
    finished.check_resumed(name, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_microbatches_and_a_mesh_change_nothing(name, finished, tmp_path):
    finished.check_cut(name, tmp_path / "cut", mesh={"data": 1, "fsdp": 2}, microbatches=2)


@pytest.mark.slow
def test_a_checkpoint_holds_what_is_trained_of_all_roles(finished):
    names = {name for name in runs.parameters(finished("parts of both")) if name.startswith("['params']")}
    assert all("['policy']['layers']['2']" in name or "['value']" in name for name in names)
    assert any("['value']['layers']['0']['mlp']" in name for name in names)
    assert "['params']['value']['head']" in names
    assert not any("['value']['layers']['0']['attention']" in name for name in names)
    state = {name for name in runs.parameters(finished("layer")) if "layers" in name}
    assert state
    assert all("['layers']['1']" in name for name in state)


@pytest.mark.slow
def test_every_role_moves_and_what_is_frozen_does_not(finished):
    first, last = (checkpoint.steps(finished("two models"))[i] for i in (0, -1))
    assert (first, last) == (2, 4)
    whole = runs.parameters(finished("two models"))
    losses = [r["train/distance"] for r in metrics.read_metrics(str(finished("two models"))) if "train/distance" in r]
    assert losses[-1] < losses[0]
    assert np.abs(whole["['params']['value']['head']"]).max() > 0
    rates = [r for r in metrics.read_metrics(str(finished("head on the trunk"))) if "train/learning_rate/head" in r]
    assert max(r["train/learning_rate/head"] for r in rates) == pytest.approx(0.05)


def test_a_reference_is_the_policy_as_it_began_and_shares_what_is_frozen(finished):
    gaps = [r["train/gap"] for r in metrics.read_metrics(str(finished("reference"))) if "train/gap" in r]
    assert gaps[0] == 0
    assert min(gaps[2:]) > 0
    parts = parts_of(CASES["reference"])
    assert parts.frozen["reference"]["layers"].keys() == {"1-2"}
    assert parts.frozen["policy"].keys() == {"embed", "final_norm", "head", "layers"}
    assert parts.frozen["policy"]["layers"].keys() == {"0"}
    assert parts.frozen.keys() == {"policy", "reference"}


def test_a_frozen_head_has_no_gradient():
    """No product in the step is of the shape of the head's kernel."""
    products = lambda parts: re.findall(  # noqa: E731
        r"f32\[16,264\] = dot_general", str(parts.step.trace(parts.state, parts.frozen, parts.batch).jaxpr)
    )
    assert products(parts_of({}))
    assert not products(parts_of(CASES["layer"]))


@pytest.mark.slow
def test_the_policy_is_evaluated_and_answers_with_a_part_of_it_frozen(finished, tmp_path):
    """An evaluation joins the two trees: its loss is the one of the whole model, loaded from the checkpoint."""
    evals = {"every": 4, "batches": 1, "generate": 1, "max_new_tokens": 2}
    run(config_of(CASES["layer"], eval=evals), str(tmp_path / "run"), devices=jax.devices()[:1])
    scores = [r for r in metrics.read_metrics(str(tmp_path / "run")) if "eval/loss" in r]
    assert [r["step"] for r in scores] == [0, 4]
    assert scores[1]["eval/loss"] < scores[0]["eval/loss"]
    runs.assert_same(finished("layer"), tmp_path / "run")
    arguments = [f"--model={tmp_path / 'run'}", f"--output={tmp_path / 'out'}"]
    assert export.main(arguments) == 0
    ours = loading.load_model(str(tmp_path / "run")).params
    theirs = loading.load_model(str(tmp_path / "out")).params
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_a_head_on_the_trunk_needs_no_second_pass():
    passes = lambda parts: str(parts.step.trace(parts.state, parts.frozen, parts.batch).jaxpr).count("scan[")  # noqa: E731
    shared = parts_of(CASES["head on the trunk"])
    alone = parts_of(CASES["two models"])
    plain = parts_of({})
    assert passes(shared) == passes(plain) < passes(alone)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["layer", "attention of layers", "reference"])
def test_a_run_with_frozen_parameters_is_loaded_whole(name, finished):
    workdir = finished(name)
    values = loading.load_model(str(workdir)).params
    stored = runs.parameters(workdir)
    parts = parts_of(CASES[name])
    frozen = parts.begin(np.uint32(0))[1]
    layers = values["layers"]["mlp"]["up"]["kernel"]
    assert layers.shape[0] == 3
    near = {"rtol": 1e-6, "atol": 1e-8}  # numbers drawn by another program
    np.testing.assert_allclose(layers[0], frozen["policy"]["layers"]["0"]["mlp"]["up"]["kernel"][0], **near)
    np.testing.assert_allclose(values["embed"], frozen["policy"]["embed"], **near)
    for key, array in stored.items():
        if key.startswith("['params']['policy']['layers']['1"):
            path = key.removeprefix("['params']['policy']['layers']").replace("']['", "/").strip("[]'").split("/")[1:]
            leaf = layers_of(values["layers"], path)
            np.testing.assert_array_equal(leaf[1 : 1 + array.shape[0]], array)


def layers_of(tree, path):
    for name in path:
        tree = tree[name]
    return tree


def test_what_the_run_began_with_must_be_there_and_the_same(finished, tmp_path):
    shutil.copytree(finished("layer"), tmp_path / "run")
    record = json.loads((tmp_path / "run/config.json").read_text())
    record["config"]["seed"] = 5
    del record["data"], record["digest"]  # another seed makes other data, which is refused before
    (tmp_path / "run/config.json").write_text(json.dumps(record))
    with pytest.raises(
        InputError, match="isn't trained, hence not in the checkpoints but in the seed 5, and has other"
    ):
        loading.load_model(str(tmp_path / "run"))
    with pytest.raises(InputError, match="has other values there than when the run began"):
        run(config_of(CASES["layer"], seed=5, steps=6), str(tmp_path / "run"), devices=jax.devices()[:1])


@pytest.mark.slow
def test_a_part_of_a_checkpoint_is_trained_and_the_rest_comes_from_it(finished, tmp_path):
    """A run that starts from a run of which a part is trained, and trains another part; then resumes."""
    base = str(finished("layer"))
    case = {"model": {"init_from": base}, "trainable": "layers/2/.*|head", "tokenizer": {"kind": "auto"}}
    run(config_of(case, **{k: case[k] for k in case}), str(tmp_path / "next"), devices=jax.devices()[:1])
    before, after = loading.load_model(base).params, loading.load_model(str(tmp_path / "next")).params
    kernel = lambda values: values["layers"]["mlp"]["up"]["kernel"]  # noqa: E731
    np.testing.assert_array_equal(kernel(after)[:2], kernel(before)[:2])
    assert np.abs(kernel(after)[2] - kernel(before)[2]).max() > 0
    np.testing.assert_array_equal(after["embed"], before["embed"])
    run(config_of(case, **case, steps=6), str(tmp_path / "next"), devices=jax.devices()[:1])
    assert checkpoint.steps(tmp_path / "next")[-1] == 6


def test_a_policy_of_which_nothing_is_trained_is_read_from_where_it_began(finished, tmp_path):
    """The run trains a head on a third model alone, which only that head's role names."""
    base = str(finished("layer"))
    case = {
        "objective": {"terms": {"two_roles": {"train_policy": False}}},
        "roles": {"judge": {"init_from": base}, "value": {"of": "judge", "num_labels": 1}},
        "model": {"init_from": base},
        "tokenizer": {"kind": "auto"},
    }
    run(config_of(case, **case), str(tmp_path / "run"), devices=jax.devices()[:1])
    assert checkpoint.steps(tmp_path / "run")[-1] == 4
    policies = [loading.load_model(folder).params for folder in (base, str(tmp_path / "run"))]
    jax.tree.map(np.testing.assert_array_equal, *policies)
    with pytest.raises(InputError, match="average"):
        loading.load_model(str(tmp_path / "run"), ema=True)


def test_frozen_kernels_are_held_in_the_compute_dtype_or_as_asked():
    for dtype, asked, held in (
        ("bfloat16", "auto", "bfloat16"),
        ("bfloat16", "float32", "float32"),
        ("float32", "bfloat16", "bfloat16"),
    ):
        parts = parts_of(CASES["layer"], frozen_dtype=asked, model={**MODEL, "vocab_size": 264, "dtype": dtype})
        assert parts.frozen["policy"]["embed"].dtype == held
        assert parts.frozen["policy"]["final_norm"]["scale"].dtype == jnp.float32
        assert parts.state.params["policy"]["layers"]["1"]["mlp"]["up"]["kernel"].dtype == jnp.float32


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ({"trainable": "layers/3/.*"}, r"trainable = 'layers/3/.*': matches none .* layers/0/\.\.\. to layers/2/"),
        ({**TWO, "roles": {"value": VALUE}, "trainable": {"critic": ""}}, r"trainable\.critic: no such role"),
        ({**TWO, "roles": {"value": VALUE}, "trainable": {"value": "haed"}}, r"trainable\.value = 'haed': matches no"),
        ({**TWO, "roles": {"value": {"of": "policy"}}}, r"roles\.value\.of .*no parameters of its own.*num_labels"),
        ({**TWO, "roles": {"value": {"of": "polcy"}}}, r"roles\.value\.of = 'polcy': must be a role with a model"),
        ({**TWO, "roles": {"value": {**VALUE, "d_model": 8}}}, r"roles\.value\.d_model = 8: the role is the model"),
        (
            {**REFERENCE, "roles": {"value": VALUE, "reference": {"of": "policy"}}},
            r"roles\.reference\.of = 'policy': all of the policy's trunk is trained.* the policy itself",
        ),
        (
            {
                **REFERENCE,
                "roles": {"value": VALUE, "reference": {"of": "policy"}},
                "trainable": {"policy": "embed|layers/.*|final_norm/.*"},
            },
            r"roles\.reference\.of = 'policy': all of the policy's trunk is trained",
        ),
        ({**TWO, "roles": {"value": VALUE, "policy": MODEL}}, r"roles\.policy: 'policy' is the model of the section"),
        ({**TWO, "roles": {"value": VALUE, "objectives": MODEL}}, r"roles\.objectives: 'objectives' is where param"),
        ({**TWO, "roles": {"value": VALUE, "a/b": MODEL}}, r"roles\.a/b: 'a/b' is no name of a role"),
        ({"rules": {"embed": 1}}, r"rules\.embed = 1: must be a mesh axis, a list of them, or None"),
        ({"frozen_dtype": "float16"}, r"frozen_dtype = 'float16': no such choice"),
        ({"trainable": 3}, r"trainable = 3: must be of type str or mapping, and is int"),
        ({"optimizer": {"groups": {"a": {"match": "value/.*"}}}}, r"groups\.a\.match = 'value/.*': matches none"),
    ],
)  # fmt: skip
def test_what_can_not_be_is_named(case, words):
    with pytest.raises(InputError, match=words):
        parts_of(case)


def test_a_head_on_a_prefix_lm_reads_its_trunk():
    """A reference of one is one; a value head isn't, and no classifier either, which would be refused."""
    values = {"model": {"prefix": True}, "roles": {"value": {"of": "policy", "num_labels": 1}, "ref": {"of": "policy"}}}
    models = {role: config.model_config(config.parse(values), 256, role=role) for role in ("value", "ref")}
    assert [(c.prefix, c.num_labels) for c in models.values()] == [(False, 1), (True, 0)]
