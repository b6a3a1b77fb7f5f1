"""Options of XLA's compiler."""

import jax
import pytest

from research.devices import compilation, sharding


@pytest.fixture
def mesh():
    return sharding.make_mesh({}, jax.devices("cpu")[:1])


def test_options_for_cpus_are_those_that_this_xla_knows(mesh, monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    options = compilation.compiler_options(mesh)
    assert options["xla_backend_optimization_level"] == 2
    assert jax.jit(lambda x: x + 1, compiler_options=options)(1) == 2


def test_what_xla_flags_say_stands(mesh, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=true --xla_backend_optimization_level=0")
    assert compilation.compiler_options(mesh) == {}


def test_an_abstract_mesh_has_no_options():
    assert compilation.compiler_options(jax.sharding.AbstractMesh((1,), ("data",))) is None
