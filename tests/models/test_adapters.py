"""Adapters beside a model: against PEFT's numbers, at their start, merged, and while decoding."""

import functools
import re

import goldens
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy

from research import loading, optim, params
from research.devices import sharding
from research.errors import InputError
from research.models import adapters, kernels, transformer
from research.models.adapters import lora
from research.models.config import ModelConfig
from research.ops import quantized

GOLDENS = goldens.load("peft")
GOLDENS_OF_TRAINING = goldens.load("trajectories")
FOLDER = goldens.pathlib.Path(__file__).parents[1] / "golden"
QV, ALL = "q|v", "all"
OPTIONS = {
    "lora_qv": {"rank": 4, "alpha": 8, "targets": QV},
    "lora_all_rslora": {"rank": 4, "alpha": 8, "rslora": True},
    "lora_all_bias_head": {"rank": 2, "alpha": 2, "also": "head"},
    "lora_embed": {"rank": 3, "alpha": 6, "targets": "embed|q"},
    "lora_rank_pattern": {
        "rank": 2,
        "alpha": 4,
        "targets": QV,
        "rank_pattern": {"layers/1/attention/q": 5},
        "alpha_pattern": {"layers/1/attention/q": 15},
    },
    "dora": {"rank": 4, "alpha": 8, "dora": True},
    "pissa": {"rank": 4, "alpha": 4, "targets": QV, "init": "pissa"},
    "ia3": {"kind": "ia3"},
    "vera": {"kind": "vera", "rank": 6, "targets": "q"},
}
PARTS = {"self_attn": "attention", "mlp": "mlp"}


def adapter_of(name):
    return adapters.load({"kind": "lora", **OPTIONS[name]})


@pytest.fixture(scope="module")
def base():
    """The checkpoint that the goldens are of, with its parameters."""
    found = loading.find(str(FOLDER / "hf_tiny/llama"))
    mesh = sharding.make_mesh({}, jax.devices()[:1])
    specs = transformer.make_model(found.config).specs
    return found.config, found.read(specs, params.shardings(specs, mesh))


@pytest.fixture(scope="module")
def bare(base):
    """(parameters, batch) -> logits of the checkpoint's model without an adapter."""
    return jax.jit(functools.partial(logits, transformer.make_model(base[0])))


def begun(base, adapter, seed=0):
    """A model with an adapter, and its parameters as they begin."""
    config, values = base
    model = transformer.make_model(config, adapter=adapter)
    drawn = params.init(model.specs, jax.random.PRNGKey(seed))
    own, _ = params.split(drawn, params.like(values, model.specs))
    _, added = params.split(drawn, params.like(own, model.specs))
    return model, loading.adapted(model, model.specs, params.join(values, added), jax.random.PRNGKey(seed))


def batch_of(case):
    mask = jnp.asarray(case.inputs["attention_mask"], jnp.int32)
    positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
    return {"tokens": jnp.asarray(case.inputs["input_ids"], jnp.int32), "segment_ids": mask, "positions": positions}


def logits(model, values, batch):
    return model.unembed(values).logits(model.hidden(values, batch))


def loss(out, labels):
    labels = jnp.asarray(labels, jnp.int32)[:, 1:]
    nll = optax.softmax_cross_entropy_with_integer_labels(out[:, :-1], jnp.maximum(labels, 0))
    return jnp.sum(jnp.where(labels >= 0, nll, 0)) / jnp.sum(labels >= 0).astype(jnp.float32)


def path_of(name):
    """PEFT's name of a tensor -> where ours is, and the layer."""
    name = re.sub(r"^base_model\.(model\.)?|\.default|\.weight$|\.modules_to_save", "", name)
    if match := re.fullmatch(r"model\.layers\.(\d+)\.(\w+)\.(\w+)_proj\.(\w+)", name):
        layer, part, target, leaf = match.groups()
        kind, own = {
            "lora_A": ("lora", "a"),
            "lora_B": ("lora", "b"),
            "lora_magnitude_vector": ("lora", "magnitude"),
            "ia3_l": ("ia3", "in" if target == "down" else "out"),
            "vera_lambda_b": ("vera", "out"),
            "vera_lambda_d": ("vera", "d"),
        }[leaf]
        return ("layers", PARTS[part], target, kind, own), int(layer)
    top = {
        "model.embed_tokens.lora_embedding_A": ("embed_lora", "a"),
        "model.embed_tokens.lora_embedding_B": ("embed_lora", "b"),
        "vera_A": ("vera", "a"),
        "vera_B": ("vera", "b"),
        "lm_head": ("head",),
    }
    return top[name], None


def put(values, path, layer, x):
    """The parameters with one of PEFT's tensors in the place of ours; columns beyond a lower rank are 0."""
    if path:
        return {**values, path[0]: put(values[path[0]], path[1:], layer, x)}
    old, x = values if layer is None else values[layer], np.asarray(x).T
    if x.size < old.size:  # of a layer of a lower rank than others: A [in, r] or B [r, out]
        narrow = x.shape[0] == old.shape[0]
        x = np.pad(x, [(0, 0), (0, old.shape[1] - x.shape[1])] if narrow else [(0, old.shape[0] - x.shape[0]), (0, 0)])
    x = jnp.asarray(x.reshape(old.shape))
    return x if layer is None else values.at[layer].set(x)


def loaded(values, name):
    """The parameters with those of one of PEFT's folders."""
    for key, x in safetensors.numpy.load_file(FOLDER / "peft_adapters" / name / "adapter_model.safetensors").items():
        if "base_layer" not in key:
            values = put(values, *path_of(key), x)
    return values


@pytest.mark.parametrize("name", OPTIONS)
def test_a_model_and_its_gradients_are_as_peft_has_them(base, bare, name):
    case, adapter = GOLDENS[name], adapter_of(name)
    batch, real = batch_of(case), np.asarray(case.inputs["attention_mask"]) > 0
    model, initial = begun(base, adapter)
    values = loaded(initial, name)
    masks = [params.matching(model.specs, pattern, as_written=False) for pattern in adapter.trained.values()]
    mask = jax.tree.map(lambda *each: any(each), *masks)
    specs, _ = params.split(model.specs, mask)
    assert params.count(specs) == case.outputs["n_trainable"]

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def measure(own, frozen):
        out = logits(model, params.join(own, frozen), batch)
        return loss(out, case.inputs["labels"]), out

    (_, out), _ = measure(*params.split(initial, mask))
    np.testing.assert_allclose(out[real], case.outputs["logits_at_init"][real], atol=1e-4)
    (value, out), grads = measure(*params.split(values, mask))
    np.testing.assert_allclose(out[real], case.outputs["logits"][real], atol=1e-4)
    whole = kernels.merge(values)
    assert jax.tree.structure(whole) == jax.tree.structure(base[1])
    np.testing.assert_allclose(bare(whole, batch)[real], case.outputs["merged_logits"][real], atol=1e-4)
    merged = np.asarray(whole["layers"]["attention"]["q"]["kernel"][0]).reshape(32, 32).T
    np.testing.assert_allclose(merged, case.outputs["merged_q0"], atol=1e-5)
    np.testing.assert_allclose(value, case.outputs["loss"], rtol=1e-5)
    norms = case.outputs["grad_norms"]
    assert len(norms) == sum(
        x.shape[0] if p[0].key == "layers" else 1 for p, x in jax.tree_util.tree_leaves_with_path(grads)
    )
    for key, norm in norms.items():
        path, layer = path_of(key)
        gradient = functools.reduce(lambda tree, part: tree[part], path, grads)
        gradient = gradient if layer is None else gradient[layer]
        if not (name == "lora_embed" and path[-1] == "b" and path[0] == "embed_lora"):
            np.testing.assert_allclose(jnp.linalg.norm(gradient.ravel()), norm, rtol=2e-4, atol=1e-6, err_msg=key)


def test_pissa_leaves_what_peft_leaves(base):
    case = GOLDENS["pissa"]
    _, values = begun(base, adapter_of("pissa"))
    q = jax.tree.map(lambda x: np.asarray(x[0]), values["layers"]["attention"]["q"])
    # What is stored as q0_residual is the merged kernel: PEFT had merged in place.
    residual = case.outputs["merged_q0"] - case.outputs["q0_lora_B"] @ case.outputs["q0_lora_A"]
    np.testing.assert_allclose(q["kernel"].reshape(32, 32).T, residual, atol=1e-5)
    best = np.asarray(base[1]["layers"]["attention"]["q"]["kernel"][0]).reshape(32, 32) - q["kernel"].reshape(32, 32)
    np.testing.assert_allclose(q["lora"]["a"].reshape(32, -1) @ q["lora"]["b"].reshape(-1, 32), best, atol=1e-5)


# At the start: what changes nothing bit for bit, and what changes nothing but for rounding.
SAME = {
    "lora": {"kind": "lora", "rank": 2, "bias": "all"},
    "gaussian": {"kind": "lora", "rank": 2, "init": "gaussian", "rank_pattern": {"q": 3}},
    "some layers": {"kind": "lora", "rank": 2, "targets": "layers/1/.*", "exclude": "down"},
    "ia3": {"kind": "ia3"},
    "vera": {"kind": "vera", "rank": 3},
    "bias": {"kind": "bias"},
    "norms": {"kind": "norms"},
    "head": {"kind": "head"},
    "layers": {"kind": "layers", "match": "layers/attention/.*"},
}
CLOSE = {
    "dora": {"kind": "lora", "rank": 2, "dora": True},
    "pissa": {"kind": "lora", "rank": 2, "init": "pissa", "rank_pattern": {"layers/0/attention/q": 4}},
    "olora": {"kind": "lora", "rank": 2, "init": "olora"},
    "orthogonal": {"kind": "lora", "rank": 4, "init": "orthogonal"},
    "pissa with dora": {"kind": "lora", "rank": 2, "init": "pissa", "dora": True},
}
SMALL = {"vocab_size": 64, "num_layers": 2, "d_model": 16, "num_heads": 4, "num_kv_heads": 2, "d_ff": 24}
MODELS = {
    "llama": {"tie_embeddings": False},
    "gpt2": {"mlp": "gelu", "norm": "layernorm", "attention_bias": True, "attention_out_bias": True, "mlp_bias": True}
    | {"tie_embeddings": False},
}
# Llama's maps, norms and head are others than those of GPT-2; what begins in another way is of the same ones.
CASES = [(name, "gpt2") for name in (*SAME, *CLOSE)]
CASES += [(name, "llama") for name in ("lora", "ia3", "norms", "head", "dora", "pissa")]
compiled = functools.cache(jax.jit)


@functools.cache
def without(**fields):
    """A random model, and its parameters."""
    config = ModelConfig(**{**SMALL, **fields})
    plain = transformer.make_model(config)
    return config, plain, params.init(plain.specs, jax.random.PRNGKey(1))


def small(adapter, **fields):
    """A random model with an adapter that has moved from its start, the model without, and the parameters of both."""
    config, plain, values = without(**fields)
    model, own = begun((config, values), adapters.load(adapter))
    return model, own, plain, values


def moved(model, values):
    """The parameters with noise on all that the adapter adds or trains."""
    masks = [params.matching(model.specs, pattern, as_written=False) for pattern in model.adapter.trained.values()]
    trained, rest = params.split(values, jax.tree.map(lambda *each: any(each), *masks))
    leaves, structure = jax.tree.flatten(trained)
    noisy = [x + 0.03 * jax.random.normal(jax.random.PRNGKey(i), x.shape) for i, x in enumerate(leaves)]
    return params.join(structure.unflatten(noisy), rest)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nf4"])
def test_loftq_makes_up_for_what_quantising_loses(kind):
    """What the model computes is nearer to the float base than that of its quantised kernels alone, as each map is."""
    adapter = adapters.load({"kind": "lora", "rank": 4, "init": "loftq"})
    config = ModelConfig(**SMALL, tie_embeddings=False, head_dim=8)
    plain, model = transformer.make_model(config), transformer.make_model(config, adapter=adapter)
    values = params.init(plain.specs, jax.random.PRNGKey(1))
    _, added = params.split(params.init(model.specs, jax.random.PRNGKey(0)), params.like(values, model.specs))
    specs = quantized.held_in(model.specs, kind)
    begun = loading.adapted(model, specs, params.join(values, added), jax.random.PRNGKey(0))
    held = quantized.hold(values, quantized.held_in(plain.specs, kind))
    assert kind in begun["layers"]["mlp"]["up"]["kernel"]
    for part, name in (("attention", "q"), ("attention", "o"), ("mlp", "down")):
        p, wanted = begun["layers"][part][name], values["layers"][part][name]["kernel"]
        alone = quantized.read(held["layers"][part][name]["kernel"], jnp.float32) - wanted
        beside = quantized.read(p["kernel"], jnp.float32) + kernels.low_rank(p["lora"], wanted.shape) - wanted
        assert jnp.linalg.norm(beside.ravel()) < 0.8 * jnp.linalg.norm(alone.ravel())
    wanted, alone, beside = plain.hidden(values, BATCH), plain.hidden(held, BATCH), model.hidden(begun, BATCH)
    assert jnp.linalg.norm((beside - wanted).ravel()) < 0.8 * jnp.linalg.norm((alone - wanted).ravel())


TOKENS = np.random.default_rng(0).integers(0, 64, (2, 12)).astype(np.int32)
BATCH = {
    "tokens": TOKENS,
    "segment_ids": np.ones_like(TOKENS),
    "positions": np.tile(np.arange(12, dtype=np.int32), (2, 1)),
}


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_nothing_changes_at_the_start_and_merged_is_as_apart(name, kind):
    adapter = {**SAME, **CLOSE}[name]
    if kind == "llama" and name == "lora":  # it has no biases
        adapter = {**adapter, "bias": "none"}
    model, own, plain, values = small(adapter, **MODELS[kind])
    beside, alone = compiled(model.hidden), compiled(plain.hidden)
    got, wanted = beside(own, BATCH), alone(values, BATCH)
    if name in SAME:
        np.testing.assert_array_equal(got, wanted)
    else:
        np.testing.assert_allclose(got, wanted, atol=2e-5)
    own = moved(model, own)
    got = beside(own, BATCH)
    assert np.abs(got - wanted).max() > 1e-2 or name == "head"
    whole = kernels.merge(own)
    assert jax.tree.structure(whole) == jax.tree.structure(plain.specs, is_leaf=params.is_spec)
    np.testing.assert_allclose(alone(whole, BATCH), got, atol=1e-5)


MORE = {
    "experts": ({"kind": "lora", "rank": 2}, {"num_experts": 3, "tie_embeddings": False}),
    "embedding": ({"kind": "lora", "rank": 2, "targets": "embed|q"}, {"tie_embeddings": False}),
}


def build(name):
    """What `small` gives for one of SAME, CLOSE and MORE."""
    adapter, fields = MORE.get(name, ({**SAME, **CLOSE}.get(name), MODELS["gpt2"]))
    return small(adapter, **fields)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lora", "some layers", "ia3", "vera", "bias", "dora", *MORE])
def test_decoding_is_as_training_reads(name):
    model, own, _, _ = build(name)
    own = moved(model, own)
    wanted = model.hidden(own, BATCH)
    cache, mask = model.init_cache(2, 12), np.tril(np.ones((12, 12), bool))
    apart, got = model.unstack(own), []
    for t in (slice(0, 7), slice(7, 8), slice(8, 12)):
        args = TOKENS[:, t], BATCH["positions"][:, t], jnp.tile(jnp.asarray(mask[t])[None], (2, 1, 1))
        x, cache = model.decode(apart, *map(jnp.asarray, args), cache, t.start)
        got.append(x)
    np.testing.assert_allclose(jnp.concatenate(got, axis=1), wanted, atol=2e-5)


@pytest.mark.parametrize("name", MORE)
def test_merged_is_as_apart(name):
    model, own, plain, _ = build(name)
    own = moved(model, own)
    whole = kernels.merge(own)
    assert jax.tree.structure(whole) == jax.tree.structure(plain.specs, is_leaf=params.is_spec)
    np.testing.assert_allclose(plain.hidden(whole, BATCH), model.hidden(own, BATCH), atol=1e-5)


def test_layers_of_a_lower_rank_keep_their_zeros():
    adapter = {"kind": "lora", "rank": 2, "rank_pattern": {"layers/1/attention/q": 3}}
    model, own, _, _ = small(adapter, tie_embeddings=False)
    lora = own["layers"]["attention"]["q"]["lora"]
    assert lora["a"].shape == (2, 16, 3)
    assert not np.any(lora["a"][0, :, 2])
    assert np.any(lora["a"][1, :, 2])
    assert params.count(model.specs["layers"]["attention"]["q"]["lora"]["a"]) == 16 * 5
    grads = jax.jit(jax.grad(lambda own: jnp.sum(jnp.square(model.hidden(own, BATCH)))))(
        params.put(own, {"layers": {"attention": {"q": {"lora": {"b": lora["b"].at[:, :2].set(1.0).at[1].set(1.0)}}}}})
    )["layers"]["attention"]["q"]["lora"]
    assert not np.any(grads["a"][0, :, 2])
    assert not np.any(grads["b"][0, 2])
    assert np.any(grads["a"][1, :, 2])


def test_weight_decay_spares_a_and_b_unless_asked():
    specs = small({"kind": "lora", "rank": 2, "also": "head"}, tie_embeddings=False)[0].specs
    decays = params.decay_mask(specs)
    assert not decays["layers"]["attention"]["q"]["lora"]["a"]
    assert decays["layers"]["attention"]["q"]["kernel"]
    assert decays["head"]
    asked = small({"kind": "lora", "rank": 2, "decay": True}, tie_embeddings=False)[0].specs
    assert params.decay_mask(asked)["layers"]["attention"]["q"]["lora"]["b"]


def test_the_norm_of_dora_has_no_gradient():
    """The gradient of B is as if the norm were a number (arXiv:2402.09353, section 4.3)."""
    _, own, _, _ = small(CLOSE["dora"], tie_embeddings=False)
    p = jax.tree.map(lambda x: x[0], own["layers"]["mlp"]["up"])
    p = {**p, "lora": {**p["lora"], "b": p["lora"]["b"] + 0.3}}
    x = jax.random.normal(jax.random.PRNGKey(0), (3, 16))
    ratio = p["lora"]["magnitude"] / jnp.linalg.norm(p["kernel"] + kernels.low_rank(p["lora"], (16, 24)), axis=0)

    def fixed(b):
        low = {**p["lora"], "b": b}
        return jnp.sum(jnp.square(x @ (p["kernel"] + kernels.low_rank(low, (16, 24))) * ratio[None]))

    def ours(b):
        return jnp.sum(jnp.square(kernels.linear({**p, "lora": {**p["lora"], "b": b}}, x)))

    one, two = (jax.jit(jax.grad(f))(p["lora"]["b"]) for f in (ours, fixed))
    np.testing.assert_allclose(one, two, rtol=1e-4)


def test_dropout_leaves_out_its_share():
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.PRNGKey(0), jnp.arange(4))
    x = jnp.ones((4, 50, 40))
    y = kernels.dropped(x, keys, jnp.asarray(0.25))
    assert set(np.unique(y)) == {0.0, np.float32(1 / 0.75)}
    assert abs(float(jnp.mean(y == 0)) - 0.25) < 0.02
    np.testing.assert_array_equal(kernels.dropped(x[2:], keys[2:], jnp.asarray(0.25)), y[2:])


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ({"kind": "lor"}, "adapter.kind = 'lor': .* Did you mean 'lora'"),
        ({"kind": "lora", "rang": 3}, "adapter.rang: no such option. Did you mean 'rank'"),
        ({"kind": "lora", "rank": 2.0}, "adapter.rank = 2.0: must be of type int"),
        ({"kind": "lora", "rank": 0}, "adapter.rank = 0: must be at least 1"),
        ({"kind": "lora", "dropout": 1.0}, "adapter.dropout = 1.0"),
        ({"kind": "lora", "alpha": 0.0}, "adapter.alpha = 0.0: must be above 0"),
        ({"kind": "lora", "rank": 2, "bias": "all"}, "adapter.bias = 'all': the model has no biases"),
        ({"kind": "bias", "add": False}, "adapter.add = False: the model has no biases"),
        ({"kind": "lora", "init": "zeros"}, "adapter.init = 'zeros': no such choice"),
        ({"kind": "lora", "rank": 3, "init": "orthogonal"}, "adapter.init = 'orthogonal': wants one even rank"),
        (
            {"kind": "lora", "rank": 2, "targets": "q|w"},
            "adapter.targets = 'q.w': 'w' matches none .*layers/attention/q",
        ),
        ({"kind": "lora", "rank": 2, "targets": "head"}, "adapter.targets = 'head': .* also = .head."),
        ({"kind": "lora", "rank": 2, "exclude": "embed"}, "adapter.exclude = 'embed': matches none"),
        ({"kind": "lora", "rank": 2, "rank_pattern": {"w": 3}}, "adapter.rank_pattern = 'w': matches none"),
        ({"kind": "lora", "rank": 17}, "adapter.rank = 17: is more than layers/attention/q can have"),
        ({"kind": "lora", "rank": 2, "targets": "embed"}, "adapter.targets = 'embed': the embedding is the head too"),
        ({"kind": "layers"}, "adapter.match: is missing"),
        ({"kind": "ia3", "targets": "layers/1/attention/k"}, "adapter.targets = .*: names some layers"),
    ],
)
def test_what_cannot_be_honoured_is_refused(adapter, message):
    def make():
        beside = adapters.load(adapter)
        with adapters.naming_fields():
            transformer.make_model(ModelConfig(**SMALL), adapter=beside)

    with pytest.raises(InputError, match=message):
        make()


def test_a_training_goes_as_peft_trains(base):
    """AdamW with decay of A and B, a cosine after two steps of warm-up, and clipping."""
    case = GOLDENS_OF_TRAINING["lora_llama"]
    options = {"kind": "lora", "rank": 4, "alpha": 8, "targets": "q|v|down", "decay": True}
    model, values = begun(base, adapters.load(options))
    for name, x in case.inputs.items():
        if name.startswith("lora_A_init/"):
            values = put(values, *path_of("base_model.model." + name.removeprefix("lora_A_init/")), x)
    trained, frozen = params.split(values, params.matching(model.specs, lora.LEAVES, as_written=False))
    specs, _ = params.split(model.specs, params.matching(model.specs, lora.LEAVES, as_written=False))
    spec = optim.OptimizerSpec(learning_rate=0.01, warmup_steps=2, weight_decay=0.01, b2=0.999)
    optimizer = optim.make_optimizer(spec, 8, params.decay_mask(specs))
    state, labels = optimizer.init(trained), case.inputs["labels"]

    @jax.jit
    def step(trained, state, batch, labels):
        f = lambda own: loss(logits(model, params.join(own, frozen), batch), labels)  # noqa: E731
        value, grads = jax.value_and_grad(f)(trained)
        updates, state = optimizer.update(grads, state, trained)
        return optax.apply_updates(trained, updates), state, value, optax.tree.norm(grads)

    for i, (wanted, norm) in enumerate(zip(case.outputs["loss"], case.outputs["grad_norm"], strict=True)):
        inputs = {name: np.asarray(case.inputs[name][i]) for name in ("input_ids", "attention_mask")}
        batch = batch_of(case._replace(inputs=inputs))
        trained, state, value, found = step(trained, state, batch, labels[i])
        np.testing.assert_allclose([value, found], [wanted, norm], rtol=1e-4, err_msg=f"step {i}")
    probe = jnp.asarray(case.inputs["probe_ids"], jnp.int32)
    batch = batch_of(case._replace(inputs={"input_ids": probe, "attention_mask": np.ones(probe.shape)}))
    final = jax.jit(functools.partial(logits, model))(params.join(trained, frozen), batch)
    np.testing.assert_allclose(final, case.outputs["final_probe_logits"], atol=1e-3)
