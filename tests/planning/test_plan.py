"""Plans: a real compiler for a TPU that isn't here, and the arithmetic around it."""

import importlib.util
import json
import re

import pytest

from experiments import base
from research import config
from research.commands import plan
from research.errors import InputError
from research.planning import abstract, estimate, hlo, report, topology

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="the TPU compiler isn't here")

HLO = """HloModule jit_step, entry_computation_layout={()->f32[]}

%add.1 (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  ROOT %sum = f32[] add(%x, %y)
}

%body.2 (p: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %ag = bf16[16,128]{1,0:T(8,128)(2,1)} all-gather(%w), channel_id=7, replica_groups=[2,2]<=[4], dimensions={0}
  %again = f32[2] fusion(%w), kind=kCustom, calls=%async_collective_fusion.8
  %rs = f32[4,128]{1,0} reduce-scatter(%g), replica_groups=mesh['x'=2,'y'=2] {'y'}, to_apply=%add.1
  %pair = (bf16[8,128]{1,0}, bf16[8,128]{1,0}) all-gather-start(%v), dimensions={0}
  %done = bf16[8,128]{1,0} all-gather-done(%pair)
}

%async_collective_fusion.8 (p: bf16[8,128]) -> f32[2] {
  %ag.1 = bf16[16,128]{1,0} all-gather(%p), channel_id=7, replica_groups=[2,2]<=[4], dimensions={0}
}

%all-reduce-scatter.4 (g: f32[8,128]) -> f32[2,128] {
  %sum = f32[8,128]{1,0} all-reduce(%g), replica_groups={{0,1,2,3}}, to_apply=%add.1
}

%body.5 (p: (s32[])) -> (s32[]) {
  %there = f32[4]{0} collective-permute(%x), source_target_pairs={{0,1}}
  %tokens = f32[8]{0} all-to-all(%x), channel_id=1, metadata={op_name="jit(f)/shard_map/tokens"}
  %sums = f32[2]{0} all-to-all(%x), channel_id=1, metadata={op_name="jit(f)/shard_map/sums"}
  %part = f32[8]{0} all-to-all(%x), channel_id=1, metadata={op_name="jit(f)/shard_map/tokens"}
}

%condition.3 (p: (s32[], f32[8,128])) -> pred[] {
  %n = s32[]{:T(128)} constant(3)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

ENTRY %main.9 (a: f32[8,128]) -> f32[] {
  %loop = (s32[]) while(%t), condition=%condition.3, body=%body.2, backend_config={"known_trip_count":{"n":"5"}}
  %short = (s32[]) while(%t), condition=%condition.3, body=%body.5
  %scattered = f32[2,128] fusion(%y), kind=kCustom, calls=%all-reduce-scatter.4
  ROOT %ar = f32[] all-reduce(%y), replica_groups={{0,1,2,3}}, to_apply=%add.1
}
"""


def test_collectives_are_counted_as_often_as_their_loops_run():
    totals = {c.kind: (c.calls, c.bytes) for c in hlo.find_collectives(HLO)}
    assert totals == {
        "all-gather": (10, 5 * (16 * 128 * 2 + 8 * 128 * 2)),
        "reduce-scatter": (5 + 1, 5 * 2 * 4 * 128 * 4 + 8 * 128 * 4),
        "all-reduce": (1, 4),
        "collective-permute": (3, 3 * 16),
        "all-to-all": (2 * 3, 3 * (8 * 4 + 2 * 4)),
    }


def test_what_the_compiler_says_of_memory():
    text = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. "
    text += "Used 20.10G of 15.75G hbm. Exceeded hbm capacity by 4.35G."
    assert hlo.out_of_memory(text) == "needs 20.10G of 15.75G: 4.35G too much"
    text = "Ran out of memory on HBM, the total memory required for HLO temporaries (35.21G) "
    text += "exceeds available HBM (15.75G)."
    assert hlo.out_of_memory(text) == "needs 35.21G of 15.75G for temporaries alone: 19.46G too much"
    assert hlo.out_of_memory("INTERNAL: a bug") == ""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5e", "isn't of the form KIND:SHAPE"),
        ("v5x:4x4", "Did you mean 'v5"),
        ("gpu:8xH101", "give cpu:COUNT or gpu:COUNTxKIND"),
        ("cpu:8x8", "give cpu:COUNT"),
        pytest.param("v5e:3x5", "Give a shape that v5e comes in", marks=needs_libtpu),
    ],
)
def test_a_topology_that_does_not_exist_is_an_error(name, message):
    with pytest.raises(InputError, match=re.escape(message)):
        topology.find(name)


def small(**overrides):
    values = base.debug(base.get_config())
    values.seq_len, values.batch_size = 256, 16
    values.tokenizer.kind = "byte"
    values.model.vocab_size = 512
    for name in ("adapter", "frozen_dtype"):
        values[name] = overrides.pop(name, values[name])
    values.update_from_flattened_dict(overrides)
    return config.parse(values.to_dict())


@pytest.mark.slow
def test_bytes_are_those_of_one_device():
    eight = topology.find("gpu:8xH100")  # first, as it decides how many devices there are
    whole = estimate.make(small(), topology.find("cpu:1"))
    cut = estimate.make(small(**{"mesh.data": 1, "mesh.fsdp": 8}), eight)
    assert whole.parameters == cut.parameters
    assert whole.bytes_of["parameters"] == 4 * whole.parameters
    assert whole.bytes_of["optimizer"] >= 8 * whole.parameters
    for kind in ("parameters", "optimizer"):  # norms alone are whole on each device
        assert whole.bytes_of[kind] / 8 < cut.bytes_of[kind] < whole.bytes_of[kind] / 7
    assert not whole.collectives
    assert {c.kind for c in cut.collectives} >= {"all-gather", "all-reduce"}
    assert whole.seconds["network"] == 0 < cut.seconds["network"]
    assert whole.fits
    assert whole.policy is None  # all of it is trained
    assert cut.fits
    text = report.describe(small(**{"plan.prices.H100": 2.0}), eight, cut)
    assert "an estimate: compiled for simulated CPU devices" in text
    assert "plan.prices.H100 = 2.0" in text
    assert f"model       {cut.parameters / 1e6:.3g} M parameters" in text  # not 0.00 B, and 0.00 GiB
    assert f"memory      {cut.used / 2**20:.3g} MiB of 74.5 GiB a chip: fits. parameters" in text


@pytest.mark.slow
@needs_libtpu
def test_compiles_for_a_tpu_that_is_not_here(tmp_path, capsys):
    command = ["--config=experiments/pretrain.py:debug", "--topology=v5e:2x2", "--config.mesh.fsdp=2"]
    command += ["--config.plan.prices.v5e=1.2", f"--output={tmp_path / 'plan.json'}"]
    assert plan.main(command) == 0
    said = capsys.readouterr().out
    assert "4 devices, mesh data 2, fsdp 2" in said
    assert "fits" in said
    assert "plan.prices.v5e = 1.2" in said
    (record,) = json.loads((tmp_path / "plan.json").read_text())
    assert record["bytes_of"]["temporary"] > 0
    assert record["collectives"]


@needs_libtpu
@pytest.mark.slow
def test_search_names_the_fastest_that_fits(tmp_path):
    command = ["--config=experiments/pretrain.py:debug", "--topology=v5e:2x2", "--search", "--max_compiles=2"]
    assert plan.main([*command, f"--output={tmp_path / 'plan.json'}"]) == 0
    records = json.loads((tmp_path / "plan.json").read_text())
    assert 1 <= len(records) <= 2
    assert all(r["fits"] for r in records)
    most = [sum(r["seconds"].values()) for r in records]
    assert most[-1] == min(most)


@needs_libtpu
@pytest.mark.slow
def test_what_does_not_fit_says_by_how_much(capsys):
    command = ["--config=experiments/large.py:8b", "--topology=v5e:2x2", "--config.batch_size=4"]
    assert plan.main(command) == 1
    said = capsys.readouterr().out
    assert "DOESN'T FIT" in said
    assert "too much" in said
    assert re.search(r"take \d+ chips or more", said)


@pytest.mark.parametrize(
    ("adapter", "frozen_dtype"),
    [
        ({"kind": "lora", "rank": 4}, "auto"),
        ({"kind": "lora", "rank": 4}, "nf4"),
        ({"kind": "lora", "rank": 4}, "int8"),
        ({"kind": "prompt", "tokens": 3}, "bfloat16"),
    ],
)
def test_bytes_of_an_adapter_by_kind(adapter, frozen_dtype):
    values = small(adapter=adapter, frozen_dtype=frozen_dtype)
    described = abstract.describe(values, topology.find("cpu:1").devices)
    parts = described.assemble()
    policy = estimate.adapted(described, parts)
    # Two layers of D 64, 4 query and 2 key/value heads of 16, F 128, gated; V 512, tied.
    maps = [(64, 64), (64, 32), (64, 32), (64, 64), (64, 128), (64, 128), (128, 64)]
    linear, norms, embed = 2 * sum(i * o for i, o in maps), 5 * 64, 512 * 64
    trained = 2 * 4 * sum(i + o for i, o in maps) if adapter["kind"] == "lora" else 3 * 64
    scales = 2 * 7 if adapter["kind"] == "lora" else 0  # alpha / r of each map, which stays
    blocks = sum(i * o / (16 if n < 3 else 64) for n, (i, o) in enumerate(maps)) / sum(i * o for i, o in maps)
    each = {"auto": 4, "bfloat16": 2, "int8": 1 + 4 * blocks, "nf4": 0.5 + blocks}[frozen_dtype]
    rest = 2 * embed if frozen_dtype == "bfloat16" else 4 * embed
    assert policy.parameters == trained
    assert policy.trained == policy.gradients == 4 * trained
    assert policy.optimizer == pytest.approx(8 * trained, abs=32)  # two moments, and counters
    assert policy.base == pytest.approx(
        each * linear + rest + 4 * (norms + scales), rel=0.005
    )  # and, of nf4, scales of scales
    whole = 4 * (linear + norms + embed)
    assert (policy.full["trained"], policy.full["gradients"]) == (whole, whole)
    assert policy.full["optimizer"] == pytest.approx(2 * whole, abs=32)
    assert policy.saved == sum(policy.full.values()) - policy.used > 0
