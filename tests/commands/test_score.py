import functools
import gzip
import json
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research import params
from research.commands import score
from research.devices import sharding
from research.evals import record_scores
from research.loading import LoadedModel
from research.models.config import ModelConfig
from research.models.transformer import make_model
from research.sources import scores
from research.sources.tokenizers import TokenizerSpec, make_tokenizer

TOKENIZER = make_tokenizer(TokenizerSpec("byte"), lambda: iter(()))
V = 384  # the tokenizer's ids, padded
LONGEST = 64
MODEL = make_model(
    ModelConfig(vocab_size=V, num_layers=1, d_model=16, num_heads=2, num_kv_heads=2, d_ff=16, max_length=LONGEST)
)
HIDDEN = jax.jit(MODEL.hidden)
SCORER = functools.cache(functools.partial(record_scores.make_token_scorer, MODEL))  # compiled once for all tests


@pytest.fixture
def loaded(monkeypatch):
    """What load_model gives; the test may change it."""
    values = params.init(MODEL.specs, jax.random.key(0))
    values["embed"] *= 40.0
    model = types.SimpleNamespace(model=MODEL, params=values, tokenizer=TOKENIZER, template="chat")

    def load(name, *, step, ema, mesh, needs_tokenizer, adapter):
        placed = jax.device_put(model.params, params.shardings(MODEL.specs, mesh, sharding.RULES))
        return LoadedModel(**{**vars(model), "params": placed, "mesh": mesh})

    monkeypatch.setattr("research.loading.load_model", load)
    monkeypatch.setattr("research.devices.compilation.use_compilation_cache", lambda: None)
    monkeypatch.setattr(
        record_scores, "make_token_scorer", lambda model, batch_tokens: SCORER(batch_tokens=batch_tokens)
    )
    return model


@pytest.fixture
def run(loaded, tmp_path, capsys):
    """(text of the input, flags) -> status, the output's lines, stderr."""

    def run(text, *flags, output="y.jsonl"):
        (tmp_path / "x.jsonl").write_text(text)
        path = tmp_path / output
        status = score.main(["--model=m", f"--data={tmp_path / 'x.jsonl'}", f"--output={path}", *flags])
        lines = path.read_text().split("\n")[:-1] if path.exists() else None
        return status, lines, capsys.readouterr().err

    return run


def _lines(*records):
    return "".join(json.dumps(record) + "\n" for record in records)


def _logprobs(loaded, tokens):
    """Of all tokens but the first, by a softmax over the whole logits."""
    ids = np.zeros((1, LONGEST), np.int32)  # what comes after isn't seen
    ids[0, : len(tokens) - 1] = tokens[:-1]
    positions = np.arange(LONGEST, dtype=np.int32)[None]
    hidden = HIDDEN(loaded.params, {"tokens": ids, "segment_ids": np.ones_like(ids), "positions": positions})
    logits = hidden[0] @ MODEL.unembed(loaded.params).kernel
    return np.asarray(jax.nn.log_softmax(logits))[np.arange(len(tokens) - 1), np.array(tokens[1:])]


def test_all_kinds_of_records(run, loaded):
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    text = '{"text": "h\\u00e9llo", "id": 12345678901234567890, "x": 1.50e2}\n\n' + _lines(
        {"prompt": "a", "response": "bcd"}, {"messages": messages}, {"tokens": [5, 300, 9, 9], "perp": None}
    )
    status, lines, _ = run(text, "--per_token", "--batch_tokens=64")
    assert status == 0
    assert lines[0].startswith('{"text": "h\\u00e9llo", "id": 12345678901234567890, "x": 1.50e2, "count": 7, "loss": ')
    user, assistant = TOKENIZER.special("<|user|>"), TOKENIZER.special("<|assistant|>")
    bos, eos = TOKENIZER.bos, TOKENIZER.eos
    sequences = [
        ([bos, *"héllo".encode(), eos], 7),
        ([bos, user, *b"a", assistant, *b"bcd", eos], 4),
        ([bos, user, *b"hi", assistant, *b"yo", eos], 3),
        ([5, 300, 9, 9], 3),
    ]
    for line, (tokens, count) in zip(lines, sequences, strict=True):
        record = json.loads(line)
        expected = _logprobs(loaded, tokens)[-count:]
        assert record["count"] == count
        np.testing.assert_allclose(record["logprobs"], expected, atol=1e-5)
        assert record["loss"] == pytest.approx(-np.mean(expected, dtype=np.float64), abs=1e-5)
        assert record["perplexity"] == pytest.approx(math.exp(record["loss"]))
    assert list(json.loads(lines[3])) == ["tokens", "perp", "count", "loss", "perplexity", "logprobs"]
    _, lines, _ = run(text, output="z.jsonl")
    assert all("logprobs" not in json.loads(line) for line in lines)


def test_tokens_need_no_tokenizer(run, loaded):
    loaded.tokenizer = None
    status, lines, _ = run(_lines({"tokens": [1, 2, 3]}))
    assert (status, json.loads(lines[0])["count"]) == (0, 2)
    status, _, stderr = run(_lines({"tokens": [1, 2, 3]}, {"text": "a"}), output="z.jsonl")
    assert status == 2
    assert "x.jsonl:2: holds text, and the model has no tokenizer" in stderr


def test_other_files(run, loaded, tmp_path):
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write(_lines({"text": "one"}))
    (tmp_path / "b.json").write_text(json.dumps([{"text": "tw\u2028ö"}, {"text": "three"}], ensure_ascii=False))
    (tmp_path / "c.txt").write_text("four")
    for name, texts in (("a.jsonl.gz", ["one"]), ("b.json", ["tw\u2028ö", "three"]), ("c.txt", ["four"])):
        output = tmp_path / f"{name}.out"
        assert score.main(["--model=m", f"--data={tmp_path / name}", f"--output={output}"]) == 0
        records = [json.loads(line) for line in output.read_text().rstrip("\n").split("\n")]
        assert [record["text"] for record in records] == texts
        assert [record["count"] for record in records] == [len(text.encode()) + 1 for text in texts]


MANY = _lines(*({"text": "ab " * (i % 13 + 1), "i": i} for i in range(60)))
SMALL = ("--batch_tokens=8", "--mesh=fsdp=4,tensor=2")


@pytest.fixture
def few_at_once(monkeypatch):
    monkeypatch.setattr(record_scores, "_BATCHES_AT_ONCE", 8)


@pytest.mark.parametrize("torn", ['{"text": "torn and never end', "whole lines lost"])
def test_a_killed_run_goes_on(run, monkeypatch, tmp_path, few_at_once, torn):
    _, whole, _ = run(MANY, "--per_token", *SMALL, output="whole.jsonl")
    partial, line, calls = tmp_path / "y.jsonl.partial", record_scores._line, []

    def killed(*args):
        calls.append(args)
        if len(calls) == 33:
            raise KeyboardInterrupt
        return line(*args)

    monkeypatch.setattr(record_scores, "_line", killed)
    status, lines, stderr = run(MANY, "--per_token", *SMALL)
    assert (status, lines) == (130, None)
    assert "the same command goes on" in stderr
    done = partial.read_text().count("\n")
    assert 5 < done < 33
    if torn == "whole lines lost":  # within what was written at once
        partial.write_text("".join(partial.read_text().splitlines(keepends=True)[:-2]))
        done -= 2
    else:
        with partial.open("a") as file:
            file.write(torn)
    calls.clear()
    monkeypatch.setattr(record_scores, "_line", lambda *args: calls.append(args) or line(*args))
    status, lines, _ = run(MANY, "--per_token", *SMALL)
    assert status == 0
    assert len(calls) == 60 - done
    assert lines == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["whole.jsonl", "x.jsonl", "y.jsonl"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("data", "--data holds other records"),
        ("flag", "--per_token was False"),
        ("template", "--template, --on_long or the tokenizer gives other tokens"),
        ("weights", "--model has other weights"),
    ],
)
def test_another_command_does_not_go_on(run, loaded, monkeypatch, tmp_path, few_at_once, change, message):
    text = MANY + _lines({"prompt": "a", "response": "b"})
    monkeypatch.setattr(record_scores, "_line", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    assert run(text, *SMALL)[0] == 130
    monkeypatch.undo()
    if change == "weights":
        last = loaded.params["final_norm"]["scale"]
        loaded.params = {**loaded.params, "final_norm": {"scale": last.at[3].add(1e-6)}}
    loaded_again = LoadedModel(**vars(loaded), mesh=sharding.make_mesh({"fsdp": 4, "tensor": 2}))
    monkeypatch.setattr("research.loading.load_model", lambda *args, **kwargs: loaded_again)
    monkeypatch.setattr("research.devices.compilation.use_compilation_cache", lambda: None)
    flags = {"flag": ["--per_token"], "template": ["--template=plain"]}.get(change, [])
    status, lines, stderr = run(text.replace('"i": 7', '"i": 8') if change == "data" else text, *SMALL, *flags)
    assert (status, lines) == (2, None)
    assert f"y.jsonl.partial: was begun by another command: {message}" in stderr


def test_any_mesh_gives_the_same(run):
    results = []
    for i, mesh in enumerate(("data=8", "data=4,tensor=2")):
        _, lines, _ = run(MANY, f"--mesh={mesh}", "--batch_tokens=64", output=f"{i}.jsonl")
        results.append([json.loads(line)["loss"] for line in lines])
    np.testing.assert_allclose(*results, atol=1e-5)
    assert len(results[0]) == 60


def test_long_records(run, loaded):
    fits, long = "x" * (LONGEST - 1), "x" * 150
    status, _, stderr = run(_lines({"text": fits}, {"text": long}))
    assert status == 2
    assert "x.jsonl:2: has 152 tokens, and the model takes 64" in stderr
    _, lines, _ = run(_lines({"text": fits}, {"text": long}), "--on_long=truncate", "--per_token", output="t.jsonl")
    assert [json.loads(line)["count"] for line in lines] == [LONGEST, LONGEST]
    status, _, stderr = run(_lines({"prompt": long, "response": "a"}), "--on_long=truncate", output="n.jsonl")
    assert status == 2
    assert "x.jsonl:1: nothing of its first 65 tokens is to be scored" in stderr
    _, lines, _ = run(_lines({"text": long}), "--on_long=split", "--per_token", output="s.jsonl")
    tokens = [TOKENIZER.bos, *long.encode(), TOKENIZER.eos]
    expected = np.concatenate([_logprobs(loaded, tokens[:65]), _logprobs(loaded, tokens[64:129])])
    logprobs = json.loads(lines[0])["logprobs"]
    assert len(logprobs) == 151
    np.testing.assert_allclose(logprobs[:128], expected, atol=1e-5)
    np.testing.assert_allclose(logprobs[128:], _logprobs(loaded, tokens[-65:])[-23:], atol=1e-5)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text"', "x.jsonl:301: invalid JSON"),
        ("[]", "x.jsonl:301: holds a list"),
        ('{"prompt": "a"}', "x.jsonl:301: has the fields 'prompt', but needs 'text'"),
        ('{"tokens": [1]}', "x.jsonl:301: has no token to score"),
        ('{"text": "a", "loss": 1}', "x.jsonl:301: has a field 'loss' already"),
    ],
)
def test_a_faulty_line_is_named_before_anything_is_computed(run, tmp_path, line, message):
    status, lines, stderr = run(_lines(*[{"text": "fine"}] * 300) + line + "\n")
    assert (status, lines) == (2, None)
    assert message in stderr
    assert [path.name for path in tmp_path.iterdir()] == ["x.jsonl"]


def test_weights_that_are_no_numbers(run, loaded):
    loaded.params = jax.tree.map(lambda x: x * jnp.nan, loaded.params)
    status, lines, stderr = run(_lines({"text": "a"}))
    assert (status, lines) == (2, None)
    assert "x.jsonl:1: has loss nan" in stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--model, --data, --output: are missing"),
        (["--model=m", "--data=x"], "--output: is missing"),
        (["--modle=m"], "--modle: no such flag. Did you mean '--model'?"),
        (["--model=m", "--data=tasks:copy", "--output=y"], "--data = tasks:copy: is generated"),
        (["--model=m", "--data=none.jsonl", "--output=y"], "--data: there is no 'none.jsonl'"),
        (["--model=m", "--data=x", "--output=no/y"], "--output = no/y: there is no folder 'no'"),
        (["--model=m", "--data=x", "--output=pyproject.toml"], "--output = pyproject.toml: is there already"),
        (["--model=m", "--data=x", "--output=y", "--mesh=data"], "--mesh = data: 'data' is not of the form"),
        (["--model=m", "--data=x", "--output=y", "--batch_tokens=0"], "--batch_tokens = 0"),
        (["--model=m", "--data=pyproject.toml", "--output=y"], "--data: 'pyproject.toml' is of no known kind"),
    ],
)
def test_bad_flags(capsys, monkeypatch, request, flags, message):
    monkeypatch.chdir(request.config.rootpath)
    assert score.main(flags) == 2
    assert f"error: {message}" in capsys.readouterr().err


def test_a_mesh_that_cannot_be(run):
    status, _, stderr = run(MANY, "--mesh=data=3")
    assert status == 2
    assert "mesh: data=3" in stderr
    assert "mesh.date: no such mesh axis" in run(MANY, "--mesh=date=8")[2]


def test_an_empty_input(run):
    assert "holds no record" in run("\n")[2]


def test_means_are_of_scores_and_counts_alone(tmp_path):
    rows = [scores.row(("a", i), "00000000000000ff", (4, 2), {"ifd": i / 2, "good": True}, 3) for i in range(3)]
    (tmp_path / "s.jsonl").write_bytes(b"".join(rows))
    assert score._means(str(tmp_path / "s.jsonl"), reward=False, rows=True) == "tokens 4, supervised 2, ifd 0.5"
