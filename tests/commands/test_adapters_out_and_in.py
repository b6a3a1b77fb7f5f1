"""Runs with an adapter out and in again: as folders of PEFT, merged, and several beside one model."""

import json
import shutil
from pathlib import Path

import goldens
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
import safetensors.numpy
import test_export

from research import config, loading, params
from research.commands import evaluate, export, generate, score
from research.devices import sharding
from research.errors import InputError
from research.models import virtual
from research.run import resolve, run

pytestmark = pytest.mark.slow

TINY = Path(goldens.__file__).parent / "golden/hf_tiny"
LORA = {"kind": "lora", "rank": 2, "alpha": 6.0, "targets": "q|v|up", "rank_pattern": {"layers/1/attention/q": 4}}
CASES = {
    "llama": LORA,
    "dora": {**LORA, "dora": True, "also": "final_norm/scale"},
    "pissa": {"kind": "lora", "rank": 2, "alpha": 3.0, "targets": "q|down", "init": "pissa"},
    "ia3": {"kind": "ia3"},
    "vera": {"kind": "vera", "rank": 4, "targets": "q|v"},
    "phi3": LORA,
    "p_tuning": {"kind": "p_tuning", "tokens": 3, "hidden": 8},
    "prefix": {"kind": "prefix", "tokens": 3},
    "gemma3_text": {"kind": "prompt", "tokens": 3},  # whose embeddings are scaled, and virtual tokens not
    "gpt_neox": {"kind": "lora", "rank": 3, "targets": "q|v|o|up", "also": "final_norm/.*"},
    "qwen2": {"kind": "lora", "rank": 2, "targets": "q|v", "also": "embed"},  # whose head is the embedding
    "mixtral": {
        "kind": "lora",
        "rank": 2,
        "targets": "q|router|gate|up|layers/1/mlp/down",
        "rank_pattern": {"layers/0/mlp/up": 3},
        "alpha_pattern": {"layers/1/mlp/router": 5.0},
    },
    "qwen3_moe": {"kind": "lora", "rank": 3, "rslora": True, "targets": "up|down", "also": "layers/mlp/router/kernel"},
    "head": {"kind": "lora", "rank": 2, "targets": "q|embed", "also": "head|layers/1/attention_norm/scale"},
    "gpt2": {
        "kind": "lora",
        "rank": 2,
        "rslora": True,
        "targets": "k|v|down",
        "also": "layers/(attention/o|mlp/down)/bias",
    },
}
RUN = {
    "steps": 2, "batch_size": 4, "seq_len": 32, "objective": {"terms": {"next_token": 1.0}},
    "optimizer": {"learning_rate": 0.05, "warmup_steps": 0}, "eval": {"every": 0}, "checkpoint": {"every": 2},
    "log": {"tensorboard": False}, "frozen_dtype": "float32",
}  # fmt: skip


def config_of(base, adapter, **changes):
    data = {"path": str(base.parent / "data.jsonl")}
    return config.parse({**RUN, "model": {"init_from": str(base)}, "data": data, "adapter": adapter, **changes})


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Name of a case -> (the model that the run began with, its workdir, the folder that was exported)."""
    root, done = tmp_path_factory.mktemp("adapters"), {}
    rows = [{"text": f"{i}: the {i % 7} quick foxes jump."} for i in range(40)]
    (root / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(name):
        if name not in done:
            base = root / (name if (TINY / name).is_dir() else "llama")
            if not base.exists():
                shutil.copytree(TINY / base.name, base)
                test_export.write_tokenizer(base)
            workdir, folder = root / f"{name}-run", root / f"{name}-folder"
            run.run(config_of(base, CASES[name]), str(workdir), devices=jax.devices()[:1])
            assert export.main([f"--model={workdir}", f"--output={folder}"]) == 0
            done[name] = base, workdir, folder
        return done[name]

    return make


def logits_of(loaded, values=None):
    values = loaded.params if values is None else values
    tokens = jnp.arange(24, dtype=jnp.int32).reshape(2, 12)
    batch = {"tokens": tokens, "segment_ids": jnp.ones_like(tokens), "positions": jnp.tile(jnp.arange(12), (2, 1))}
    with jax.set_mesh(loaded.mesh):
        hidden = virtual.hidden(loaded.model, values, batch)
        return np.asarray(loaded.model.unembed(values).logits(hidden))


_EACH_RUN = ("llama", "phi3")  # the others are slow tests: each trains and exports


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in _EACH_RUN else pytest.mark.slow) for name in CASES]
)
def test_a_folder_beside_its_model_is_the_run(name, trained):
    base, workdir, folder = trained(name)
    merged = logits_of(loading.load_model(str(workdir)))
    both = loading.load_model(str(base), adapter=[f"folder={folder}", f"run={workdir}"])
    assert np.abs(merged - logits_of(both)).max() > 1e-3
    for beside in both.adapters.values():
        np.testing.assert_allclose(logits_of(beside), merged, atol=2e-5)
        kernels = [each.params["layers"]["mlp"]["up"]["kernel"] for each in (beside, both)]
        assert kernels[0] is kernels[1], "the model is held twice"


@pytest.mark.parametrize("name", ["llama", "pissa"])
def test_a_merged_export_is_the_run(name, trained, tmp_path):
    _, workdir, _ = trained(name)
    assert export.main([f"--model={workdir}", "--merge", f"--output={tmp_path / 'whole'}"]) == 0
    whole, own = (logits_of(loading.load_model(str(path))) for path in (tmp_path / "whole", workdir))
    np.testing.assert_allclose(whole, own, atol=1e-6)


def test_fused_maps_have_one_adapter_of_more_ranks(trained):
    _, _, folder = trained("phi3")
    tensors = safetensors.numpy.load_file(folder / "adapter_model.safetensors")
    ranks = {name: x.shape[0] for name, x in tensors.items() if "lora_A" in name}
    assert sorted(ranks.values()) == [2, 2, 4, 6]  # up of two layers; q and v of layer 0, and of layer 1
    values = json.loads((folder / "adapter_config.json").read_text())
    assert {values["lora_alpha"], *values["alpha_pattern"].values()} == {6, 12, 18}


def test_an_init_that_changes_the_model_is_written_as_the_difference(trained):
    _, _, folder = trained("pissa")
    values = json.loads((folder / "adapter_config.json").read_text())
    assert (values["r"], values["lora_alpha"], values["init_lora_weights"]) == (4, 6, True)


@pytest.mark.slow
def test_a_run_that_goes_on_with_an_adapter_resumes(trained, tmp_path):
    base, _, folder = trained("vera")  # of which not all is in checkpoints
    adapter = {"init_from": str(folder), "also": "final_norm/scale", "dropout": 0.1}
    c = config_of(base, adapter, steps=4, checkpoint={"every": 2, "keep_last": 2})
    run.run(c, str(tmp_path / "whole"), devices=jax.devices()[:1])
    runs.check_resumed(c, tmp_path / "whole", tmp_path / "half", devices=jax.devices()[:1])
    recorded = json.loads((tmp_path / "half" / "config.json").read_text())["config"]["adapter"]
    assert loading.adapter_options(str(folder), loading.find(str(base)), recorded) == recorded


@pytest.mark.parametrize("name", ["llama", pytest.param("ia3", marks=pytest.mark.slow)])
@pytest.mark.parametrize("source", ["workdir", "folder"])
def test_a_run_goes_on_with_an_adapter(name, source, trained, tmp_path):
    base, workdir, folder = trained(name)
    saved = str(workdir if source == "workdir" else folder)
    c = config_of(base, {"init_from": saved}, steps=2)
    run.run(c, str(tmp_path / "next"), devices=jax.devices()[:1])
    began = json.loads((tmp_path / "next" / "config.json").read_text())["config"]["adapter"]
    assert began["kind"] == CASES[name]["kind"]
    start = loading.find(str(tmp_path / "next")).run_adapter.start
    where = params.shardings(start.model.specs, sharding.make_mesh({}, jax.devices()[:1]))
    values = start.read(start.model.specs, where)
    ours = loading.load_model(str(base))
    np.testing.assert_allclose(logits_of(ours, values), logits_of(loading.load_model(str(workdir))), atol=2e-5)


@pytest.mark.slow
def test_an_adapter_beside_a_model_with_added_tokens(trained, tmp_path, capsys):
    base, before, _ = trained("llama")
    added = {"tokenizer": {"kind": "auto", "added_tokens": ["<a>", "<b>"]}}
    workdir = tmp_path / "run"
    run.run(
        config_of(base, {"init_from": str(before), "also": "embed_added|head_added"}, **added), str(workdir),
        devices=jax.devices()[:1],
    )  # fmt: skip
    loaded = loading.load_model(str(workdir))
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert np.isfinite([row["train/loss"] for row in rows if "train/loss" in row]).all()
    assert loaded.tokenizer.backend.token_to_id("<b>") == loaded.tokenizer.size - 1
    with pytest.raises(InputError, match=r"added tokens to its model, and its adapter belongs to the model with them"):
        loading.load_model(str(base), adapter=[str(workdir)])
    assert export.main([f"--model={workdir}", f"--output={tmp_path / 'folder'}"]) == 2
    assert "export --merge" in capsys.readouterr().err
    assert export.main([f"--model={workdir}", "--merge", f"--output={tmp_path / 'whole'}"]) == 0
    np.testing.assert_allclose(logits_of(loading.load_model(str(tmp_path / "whole"))), logits_of(loaded), atol=1e-5)


def test_each_record_names_its_adapter(trained, tmp_path):
    base, _, llama = trained("llama")
    _, _, pissa = trained("pissa")
    prompts = [("the fox", "a"), ("jump 3", "b"), ("quick", "base"), ("the 7", "a")]
    lines = [json.dumps({"prompt": prompt, "adapter": name}) + "\n" for prompt, name in prompts]
    (tmp_path / "prompts.jsonl").write_text("".join(lines))
    common = [f"--model={base}", f"--data={tmp_path / 'prompts.jsonl'}", "--max_new_tokens=4", "--temperature=1"]
    several = [f"--adapter=a={llama}", f"--adapter=b={pissa}"]

    def answers(*flags):
        output = tmp_path / "out.jsonl"
        assert generate.main([*common, *flags, f"--output={output}", "--overwrite"]) == 0
        return [json.loads(line)["tokens"] for line in output.read_text().splitlines()]

    each = answers(*several)
    alone = {"a": answers(f"--adapter=a={llama}", f"--adapter=b={llama}"), "b": None, "base": None}
    assert [each[0], each[3]] == [alone["a"][0], alone["a"][3]]
    assert each[2] == alone["a"][2]
    assert each[1] == answers(f"--adapter=a={pissa}", f"--adapter=b={pissa}")[1]


def test_records_are_scored_each_under_its_adapter(trained, tmp_path):
    base, _, llama = trained("llama")
    names = ["a", "base", "a"]
    rows = [{"text": f"the {i} fox", "adapter": name} for i, name in enumerate(names)]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def losses(name, *flags):
        output = tmp_path / f"{name}.jsonl"
        assert score.main([f"--model={base}", f"--data={tmp_path / 'x.jsonl'}", f"--output={output}", *flags]) == 0
        return [json.loads(line)["loss"] for line in output.read_text().splitlines()]

    apart, both = losses("base"), losses("both", f"--adapter=a={llama}")
    assert both[1] == apart[1]
    assert abs(both[0] - apart[0]) > 1e-4
    assert abs(both[2] - apart[2]) > 1e-4


def test_what_cannot_be_is_refused(trained, tmp_path, capsys):
    base, workdir, folder = trained("llama")
    loaded = loading.load_model(str(base), adapter=[f"a={folder}", str(folder)])
    assert list(loaded.adapters) == ["a", folder.name]
    with pytest.raises(InputError, match=r"x:1: adapter = 'b': no such adapter. There are 'a', 'llama-folder'"):
        loaded.adapter_of({"adapter": "b"}, "x:1")
    with pytest.raises(InputError, match=r"x:1: is for which of the adapters 'a', 'llama-folder'\?"):
        loaded.adapter_of({"prompt": "hi"}, "x:1")
    with pytest.raises(InputError, match=r"'a' names two adapters"):
        loading.name_adapters([f"a={folder}", f"a={folder}"])
    with pytest.raises(InputError, match=r"'base' is the model without an adapter"):
        loading.name_adapters([f"base={folder}"])
    other = tmp_path / "other"
    shutil.copytree(base, other)
    weights = safetensors.numpy.load_file(other / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    safetensors.numpy.save_file({**weights, name: weights[name] * 1.5}, other / "model.safetensors", {"format": "pt"})
    for adapter in (folder, workdir):
        with pytest.raises(InputError, match=r"was made for another model: layers/0/attention/q/kernel"):
            loading.load_model(str(other), adapter=[str(adapter)])
    assert export.main([f"--model={base}", "--merge", f"--output={tmp_path / 'x'}"]) == 2
    assert "has no adapter that could be merged" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"model.num_labels = 3: the head is new, .* adapter.also = 'head'"):
        resolve.with_checkpoints(config_of(base, LORA, model={"init_from": str(base), "num_labels": 3}), None)
    of_bytes = config_of(base, LORA, tokenizer={"kind": "byte", "added_tokens": ["<a>"]})
    with pytest.raises(InputError, match=r"tokenizer.kind = 'byte': has 261 tokens, and .* has 96 rows for them"):
        resolve.with_tokenizer(of_bytes, {"policy": loading.find(str(base))})
    with pytest.raises(InputError, match=r"adapter.init_from = 'nowhere': is the folder or workdir of an adapter for"):
        resolve.with_checkpoints(config.parse({**RUN, "adapter": {"init_from": "nowhere"}}), None)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_peft_computes_what_the_run_does(name, trained):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    import transformers  # as torch and peft, which most machines lack

    base, workdir, folder = trained(name)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapted = peft.PeftModel.from_pretrained(model, folder).eval()
    with torch.no_grad():
        theirs = adapted(input_ids=torch.arange(24).reshape(2, 12)).logits[:, -12:].numpy()
    np.testing.assert_allclose(logits_of(loading.load_model(str(workdir))), theirs, atol=1e-4)


def test_an_evaluation_takes_one_adapter(trained, tmp_path):
    base, workdir, folder = trained("llama")

    def loss(model, *flags):
        flags = [f"--model={model}", f"--task=perplexity,limit=4:{base.parent / 'data.jsonl'}", *flags]
        status = evaluate.main([*flags, "--overwrite", f"--output={tmp_path / 'results.json'}"])
        return status, json.dumps(json.loads((tmp_path / "results.json").read_text())["results"])

    assert loss(base, f"--adapter={folder}")[1] == loss(base, f"--adapter={workdir}")[1] != loss(base)[1]
    assert (
        evaluate.main([f"--model={base}", "--task=perplexity:x.txt", *[f"--adapter={a}={folder}" for a in "ab"]]) == 2
    )
