"""Prompt tuning, p-tuning and prefix tuning give what PEFT's do."""

import goldens
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import soft_prompts
from soft_prompts import logits, rows

from research import optim, params
from research.errors import InputError
from research.models import adapters, virtual
from research.models.adapters import prompt
from research.objectives import sft
from research.objectives.types import Forward

CASES = goldens.load("peft")
KINDS = {
    "prompt_tuning": {"kind": "prompt", "tokens": 5},
    "p_tuning_mlp": {"kind": "p_tuning", "tokens": 4, "hidden": 20},
    "prefix_tuning": {"kind": "prefix", "tokens": 4},
    "prefix_tuning_mlp": {"kind": "prefix", "tokens": 4, "projection": True},
}


def affine(outputs, name):
    weight, bias = (jnp.asarray(outputs[f"reparam/default.{name}.{part}"]) for part in ("weight", "bias"))
    return {"kernel": weight.T, "bias": bias}


def put(name, values, outputs):
    """The parameters with those of PEFT's adapter in their places."""
    if name == "prompt_tuning":
        return {**values, "prompt": {"rows": jnp.asarray(outputs["saved_prompt_embeddings"])}}
    if name == "p_tuning_mlp":
        maps = {own: affine(outputs, f"mlp_head.{i}") for own, i in (("inner", 0), ("middle", 2), ("outer", 4))}
        return {**values, "prompt": {"embed": jnp.asarray(outputs["reparam/default.embedding.weight"]), **maps}}
    L, _, K, h = values["layers"]["attention"]["k"]["kernel"].shape
    if name == "prefix_tuning":
        keys, entries = virtual.from_entries(jnp.asarray(outputs["saved_prompt_embeddings"]), (L, 4, K, h))
        prefix, more = {"keys": keys, "values": entries}, {}
    else:
        outer = affine(outputs, "transform.2")
        kernel, bias = outer["kernel"].reshape(-1, L, 2, K, h), outer["bias"].reshape(L, 2, K, h)
        prefix = {}
        for i, part in enumerate(("keys", "values")):
            prefix |= {f"{part}_kernel": kernel[:, :, i].swapaxes(0, 1), f"{part}_bias": bias[:, i]}
        embed = jnp.asarray(outputs["reparam/default.embedding.weight"])
        more = {"prefix_encoder": {"embed": embed, "inner": affine(outputs, "transform.0")}}
    layers = {**values["layers"], "attention": {**values["layers"]["attention"], "prefix": prefix}}
    return {**values, "layers": layers, **more}


def flat(tree):
    return {params.path_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_logits_loss_gradients_and_counts_are_those_of_peft(name):
    case, (c, base) = CASES[name], soft_prompts.llama()
    model, values = soft_prompts.with_adapter(c, base, **KINDS[name])
    drawn = jax.tree.map(jnp.shape, values)
    values = put(name, values, case.outputs)
    assert jax.tree.map(jnp.shape, values) == drawn
    own = params.matching(model.specs, "|".join(model.adapter.trained.values()))
    specs, _ = params.split(model.specs, own)
    assert params.count(specs) == case.outputs["n_trainable"]
    inputs, count = case.inputs, model.virtual_tokens
    batch = rows(inputs["input_ids"], inputs["attention_mask"], c.vocab_size, count)
    real = np.asarray(batch["segment_ids"]) > 0
    np.testing.assert_allclose(logits(model, values, batch)[real], case.outputs["logits"][real], atol=2e-5)
    batch["loss_mask"] = jnp.asarray(np.pad(inputs["labels"] != -100, ((0, 0), (count, 0))), jnp.float32)
    trained, rest = params.split(values, own)

    def loss(trained):
        forward = Forward({"policy": model}, {"policy": params.join(trained, rest)}, batch)
        out = sft.make().loss(forward, batch, None)
        return out.loss_sum / out.weight

    value, grads = jax.value_and_grad(loss)(trained)
    np.testing.assert_allclose(value, case.outputs["loss"], rtol=1e-5)
    names = {"weight": "kernel"}
    theirs = {tuple(key.split(".")[2:]): x for key, x in case.outputs["grad_norms"].items()}
    squares = {key: float(jnp.sum(jnp.square(x))) for key, x in flat(grads).items()}
    total = sum(x**2 for x in theirs.values())
    np.testing.assert_allclose(sum(squares.values()), total, rtol=1e-4)
    pairs = {"mlp_head.0": "inner", "mlp_head.2": "middle", "mlp_head.4": "outer", "transform.0": "inner"}
    for parts, norm in theirs.items():
        own = pairs.get(".".join(parts[:-1]))
        if own:
            top = "prompt" if name == "p_tuning_mlp" else "prefix_encoder"
            square = squares[f"{top}/{own}/{names.get(parts[-1], parts[-1])}"]
            np.testing.assert_allclose(square**0.5, norm, rtol=1e-4)
    if name.startswith("prefix"):
        np.testing.assert_allclose(virtual.entries(values), case.outputs["saved_prompt_embeddings"], atol=1e-6)
    else:
        final = virtual.realized(values)["prompt"]["rows"]
        np.testing.assert_allclose(final, case.outputs["saved_prompt_embeddings"], atol=1e-6)


@pytest.mark.parametrize("name", ["prompt_text_init_3_8", "prompt_text_init_6_4"])
def test_a_text_longer_or_shorter_than_the_prompt_is_cut_or_repeated(name):
    case, (c, base) = CASES[name], soft_prompts.llama()
    ids = case.inputs["init_token_ids"].tolist()
    count = case.hparams["num_virtual_tokens"]
    model, _ = soft_prompts.with_adapter(c, base, kind="prompt", tokens=count)
    begun = prompt.Begin("text", count, ids, 90)(base, jax.random.key(0), model)
    np.testing.assert_array_equal(begun["prompt"]["rows"], case.outputs["embedding"])


class Ids:
    """A tokenizer of texts that are numbers."""

    size = 90

    def encode(self, text):
        return [int(word) for word in text.split()]


def test_rows_of_the_vocabulary_are_rows_of_the_tokenizers_tokens():
    c, base = soft_prompts.llama()
    _, values = soft_prompts.with_adapter(c, base, tokenizer=Ids(), kind="prompt", tokens=50, init="vocabulary")
    distance = jnp.abs(values["prompt"]["rows"][:, None] - base["embed"][None]).max(axis=2)
    assert jnp.all(distance.min(axis=1) == 0)
    assert len(set(distance.argmin(axis=1).tolist())) > 20
    assert distance.argmin(axis=1).max() < 90


@pytest.mark.parametrize(
    "spec",
    [
        *KINDS.values(),
        {"kind": "prompt", "tokens": 2, "init": "text", "text": "5 6 7"},
        {"kind": "prompt", "tokens": 2, "init": "vocabulary"},
        {"kind": "prefix", "tokens": 3, "init": "zero"},
        {"kind": "prefix", "tokens": 3, "init": "text", "text": "5 6"},
    ],
)
def test_the_output_changes_at_init(spec):
    c, base = soft_prompts.llama()
    model, values = soft_prompts.with_adapter(c, base, tokenizer=Ids(), **spec)
    ids = np.arange(12).reshape(2, 6) + 3
    batch = rows(ids, np.ones_like(ids))
    before = logits(model, base, batch)
    after = jnp.matmul(virtual.hidden(model, values, batch), base["head"], precision="highest")
    assert jnp.abs(after - before).max(axis=2).min() > 1e-3


@pytest.mark.slow
def test_a_text_as_a_prompt_or_as_a_prefix_is_as_if_it_came_before():
    c, base = soft_prompts.llama()
    text, ids = "5 9 11 40", np.arange(14).reshape(2, 7) + 3
    whole = np.concatenate([np.broadcast_to(Ids().encode(text), (2, 4)), ids], axis=1)
    batch = rows(ids, np.ones_like(ids))
    for kind in ("prompt", "prefix"):
        model, values = soft_prompts.with_adapter(c, base, tokenizer=Ids(), kind=kind, tokens=4, init="text", text=text)
        expected = model.hidden(base, rows(whole, np.ones_like(whole)))[:, 4:]
        np.testing.assert_allclose(virtual.hidden(model, values, batch), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"kind": "prompt", "tokens": 0}, r"adapter.tokens = 0"),
        ({"kind": "prompt", "init": "texts"}, r"adapter.init = 'texts': no such choice.* 'text'"),
        ({"kind": "prompt", "init": "text"}, r"adapter.text = ''"),
        ({"kind": "prefix", "text": "a"}, r"adapter.text = 'a': is of init = 'text'"),
        ({"kind": "prefix", "init": "zero", "projection": True}, r"adapter.init = 'zero': is of keys"),
        ({"kind": "prefix", "hidden": 3}, r"adapter.hidden = 3: is of projection"),
        ({"kind": "p_tuning", "tokenizer": 3}, r"adapter.tokenizer: no such option"),
        ({"kind": "prompt", "tokenizer": 3}, r"adapter.tokenizer: no such option"),
        ({"kind": "p_tuning", "hidden": -1}, r"adapter.hidden = -1"),
    ],
)
def test_options_that_cannot_be_used_are_refused(spec, words):
    with pytest.raises(InputError, match=words):
        adapters.load(spec)


def test_a_training_with_virtual_tokens_goes_as_with_peft():
    case, (c, base) = goldens.load("trajectories")["prompt_tuning_llama"], soft_prompts.llama()
    model, _ = soft_prompts.with_adapter(c, base, kind="prompt", tokens=5, decay=True)
    own = params.matching(model.specs, "|".join(model.adapter.trained.values()))
    specs, _ = params.split(model.specs, own)
    settings = optim.OptimizerSpec(
        learning_rate=case.hparams["lr"],
        warmup_steps=2,
        weight_decay=case.hparams["weight_decay"],
        clip_norm=case.hparams["max_grad_norm"],
        b2=0.999,
    )
    optimizer = optim.make_optimizer(settings, 8, params.decay_mask(specs))
    trained = {"prompt": {"rows": jnp.asarray(case.inputs["prompt_init"])}}

    @jax.jit
    def step(trained, state, batch):
        def loss(trained):
            forward = Forward({"policy": model}, {"policy": {**base, **trained}}, batch)
            out = sft.make().loss(forward, batch, None)
            return out.loss_sum / out.weight

        value, grads = jax.value_and_grad(loss)(trained)
        updates, state = optimizer.update(grads, state, trained, ok=jnp.bool_(True))
        return optax.apply_updates(trained, updates), state, value, optax.tree.norm(grads)

    state, losses, norms = optimizer.init(trained), [], []
    for i in range(8):
        batch = rows(case.inputs["input_ids"][i], case.inputs["attention_mask"][i], c.vocab_size, 5)
        labels = np.pad(case.inputs["labels"][i] != -100, ((0, 0), (5, 0)))
        batch["loss_mask"] = jnp.asarray(labels, jnp.float32)
        trained, state, value, norm = step(trained, state, batch)
        losses.append(value)
        norms.append(norm)
    np.testing.assert_allclose(losses, case.outputs["loss"], rtol=1e-4)
    np.testing.assert_allclose(norms, case.outputs["grad_norm"], rtol=1e-3)
    ids = case.inputs["probe_ids"]
    probe = logits(model, {**base, **trained}, rows(ids, np.ones_like(ids), c.vocab_size, 5))
    np.testing.assert_allclose(probe, case.outputs["final_probe_logits"], atol=2e-3)
