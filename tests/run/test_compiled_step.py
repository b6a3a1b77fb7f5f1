"""What keeps the compiled step fast: no array of all logits, nothing compiled twice, no talk with the host inside."""

import dataclasses
import importlib.util
import math
import re

import jax
import jax.numpy as jnp
import pytest

from experiments import sft
from research import config as config_lib
from research import objectives
from research.bench import prepared
from research.devices import sharding
from research.planning import abstract
from research.planning import topology as topologies
from research.run import assemble, metrics, run

VOCAB, ROWS, LENGTH = 32_768, 8, 384
LONGER = ("preference", "policy_gradient")
OBJECTIVES = ("sft", "distill", "weak_to_strong", *(pytest.param(name, marks=pytest.mark.slow) for name in LONGER))
HOST = re.compile(r"\b(infeed|outfeed|send|recv)\(|callback")


@pytest.fixture(scope="module")
def config():
    made = config_lib.parse(sft.get_config("debug").to_dict())
    shape = {"vocab_size": VOCAB, "num_layers": 2, "d_model": 32, "num_heads": 2, "num_kv_heads": 2, "d_ff": 64}
    shape |= {"max_length": LENGTH, "tie_embeddings": False}
    return dataclasses.replace(made, model=dataclasses.replace(made.model, **shape), batch_size=ROWS, seq_len=LENGTH)


def compiled(config, objective, devices, **axes):
    mesh = sharding.make_mesh({"data": 1, **axes}, jax.devices()[:devices])
    changed = dataclasses.replace(prepared.with_objective(config, objective), mesh=config_lib.MeshConfig(1, **axes))
    with jax.set_mesh(mesh):
        return prepared.prepare(abstract.Described(changed, mesh, VOCAB))


def largest(text):
    """Elements of the largest array in a compiled program."""
    return max(math.prod(map(int, dims.split(","))) for dims in re.findall(r"\b[a-z]+\d+\[([\d,]+)\]", text))


@pytest.fixture(scope="module", params=OBJECTIVES)
def step(request, config):
    return compiled(config, request.param, 1)


def test_a_step_holds_no_logits_of_all_tokens(step):
    assert largest(step.compiled.as_text()) < ROWS * LENGTH * VOCAB / 2


@pytest.mark.slow
def test_nor_does_one_over_devices(config):
    """Of a device's tokens and its part of the vocabulary."""
    step = compiled(config, "distill", 4, fsdp=2, tensor=2)
    assert largest(step.compiled.as_text()) < ROWS / 2 * LENGTH * VOCAB / 2 / 2


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="the TPU compiler isn't here")
def test_nor_does_one_for_tpus(config):
    topology, length = topologies.find("v5e:2x2"), 8 * LENGTH  # of a chip, more than the tokens of a chunk
    changed = dataclasses.replace(
        prepared.with_objective(config, "sft"),
        mesh=config_lib.MeshConfig(1, fsdp=4),
        model=dataclasses.replace(config.model, max_length=length),
        seq_len=length,
    )
    mesh = sharding.make_mesh(dataclasses.asdict(changed.mesh), topology.devices)
    parts = assemble.assemble(changed, objectives.load(changed.objective), mesh, abstract.batch_spec(changed), VOCAB)
    with jax.set_mesh(mesh):
        text = parts.step.lower(parts.state, parts.frozen, parts.batch).compile().as_text()
    assert largest(text) < ROWS * length / 4 * VOCAB / 2


def test_whole_logits_would_be_found():
    @jax.jit
    def loss(hidden, kernel):
        return jnp.sum(jax.nn.logsumexp(hidden @ kernel, axis=-1))

    shapes = jax.ShapeDtypeStruct((ROWS, LENGTH, 32), "float32"), jax.ShapeDtypeStruct((32, VOCAB), "float32")
    assert largest(loss.lower(*shapes).compile().as_text()) >= ROWS * LENGTH * VOCAB


def test_parameters_and_moments_are_not_copied(config):
    adamw = dataclasses.replace(config.optimizer, name="adamw")
    text = compiled(dataclasses.replace(config, optimizer=adamw), "sft", 1).compiled.as_text()
    assert re.search(r"fusion\([^)]*%state_params__policy", text), "they have other names"
    assert not re.search(r"f32\[\d+,[\d,]+\]\S* copy\(%state_", text)


@pytest.mark.slow
def test_an_adapter_is_never_merged_and_its_base_has_no_gradient(config):
    """The step makes no array of a kernel's shape, within fusions neither: it only cuts layers from their stacks."""
    model = dataclasses.replace(config.model, d_model=48, d_ff=80, num_layers=3)  # of shapes that nothing else has
    kernels = re.compile(r"= f32\[(?:\d+,)?(?:48,80|80,48|48,32768)\]\S* (\w[\w-]*)\(")
    reads = {"parameter", "get-tuple-element", "dynamic-slice", "bitcast", "copy", "transpose", "slice", "reshape"}

    def made(**fields):
        step = compiled(dataclasses.replace(config, model=model, **fields), "sft", 1)
        shapes = [x.shape for x in jax.tree.leaves(step.state)]
        return set(kernels.findall(step.compiled.as_text())) - reads, shapes

    operations, shapes = made(adapter={"kind": "lora", "rank": 5})
    assert not operations - {"fusion"}, operations
    assert not [shape for shape in shapes if shape[-2:] in ((48, 80), (80, 48), (48, VOCAB))]
    full, shapes = made()
    assert {"dot", "add", "multiply"} <= full
    assert [shape for shape in shapes if shape[-2:] == (48, 80)]


def test_a_step_does_not_talk_with_the_host(step):
    assert not HOST.search(step.compiled.as_text())
    with jax.transfer_guard("disallow"):
        jax.block_until_ready(step.compiled(step.state, step.frozen, step.batch, step.rates))


def test_runs_at_other_learning_rates_have_one_program(config):
    """The rates are arguments: what XLA compiles, and what its cache looks up, is the same text."""

    def lowered(rate):
        head = {"match": "policy/head", "learning_rate": 2 * rate}
        optimizer = dataclasses.replace(config.optimizer, learning_rate=rate, groups={"head": head})
        mesh = sharding.make_mesh({"data": 1}, jax.devices()[:1])
        with jax.set_mesh(mesh):
            parts = abstract.Described(dataclasses.replace(config, optimizer=optimizer), mesh, VOCAB).assemble()
            return parts.step.lower(parts.state, parts.frozen, parts.batch, parts.rates).as_text()

    assert lowered(1e-3) == lowered(3e-2)


def test_such_talk_would_be_found():
    @jax.jit
    def f(x):
        jax.debug.callback(print, x)
        return x + 1

    assert HOST.search(f.lower(jnp.ones(())).compile().as_text())


@pytest.mark.slow
def test_nothing_compiles_after_the_second_step(tmp_path, monkeypatch):
    """Evaluations, answers and checkpoints included, the second time that they come."""
    at, found = [0], []

    def listen(name, seconds, **_):
        if name == "/jax/core/compile/backend_compile_duration":
            found.append(at[0])

    advance = metrics.Writer.advance

    def advancing(self, step):
        at[0] = step
        advance(self, step)

    monkeypatch.setattr(metrics.Writer, "advance", advancing)
    values = sft.get_config("debug")
    values.steps = 5
    values.eval.update(every=1, generate=2)
    values.checkpoint.update(every=1)
    values.compilation_cache = False
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        run.run(config_lib.parse(values.to_dict()), str(tmp_path / "run"))
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert found, "nothing was counted"
    assert max(found) <= 2, found
