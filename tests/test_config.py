"""A config that names a checkpoint takes its architecture."""

import dataclasses
import json

import pytest

from research import config
from research.errors import InputError
from research.models.config import ModelConfig
from research.ops.rope import RopeScaling

BASE = ModelConfig(
    vocab_size=96, num_layers=2, d_model=32, num_heads=4, num_kv_heads=2, d_ff=56, max_length=64, mlp="geglu",
    norm_eps=1e-5, rope_theta=5e5, tie_embeddings=False, rope_scaling=RopeScaling("linear", 2.0), sliding_window=(4, 0),
)  # fmt: skip


def with_architecture(base=BASE, **model):
    parsed = config.parse({"model": {"init_from": "there", **model}})
    return config.with_architecture(parsed, base, "there")


def test_the_checkpoint_decides_what_the_config_leaves_open():
    merged = with_architecture()
    assert config.model_config(merged, 96, backend="cpu") == BASE
    again = config.parse(json.loads(json.dumps(config.to_dict(merged))))  # as a run that goes on reads it
    assert config.model_config(again, 96, backend="cpu") == BASE
    assert again.model.init_from == "there"


def test_what_changes_no_parameter_may_be_set():
    free = {"remat": "full", "attention": "reference", "dtype": "bfloat16", "max_length": 128, "rope_theta": 1e6}
    free |= {"sliding_window": (8,), "logit_softcap": 30.0, "norm_eps": 1e-4, "init_std": 0.1}
    scaling = {"kind": "yarn", "factor": 4.0, "original_length": 64}
    merged = config.model_config(with_architecture(**free, rope_scaling=scaling), 96)
    assert merged == dataclasses.replace(BASE, **free, rope_scaling=RopeScaling(**scaling))


def test_a_prefix_lm_goes_on_as_one_or_as_a_causal_model():
    base = dataclasses.replace(BASE, prefix=True)
    goes_on = {said: config.model_config(with_architecture(base, prefix=said), 96) for said in (None, True, False)}
    assert {said: model.prefix for said, model in goes_on.items()} == {None: True, True: True, False: False}
    assert config.model_config(config.parse({}), 96).prefix is False


def test_what_agrees_with_the_checkpoint_may_be_said():
    said = with_architecture(d_model=32, mlp="geglu", vocab_size=96)
    assert config.model_config(said, 96, backend="cpu") == BASE


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"d_model": 64}, r"model\.d_model = 64, .* there, has 32\. Leave it"),
        ({"num_layers": 3}, r"model\.num_layers = 3, .* has 2"),
        ({"mlp": "gelu"}, r"model\.mlp = 'gelu', .* has 'geglu'"),
        ({"vocab_size": 128}, r"model\.vocab_size = 128, .* has 96"),
        ({"qk_norm": "head"}, r"model\.qk_norm = 'head', .* has 'none'"),
        ({"d_ff": "wide"}, r"model\.d_ff = 'wide': must be of type int"),
    ],
)
def test_what_asks_for_other_parameters_is_named(model, words):
    with pytest.raises(InputError, match=words):
        with_architecture(**model)


def test_learned_positions_are_parameters():
    learned = dataclasses.replace(BASE, positions="learned", rope_scaling=RopeScaling())
    with pytest.raises(InputError, match=r"model\.max_length = 128, .* has 64"):
        with_architecture(learned, max_length=128)
