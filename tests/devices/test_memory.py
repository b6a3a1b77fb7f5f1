"""What a machine can hold, and what is refused for being more."""

import types

import jax
import jax.numpy as jnp
import pytest

from research.devices import memory, sharding


def test_bytes_are_those_of_one_device():
    mesh = sharding.make_mesh({"data": -1})
    parted = jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=sharding.named(mesh, ("batch", None)))
    whole = jax.ShapeDtypeStruct((8, 4), jnp.bfloat16, sharding=sharding.named(mesh, ()))
    assert memory.bytes_on_a_device({"a": parted, "b": whole}) == 8 * 4 * 4 // mesh.size + 8 * 4 * 2


def test_cpu_devices_share_the_machine_and_others_have_a_limit(monkeypatch):
    monkeypatch.setattr(memory, "machine_bytes", lambda: 800)
    assert memory.most_on_a_device(jax.devices()[0], 8) == 100
    for stats, most in (({"bytes_limit": 7}, 7), ({}, None), (None, None)):
        device = types.SimpleNamespace(platform="gpu", memory_stats=lambda stats=stats: stats)
        assert memory.most_on_a_device(device, 8) == most


@pytest.mark.parametrize(("most", "swap", "share"), [("100", "50", 150), ("max", "0", None), ("100", "max", None)])
def test_a_container_has_less_than_the_machine(most, swap, share, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    whole = memory.machine_bytes()
    assert whole > 10**8
    (tmp_path / "memory.max").write_text(f"{most}\n")
    (tmp_path / "memory.swap.max").write_text(f"{swap}\n")
    assert memory.machine_bytes() == (share or whole)
