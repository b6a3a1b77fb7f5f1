"""Runs with rewards: they go on as if uninterrupted, however they are cut; and what they refuse."""

import dataclasses

import jax
import numpy as np
import pytest
from runs import Finished, parameters, small

from research.errors import InputError
from research.models import transformer
from research.planning import abstract
from research.run import metrics, run

DATA = {"path": "tasks:copy", "examples": 40, "pack": False}
MODEL = {"num_layers": 1, "d_model": 32, "num_heads": 2, "num_kv_heads": 2, "d_ff": 64}
NEVER = {"exact_match": 1.0, "length": {"most": 3, "over": 4, "weight": 0.5}}
WAYS = {
    # 4 updates a rollout: the checkpoint after the third is in the middle of the second epoch.
    "epochs": {
        "seed": 1,  # not all answers of the first rollout get one reward
        "rollout": {
            "prompts": 4,
            "answers": 4,
            "epochs": 2,
            "max_new_tokens": 6,
            "filter_rounds": 1,
            "temperature": 0.8,
        },
        "objective": {"terms": {"policy_gradient": {"old": "trainer", "kl_coef": 0.1}}},
        "roles": {"reference": {"of": "policy"}},
        "trainable": "layers/.*",
        "advantage": {"kind": "ema", "scale": "batch", "whiten": "tokens"},
    },
    "adapter": {
        "adapter": {"kind": "lora", "rank": 2},
        "roles": {"reference": {"of": "policy", "adapter": False}},
        "objective": {"terms": {"policy_gradient": {"kl_coef": 0.1}, "sft": {"weight": 0.1, "sources": ["copy"]}}},
        "data": {
            "path": "",
            "sources": {"copy": {"path": "tasks:copy"}, "reverse": {"path": "tasks:reverse"}},
            "examples": 40,
            "pack": False,
        },
        "rollout": {"prompts": 4, "answers": 4, "max_new_tokens": 6, "top_k": 0, "slots": 4},
    },
    "virtual": {
        "adapter": {"kind": "prompt", "tokens": 3},
        "rollout": {"answers": 4, "max_new_tokens": 6},
        "rewards": {"length": {"unit": "characters", "most": 1, "over": 8}},
        "advantage": {"kind": "greedy", "scale": "none"},
    },
    "critic": {
        "rollout": {"prompts": 4, "answers": 4, "max_new_tokens": 6},
        "objective": {"terms": {"policy_gradient": 1.0, "value": 0.5}},
        "roles": {"critic": {"of": "policy", "num_labels": 1}, "reference": {"of": "policy"}},
        "trainable": "layers/.*",
        "advantage": {"kind": "critic", "scale": "none", "kl": {"weight": 0.1, "target": 0.5, "horizon": 20}},
        "optimizer": {"groups": {"policy": {"match": "policy/.*", "delay_steps": 2}}},
    },
    # 2 updates a rollout: the checkpoint after the third is in the middle of the second, and the third one waits.
    "ahead": {
        "rollout": {"prompts": 4, "answers": 4, "max_new_tokens": 6, "filter_rounds": 1, "ahead": True},
        "advantage": {"kind": "ema", "scale": "none"},
    },
    "pairs": {
        "rollout": {"prompts": 16, "answers": 3, "max_new_tokens": 6, "pairs": True, "ahead": True},
        "objective": {"terms": {"preference": {"beta": 0.5, "sft": 0.1}}},
        "roles": {"reference": {"of": "policy"}},
        "trainable": "layers/.*",
        "rewards": {"length": {"unit": "characters", "most": 1, "over": 8}},
        "seq_len": 48,
    },
    # As "critic", in two rollouts of two updates each.
    "shared": {
        "rollout": {"prompts": 4, "answers": 4, "max_new_tokens": 6, "shared_prompts": True},
        "objective": {"terms": {"policy_gradient": {"old": "trainer"}, "value": 0.5}},
        "adapter": {"kind": "prompt", "tokens": 3},
        "roles": {"critic": {"of": "policy", "num_labels": 1}},
        "advantage": {"kind": "critic", "scale": "none"},
        "rewards": {"length": {"unit": "characters", "most": 1, "over": 8}},
    },
    "masked": {"rollout": {"answers": 4, "max_new_tokens": 1, "truncated": "mask"}, "steps": 2, "seed": 1},
}


def config_of(name, **fields):
    base = {
        "steps": 5,
        "batch_size": 8,
        "data": DATA,
        "model": MODEL,
        "rewards": NEVER,
        "objective": {"terms": {"policy_gradient": 1.0}},
        "checkpoint": {"every": 3, "keep_last": 9},
        "eval": {"every": 5, "generate": 2, "max_new_tokens": 4},
    }
    return small(**{**base, **WAYS[name], **fields})


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return Finished(tmp_path_factory, config_of)


@pytest.mark.slow
def test_resumed_in_the_middle_of_the_epochs_is_uninterrupted(finished, tmp_path):
    """The answers that are trained on after the checkpoint, the running mean and the next prompts are in it."""
    finished.check_resumed("epochs", tmp_path)
    lines = [line for line in metrics.read_metrics(str(finished("epochs"))) if "train/loss" in line]
    assert [line["train/rollout/staleness"] for line in lines] == [0, 1, 2, 3, 0]
    assert ["train/reward" in line for line in lines] == [True, False, False, False, True]
    assert max(line.get("train/rollout/log_prob_gap", 0) for line in lines) < 1e-5
    assert lines[0]["train/ratio"] == pytest.approx(1, abs=1e-4)
    assert lines[0]["train/grad_norm"] > 0
    told = [s for s in metrics.read_samples(str(finished("epochs"))) if s["name"] == "rollout"]
    assert {s["step"] for s in told} == {5}  # none is written before the first step
    assert all(s["prompt"].startswith("copy: ") for s in told)
    assert all(isinstance(a["text"], str) and a["reward"] is not None for s in told for a in s["answers"])
    again = [line for line in metrics.read_metrics(str(tmp_path / "half")) if "train/loss" in line]
    same = lambda line: {k: v for k, v in line.items() if "seconds" not in k and "/mfu" not in k}  # noqa: E731
    assert [same(line)["train/loss"] for line in again] == [same(line)["train/loss"] for line in lines]
    assert again[-1]["train/reward"] == lines[-1]["train/reward"]


@pytest.mark.slow
def test_a_rollout_that_is_drawn_ahead_is_in_checkpoints(finished, tmp_path):
    """What is logged of it too, and how many updates its policy lies behind."""
    finished.check_resumed("ahead", tmp_path)
    whole, again = (
        [line for line in metrics.read_metrics(str(folder)) if "train/loss" in line]
        for folder in (finished("ahead"), tmp_path / "half")
    )
    assert [line["train/rollout/staleness"] for line in whole] == [0, 1, 2, 3, 2]
    for name in ("train/reward", "train/rollout/tokens", "train/rollout/filtered", "train/rollout/staleness"):
        assert [line.get(name) for line in again] == [line.get(name) for line in whole]
    assert whole[0]["train/ratio"] == pytest.approx(1, abs=1e-4)
    assert abs(whole[2]["train/ratio"] - 1) > 1e-4  # of the policy two updates ago
    assert whole[2]["train/rollout/seconds/generation"] > 0


@pytest.mark.slow
def test_pairs_of_the_policy_s_answers(finished, tmp_path):
    finished.check_resumed("pairs", tmp_path)
    lines = [line for line in metrics.read_metrics(str(finished("pairs"))) if "train/loss" in line]
    assert lines[0]["train/preference_loss"] == pytest.approx(np.log(2), abs=1e-4)
    assert lines[0]["train/rollout/agreeing"] < 0.5
    assert max(abs(line["train/margin"]) for line in lines[:2]) < 1e-4  # the learning rate of the first update is 0
    assert min(abs(line["train/margin"]) for line in lines[2:]) > 1e-4
    assert min(line["train/grad_norm"] for line in lines) > 0
    assert not any(name.startswith("eval/loss") for line in lines for name in line)


@pytest.mark.slow
def test_a_critic_learns_before_the_policy_moves(finished, tmp_path):
    """And the weight of the KL in the reward, which the controller changes, is in checkpoints."""
    finished.check_resumed("critic", tmp_path)
    lines = [line for line in metrics.read_metrics(str(finished("critic"))) if "train/loss" in line]
    assert [line["train/learning_rate/policy"] > 0 for line in lines] == [False, False, True, True, True]
    rollouts = [line for line in lines if "train/reward" in line]
    kl, weight = ([line[f"train/rollout/{name}"] for line in rollouts] for name in ("kl", "kl_weight"))
    assert kl[:2] == pytest.approx([0, 0], abs=1e-6)  # the policy hasn't moved yet
    assert weight == pytest.approx([0.1, 0.1 * (1 - 0.2 * 16 / 20), 0.1 * (1 - 0.2 * 16 / 20) ** 2])
    losses = [line["train/value/loss"] for line in lines]
    assert losses[1] < losses[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adapter", "virtual"])
def test_adapters_learn_from_rewards(finished, tmp_path, name):
    """With the policy without its adapter as reference, of two sources, in turns; and behind virtual tokens. The ratio
    to the sampler, which reads and writes what is in front by itself, is 1 before the first update."""
    finished.check_resumed(name, tmp_path)
    lines = [line for line in metrics.read_metrics(str(finished(name))) if "train/loss" in line]
    term = "policy_gradient/" if name == "adapter" else ""
    assert lines[0][f"train/{term}ratio"] == pytest.approx(1, abs=1e-4)
    assert abs(lines[0][f"train/{term}old_kl"]) < 1e-5
    assert max(line["train/grad_norm"] for line in lines) > 0
    if name == "adapter":
        assert min(lines[0][f"train/tokens/{source}"] for source in ("copy", "reverse")) > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["epochs", "pairs"])
def test_microbatches_and_devices_change_nothing(finished, tmp_path, name):
    finished.check_cut(name, tmp_path / "cut", microbatches=2, mesh={"data": 2, "fsdp": 2})


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{}, {"microbatches": 2}, {"mesh": {"data": 2, "tensor": 2}}])
def test_prompts_that_are_computed_once_change_nothing(finished, tmp_path, monkeypatch, fields):
    """As whole rows of the same layout in the same order."""
    if not fields:
        monkeypatch.setattr(transformer, "sharing", lambda model, prompts: model)
    finished.check_cut("shared", tmp_path / "cut", **fields)


@pytest.mark.slow
def test_where_all_answers_are_cut_off_and_masked_nothing_is_learned(finished):
    with pytest.raises(run.Diverged, match="all 2 updates were skipped"):
        finished("masked")
    state = parameters(finished("masked"))
    assert state["['updates']"] == 0
    assert state["['step']"] == 2
    lines = [line for line in metrics.read_metrics(str(finished("masked"))) if "train/empty_batch" in line]
    assert [line["train/empty_batch"] for line in lines] == [1, 1]
    assert lines[0]["train/rollout/truncated"] > 0.9


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"objective": {"terms": {"sft": 1.0}}}, r"^rewards = .*: no term of the objective reads 'advantage'"),
        (
            {"rewards": {}, "rollout": {}},
            r"^objective\.terms\.policy_gradient: reads the batch field 'advantage', which is made",
        ),
        (
            {"objective": {"terms": {"preference": 1.0}}},
            r"^rewards = .*: a term of the objective reads pairs of answers\. Set rollout\.pairs = True",
        ),
        (
            {"rollout": {"pairs": True, "max_new_tokens": 6}, "advantage": {}},
            r"^rollout\.pairs = True: no term of the objective reads pairs",
        ),
        (
            {"rollout": {"ahead": True, "max_new_tokens": 6}},
            r"^objective\.terms\.policy_gradient\.old = 'trainer': isn't who answered, and with rollout\.ahead = True",
        ),
        (
            {"data": {**DATA, "annotations": "some/folder"}},
            r"^data\.annotations = 'some/folder': are of the data's answ",
        ),
        (
            {"rollout": {"shared_prompts": True, "answers": 3, "prompts": 8, "max_new_tokens": 6}},
            r"^rollout\.shared_prompts = True: batch_size = 8 isn't a multiple of 3: rollout\.answers = 3 stay ",
        ),
        ({"roles": {}, "trainable": ""}, r"^roles: none is called 'reference', and the objective reads what it says"),
        ({"rollout": {"answers": 4, "max_new_tokens": 30}}, r"^rollout\.max_new_tokens: leaves 2 tokens for a prompt"),
        ({"data": {**DATA, "path": "TEXT"}}, r"^rewards: judge answers to prompts"),
        ({"rewards": {"reward_model": 1.0}}, r"^rewards\.reward_model\.role = 'reward': there is no such role\. Name"),
        ({"rewards": {"reward_model": {"role": "reference"}}}, r"^rewards\.reward_model\.role = .* shares 'policy'"),
        (
            {"model": {**MODEL, "num_labels": 2}, "eval": {"every": 0}},
            r"^rewards = .*: the policy is .*, and can't write answers",
        ),
    ],
)
def test_refused_before_anything_is_written(tmp_path, fields, message):
    if fields.get("data", {}).get("path") == "TEXT":
        text = tmp_path / "a.txt"
        text.write_text("some text " * 4000)
        fields = {"data": {**fields["data"], "path": str(text)}, "eval": {"every": 0}}
    bare = fields.get("rewards") == {} or "advantage" in fields
    fields = {**fields, "advantage": {} if bare else dataclasses.asdict(config_of("epochs").advantage)}
    with pytest.raises(InputError, match=message):
        run.run(config_of("epochs", **fields), str(tmp_path / "run"), devices=jax.devices()[:1])
    assert not (tmp_path / "run").exists()


def test_a_plan_knows_the_fields_of_answers():
    weighed = dataclasses.asdict(config_of("epochs").advantage) | {"kl": {"weight": 0.1}}
    assert set(abstract.batch_spec(config_of("masked", advantage=weighed))) > {"old_log_prob", "reference_log_prob"}
    described = abstract.describe(config_of("epochs"), jax.devices()[:1])
    batch = abstract.batch_spec(described.config)
    names = ("advantage", "sampler_log_prob", "old_log_prob", "reference_log_prob")
    assert set(names) < set(batch)
    parts = described.assemble()
    assert parts.scores is not None
    out = jax.eval_shape(parts.scores, parts.state, parts.frozen, parts.batch)
    assert {name: x.shape for name, x in out.items()} == dict.fromkeys(("old_log_prob", "reference_log_prob"), (8, 32))
    assert np.all([batch[name].dtype == np.float32 for name in names])


@pytest.mark.slow
def test_a_model_and_a_function_of_the_user_s_as_rewards(tmp_path):
    """A fault in the function costs its answer, whatever the model says of it."""
    taught = small(
        data={"path": "preferences:copy", "examples": 40},
        model={**MODEL, "num_labels": 2},
        objective={"terms": {"reward": 1.0}},
        seq_len=64,
    )
    run.run(taught, str(tmp_path / "judge"), devices=jax.devices()[:1])
    code = tmp_path / "mine.py"
    code.write_text("def odd(sample):\n    return 1 / (len(sample.prompt) % 3)\n")
    given = {
        "reward_model": {"weight": 1.0, "combine": "min"},
        "odd": {"reward": f"{code}:odd", "weight": 0.0},
    }
    judge = {"reward": {"init_from": str(tmp_path / "judge")}}
    config = config_of("masked", rewards=given, roles=judge, rollout={"answers": 2, "max_new_tokens": 4})
    run.run(config, str(tmp_path / "run"), devices=jax.devices()[:1])
    lines = [line for line in metrics.read_metrics(str(tmp_path / "run")) if "train/reward" in line]
    assert len(lines) == 2
    for line in lines:
        assert line["train/reward/reward_model/deviation"] > 0
        assert line["train/reward"] == pytest.approx(line["train/reward/reward_model"])
        assert line["train/reward/odd/failed"] == line["train/reward/reward_model/unjudged"]
