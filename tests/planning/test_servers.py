"""What a plan says of the servers that write a run's answers."""

import dataclasses

import pytest

from research.config import Config, ModelSection
from research.devices.chips import Chip
from research.planning import servers
from research.planning.topology import Topology
from research.rollouts.spec import RolloutSpec

MODEL = ModelSection(num_layers=3, d_model=16, num_heads=4, num_kv_heads=2, d_ff=32, dtype="bfloat16", max_length=64)
SPEC = RolloutSpec(engine="vllm", servers=("http://a", "http://b"), in_flight=5)


def config(**fields):
    defaults = {"model": MODEL, "rollout": SPEC, "rewards": {"exact_match": 1.0}, "seq_len": 64}
    return dataclasses.replace(Config(), **defaults | fields)


@pytest.mark.parametrize("adapter", [{}, {"kind": "lora", "rank": 2, "targets": "q"}])
def test_memory_of_a_server(adapter):
    memory = servers.make(config(adapter=adapter), 32)
    layer = 16 * 16 * 2 + 2 * 16 * 8 + 3 * 16 * 32 + 2 * 16  # q and o, k and v, the block, two norms
    assert memory.weights == 2 * (3 * layer + 16 + 128 * 16)  # of 32 tokens, filled up to 128, tied
    assert memory.cache == 5 * 64 * 2 * 3 * 2 * 4 * 2
    low_rank = 2 * 3 * (2 * (16 + 16) + 1) * 2 if adapter else 0  # of two versions: a, b, and the scale, in each layer
    assert memory.adapter == pytest.approx(low_rank, abs=2 * 2 * 3)
    chip = dataclasses.replace(Chip(*([1.0] * len(dataclasses.fields(Chip)))), memory=memory.used / 2)
    line = memory.describe(Topology("gpu:1xT", "gpu", 1, 1, (), chip))
    assert line.startswith("2 with ")
    assert "as 3 such chips have" in line
    assert ("adapters" in line) == bool(adapter)
    assert "5 answers at once (rollout.in_flight) of 64 tokens" in line


def test_a_run_that_answers_by_itself_has_none():
    assert servers.make(config(rollout=RolloutSpec()), 32) is None
    assert servers.make(config(rewards={}), 32) is None
