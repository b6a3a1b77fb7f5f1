"""The split of parameters into trained and frozen, by name and by layer."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research import params
from research.devices import sharding
from research.errors import InputError
from research.models.transformer import ModelConfig, make_model

CONFIG = ModelConfig(
    vocab_size=64, num_layers=5, d_model=16, num_heads=2, num_kv_heads=1, d_ff=16, max_length=32, tie_embeddings=False
)
MODEL = make_model(CONFIG)
VALUES = jax.jit(lambda key: params.init(MODEL.specs, key))(jax.random.PRNGKey(0))
TOKENS = jax.random.randint(jax.random.PRNGKey(1), (2, 12), 0, 64)
BATCH = {
    "tokens": TOKENS,
    "segment_ids": jnp.ones((2, 12), jnp.int32),
    "positions": jnp.broadcast_to(jnp.arange(12, dtype=jnp.int32)[None], (2, 12)),
}


def names(tree):
    return {params.path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree, is_leaf=params.is_spec)}


@pytest.mark.parametrize(
    ("pattern", "pieces", "trained"),
    [
        ("head", None, {"head"}),
        ("layers/.*_norm/.*", None, {"layers/attention_norm/scale", "layers/mlp_norm/scale"}),
        ("layers/3/attention/q/.*", ["0-2", "3", "4"], {"layers/3/attention/q/kernel"}),
        ("layers/[01]/mlp_norm/.*|head", ["0-1", "2-4"], {"layers/0-1/mlp_norm/scale", "head"}),
        (r"layers/\d/mlp_norm/.*", None, {"layers/mlp_norm/scale"}),
    ],
)
def test_a_pattern_names_parameters_of_all_layers_or_of_some(pattern, pieces, trained):
    specs = params.cut(MODEL.specs, pattern)
    ours, rest = params.split(specs, params.matching(specs, pattern))
    assert names(ours) == trained
    assert not names(ours) & names(rest)
    assert params.count(ours) + params.count(rest) == params.count(MODEL.specs)
    assert params.join(ours, rest) == specs == params.join(rest, ours)
    assert pieces is None or sorted(specs["layers"]) == pieces
    assert pieces is not None or specs == MODEL.specs


def test_an_empty_pattern_is_everything_and_the_other_tree_is_empty():
    ours, rest = params.split(MODEL.specs, params.matching(MODEL.specs, ""))
    assert (ours, rest) == (MODEL.specs, {})


def test_a_pattern_that_matches_nothing_names_what_there_is():
    with pytest.raises(InputError, match=r"trainable = 'layers/5/.*': matches none of .* embed, final_norm/scale, .*"):
        params.matching(MODEL.specs, "layers/5/.*")
    with pytest.raises(InputError, match=r"of one layer alone: layers/0/\.\.\. to layers/4/\.\.\."):
        params.matching(MODEL.specs, "haed")
    with pytest.raises(InputError, match=r"of one layer alone: value/layers/0/\.\.\. to value/layers/4/\.\.\.\)"):
        params.matching({"value": MODEL.specs}, "haed", field="optimizer.groups.a.match")
    with pytest.raises(InputError, match=r"roles.value.trainable = '\(': is no regular expression"):
        params.matching(MODEL.specs, "(", field="roles.value.trainable")


@pytest.mark.parametrize(
    ("pattern", "part"), [("layers/1/.*|haed", "haed"), ("layers/[12]/.*|layers/9/.*", "layers/9/.*")]
)
def test_an_alternative_that_matches_nothing_is_an_error(pattern, part):
    with pytest.raises(InputError) as error:
        params.matching(params.cut(MODEL.specs, pattern), pattern)
    assert str(error.value).startswith(f"trainable = {pattern!r}: {part!r} matches none of the parameters")
    params.matching(MODEL.specs, "embed|final_norm/.*")


@pytest.mark.parametrize(
    ("pattern", "part"),
    [
        ("layers/(attention/(q|w)|mlp/up)/kernel", "w"),
        ("(?:embed|haed)", "haed"),
        ("embed|final_norm/(scale|bias)", "bias"),
        (r"layers/(\d/)?(attention|mlp)/(q|gate|norm)/kernel", "norm"),
    ],
)
def test_an_alternative_of_a_group_that_matches_nothing_is_an_error(pattern, part):
    with pytest.raises(InputError) as error:
        params.matching(params.cut(MODEL.specs, pattern), pattern)
    assert str(error.value).startswith(f"trainable = {pattern!r}: {part!r} matches none of the parameters")
    params.matching(params.cut(MODEL.specs, pattern), pattern, as_written=False)


@pytest.mark.parametrize(
    "pattern",
    [
        "layers/(?!mlp|x).*",
        "(layers|attention|q|/|x)*kernel",
        r"layers/(attention|mlp)/(q|up)/kernel",
        "[e|x]mbed|head",
    ],
)
def test_what_is_no_alternative_of_a_plain_group_is_not_asked_for(pattern):
    params.matching(MODEL.specs, pattern)


def test_each_alternative_is_named_with_the_expression_that_has_it_alone():
    assert params.alternatives("a(b|c(?:d|e))f|g") == [
        ("a(b|c(?:d|e))f", "a(b|c(?:d|e))f"),
        ("g", "g"),
        ("b", "a(?:b)f"),
        ("c(?:d|e)", "a(?:c(?:d|e))f"),
        ("d", "a(?:c(?:d))f"),
        ("e", "a(?:c(?:e))f"),
    ]
    assert params.alternatives(r"(a|b)\1") == params.alternatives("(a)") == params.alternatives(r"\(a[|)]\)") == []


def test_the_head_of_tied_embeddings_is_named():
    specs = {name: spec for name, spec in MODEL.specs.items() if name != "head"}
    with pytest.raises(InputError, match=r"trainable = 'head': .* Where embeddings are tied .*, the head is 'embed'\."):
        params.matching(specs, "head")


def test_layers_of_a_role_whose_name_ends_in_layers_are_told_apart():
    pattern = "sublayers/layers/3/.*"
    specs = params.cut(MODEL.specs, pattern, prefix="sublayers/")
    mask = params.matching({"sublayers": specs}, pattern)["sublayers"]
    assert sorted(params.split(specs, mask)[0]["layers"]) == ["3"]


def test_two_trees_with_the_same_leaf_are_not_joined():
    with pytest.raises(ValueError, match="'a' is in two"):
        params.join({"a": 1}, {"a": 2})
    assert params.overlay({"a": 1, "b": {"c": 2, "d": 3}}, {"b": {"c": 4}}) == {"a": 1, "b": {"c": 4, "d": 3}}


@pytest.mark.slow
@pytest.mark.parametrize("window", [(0,), (4, 0), (4, 4, 0)])
def test_a_model_in_pieces_computes_the_same(window):
    """Forward passes with the states that are asked for, gradients, attention's inputs, and the weights of decoding."""
    model = make_model(dataclasses.replace(CONFIG, sliding_window=window))
    specs = params.cut(model.specs, "layers/[13]/.*")
    cut = params.in_pieces(VALUES, specs)
    assert sorted(cut["layers"]) == ["0", "1", "2", "3", "4"]
    jax.tree.map(np.testing.assert_array_equal, params.stacked(cut), VALUES)

    def run(values):
        hidden, states = model.hidden_at(values, BATCH, (0, 2, -1))
        return jnp.sum(hidden) + jnp.sum(states[1]), (hidden, states)

    step = jax.jit(jax.value_and_grad(run, has_aux=True))
    (_, whole), whole_gradient = step(VALUES)
    (_, pieces), gradient = step(cut)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)  # noqa: E731
    jax.tree.map(close, pieces, whole)
    jax.tree.map(close, params.stacked(gradient), whole_gradient)
    for layer in (2, 4):
        ours, theirs = (model.attention_inputs(v, whole[1][1], BATCH, layer) for v in (cut, VALUES))
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    jax.tree.map(np.testing.assert_array_equal, model.unstack(cut), model.unstack(VALUES))


def test_a_step_makes_no_stack_of_pieces():
    """The largest stacked kernel is nowhere in the program."""
    cut = jax.eval_shape(lambda v: params.in_pieces(v, params.cut(MODEL.specs, "layers/2/.*")), VALUES)
    text = jax.jit(jax.grad(lambda v: jnp.sum(MODEL.hidden(v, BATCH)))).lower(cut).as_text()
    assert "tensor<5x16x16xf32>" not in text
    assert "tensor<2x16x16xf32>" in text


def test_a_piece_can_be_cut_again():
    once = params.cut(MODEL.specs, "layers/[12]/.*")
    assert sorted(once["layers"]) == ["0", "1-2", "3-4"]
    twice = params.cut(once, "layers/[23]/mlp/.*")
    assert sorted(twice["layers"]) == ["0", "1", "2", "3", "4"]
    assert params.cut(once, "head") == once
    assert params.cut(once, "policy/layers/2/.*", prefix="policy/").keys() == once.keys()


def test_a_fingerprint_is_that_of_pieces_of_bfloat16_and_of_a_mesh_and_tells_other_values_apart():
    whole = params.fingerprint(VALUES)
    specs = params.cut(MODEL.specs, "layers/2/.*")
    cut = params.in_pieces(VALUES, specs)
    mesh = sharding.make_mesh({"data": 2, "fsdp": 4})
    sharded = jax.device_put(cut, params.shardings(specs, mesh))
    half = jax.tree.map(lambda x, s: x.astype(s.dtype), cut, params.held_in(specs, "bfloat16"))
    for values in (cut, sharded, half):
        marks = params.fingerprint(values)
        assert marks.keys() == whole.keys()
        for name, (total, norm) in marks.items():
            np.testing.assert_allclose([total, norm], whole[name], atol=1e-5 * whole[name][1])
    assert "layers/4/mlp/up/kernel" in whole
    other = params.fingerprint(jax.tree.map(lambda x: x + 1e-5 * jnp.sign(jnp.sin(1e4 * x)), VALUES))
    assert any(abs(other[name][0] - total) > 1e-4 * norm for name, (total, norm) in whole.items())


def test_a_part_is_put_back_into_whole_stacks():
    specs = params.cut(MODEL.specs, "layers/[23]/mlp/.*|head")
    trained, _ = params.split(params.in_pieces(VALUES, specs), params.matching(specs, "layers/[23]/mlp/.*|head"))
    wiped = jax.tree.map(jnp.zeros_like, VALUES)
    back = jax.jit(params.put)(wiped, trained)
    np.testing.assert_array_equal(back["head"], VALUES["head"])
    kernel = back["layers"]["mlp"]["up"]["kernel"]
    np.testing.assert_array_equal(kernel[2:4], VALUES["layers"]["mlp"]["up"]["kernel"][2:4])
    assert not np.any(kernel[:2])
    assert not np.any(back["layers"]["attention"]["q"]["kernel"])
    assert (
        params.named(MODEL.specs, trained) == params.split(specs, params.matching(specs, "layers/[23]/mlp/.*|head"))[0]
    )
