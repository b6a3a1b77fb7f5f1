"""Real models through training and out again: what is trained from a checkpoint is exported, read back, and resumed."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import goldens
import jax
import numpy as np
import pytest
import safetensors.numpy
import tokenizers
import transformers

from research import config, loading
from research.commands import export
from research.errors import InputError
from research.pretrained import peft
from research.run import checkpoint, run

LLAMA = Path(goldens.__file__).parent / "golden/hf_tiny/llama"
CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,:;!? \n"
DEBUG = {
    "steps": 2, "batch_size": 8, "seq_len": 32, "mesh": {"data": 1, "fsdp": 4, "tensor": 2},
    "objective": {"terms": {"next_token": 1.0}}, "optimizer": {"learning_rate": 0.01, "warmup_steps": 0},
    "eval": {"every": 0}, "checkpoint": {"every": 1, "keep_last": 2}, "log": {"tensorboard": False},
}  # fmt: skip


def configure(init_from, data, **changes):
    model = {"init_from": str(init_from)}
    return config.parse({**DEBUG, "model": model, "data": {"path": str(data)}, **changes})


def write_tokenizer(folder):
    """A tokenizer of single characters, no larger than the vocabulary of the tiny checkpoints."""
    vocabulary = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *CHARACTERS])}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], unk_token="<unk>"))
    made.decoder = tokenizers.decoders.Fuse()
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    made.save(str(folder / "tokenizer.json"))
    told = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(told))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(the checkpoint that a run began with, its workdir, its data)."""
    folder = tmp_path_factory.mktemp("export")
    shutil.copytree(LLAMA, folder / "llama")
    write_tokenizer(folder / "llama")
    rows = ({"text": f"{i}: the {i % 7} quick brown foxes jump over {i * i} lazy dogs."} for i in range(200))
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run.run(configure(folder / "llama", folder / "data.jsonl"), str(folder / "run"))
    return folder / "llama", folder / "run", folder / "data.jsonl"


def main(*flags):
    return export.main([str(flag) for flag in flags])


def parameters(name, **options):
    return jax.device_get(loading.load_model(str(name), needs_tokenizer=False, **options).params)


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def differ(a, b):
    with pytest.raises(AssertionError):
        same(a, b)


def test_a_trained_model_is_exported_and_read_back(trained, tmp_path, capfd):
    began, workdir, _ = trained
    assert main(f"--model={workdir}", f"--output={tmp_path / 'out'}") == 0
    assert "LlamaForCausalLM, 0.1 MB of float32" in capfd.readouterr().err
    same(parameters(tmp_path / "out"), parameters(workdir))
    differ(parameters(tmp_path / "out"), parameters(began))
    for file in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "out" / file).read_text()) == json.loads((began / file).read_text())
    assert (tmp_path / "out/config.json").stat().st_mode & 0o777 == (
        tmp_path / "out/model.safetensors"
    ).stat().st_mode & 0o777
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_adapter_says_what_it_is_beside(trained, monkeypatch, capfd):
    """transformers loads no workdir, and no GGUF by its name alone."""
    began, workdir, _ = trained
    monkeypatch.setattr(peft, "write", lambda *arguments: 33_280)
    for base, words in (
        (began, f"{began}\n"),
        (workdir, f"what understudy export --model={workdir} --output=BASE writes. The base_model_name_or_path of"),
        ("x/Q4.gguf", "what understudy export --model=x/Q4.gguf --output=BASE writes. The base_model_name_or_path of"),
    ):
        written = SimpleNamespace(kind="lora", base=str(base))
        model = SimpleNamespace(run_adapter=SimpleNamespace(written=lambda w=written: w), holding_error=lambda: None)
        model.config, model.origin = loading.find(str(workdir)).config, {}
        flags = SimpleNamespace(output="x", dtype="", max_shard_gb=5.0, model="runs/lora")
        export._export_adapter(flags, model)
        assert capfd.readouterr().err.startswith(f"x: lora, 33.3 kB; PEFT reads it beside {words}")


@pytest.mark.slow
def test_a_causal_model_becomes_a_prefix_lm_and_stays_one_when_exported(trained, tmp_path, capfd):
    began, _, data = trained
    model = {"init_from": str(began), "prefix": True}
    run.run(configure("", data, model=model, objective={"terms": {"prefix_lm": 1.0}}), str(tmp_path / "run"))
    assert loading.find(str(tmp_path / "run")).config.prefix
    capfd.readouterr()
    assert main(f"--model={tmp_path / 'run'}", f"--output={tmp_path / 'out'}") == 0
    assert "is a prefix LM. transformers reads prompts from left to right" in capfd.readouterr().err
    assert loading.find(str(tmp_path / "out")).config.prefix
    assert not loading.find(str(began)).config.prefix
    same(parameters(tmp_path / "out"), parameters(tmp_path / "run"))
    assert transformers.AutoConfig.from_pretrained(tmp_path / "out").prefix_lm  # which no model there reads
    with pytest.raises(InputError, match=r"model\.prefix = True: nothing says what a document's prefix is"):
        run.run(configure(tmp_path / "out", data), str(tmp_path / "next"))


def test_transformers_reads_the_config_and_the_tokenizer(trained, tmp_path):
    assert main(f"--model={trained[1]}", f"--output={tmp_path / 'out'}") == 0
    c = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert (c.model_type, c.vocab_size, c.num_key_value_heads) == ("llama", 96, 2)
    theirs, ours = (
        transformers.AutoTokenizer.from_pretrained(tmp_path / "out"),
        loading.find(str(trained[1])).tokenizer(),
    )
    text = "two foxes\nand 17 dogs?"
    assert theirs(text, add_special_tokens=False)["input_ids"] == ours.encode(text)
    assert (theirs.eos_token_id, theirs.bos_token_id) == (ours.eos, ours.bos) == (2, 1)


def test_dtype_shards_and_step_are_as_asked_for(trained, tmp_path, capfd):
    flags = (f"--model={trained[1]}", "--dtype=bfloat16", "--max_shard_gb=0.00002", "--step=1")
    assert main(*flags, f"--output={tmp_path / 'out'}") == 0
    assert re.search(r" [1-9][\d.]* kB of bfloat16", capfd.readouterr().err)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"
    first = parameters(trained[1], step=1)
    differ(first, parameters(trained[1]))
    same(parameters(tmp_path / "out"), jax.tree.map(lambda x: x.astype("bfloat16").astype("float32"), first))


@pytest.mark.parametrize("of_config", [2, 5])
def test_other_tools_stop_where_the_model_stops(of_config, tmp_path):
    """The chat template ends turns with a token that neither file of the checkpoint names."""
    shutil.copytree(LLAMA, tmp_path / "llama")
    write_tokenizer(tmp_path / "llama")
    template = "{% for m in messages %}{{ m.role }} {{ m.content }}<unk>{% endfor %}"
    (tmp_path / "llama/chat_template.jinja").write_text(template)
    config = json.loads((tmp_path / "llama/config.json").read_text()) | {"eos_token_id": of_config}
    (tmp_path / "llama/config.json").write_text(json.dumps(config))
    tokenizer = loading.find(str(tmp_path / "llama")).tokenizer()
    assert tokenizer.stop == (2, 0)
    assert main(f"--model={tmp_path / 'llama'}", f"--output={tmp_path / 'out'}") == 0
    generation = json.loads((LLAMA / "generation_config.json").read_text())
    written = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert written == generation | {"eos_token_id": [2, 0]}
    assert json.loads((tmp_path / "out/config.json").read_text())["eos_token_id"] == 2
    assert loading.find(str(tmp_path / "out")).tokenizer().stop == (2, 0)
    assert transformers.GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == [2, 0]


def test_a_dtype_that_overflows_leaves_nothing_and_nan_is_said(tmp_path, capfd):
    shutil.copytree(LLAMA, tmp_path / "llama")
    file = tmp_path / "llama/model.safetensors"
    values = safetensors.numpy.load_file(file)
    values["model.norm.weight"][3] = -1e5
    safetensors.numpy.save_file(values, file)
    flags = (f"--model={tmp_path / 'llama'}", f"--output={tmp_path / 'out'}")
    assert main(*flags, "--dtype=float16") == 2
    error = capfd.readouterr().err
    assert error.startswith("error: model.norm.weight: its largest value is 100000, and float16 ends at 65504.")
    assert {p.name for p in tmp_path.iterdir()} == {"llama"}
    values["model.norm.weight"][3] = np.nan
    safetensors.numpy.save_file(values, file)
    assert main(*flags, "--dtype=float16") == 0
    assert "1 tensors hold NaN or infinity, model.norm.weight first" in capfd.readouterr().err


def test_an_import_is_exported_as_it_was(tmp_path, capfd):
    assert main(f"--model={LLAMA}", f"--output={tmp_path / 'out'}") == 0
    assert "comes without a tokenizer, and so does the export" in capfd.readouterr().err
    for file in LLAMA.glob("*.json"):
        assert json.loads((tmp_path / "out" / file.name).read_text()) == json.loads(file.read_text())
    same(parameters(tmp_path / "out"), parameters(LLAMA))
    assert {p.name for p in (tmp_path / "out").iterdir()} == {p.name for p in LLAMA.iterdir()}


def test_a_model_that_began_with_us_is_exported(trained, tmp_path):
    small = {"num_layers": 1, "d_model": 32, "num_heads": 4, "num_kv_heads": 2, "d_ff": 64, "max_length": 64}
    c = configure("", trained[2], model=small, ema_decay=0.5, mesh={})
    run.run(c, str(tmp_path / "run"), devices=jax.devices()[:1])
    assert main(f"--model={tmp_path / 'run'}", "--ema", f"--output={tmp_path / 'out'}") == 0
    same(parameters(tmp_path / "out"), parameters(tmp_path / "run", ema=True))
    differ(parameters(tmp_path / "out"), parameters(tmp_path / "run"))
    c = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    tokenizer = loading.load_model(str(tmp_path / "out")).tokenizer
    assert (c.model_type, c.eos_token_id, c.vocab_size) == ("llama", tokenizer.eos, 384)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs("né", add_special_tokens=False)["input_ids"] == list("né".encode()) == tokenizer.encode("né")


@pytest.mark.slow
def test_a_run_goes_on_when_what_it_began_with_is_gone(trained, tmp_path):
    began, workdir, data = trained
    shutil.copytree(workdir, tmp_path / "run")
    record = json.loads((tmp_path / "run/config.json").read_text().replace(str(began), str(tmp_path / "gone")))
    del record["digest"]  # it was changed on purpose
    (tmp_path / "run/config.json").write_text(json.dumps(record))
    run.run(configure(tmp_path / "gone", data, steps=3), str(tmp_path / "run"))
    assert checkpoint.steps(tmp_path / "run")[-1] == 3
    same(parameters(tmp_path / "run", step=2), parameters(workdir))
    assert main(f"--model={tmp_path / 'run'}", f"--output={tmp_path / 'out'}") == 0
    assert json.loads((tmp_path / "out/config.json").read_text()) == json.loads((began / "config.json").read_text())


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model=LLAMA", "--output=HERE"], ["--output = HERE", "is there already"]),
        (["--model=LLAMA"], ["--output: is missing"]),
        (["--output=HERE/out"], ["--model: is missing"]),
        (["--model=LLAMA", "--outptu=HERE/out"], ["--outptu: no such flag", "Did you mean '--output'"]),
        (["--model=LLAMA", "--output=HERE/out", "--max_shard_gb=0"], ["--max_shard_gb = 0", "above 0"]),
        (["--model=LLAMA", "--output=HERE/out", "--step=3"], ["--step", "LLAMA", "isn't the workdir"]),
        (["--model=RUN", "--output=HERE/out", "--step=7"], ["RUN", "7", "1, 2"]),
        (["--model=RUN", "--output=HERE/out", "--ema"], ["RUN", "ema"]),
        (["--model=HERE/none", "--output=HERE/out"], ["HERE/none: no such file or folder"]),
    ],
)
def test_what_can_not_be_exported_is_named_and_nothing_is_written(flags, words, trained, tmp_path, capfd):
    def fill(text):
        return text.replace("LLAMA", str(LLAMA)).replace("RUN", str(trained[1])).replace("HERE", str(tmp_path))

    assert main(*map(fill, flags)) == 2
    error = capfd.readouterr().err
    assert error.startswith("error: ")
    assert all(fill(word) in error for word in words), error
    assert not list(tmp_path.iterdir())
