"""Runs whose frozen kernels are held in 4 or 8 bits."""

import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs

from research import config, digests, loading, objectives, params
from research.commands import export
from research.devices import sharding
from research.errors import InputError
from research.models.specs import make_specs
from research.ops import quantized
from research.planning import estimate
from research.planning import topology as topologies
from research.pretrained import wholeness
from research.run import assemble, checkpoint, metrics
from research.run.run import run

pytestmark = pytest.mark.slow

MODEL = {"num_layers": 2, "d_model": 64, "num_heads": 4, "num_kv_heads": 2, "d_ff": 128}
NORMS = r"layers/.*norm/scale|final_norm/.*"
TEACHER = {"objective": {"terms": {"distill": 1.0}}, "roles": {"teacher": {**MODEL, "vocab_size": 264}}}


def config_of(**fields):
    values = {
        "steps": 4,
        "batch_size": 4,
        "seq_len": 32,
        "model": {**MODEL, "vocab_size": 264},
        "data": {"path": "tasks:copy", "examples": 40},
        "objective": {"terms": {"next_token": 1.0}},
        "optimizer": {"learning_rate": 0.02, "warmup_steps": 1},
        "checkpoint": {"every": 2, "keep_last": 9},
        "eval": {"every": 0},
        "log": {"every": 1, "tensorboard": False},
        **fields,
    }
    return config.parse(values)


def parts_of(**fields):
    c = config_of(**fields)
    config.check(c, num_devices=1)
    mesh = sharding.make_mesh({}, jax.devices()[:1])
    batch = {name: jax.ShapeDtypeStruct((4, 32), jnp.int32) for name in ("tokens", "segment_ids", "positions")}
    batch["loss_mask"] = jax.ShapeDtypeStruct((4, 32), jnp.float32)
    return assemble.assemble(c, objectives.load(c.objective), mesh, batch, 264)


def start(workdir, devices=1, **fields):
    run(config_of(**fields), str(workdir), devices=jax.devices()[:devices])
    return workdir


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A run that trains everything, in float32."""
    return str(start(tmp_path_factory.mktemp("base") / "run", steps=1))


@pytest.fixture(scope="module")
def case(base):
    return {"trainable": NORMS, "frozen_dtype": "nf4", "model": {**MODEL, "vocab_size": 264, "init_from": base}}


@pytest.fixture(scope="module")
def lora(case):
    return {**case, "trainable": "", "adapter": {"kind": "lora", "rank": 4}}


@pytest.fixture(scope="module")
def whole(case, tmp_path_factory):
    return start(tmp_path_factory.mktemp("norms") / "run", **case)


@pytest.fixture(scope="module")
def whole_lora(lora, tmp_path_factory):
    return start(tmp_path_factory.mktemp("lora") / "run", **lora)


def losses(workdir):
    return [line["train/loss"] for line in metrics.read_metrics(str(workdir)) if "train/loss" in line]


def half(workdir, to):
    shutil.copytree(workdir, to)
    shutil.rmtree(to / checkpoint.FOLDER / "4")
    return to


def test_half_a_run_and_the_rest_are_the_whole(lora, whole_lora, tmp_path):
    assert losses(whole_lora)[-1] < losses(whole_lora)[0]
    names = [name for name in runs.parameters(whole_lora) if name.startswith("['params']")]
    assert names
    assert all("lora" in name for name in names)
    start(half(whole_lora, tmp_path / "half"), **lora)
    runs.assert_same(whole_lora, tmp_path / "half")


@pytest.mark.slow
@pytest.mark.parametrize("kind", quantized.KINDS)
def test_so_with_random_kernels_of_which_some_layers_are_trained(kind, tmp_path):
    case = {"trainable": "layers/1/mlp/.*|final_norm/.*", "frozen_dtype": kind}
    start(tmp_path / "run", **case)
    start(half(tmp_path / "run", tmp_path / "half"), **case)
    runs.assert_same(tmp_path / "run", tmp_path / "half")
    loading.load_model(str(tmp_path / "run"))


def test_a_mesh_and_microbatches_change_nothing(lora, whole_lora, tmp_path):
    mesh = {"data": 1, "fsdp": 2, "tensor": 2}
    values = runs.parameters(start(tmp_path / "run", 4, **lora, mesh=mesh, microbatches=2))
    expected = runs.parameters(whole_lora)
    for key in expected:
        if key.startswith("['params']"):
            np.testing.assert_allclose(values[key], expected[key], rtol=1e-3, atol=1e-4, err_msg=key)


@pytest.mark.slow
def test_a_model_of_the_run_has_the_kernels_that_it_was_trained_beside(base, whole, whole_lora):
    """Decoding, evaluations and exports read it so: dequantised, not as the base had it."""
    values, original = loading.load_model(str(whole)).params, loading.load_model(base).params
    specs = make_specs(loading.find(base).config)
    kernels = quantized.held_in(specs, "nf4")
    for part, name in (("attention", "o"), ("mlp", "up")):
        kernel = original["layers"][part][name]["kernel"]
        held = quantized.quantize(kernel, kernels["layers"][part][name]["kernel"])
        np.testing.assert_array_equal(values["layers"][part][name]["kernel"], quantized.dequantize(held))
        assert 0.05 < quantized.relative_error(held, kernel) < 0.12
    np.testing.assert_array_equal(values["embed"], original["embed"])
    merged, own = loading.load_model(str(whole_lora)).params, runs.parameters(whole_lora)
    a, b = (own[f"['params']['policy']['layers']['mlp']['up']['lora']['{name}']"] for name in "ab")
    expected = quantized.dequantize(held) + 32 / 4 * np.matmul(a, b)  # alpha over rank
    np.testing.assert_allclose(merged["layers"]["mlp"]["up"]["kernel"], expected, atol=1e-5)
    assert np.abs(values["final_norm"]["scale"] - original["final_norm"]["scale"]).max() > 0.01


@pytest.mark.slow
def test_an_export_says_how_far_the_kernels_are_from_the_base(base, whole_lora, tmp_path, capsys):
    assert export.main([f"--model={whole_lora}", f"--output={tmp_path / 'merged'}", "--merge"]) == 0
    message = re.search(r"beside kernels held in nf4, .* they are (.*)% from", capsys.readouterr().err)
    assert export.main([f"--model={whole_lora}", f"--output={tmp_path / 'adapter'}"]) == 0
    assert f"beside kernels held in nf4, which are {message[1]}% from those of {base}" in capsys.readouterr().err
    original = loading.load_model(base).params["layers"]
    specs = quantized.held_in({"layers": make_specs(loading.find(base).config)["layers"]}, "nf4")["layers"]
    held = quantized.hold(original, specs)
    assert float(message[1]) == pytest.approx(100 * float(quantized.relative_error(held, original)), abs=0.01)
    assert loading.find(base).holding_error() is None
    exported, merged = (loading.load_model(str(name)).params["layers"] for name in (tmp_path / "merged", whole_lora))
    jax.tree.map(np.testing.assert_array_equal, exported, merged)


def test_other_ways_to_hold_the_base_are_refused_when_the_run_goes_on(case, whole, tmp_path):
    half(whole, tmp_path / "half")
    for dtype in ("auto", "int8"):
        with pytest.raises(InputError, match=r"frozen_dtype.*beside the kernels as they were held"):
            start(tmp_path / "half", **{**case, "frozen_dtype": dtype})


def test_a_base_that_has_changed_is_named(base, case, whole, tmp_path):
    other = tmp_path / "base"
    shutil.copytree(base, other)
    half(whole, tmp_path / "half")
    record = json.loads((tmp_path / "half" / "frozen.json").read_text())
    name = "layers/1/mlp/up/kernel/nf4"
    record["policy"][name][0] += 0.01 * record["policy"][name][1]
    (tmp_path / "half" / "frozen.json").write_text(json.dumps(record))
    about = json.loads((tmp_path / "half" / "config.json").read_text())
    assert "frozen.json" in about.pop(wholeness.FILES)  # whose digest would say that the file was changed
    del about[digests.SEAL]
    (tmp_path / "half" / "config.json").write_text(json.dumps(about))
    with pytest.raises(InputError, match=f"{name} of the role 'policy'"):
        start(tmp_path / "half", **case)


@pytest.mark.parametrize("kind", quantized.KINDS)
def test_a_teacher_is_held_so_too(kind):
    parts = parts_of(**TEACHER, frozen_dtype=kind)
    assert parts.frozen["teacher"]["layers"]["mlp"]["up"]["kernel"].keys() >= {kind, "scale"}
    assert parts.frozen["teacher"]["embed"].dtype == jnp.float32
    assert params.count(parts.roles.whole["teacher"]) == params.count(parts.roles.whole["policy"])


def test_a_plan_counts_bytes_and_parameters():
    topology = topologies.find("cpu:1")
    plans = {kind: estimate.make(config_of(**TEACHER, frozen_dtype=kind), topology) for kind in ("float32", "nf4")}
    assert plans["float32"].frozen_parameters == plans["nf4"].frozen_parameters
    specs = parts_of(**TEACHER).roles.whole["teacher"]
    kernels = params.count([s for s in jax.tree.leaves(specs["layers"], is_leaf=params.is_spec) if s.contracts])
    saved = plans["float32"].bytes_of["frozen"] - plans["nf4"].bytes_of["frozen"]
    assert 3.3 * kernels < saved < 3.5 * kernels


def test_a_step_dequantises_a_kernel_at_a_time():
    """Its program has no array of all layers' kernels but those that they are held in, whatever is rematerialised."""
    for remat in ("dots", "none"):
        model = {**MODEL, "num_layers": 6, "vocab_size": 264, "remat": remat}
        text, memory = {}, {}
        for kind in ("float32", "nf4"):
            parts = parts_of(model=model, trainable="final_norm/.*|layers/.*norm/.*", frozen_dtype=kind)
            compiled = parts.step.lower(parts.state, parts.frozen, parts.batch).compile()
            text[kind], memory[kind] = compiled.as_text(), compiled.memory_analysis().temp_size_in_bytes
        assert "f32[6,64,128]" in text["float32"]
        assert "f32[6,64,128]" not in text["nf4"]
        assert "f32[64,128]" in text["nf4"]
        assert memory["nf4"] < memory["float32"] + 4 * 4 * 64 * 128
