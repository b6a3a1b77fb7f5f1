"""Each checkpoint of tests/golden computes what transformers computes with it: logits, loss, gradients, greedy text."""

import dataclasses
import functools
import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import goldens
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from research import params
from research.devices import sharding
from research.models import transformer
from research.models.config import ModelConfig
from research.models.generation import make_generate
from research.models.sampling import SamplingConfig
from research.objectives import next_token
from research.objectives.types import Forward
from research.pretrained import load, save

GOLDEN = Path(goldens.__file__).parent / "golden"
CASES = goldens.load("checkpoints")
GENERATORS = [name for name, case in CASES.items() if "greedy_tokens" in case.outputs]
# Programs that take long to compile run for what is unlike the rest by default, and for all with -m slow.
DECODED = ["hf_tiny/gemma3_text", "hf_tiny/gpt2", "hf_tiny/gpt_neox", "hf_tiny/phi3_longrope", "hf_tiny/qwen3_moe"]
DERIVED = ["hf_tiny/gemma2", "hf_tiny/mixtral"]
CLASSIFIERS = ["hf_tiny/llama_seqcls", "hf_tiny/llama_reward", "hf_tiny/qwen2_seqcls"]
PROMPT = 6  # tokens of greedy_tokens


class Opened(NamedTuple):
    found: load.Pretrained
    model: transformer.Model
    params: Any


@functools.cache
def opened(name: str) -> Opened:
    found = load.open_pretrained(str(GOLDEN / name))
    model = transformer.make_model(found.config)
    mesh = sharding.make_mesh({}, jax.devices()[:1])
    return Opened(found, model, load.load(found, model.specs, params.shardings(model.specs, mesh)))


def rows(tokens, segment_ids, positions=None, **fields):
    """A batch; without positions, those of one document that begins each row."""
    tokens, segment_ids = np.asarray(tokens), np.asarray(segment_ids)
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape) if positions is None else positions
    batch = {"tokens": tokens, "segment_ids": segment_ids, "positions": positions, **fields}
    return {name: jnp.asarray(x, jnp.int32) for name, x in batch.items()}


@functools.cache
def program(config: ModelConfig):
    """jitted (parameters, batch) -> logits; one for all checkpoints of the same config."""
    model = transformer.make_model(config)

    @jax.jit
    def logits(values, batch):
        head = model.unembed(values)
        x = model.hidden(values, batch) @ head.kernel
        if head.bias is not None:
            x = x + head.bias[None, None]
        return head.softcap * jnp.tanh(x / head.softcap) if head.softcap else x

    return logits


def logits_of(name, batch):
    return np.asarray(program(opened(name).model.config)(opened(name).params, batch))


@functools.cache
def generator(config: ModelConfig, new_tokens: int):
    return make_generate(transformer.make_model(config), SamplingConfig(max_new_tokens=new_tokens))


def mostly_slow(names, quick):
    return [pytest.param(name, marks=() if name in quick else pytest.mark.slow) for name in names]


def close(ours, theirs):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", GENERATORS)
def test_logits_padded_and_packed(name):
    given, theirs = CASES[name].inputs, CASES[name].outputs["logits"]
    full = rows(given["input_ids"], np.ones_like(given["input_ids"]))
    right = rows(given["right_padded_ids"], given["right_mask"])
    left = rows(given["left_padded_ids"], given["left_mask"], given["left_position_ids"])
    (a, b), ids = (9, 5), given["input_ids"]
    documents = np.concatenate([ids[1:2, :a], ids[2:3, :b]], axis=1)
    packed = rows(documents, [[1] * a + [2] * b], [[*range(a), *range(b)]])
    batch = {key: jnp.concatenate([part[key] for part in (full, right, left, packed)]) for key in full}
    in_full, in_right, in_left, in_packed = np.split(logits_of(name, batch), [3, 6, 9])
    close(in_full, theirs)
    seen = given["right_mask"] == 1
    close(in_right[seen], theirs[seen])
    close(in_left[given["left_mask"] == 1], CASES[name].outputs["left_padded_logits"])
    close(in_packed[0, :a], theirs[1, :a])
    close(in_packed[0, a:], theirs[2, :b])


@pytest.mark.parametrize("name", mostly_slow(GENERATORS, DERIVED))
def test_loss_and_the_gradient_of_every_tensor(name, tmp_path):
    """The gradient is written as a checkpoint, so that its arrays have the names and layouts of transformers."""
    found, model, values = opened(name)
    batch, objective = rows(CASES[name].inputs["right_padded_ids"], CASES[name].inputs["right_mask"]), next_token.make()

    @jax.jit
    @jax.value_and_grad
    def step(values):
        out = objective.loss(Forward({"policy": model}, {"policy": values}, batch), batch, None)
        return out.loss_sum / out.weight

    loss, gradient = step(values)
    assert float(loss) == pytest.approx(CASES[name].outputs["loss"], rel=1e-5)
    save.save(tmp_path, found.family, found.config, gradient, lambda name: "float32", 10**9)
    ours = {k: np.linalg.norm(g) for k, g in safetensors.numpy.load_file(tmp_path / "model.safetensors").items()}
    theirs = CASES[name].outputs["grad_norms"]
    same = ours.keys() & theirs.keys()  # transformers 5 holds all experts of a layer as one
    assert len(same) > 10
    assert {k: ours[k] for k in same} == pytest.approx({k: theirs[k] for k in same}, rel=2e-4, abs=1e-5)
    assert sum(g**2 for g in ours.values()) == pytest.approx(sum(g**2 for g in theirs.values()), rel=2e-4)


@pytest.mark.parametrize("name", mostly_slow(GENERATORS, DECODED))
def test_greedy_continuation(name):
    _, model, values = opened(name)
    theirs = CASES[name].outputs["greedy_tokens"][None]
    generate = generator(model.config, theirs.shape[1] - PROMPT)
    out = generate(values, theirs[:, :PROMPT], np.full(1, PROMPT, np.int32), jax.random.key(0))
    assert out.tokens.tolist() == theirs[:, PROMPT:].tolist()


def test_an_encoder_with_kinds_of_segments():
    given, theirs = CASES["hf_tiny/bert_mlm"].inputs, CASES["hf_tiny/bert_mlm"].outputs["logits"]
    batch = rows(given["input_ids"], given["attention_mask"], token_types=given["token_type_ids"])
    seen = given["attention_mask"] == 1
    close(logits_of("hf_tiny/bert_mlm", batch)[seen], theirs[seen])


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classifiers_and_reward_models_at_the_last_token(name):
    given = CASES[name].inputs
    out = logits_of(name, rows(given["input_ids"], given["attention_mask"]))
    last = given["attention_mask"].sum(axis=1) - 1
    close(out[np.arange(len(last)), last], CASES[name].outputs["logits"])


def test_a_checkpoint_in_bfloat16():
    ids = CASES["hf_tiny/llama_bf16"].inputs["input_ids"]
    close(logits_of("hf_tiny/llama_bf16", rows(ids, np.ones_like(ids))), CASES["hf_tiny/llama_bf16"].outputs["logits"])


# Last logits of tests/golden/hf_tiny/gpt2 with other fields of config.json, by transformers 5.24.0 (eager, float32).
SCALED = {
    "by layer": (
        {"scale_attn_by_inverse_layer_idx": True},
        [0.54505074, -1.11004317, -2.56967592, 1.40410006, 4.62930346, -2.60526657],
    ),
    "by layer, upcast": (
        {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True},
        [0.54505026, -1.11004341, -2.56967568, 1.40410006, 4.62930346, -2.60526681],
    ),
    "not at all": (
        {"scale_attn_weights": False},
        [0.84080917, -1.07563269, -2.66830921, 1.03574395, 5.50627756, -2.49610901],
    ),
}


def scaled(folder, fields):
    """GPT-2's checkpoint with other fields."""
    shutil.copytree(GOLDEN / "hf_tiny/gpt2", folder)
    config = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps(config))
    return opened(str(folder))


@pytest.mark.parametrize("name", SCALED)
def test_the_scale_of_gpt_2s_scores(name, tmp_path):
    """Logits are those of transformers, in one pass and a token at a time; an export says the scale again."""
    fields, expected = SCALED[name]
    model, values = (each := scaled(tmp_path / "model", fields)).model, each.params
    tokens = np.arange(1, 13)[None]
    logits = np.asarray(program(model.config)(values, rows(tokens, np.ones_like(tokens))))
    close(logits[0, -1, :6], expected)

    @jax.jit
    def one_at_a_time(values):
        layers, cache, states = model.unstack(values), model.init_cache(1, 12), []
        for i in range(12):
            mask = (jnp.arange(12) <= i)[None, None]
            x, cache = model.decode(layers, tokens[:, i : i + 1], jnp.full((1, 1), i), mask, cache, i)
            states.append(x)
        return jnp.concatenate(states, axis=1) @ model.unembed(values).kernel

    close(one_at_a_time(values), logits)
    assert save.choose(model.config, {})[1].items() >= {k: v for k, v in fields.items() if "reorder" not in k}.items()


@pytest.mark.slow
def test_scores_divided_by_the_layer_are_queries_divided_by_it(tmp_path):
    """Also where layers are read in periods, where a pass stops between them, and in the gradient."""
    c = dataclasses.replace(opened("hf_tiny/gpt2").model.config, num_layers=5, sliding_window=(3, 0))
    model = transformer.make_model(dataclasses.replace(c, attention_scale_by_layer=True))
    plain = transformer.make_model(c)
    values = params.init(plain.specs, jax.random.key(0))
    tokens = np.arange(1, 11)[None]
    batch = rows(tokens, np.ones_like(tokens))

    def folded(values):
        divisor = jnp.arange(1, 6, dtype=jnp.float32)
        q = {
            name: w / divisor.reshape(-1, *[1] * (w.ndim - 1)) for name, w in values["layers"]["attention"]["q"].items()
        }
        return {**values, "layers": {**values["layers"], "attention": {**values["layers"]["attention"], "q": q}}}

    total = lambda model, values: jnp.sum(model.hidden_at(values, batch, (1, 4))[0] ** 3)  # noqa: E731
    ours, gradient = jax.jit(jax.value_and_grad(lambda values: total(model, values)))(values)
    theirs, expected = jax.jit(jax.value_and_grad(lambda values: total(plain, folded(values))))(values)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    assert abs(ours / jax.jit(lambda values: total(plain, values))(values) - 1) > 1e-4, "it makes a difference"
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), gradient, expected)
    state = jnp.ones((1, 10, c.d_model))
    queries = [m.attention_inputs(values, state, batch, 4)[0] for m in (model, plain)]
    np.testing.assert_allclose(queries[0] * 4, queries[1], rtol=1e-6)
