"""Low-rank parts of experts in folders of PEFT, stacked as transformers 5 has them and apart as version 4 had."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from research import loading, params
from research.errors import InputError
from research.models import adapters, transformer, virtual
from research.models.adapters import lora
from research.pretrained import families, peft

MIXTRAL = Path(__file__).parents[1] / "golden/hf_tiny/mixtral"
RANK, ALPHA = 2, 3
CONFIG = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "base_model_name_or_path": "hf_tiny/mixtral"}
WHERE = "base_model.model.model.layers"


def write(folder, tensors, **fields):
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | fields))
    safetensors.numpy.save_file(
        {name: np.ascontiguousarray(x) for name, x in tensors.items()}, folder / "adapter_model.safetensors"
    )
    return folder


def stacked(folder, c):
    """A folder as PEFT 0.21 writes it, and what it adds to the kernels [E, out, in] of "gate_up" and "down" by PEFT's
    own formula (peft/tuners/lora/layer.py, ParamWrapper.get_delta_weight)."""
    rng, tensors, deltas = np.random.default_rng(0), {}, {}
    E, D, F = c.num_experts, c.d_model, c.d_ff
    for layer in range(c.num_layers):
        for name, ins, outs, rank in (("gate_up", D, 2 * F, 2 * RANK), ("down", F, D, RANK)):
            a, b = (rng.standard_normal(shape).astype(np.float32) for shape in ((rank * E, ins), (outs, rank * E)))
            place = f"{WHERE}.{layer}.mlp.experts{'.base_layer' if name == 'gate_up' else ''}"
            tensors |= {f"{place}.lora_A.weight": a, f"{place}.lora_B.weight": b}
            product = np.einsum("ore,eri->eoi", b.reshape(outs, rank, E), a.reshape(E, rank, ins))
            deltas[name, layer] = ALPHA / RANK * product
    patterns = {"rank_pattern": {r".*\.gate_up_proj": 2 * RANK}, "alpha_pattern": {r".*\.gate_up_proj": 2 * ALPHA}}
    parameters = ["down_proj", "gate_up_proj"]
    return write(folder, tensors, target_modules=[], target_parameters=parameters, **patterns), deltas


def apart(folder, c):
    """A folder as PEFT writes it with transformers 4: an adapter at all maps of all experts, and at the routers."""
    rng, tensors = np.random.default_rng(1), {}
    D, F = c.d_model, c.d_ff
    sides = {f"experts.{e}.{name}": shape for e in range(c.num_experts) for name, shape in
             (("w1", (D, F)), ("w3", (D, F)), ("w2", (F, D)))} | {"gate": (D, c.num_experts)}  # fmt: skip
    for layer in range(c.num_layers):
        for name, (ins, outs) in sides.items():
            place = f"{WHERE}.{layer}.block_sparse_moe.{name}"
            for letter, shape in (("A", (RANK, ins)), ("B", (outs, RANK))):
                tensors[f"{place}.lora_{letter}.weight"] = 0.1 * rng.standard_normal(shape).astype(np.float32)
    return write(folder, tensors, target_modules=["gate", "w1", "w2", "w3"])


def read(folder):
    source = loading.find(str(MIXTRAL))
    saved = loading.open_adapter(str(folder), source)
    model = transformer.make_model(source.config, adapter=adapters.load(saved.options))
    return saved, model, saved.fill(params.tree_map(lambda spec: jnp.asarray(scales_or_zeros(spec)), model.specs))


def scales_or_zeros(spec):
    """What a parameter begins as where that is always the same; else zeros, which nothing has to be compiled for."""
    constant = isinstance(spec.init, lora.Fixed)
    return spec.init(None, spec.shape, np.float32) if constant else np.zeros(spec.shape, np.float32)


def delta(p, layer):
    """scale A B of a map, [E, out, in]."""
    a, b, scale = (np.asarray(p["lora"][name][layer]) for name in ("a", "b", "scale"))
    return scale * np.einsum("eir,ero->eoi", a, b)


def write_again(folder, model, values, rslora=False):
    added = {
        "layers": {"mlp": {name: {"lora": p["lora"]} for name, p in values["layers"]["mlp"].items() if "lora" in p}}
    }
    trained = peft.Trained("lora", rslora, peft.leaves_of(added, model.specs), {}, "base", {})
    peft.write(folder, families.load("mixtral", "a test"), model.config, trained)
    return folder


def test_stacked_experts_are_read_and_written_as_peft_has_them(tmp_path):
    c = loading.find(str(MIXTRAL)).config
    folder, deltas = stacked(tmp_path / "folder", c)
    saved, model, values = read(folder)
    assert saved.options["targets"] == "mlp/gate|mlp/up|mlp/down"
    mlp = values["layers"]["mlp"]
    for layer in range(c.num_layers):
        both = np.concatenate([delta(mlp[name], layer) for name in ("gate", "up")], axis=1)
        np.testing.assert_allclose(both, deltas["gate_up", layer], atol=1e-5)
        np.testing.assert_allclose(delta(mlp["down"], layer), deltas["down", layer], atol=1e-5)
    again = write_again(tmp_path / "again", model, values)
    there, here = (safetensors.numpy.load_file(each / "adapter_model.safetensors") for each in (folder, again))
    assert there.keys() == here.keys()
    for name in there:
        np.testing.assert_array_equal(here[name], there[name])
    written = json.loads((again / "adapter_config.json").read_text())
    assert written["target_modules"] == []
    assert sorted(written["target_parameters"]) == ["experts.down_proj", "experts.gate_up_proj"]
    assert {4, 2} == {written["r"], *written["rank_pattern"].values()}


def test_experts_apart_are_read_and_written_stacked(tmp_path):
    folder = apart(tmp_path / "folder", loading.find(str(MIXTRAL)).config)
    _, model, values = read(folder)
    tensors = safetensors.numpy.load_file(folder / "adapter_model.safetensors")
    mlp = values["layers"]["mlp"]
    for name, word in (("gate", "w1"), ("up", "w3"), ("down", "w2")):
        for e, ours in enumerate(delta(mlp[name], 1)):
            place = f"{WHERE}.1.block_sparse_moe.experts.{e}.{word}"
            a, b = (tensors[f"{place}.lora_{letter}.weight"] for letter in "AB")
            np.testing.assert_allclose(ours, ALPHA / RANK * b @ a, atol=1e-6)
    again = write_again(tmp_path / "again", model, values)
    written = json.loads((again / "adapter_config.json").read_text())
    assert "gate.weight" in written["target_parameters"]
    _, _, back = read(again)
    for name in ("gate", "up", "down"):
        np.testing.assert_allclose(delta(back["layers"]["mlp"][name], 0), delta(mlp[name], 0), atol=1e-6)
    router = (values["layers"]["mlp"]["router"]["lora"], back["layers"]["mlp"]["router"]["lora"])
    jax.tree.map(np.testing.assert_array_equal, *router)


def test_other_experts_are_refused(tmp_path):
    c = loading.find(str(MIXTRAL)).config
    folder, _ = stacked(tmp_path / "folder", c)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"rank_pattern": {}}))
    with pytest.raises(
        InputError, match=r"experts.gate_up_proj has \d+ rows, and \d experts of rank 2 ask for another"
    ):
        loading.open_adapter(str(folder), loading.find(str(MIXTRAL)))
    folder = apart(tmp_path / "apart", c)
    tensors = safetensors.numpy.load_file(folder / "adapter_model.safetensors")
    some = {name: x for name, x in tensors.items() if "experts.1.w2" not in name}
    safetensors.numpy.save_file(some, folder / "adapter_model.safetensors")
    with pytest.raises(InputError, match=r"changes model.layers.0.mlp.experts.0.w2, and .*experts all of a layer"):
        loading.open_adapter(str(folder), loading.find(str(MIXTRAL)))


def test_what_is_trained_of_experts_is_not_written(tmp_path):
    c = loading.find(str(MIXTRAL)).config
    family = families.load("mixtral", "a test")
    kernel = np.zeros((c.num_experts, c.d_model, c.d_ff), np.float32)
    leaves = {"layers/mlp/up/kernel": {(i,): kernel for i in range(c.num_layers)}}
    _, model, values = read(apart(tmp_path / "folder", c))
    low = peft.leaves_of(
        {"layers": {"mlp": {"router": {"lora": values["layers"]["mlp"]["router"]["lora"]}}}}, model.specs
    )
    with pytest.raises(InputError, match=r"mlp/up/kernel: has no tensor in transformers.*--merge"):
        peft.write(tmp_path / "a", family, c, peft.Trained("lora", False, low | leaves, {}, "base", {}))
    router = {"layers/mlp/router/kernel": {(i,): np.zeros((c.d_model, c.num_experts)) for i in range(c.num_layers)}}
    with pytest.raises(InputError, match=r"router/kernel: is trained, and an adapter is beside it.*--merge"):
        peft.write(tmp_path / "b", family, c, peft.Trained("lora", False, low | router, {}, "base", {}))


@pytest.mark.slow
@pytest.mark.parametrize("form", ["all-linear", "stacked", "apart"])
def test_peft_gives_the_same_logits(form, tmp_path):
    torch, peft_library = pytest.importorskip("torch"), pytest.importorskip("peft")
    import transformers  # as torch and peft, which most machines lack

    tokens = np.arange(24, dtype=np.int32).reshape(2, 12)
    model = transformers.AutoModelForCausalLM.from_pretrained(MIXTRAL, dtype=torch.float32)
    if form == "all-linear":
        config = peft_library.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
        model = peft_library.get_peft_model(model, config).eval()
        with torch.no_grad():
            for name, x in model.named_parameters():
                if "lora_B" in name:
                    x.normal_(0, 0.1)
        folder = tmp_path / "folder"
        model.save_pretrained(folder)
    else:
        c = loading.find(str(MIXTRAL)).config
        folder = apart(tmp_path / "folder", c) if form == "apart" else stacked(tmp_path / "folder", c)[0]
        model = peft_library.PeftModel.from_pretrained(model, folder).eval()
    with torch.no_grad():
        theirs = model(torch.as_tensor(tokens, dtype=torch.int64)).logits.numpy()
    loaded = loading.load_model(str(MIXTRAL), needs_tokenizer=False, adapter=[str(folder)]).with_adapter()
    batch = {"tokens": jnp.asarray(tokens), "segment_ids": jnp.ones((2, 12), jnp.int32)}
    batch["positions"] = jnp.tile(jnp.arange(12, dtype=jnp.int32), (2, 1))
    with jax.set_mesh(loaded.mesh):
        hidden = virtual.hidden(loaded.model, loaded.params, batch)
        ours = np.asarray(loaded.model.unembed(loaded.params).logits(hidden))
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
