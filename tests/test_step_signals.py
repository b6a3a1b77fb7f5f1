"""What a step always measures: on one device and several, whole and in microbatches, and against plain formulas."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import subjects

from research import config as config_lib
from research import step_signals
from research.diagnosis import trial
from research.diagnosis.subject import Subject
from research.params import named_leaves
from research.run import metrics
from research.run.run import run
from research.train import means

LOGGED = ("train/entropy", "train/moved", "train/rounded", "train/grad_norm/")  # only where a line of the log is due
MEASURED = ("entropy", "moved", "rounded", "clipped", "param_norm", "supervised_rows", "batch_hash")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = subjects.write(tmp_path_factory.mktemp("data") / "answers.jsonl", subjects.answers())
    return subjects.config(path)


@pytest.fixture(scope="module")
def subject(config):
    return subjects.subject(config)


@pytest.fixture(scope="module")
def records(subject):
    return trial.train(subject, 3, evaluate=False)[1]


def with_a_line_of_two_steps(parts):
    """The parts of a run of 3 steps, whose log has a line of 2 of them, and one at the end."""
    step = dataclasses.replace(inspect.unwrap(parts.step), log_every=2, last=3)
    where = jax.tree.map(lambda x: x.sharding, parts.state)
    return parts._replace(step=jax.jit(step, donate_argnums=0, out_shardings=(where, None)))


def check_logged(records, others):
    """The same where a line of the log is due, which is after steps 2 and 3."""
    for number, (record, again) in enumerate(zip(records, others, strict=True), 1):
        assert record.keys() - again.keys() == {name for name in record if name.startswith(LOGGED) and number == 1}
        assert record["train/batch_hash"] == again["train/batch_hash"]
        for name in again:
            np.testing.assert_allclose(again[name], record[name], rtol=2e-3, atol=2e-2, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{"microbatches": 2}, {"mesh": config_lib.MeshConfig(1, fsdp=2, tensor=2)}])
def test_they_are_the_same_in_microbatches_and_on_several_devices(config, records, fields):
    changed = dataclasses.replace(config, **fields)
    devices = jax.devices()[: 4 if "mesh" in fields else 1]
    other = Subject.of(changed, devices=devices, change_parts=with_a_line_of_two_steps)
    check_logged(records, trial.train(other, 3, evaluate=False)[1])


def test_what_costs_is_measured_where_a_line_of_the_log_is_due(subject, records):
    parts = with_a_line_of_two_steps(subject.parts)
    with jax.set_mesh(subject.mesh):
        program = parts.step.lower(parts.state, parts.frozen, parts.batch, parts.rates).compile()  # one for all steps
    assert " conditional(" in program.as_text()
    again = trial.train(dataclasses.replace(subject, parts=parts._replace(step=program)), 3, evaluate=False)[1]
    check_logged(records, again)


def test_what_a_run_says(subject, records):
    for name in MEASURED:
        assert all(f"train/{name}" in record for record in records), name
    groups = {name.rpartition("/")[2] for name in records[0] if name.startswith("train/grad_norm/")}
    assert groups == {"embed", "attention", "mlp", "norms", "head", "first_layer", "last_layer"} - (
        {"head"} if subject.config.model.tie_embeddings else set()
    )
    first, second, _ = records
    assert first["train/moved"] == 0  # the warm-up begins at a rate of 0
    assert second["train/moved"] > 0.99
    assert second["train/rounded"] < 0.01
    assert len({record["train/batch_hash"] for record in records}) == 3


def test_norms_of_groups_are_parts_of_the_whole(records):
    for record in records:
        groups = [
            record[f"train/grad_norm/{name}"] for name in step_signals.GROUPS if f"train/grad_norm/{name}" in record
        ]
        assert np.sqrt(np.sum(np.square(groups))) == pytest.approx(record["train/grad_norm"], rel=1e-5)
        layers = [record[f"train/grad_norm/{name}"] for name in ("first_layer", "last_layer")]
        inside = [record[f"train/grad_norm/{name}"] for name in ("attention", "mlp", "norms")]
        assert np.sum(np.square(layers)) <= np.sum(np.square(inside)) * (1 + 1e-5)
        assert record["train/clipped"] == (record["train/grad_norm"] >= 1.0)


def test_entropy_is_that_of_the_predictions(subject, records):
    batch = subject.batches[0]
    with jax.set_mesh(subject.mesh):
        ends = jnp.asarray([0])
        said = subject.programs.read("policy", subject.params, batch, ends)
    chosen, weights = step_signals._places(step_signals.supervised(batch, {"loss_mask"}))
    there = np.einsum("bnt,bt->bn", np.asarray(chosen), np.asarray(said.entropy))[np.asarray(weights) > 0]
    assert records[0]["train/entropy"] == pytest.approx(there.mean(), rel=1e-4)
    assert there.mean() == pytest.approx(np.log(subject.models["policy"].config.vocab_size), rel=0.1)


def test_updates_that_are_lost_to_rounding():
    def shares(dtype, update, ok=True):
        params = {"a": jnp.ones((64, 300), dtype), "b": jnp.zeros((8,), dtype)}
        made = step_signals.update_shares(params, jax.tree.map(lambda p: jnp.full_like(p, update), params))
        return means([step_signals.made(made, jnp.asarray(ok))])

    lost = shares(jnp.bfloat16, 1e-4)
    assert lost["moved"] == pytest.approx(8 / (64 * 300 + 8))
    assert lost["rounded"] == pytest.approx(64 * 300 / (64 * 300 + 8))
    assert shares(jnp.float32, 1e-4) == pytest.approx({"moved": 1, "rounded": 0})
    assert shares(jnp.float32, 0.0) == {"moved": 0, "rounded": 0}
    assert shares(jnp.float32, 1e-4, ok=False) == {"moved": 0, "rounded": 0}


def test_a_batch_is_known_by_its_rows():
    rng = np.random.default_rng(0)
    batch = {
        "tokens": jnp.asarray(rng.integers(0, 50, (4, 16)), jnp.int32),
        "positions": jnp.tile(jnp.arange(16, dtype=jnp.int32)[None], (4, 1)),
        "loss_mask": jnp.ones((4, 16)),
    }
    own = int(step_signals.batch_hash(batch))
    assert own == int(step_signals.batch_hash({name: x[::-1] for name, x in batch.items()}))
    for name, value in (("tokens", 51), ("positions", 0), ("loss_mask", 0)):
        assert own != int(step_signals.batch_hash({**batch, name: batch[name].at[2, 3].set(value)})), name


def test_each_parameter_is_of_one_group(subject):
    named = {name: step_signals.group_of(name) for name, _ in named_leaves(subject.state.params)}
    assert named["policy/layers/attention/q/kernel"] == "attention"
    assert named["policy/layers/mlp/down/kernel"] == "mlp"
    assert named["policy/layers/attention_norm/scale"] == "norms"
    assert named["policy/embed"] == "embed"
    for name, group in (
        ("policy/layers/attention/q/lora/a", "adapter"),
        ("policy/head", "head"),
        ("value/head_added", "head"),
        ("objectives/match/map", "terms"),
        ("policy/layers/0-1/mlp/up/kernel", "mlp"),
    ):
        assert step_signals.group_of(name) == group


def test_a_run_counts_batches_that_it_has_had(config, tmp_path):
    """With as many rows as a batch has, each epoch is the same batch."""
    path = subjects.write(tmp_path / "few.jsonl", subjects.answers(4))
    few = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, path=path, eval_fraction=0.0, pack=False),
        eval=dataclasses.replace(config.eval, every=0),
    )
    run(few, str(tmp_path / "run"), devices=jax.devices()[:1])
    shares = [r["train/unique_batches"] for r in metrics.read_metrics(str(tmp_path / "run")) if "train/loss" in r]
    assert shares == [1, 0, 0, 0, 0, 0]
