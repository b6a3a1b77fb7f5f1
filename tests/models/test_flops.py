"""FLOPs of a step, counted by hand: of a model that is trained, in part or not at all, and of what lies beside it."""

import dataclasses

import jax
import pytest

from experiments import base
from research import config as config_lib
from research.models import flops
from research.models.config import ModelConfig
from research.planning import abstract
from research.run import checks, window

# Of each layer of the debug model: D 64, 4 query and 2 key/value heads of 16, F 128, gated; V 512, T 128.
MAPS = [(64, 64), (64, 32), (64, 32), (64, 64), (64, 128), (64, 128), (128, 64)]  # q, k, v, o, up, gate, down
LAYER = sum(i * o for i, o in MAPS)
HEAD, ATTENTION = 64 * 512, 4 * 4 * 16 * 128 // 2  # forward, causal: half of the keys
L = 2


def counted(**changes):
    """role -> FLOPs of a token of a run."""
    config = base.debug(base.get_config())
    config.objective = {"terms": {"next_token": 1.0}}
    config.tokenizer.kind = "byte"
    config.model.update(vocab_size=512, tie_embeddings=False)
    config.eval.generate = 0
    for name, value in changes.items():
        config[name] = value
    run = abstract.describe(config_lib.parse(config.to_dict()), jax.devices()[:1])
    with jax.set_mesh(run.mesh):
        return run.assemble().roles.flops(128)


def test_what_a_rollout_reads_is_shared_by_its_epochs_and_is_no_part_of_an_update():
    config = base.debug(base.get_config())
    config.tokenizer.kind, config.data.pack, config.eval.generate = "byte", False, 0
    config.model.vocab_size = 512
    config.rewards = {"reward_model": 1.0, "length": {"most": 8}}
    config.rollout.update(prompts=2, epochs=4)
    config.objective = {"terms": {"policy_gradient": {"kl_coef": 0.1}, "value": 0.5}}
    config.advantage.update(kind="critic", scale="none")
    config.roles = {"reference": {}, "critic": {"num_labels": 1}, "reward": {"num_labels": 1}}
    run = abstract.describe(config_lib.parse(config.to_dict()), jax.devices()[:1])
    with jax.set_mesh(run.mesh):
        parts = run.assemble()
    each = parts.roles.flops(128)
    assert each.keys() == {"policy", "reference", "critic", "reward"}
    updates = each["policy"].total + each["critic"].total
    assert each["critic"].backward > 0
    assert window.flops_per_token(run.config, parts) == updates + (each["reference"].total + each["reward"].total) / 4
    assert checks.roles_of_updates(parts.terms, parts.models) >= {"policy", "critic"}
    assert not checks.roles_of_updates(parts.terms, parts.models) & {"reference", "reward"}


def test_all_that_is_trained_takes_three_times_the_forward_pass():
    policy = counted()["policy"]
    assert policy.forward == 2 * (L * LAYER + HEAD) + L * ATTENTION
    assert policy.backward == 2 * policy.forward


@pytest.mark.parametrize("frozen_dtype", ["auto", "int8", "nf4"])
def test_a_frozen_base_has_no_gradient_by_its_weights(frozen_dtype):
    policy = counted(adapter={"kind": "lora", "rank": 4}, frozen_dtype=frozen_dtype)["policy"]
    low = 4 * sum(i + o for i, o in MAPS)
    assert policy.forward == 2 * (L * (LAYER + low) + HEAD) + L * ATTENTION
    assert policy.backward == 2 * (L * (LAYER + low) + HEAD) + 2 * L * ATTENTION + 2 * L * low


def test_nothing_goes_below_the_lowest_layer_that_is_trained():
    one = counted(adapter={"kind": "lora", "rank": 4, "targets": "layers/1/mlp/down"})["policy"]
    low = 4 * (128 + 64)
    assert one.forward == 2 * (L * LAYER + low + HEAD) + L * ATTENTION
    assert one.backward == 2 * (LAYER + low + HEAD) + 2 * ATTENTION + 2 * low
    assert counted(trainable="head")["policy"].backward == 2 * HEAD
    assert counted(trainable="layers/1/.*")["policy"].backward == 2 * (LAYER + HEAD) + 2 * ATTENTION + 2 * LAYER


def test_what_has_no_weights_of_its_own_is_passed_by_gradients_alone():
    plain = counted()["policy"].forward
    for adapter in ({"kind": "ia3"}, {"kind": "norms"}, {"kind": "prompt", "tokens": 3}):
        assert counted(adapter=adapter)["policy"] == (plain, plain + L * ATTENTION), adapter
    prefix = counted(adapter={"kind": "prefix", "tokens": 3})["policy"]
    assert prefix == (plain + L * 4 * 64 * 3, plain + 2 * L * 4 * 64 * 3 + L * ATTENTION)
    vera = counted(adapter={"kind": "vera", "rank": 4})["policy"]
    low = 2 * L * 4 * sum(i + o for i, o in MAPS)
    assert vera == (plain + low, plain + low + L * ATTENTION)


def test_roles_that_are_not_trained_make_a_forward_pass():
    reference = {"of": "policy", "adapter": False}
    both = counted(
        adapter={"kind": "lora", "rank": 4},
        objective={"terms": {"distill": 1.0}},
        roles={"teacher": reference},
    )
    assert both["teacher"] == (counted()["policy"].forward, 0)
    assert both["policy"] == counted(adapter={"kind": "lora", "rank": 4})["policy"]


def test_windows_experts_and_classes_count_as_what_a_token_meets():
    c = ModelConfig(
        vocab_size=4096, num_layers=6, d_model=256, num_heads=8, num_kv_heads=4, d_ff=768, tie_embeddings=False
    )
    attention = 256 * 256 * 2 + 2 * 256 * 128
    weights = 6 * (attention + 3 * 256 * 768) + 256 * 4096
    assert flops.of_training(c, 256) == 6 * weights + 6 * 6 * 256 * 256
    assert flops.of_training(dataclasses.replace(c, tie_embeddings=True), 256) == flops.of_training(c, 256)
    windowed = flops.of_training(dataclasses.replace(c, sliding_window=(32,)), 256)
    assert 6 * weights < windowed < flops.of_training(c, 256)
    mixture = dataclasses.replace(c, num_experts=4, experts_per_token=2)
    more = 6 * 6 * (3 * 256 * 768 + 4 * 256)  # a second expert, and the router
    assert flops.of_training(mixture, 256) == flops.of_training(c, 256) + more
