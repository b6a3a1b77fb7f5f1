"""The table of batch fields: what is written down once, and who reads it."""

import jax
import numpy as np
import pytest

from research.devices import sharding
from research.errors import InputError
from research.sources import fields


def test_made_up_batches():
    shape = (4, 64)
    spec = {k: jax.ShapeDtypeStruct(shape, np.int32) for k in ("tokens", "segment_ids", "positions", "teacher_at")}
    spec["loss_mask"] = jax.ShapeDtypeStruct(shape, np.float32)
    spec["label_probs"] = jax.ShapeDtypeStruct((*shape, 3), np.float32)
    spec["teacher_ids"] = jax.ShapeDtypeStruct((*shape, 8), np.int32)
    spec["teacher_log_probs"] = jax.ShapeDtypeStruct((*shape, 8), np.float32)
    spec["teacher_rest"] = jax.ShapeDtypeStruct(shape, np.float32)
    batch = fields.fake(spec, 100)
    assert 0 <= batch["tokens"].min() <= batch["tokens"].max() < 100
    segments, positions = batch["segment_ids"], batch["positions"]
    assert segments.min() == 1
    assert segments.max() > 2  # several documents in a row
    starts = np.diff(segments, axis=1) > 0
    assert (positions[:, 1:][starts] == 0).all()
    assert (np.diff(positions, axis=1)[~starts] == 1).all()
    assert 0.5 < batch["loss_mask"].mean() < 0.8
    # A label at the end of each document and nowhere else.
    assert batch["label_probs"].sum() == segments.max(axis=1).sum()
    assert (batch["label_probs"][:, :-1].sum(axis=2)[starts] == 1).all()
    said = np.exp(batch["teacher_log_probs"]).sum(axis=2) + np.exp(batch["teacher_rest"])
    np.testing.assert_allclose(said, 1, atol=1e-5)
    assert all(len(set(ids)) == 8 for ids in batch["teacher_ids"].reshape(-1, 8).tolist())
    assert (fields.fake(spec, 100, packed=False)["segment_ids"] == 1).all()


@pytest.mark.parametrize("packed", [True, False])
def test_made_up_comparisons(packed):
    spec = fields.spec(fields.read_with(("pair", "margin", "score")), 4, {"time": 64})
    batch = fields.fake(spec, 100, packed=packed)
    for row in range(4):
        pairs = {}
        for column in range(64):
            at = {name: values[row, column] for name, values in batch.items()}
            pairs.setdefault(at["pair"], []).append((at["segment_ids"], at["side"], at["margin"], at["score"]))
        assert sorted(pairs) == list(range(1, len(pairs) + 1))
        assert (len(pairs) > 1) == packed
        for number, seen in pairs.items():
            (chosen, rejected) = sorted(set(seen))
            assert (chosen[:2], rejected[:2]) == ((2 * number - 1, 0), (2 * number, 1))
            assert chosen[2] == rejected[2]  # the pair's
            assert chosen[3] != rejected[3]  # each one's


def test_made_up_verdicts():
    alone = fields.fake(fields.spec(fields.read_with(("desirable",)), 4, {"time": 64}), 100)
    assert set(alone["desirable"].reshape(-1)) == {0, 1}
    batch = fields.fake(fields.spec(fields.read_with(("desirable", "mismatched")), 4, {"time": 64}), 100)
    assert set(batch["desirable"].reshape(-1)) == {-1, 0, 1}
    mismatched = batch["segment_ids"] % 2 == 0
    assert ((batch["desirable"] == -1) == mismatched).all()
    assert not batch["loss_mask"][mismatched].any()
    assert not batch["mismatched"][~mismatched].any()
    assert 0.4 < batch["mismatched"][mismatched].mean() < 0.8


SIZES = {"time": 16, "labels": 3, "candidates": 8}


def test_padding_spec_and_made_up_values_agree():
    for name in fields.TABLE:
        spec = fields.spec(("tokens", name), 4, SIZES)[name]
        empty = fields.empty((name,), 4, SIZES)[name]
        values = fields.fake(fields.spec(fields.read_with((name,)), 4, SIZES), 50)[name]
        assert (spec.shape, spec.dtype) == (empty.shape, empty.dtype) == (values.shape, values.dtype)
        np.testing.assert_array_equal(empty, np.full_like(empty, fields.TABLE[name].fill))
    assert fields.sizes(fields.spec(fields.TABLE, 4, SIZES)) == SIZES


def test_fields_of_a_group_come_together():
    assert fields.read_with(()) == ("tokens", "segment_ids", "positions", "loss_mask")
    assert fields.read_with(("teacher_rest",))[4:] == ("teacher_ids", "teacher_log_probs", "teacher_rest")
    assert fields.group("parallel") == ("teacher_tokens", "teacher_segment_ids", "teacher_positions", "teacher_at")


def test_time_is_sharded_and_classes_are_not():
    mesh = sharding.make_abstract_mesh({"data": 2, "sequence": 4}, 8)
    placed = fields.shardings(mesh, fields.spec(("tokens", "label_probs"), 4, SIZES))
    assert placed["tokens"].spec == jax.sharding.PartitionSpec(("data", "fsdp", "expert"), "sequence")
    assert placed["label_probs"].spec == jax.sharding.PartitionSpec(("data", "fsdp", "expert"), "sequence", None)


def test_what_is_unknown_is_named():
    with pytest.raises(InputError, match=r"'loss_maks'.*Did you mean 'loss_mask'\?"):
        fields.spec(("loss_maks",), 4, SIZES)
    with pytest.raises(InputError, match="'label_probs': the size of its axis 'labels'"):
        fields.spec(("label_probs",), 4, {"time": 16})
