"""An experience with a buffer of its own in the one loop: resumed = uninterrupted, on another mesh too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import assert_same, load

from research.rollouts import experience
from research.run import metrics, run
from research.sources.prefetch import Prefetch
from research.sources.types import Source

EPOCHS, MINIBATCHES = 2, 2


def replayed(batches, spec, rollout):
    """A batch of the source is collected, and serves EPOCHS x MINIBATCHES updates; its rows' order changes each time.

    The buffer is made of global arrays: the batch, and how many updates it has served.
    """
    assert rollout is None
    cursor = jax.ShapeDtypeStruct((), jnp.int32, sharding=jax.sharding.NamedSharding(mesh_of(spec), jax.P()))
    plain = experience.from_source(batches, spec)

    @jax.jit
    def turn(batch, served):
        return {name: jnp.roll(value, served, axis=0) for name, value in batch.items()}, served + 1

    def init():
        place = plain.init()
        empty = {k: jax.device_put(jnp.zeros(x.shape, x.dtype), x.sharding) for k, x in spec.items()}
        return place._replace(buffer={"batch": empty, "served": jax.device_put(jnp.int32(0), cursor.sharding)})

    def step(state, frozen, place):
        batch, served = place.buffer["batch"], place.buffer["served"]
        if int(served) % (EPOCHS * MINIBATCHES) == 0:
            batch, place, _ = plain.next(state, frozen, place)
        rows, after = turn(batch, served)
        rows = {k: jax.device_put(x, spec[k].sharding) for k, x in rows.items()}
        ones = jnp.ones(())
        return (
            rows,
            place._replace(buffer={"batch": batch, "served": after}),
            {"served": (after.astype(jnp.float32), ones)},
        )

    return experience.Experience(spec, {"batch": dict(spec), "served": cursor}, init, step)


def mesh_of(spec):
    return spec["tokens"].sharding.mesh


OPTIONS = {"eval.every": 0, "checkpoint.best_metric": "", "log.every": 1, "optimizer.schedule": "constant"}


def train(workdir, steps, **options):
    return run.run(load("sft", **OPTIONS, steps=steps, **options), str(workdir), make_experience=replayed)


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
def test_resumed_in_the_middle_of_an_epoch_is_uninterrupted(tmp_path):
    whole = train(tmp_path / "whole", 7)
    assert whole["train/served"] == 7
    train(tmp_path / "cut", 3)  # 3 of the 4 updates that a collected batch serves
    again = train(tmp_path / "cut", 7)
    assert_same(tmp_path / "whole", tmp_path / "cut")
    assert again["train/loss"] == whole["train/loss"]
    losses = [r["train/loss"] for r in metrics.read_metrics(str(tmp_path / "cut")) if "train/loss" in r]
    assert len(losses) == 7


@pytest.mark.slow
def test_the_buffer_is_restored_onto_another_mesh(tmp_path):
    few = {"mesh.data": 2, "mesh.fsdp": 4}
    whole = train(tmp_path / "whole", 6, **few)
    train(tmp_path / "cut", 3, **few)
    other = train(tmp_path / "cut", 6, **{"mesh.data": 4, "mesh.tensor": 2})
    assert other["train/loss"] == pytest.approx(whole["train/loss"], rel=2e-5)


def test_what_is_read_ahead_changes_nothing():
    """A place that isn't the one expected is read afresh."""
    source = Source({}, lambda: {"step": 0}, lambda s: ({"x": np.array([s["step"]])}, {"step": s["step"] + 1}))
    with Prefetch(source, lambda batch: batch) as batches:
        place = source.init()
        for expected in (0, 1, 2):
            batch, place = batches.next(place)
            assert batch["x"] == [expected]
        batch, place = batches.next({"step": 7})
        assert batch["x"] == [7]
        assert place == {"step": 8}


def test_an_error_of_the_source_is_raised_where_its_batch_is_asked_for():
    def fail(state):
        if state["step"] == 1:
            raise ValueError("row 1")
        return {}, {"step": state["step"] + 1}

    with Prefetch(Source({}, lambda: {"step": 0}, fail), lambda batch: batch) as batches:
        _, place = batches.next({"step": 0})
        with pytest.raises(ValueError, match="row 1"):
            batches.next(place)
