"""Adapters of PEFT: what is read of its folders computes what PEFT computes, and what is written is what was read."""

import json
import shutil
from pathlib import Path

import goldens
import jax
import numpy as np
import pytest
import safetensors.numpy

from research import loading, params
from research.devices import sharding
from research.errors import InputError
from research.models import adapters, transformer, virtual
from research.pretrained import families, peft

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = goldens.load("peft")
READ = ("lora_qv", "lora_all_rslora", "lora_all_bias_head", "lora_embed", "lora_rank_pattern", "dora", "ia3", "vera")
IN_FRONT = ("prompt_tuning", "p_tuning_mlp", "p_tuning_lstm", "prefix_tuning", "prefix_tuning_mlp")


def model_with(name, base="llama"):
    """(the model with a golden adapter, its parameters, what was read)."""
    source = loading.find(str(GOLDEN / "hf_tiny" / base))
    saved = loading.open_adapter(str(GOLDEN / "peft_adapters" / name), source)
    model = transformer.make_model(source.config, source.rules, adapters.load(saved.options))
    where = params.shardings(model.specs, sharding.make_mesh({}, jax.devices()[:1]))
    start = loading.Start("policy", model, 0, loading.Base(base, lambda: source), open_adapter=lambda _: saved)
    return model, start.read(model.specs, where), saved


def logits_of(model, values, case):
    """Of a golden case's tokens, which are padded on the right."""
    hidden = model.hidden(values, batch_of(case))
    return np.asarray(model.unembed(values).logits(hidden)), case.inputs["attention_mask"].astype(bool)


def batch_of(case):
    mask = case.inputs["attention_mask"]
    return {
        "tokens": case.inputs["input_ids"].astype(np.int32),
        "segment_ids": mask.astype(np.int32),
        "positions": np.maximum(np.cumsum(mask, 1) - 1, 0).astype(np.int32),
    }


@pytest.mark.parametrize("name", [*READ, "pissa"])
def test_a_folder_computes_what_peft_computes(name):
    case = CASES[name]
    model, values, _ = model_with(name)
    logits, there = logits_of(model, values, case)
    np.testing.assert_allclose(logits[there], case.outputs["logits"][there], atol=1e-4)


def written(tmp_path, model, values, saved, found):
    """The tensors of a folder written of a model's parameters and its adapter's."""
    kept = params.split(values, params.like(transformer.make_specs(model.config), values))
    leaves = peft.leaves_of(kept[1], model.specs)
    leaves |= {name: parts for name, parts in peft.leaves_of(kept[0], model.specs).items() if name in saved.leaves()}
    family = families.load("llama", "a test")
    rslora = saved.options.get("rslora", False)
    trained = peft.Trained(saved.options["kind"], rslora, leaves, {}, found, {})
    peft.write(tmp_path / "written", family, model.config, trained)
    return safetensors.numpy.load_file(tmp_path / "written" / "adapter_model.safetensors")


@pytest.mark.parametrize("name", IN_FRONT)
def test_what_stands_in_front_computes_what_peft_computes(name):
    case = CASES[name]
    base = loading.load_model(
        str(GOLDEN / "hf_tiny/llama"), needs_tokenizer=False, adapter=[str(GOLDEN / "peft_adapters" / name)]
    )
    loaded = base.with_adapter()
    mask = case.inputs["attention_mask"]
    batch = batch_of(case)
    hidden = virtual.hidden(loaded.model, loaded.params, batch)
    logits = np.asarray(loaded.model.unembed(loaded.params).logits(hidden))
    theirs = case.outputs["logits"][:, -mask.shape[1] :]  # PEFT's has the virtual tokens too
    np.testing.assert_allclose(logits[mask > 0], theirs[mask > 0], atol=1e-4)


@pytest.mark.parametrize("name", [*READ, *IN_FRONT])
def test_a_folder_that_was_read_is_written_with_the_same_tensors(name, tmp_path):
    model, values, saved = model_with(name)
    tensors = written(tmp_path, model, values, saved, "base")
    there = safetensors.numpy.load_file(GOLDEN / "peft_adapters" / name / "adapter_model.safetensors")
    there = {key: x for key, x in there.items() if "embed_tokens.base_layer" not in key}  # a copy of the model's
    assert tensors.keys() == there.keys()
    for key, x in there.items():
        np.testing.assert_array_equal(tensors[key], x, key)
    config = json.loads((tmp_path / "written" / "adapter_config.json").read_text())
    before = json.loads((GOLDEN / "peft_adapters" / name / "adapter_config.json").read_text())
    for field in ("r", "lora_alpha", "use_rslora", "use_dora", "modules_to_save", "task_type", "feedforward_modules"):
        assert (config.get(field) or None) == (before.get(field) or None), field
    assert sorted(config.get("target_modules", [])) == sorted(before.get("target_modules", []))


def test_folders_that_are_not_read_say_why():
    with pytest.raises(InputError, match=r"'LOHA': products of two low-rank matrices.*Merge it into its base in PEFT"):
        model_with("loha")
    source = loading.find(str(GOLDEN / "hf_tiny" / "llama"))
    with pytest.raises(InputError, match=r"neither a folder with adapter_config.json nor a run"):
        loading.open_adapter(str(GOLDEN), source)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("lora_qv", {"peft_type": "XLORA"}, r"'XLORA': only .* PEFT can't merge it into its base either: adapt the"),
        ("lora_qv", {"layer_replication": [[0, 2], [1, 2]]}, r"layer_replication = .*PEFT can't merge it"),
        ("lora_qv", {"some_field": 3}, r"some_field = '3': isn't offered here. Merge it into its base in PEFT"),
        (
            "lora_qv",
            {"init_lora_weights": "corda"},
            r"'corda': changed the base .* Merge it where it was trained, besi",
        ),
        ("prompt_tuning", {"some_field": 3}, r"some_field = '3': isn't offered here. PEFT can't merge it"),
    ],
)
def test_what_to_do_is_what_peft_can_do(name, changes, message, tmp_path):
    shutil.copytree(GOLDEN / "peft_adapters" / name, tmp_path / "folder")
    file = tmp_path / "folder/adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(InputError, match=message):
        loading.open_adapter(str(file.parent), loading.find(str(GOLDEN / "hf_tiny" / "llama")))


def test_virtual_tokens_are_of_models_that_take_them_as_they_are(tmp_path):
    source = loading.find(str(GOLDEN / "hf_tiny/gemma3_text"))
    rows = {"prompt/rows": {(): np.ones((3, 32), np.float32)}}
    trained = peft.Trained("prompt", False, rows, {}, "base", {})
    peft.write(tmp_path / "folder", families.load("gemma3_text", "a test"), source.config, trained)
    saved = loading.open_adapter(str(tmp_path / "folder"), source)
    np.testing.assert_array_equal(saved.leaves()["prompt/rows"][()], rows["prompt/rows"][()])
    other = loading.find(str(GOLDEN / "hf_tiny/gemma2"))
    with pytest.raises(InputError, match=r"adapter_config.json: virtual tokens of a Gemma 2 are scaled by"):
        loading.open_adapter(str(tmp_path / "folder"), other)
    with pytest.raises(InputError, match=r"adapter: virtual tokens of a Gemma 2"):
        peft.write(tmp_path / "other", families.load("gemma2", "a test"), other.config, trained)


def test_an_adapter_of_another_model_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"changes model.layers.0.self_attn.q_proj, and .*made for 'hf_tiny/llama'"):
        model_with("lora_qv", base="gpt2")
    with pytest.raises(InputError, match=r"lora_B of .*q_proj is 32 x 4, and the model asks for 64 x r"):
        model_with("lora_qv", base="qwen3")
    source = loading.find(str(GOLDEN / "hf_tiny" / "llama"))
    saved = loading.open_adapter(str(GOLDEN / "peft_adapters" / "lora_embed"), source)
    _, values, _ = model_with("lora_embed")
    with pytest.raises(InputError, match=r"was made for another model: embed has other values"):
        saved.fill({**values, "embed": values["embed"] + 1})


@pytest.mark.parametrize("rslora", [False, True])
def test_alpha_is_written_as_it_was_used(rslora, tmp_path):
    """The scale of each map is alpha over rank, or over its root, in PEFT too."""
    source = loading.find(str(GOLDEN / "hf_tiny" / "llama"))
    options = {"kind": "lora", "rank": 4, "alpha": 6.0, "rslora": rslora, "targets": "q|v"}
    patterns = {"rank_pattern": {"layers/1/attention/q": 3}, "alpha_pattern": {"layers/0/attention/v": 5.0}}
    model = transformer.make_model(source.config, adapter=adapters.load(options | patterns))
    attention = params.init(model.specs, jax.random.PRNGKey(0))["layers"]["attention"]
    low = {name: {"lora": attention[name]["lora"]} for name in "qv"}
    leaves = peft.leaves_of({"layers": {"attention": low}}, model.specs)
    trained = peft.Trained("lora", rslora, leaves, {}, "base", {})
    peft.write(tmp_path / "folder", families.load("llama", "a test"), model.config, trained)
    config = json.loads((tmp_path / "folder/adapter_config.json").read_text())
    tensors = safetensors.numpy.load_file(tmp_path / "folder/adapter_model.safetensors")
    assert config["use_rslora"] == rslora
    for name in "qv":
        for layer in range(2):
            module = f"model.layers.{layer}.self_attn.{name}_proj"
            rank = tensors[f"base_model.model.{module}.lora_A.weight"].shape[0]
            assert rank == (3 if (name, layer) == ("q", 1) else 4) == config["rank_pattern"].get(module, config["r"])
            scale = config["alpha_pattern"].get(module, config["lora_alpha"]) / (rank**0.5 if rslora else rank)
            assert scale == pytest.approx(float(low[name]["lora"]["scale"][layer]), rel=1e-6)
    assert loading.open_adapter(str(tmp_path / "folder"), source).options.get("rslora", False) == rslora


def test_an_embedding_that_is_the_head_is_written_as_both(tmp_path):
    """PEFT copies what it saves whole, and a head that stays tied to the model's own embedding would be another."""
    source = loading.find(str(GOLDEN / "hf_tiny" / "qwen2"))
    options = {"kind": "lora", "rank": 2, "targets": "q", "also": "embed"}
    model = transformer.make_model(source.config, adapter=adapters.load(options))
    drawn = params.init(model.specs, jax.random.PRNGKey(0))
    low = {"attention": {"q": {"lora": drawn["layers"]["attention"]["q"]["lora"]}}}
    leaves = peft.leaves_of({"embed": drawn["embed"], "layers": low}, model.specs)
    trained = peft.Trained("lora", False, leaves, {}, "base", {})
    peft.write(tmp_path / "folder", families.load("qwen2", "a test"), model.config, trained)
    file = tmp_path / "folder" / "adapter_model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    for name in ("model.embed_tokens", "lm_head"):
        np.testing.assert_array_equal(tensors[f"base_model.model.{name}.weight"], drawn["embed"])
    config = json.loads((file.parent / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["model.embed_tokens", "lm_head"]
    assert loading.open_adapter(str(file.parent), source).options["also"] == "embed"
    tensors["base_model.model.lm_head.weight"] += 1
    safetensors.numpy.save_file(tensors, file)
    with pytest.raises(InputError, match=r"holds lm_head.weight, trained apart from model.embed_tokens.weight"):
        loading.open_adapter(str(file.parent), source)


def test_options_come_from_the_folder_and_others_are_refused():
    source = loading.find(str(GOLDEN / "hf_tiny" / "llama"))
    folder = str(GOLDEN / "peft_adapters" / "lora_rank_pattern")
    options = loading.adapter_options(folder, source, {"init_from": folder, "dropout": 0.1, "kind": "lora"})
    assert options == {
        "kind": "lora",
        "rank": 2,
        "alpha": 4.0,
        "targets": "attention/q|attention/v",
        "rank_pattern": {"layers/1/attention/q": 5},
        "alpha_pattern": {"layers/1/attention/q": 15.0},
        "dropout": 0.1,
        "init_from": folder,
    }
    with pytest.raises(InputError, match=r"adapter.rank = 4: .*lora_rank_pattern, which it begins with, has 2. Leave"):
        loading.adapter_options(folder, source, {"rank": 4})
