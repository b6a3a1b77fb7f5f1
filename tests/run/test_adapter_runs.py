"""Runs with an adapter: what they train, save and load, and that cuts of a run change nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs

from research import loading, params
from research.devices import sharding
from research.errors import InputError
from research.models import kernels, virtual
from research.run import metrics
from research.run.run import run

MODEL = {"num_layers": 2, "d_model": 16, "num_heads": 2, "num_kv_heads": 2, "d_ff": 16, "vocab_size": 264}
MODEL |= {"tie_embeddings": False}
LORA = {"kind": "lora", "rank": 2, "alpha": 4.0}
CASES = {
    "lora": {"adapter": LORA, "ema_decay": 0.5},
    "dora from pissa": {"adapter": {**LORA, "dora": True, "init": "pissa", "also": "head"}},
    "vera": {"adapter": {"kind": "vera", "rank": 4, "dropout": 0.2}},
    "bias": {"adapter": {"kind": "bias"}},
    "reference": {
        "adapter": LORA,
        "objective": {"terms": {"two_roles": 1.0}, "two_roles": {"reference": True}},
        "roles": {"value": {"of": "policy", "num_labels": 1}, "reference": {"of": "policy", "adapter": False}},
    },
    "lora with dropout": {
        "adapter": {**LORA, "dropout": 0.3, "targets": "q|k|v|up|embed", "exclude": "layers/0/.*/up"},
        "ema_decay": 0.5,
    },
    "experts": {"adapter": LORA, "model": {**MODEL, "num_experts": 4, "experts_per_token": 2}},
    "prompt": {"adapter": {"kind": "prompt", "tokens": 3, "init": "text", "text": "copy"}},
    "prefix": {"adapter": {"kind": "prefix", "tokens": 3, "projection": True, "also": "layers/1/attention_norm/.*"}},
}
RUN = set(CASES) - {"lora"}  # which is run with dropout


def config_of(case, **fields):
    return runs.small(**{"model": MODEL, **case, **fields})


def parts_of(case, **fields):
    return runs.parts_of(config_of(case, **fields))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Name of a case -> the workdir of its run on one device."""
    return runs.Finished(tmp_path_factory, lambda name, **fields: config_of(CASES[name], **fields))


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(RUN - {"bias", "experts"}))
def test_half_a_run_and_the_rest_are_the_whole(name, finished, tmp_path):
    finished.check_resumed(name, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(RUN))
def test_microbatches_and_a_mesh_change_nothing(name, finished, tmp_path):
    """Kernels and what lies beside them are cut over fsdp and tensor, those of experts over expert too."""
    mesh = {"data": 1, "fsdp": 2, "expert" if name == "experts" else "sequence": 2, "tensor": 2}
    parts = 1 if name == "experts" else 2  # of the 4 rows, of which expert takes 2
    finished.check_cut(name, tmp_path / "cut", mesh=mesh, microbatches=parts)


def test_a_checkpoint_holds_the_adapter_alone(finished):
    names = {name for name in runs.parameters(finished("lora")) if name.startswith("['params']")}
    assert names
    assert all(name.endswith(("['lora']['a']", "['lora']['b']")) for name in names)


def test_the_moving_average_is_of_the_adapter(finished):
    saved, place = runs.parameters(finished("lora")), "['policy']['layers']['mlp']['up']['lora']"
    change = {
        kind: 2 * np.matmul(*(saved[f"['{kind}']{place}['{name}']"] for name in "ab")) for kind in ("params", "ema")
    }
    now, average = (loading.load_model(str(finished("lora")), ema=ema).params for ema in (False, True))
    np.testing.assert_array_equal(now["embed"], average["embed"])
    difference = average["layers"]["mlp"]["up"]["kernel"] - now["layers"]["mlp"]["up"]["kernel"]
    np.testing.assert_allclose(difference, change["ema"] - change["params"], atol=1e-6)
    assert np.abs(difference).max() > 1e-4


def test_a_run_is_loaded_with_its_adapter_merged(finished):
    loaded = loading.load_model(str(finished("lora")))
    parts = parts_of(CASES["lora"])
    start = loading.Start("policy", parts.models["policy"], 0)
    specs = parts.models["policy"].specs
    mesh = sharding.make_mesh({}, jax.devices()[:1])
    values = loading.read_run(str(finished("lora")), start, specs, params.shardings(specs, mesh))
    tokens = jnp.arange(24, dtype=jnp.int32).reshape(2, 12)
    batch = {"tokens": tokens, "segment_ids": jnp.ones_like(tokens), "positions": jnp.tile(jnp.arange(12), (2, 1))}
    with jax.set_mesh(mesh):
        ours = loaded.model.hidden(loaded.params, batch)
        apart = parts.models["policy"].hidden(values, batch)
        base = parts.models["policy"].hidden(kernels.bare(values), batch)
    np.testing.assert_allclose(ours, apart, atol=1e-5)
    assert np.abs(apart - base).max() > 1e-3


@pytest.mark.parametrize("kind", ["norms", "head"])
def test_a_kind_that_adds_no_parameters_begins_with_a_model(kind, finished):
    workdir = str(finished("lora"))
    model, mesh = parts_of({"adapter": {"kind": kind}}).models["policy"], sharding.make_mesh({}, jax.devices()[:1])
    start = loading.Start("policy", model, 0, loading.Base(workdir, lambda: loading.find(workdir)))
    values = start.read(model.specs, params.shardings(model.specs, mesh))
    jax.tree.map(np.testing.assert_array_equal, values, loading.load_model(workdir).params)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dora from pissa", "vera", "bias"])
def test_a_run_is_loaded_as_it_was_trained(name, finished):
    """The loss of a model that is loaded, its adapter merged, is the one that the run evaluates with it apart."""
    workdir = str(finished(name))
    loaded, parts = loading.load_model(workdir), parts_of(CASES[name])
    model, mesh = parts.models["policy"], sharding.make_mesh({}, jax.devices()[:1])
    values = loading.read_run(
        workdir, loading.Start("policy", model, 0), model.specs, params.shardings(model.specs, mesh)
    )
    tokens = jnp.arange(24, dtype=jnp.int32).reshape(2, 12)
    batch = {"tokens": tokens, "segment_ids": jnp.ones_like(tokens), "positions": jnp.tile(jnp.arange(12), (2, 1))}
    logits = [m.unembed(v).logits(m.hidden(v, batch)) for m, v in ((loaded.model, loaded.params), (model, values))]
    np.testing.assert_allclose(*logits, atol=1e-5)
    assert loaded.model.config.attention_bias == (name == "bias")


def test_a_reference_is_the_policy_without_its_adapter(finished):
    gaps = [r["train/gap"] for r in metrics.read_metrics(str(finished("reference"))) if "train/gap" in r]
    assert gaps[0] == 0
    assert min(gaps[2:]) > 0
    parts = parts_of(CASES["reference"])
    assert not jax.tree.leaves(parts.frozen["reference"])
    kept = parts_of({**CASES["reference"], "adapter": {**LORA, "also": "final_norm/scale"}}).frozen["reference"]
    assert set(kept) == {"final_norm"}
    kept = parts_of({**CASES["reference"], "adapter": {**LORA, "init": "pissa", "targets": "q"}}).frozen["reference"]
    assert set(kept["layers"]["attention"]["q"]["lora"]) == {"a", "b"}
    with pytest.raises(InputError, match=r"roles.reference.adapter = False: is for a role of the policy"):
        parts_of({**CASES["reference"], "adapter": {}})
    everything = {"kind": "layers", "match": ".*"}
    with pytest.raises(InputError, match=r"roles.reference.of = 'policy': all of the policy's trunk is trained"):
        parts_of({**CASES["reference"], "adapter": everything})


def test_a_started_adapter_that_stays_zero_is_said(tmp_path, capsys):
    still = {"adapter": LORA, "steps": 10, "optimizer": {"learning_rate": 0.0, "warmup_steps": 0}}
    run(config_of(still), str(tmp_path / "run"), devices=jax.devices()[:1])
    assert "the adapters of 7 maps are 0 still after 10 steps" in "".join(capsys.readouterr())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["prompt", "prefix"])
def test_a_run_is_loaded_with_what_is_in_front_of_documents(name, finished):
    loaded = loading.load_model(str(finished(name)))
    parts = parts_of(CASES[name])
    model = parts.models["policy"]
    start = loading.Start("policy", model, 0)
    mesh = sharding.make_mesh({}, jax.devices()[:1])
    values = loading.read_run(str(finished(name)), start, model.specs, params.shardings(model.specs, mesh))
    tokens = jnp.arange(24, dtype=jnp.int32).reshape(2, 12)
    batch = {"tokens": tokens, "segment_ids": jnp.ones_like(tokens), "positions": jnp.tile(jnp.arange(12), (2, 1))}
    with jax.set_mesh(mesh):
        ours = virtual.hidden(loaded.model, loaded.params, batch)
        apart = virtual.hidden(model, values, batch)
        base = model.hidden(kernels.bare(values), batch)
    np.testing.assert_allclose(ours, apart, atol=1e-5)
    assert np.abs(apart - base).max() > 1e-2
    again = config_of({"model": {"init_from": str(finished(name))}})
    with pytest.raises(InputError, match=rf"model.init_from = .*its adapter \({name}\) puts something in front"):
        run(again, str(finished(name)) + "_again", devices=jax.devices()[:1])


@pytest.mark.parametrize("name", ["prompt", pytest.param("prefix", marks=pytest.mark.slow)])
def test_a_reference_is_the_policy_without_what_is_in_front(name, tmp_path):
    terms = {"distill": {"teachers": {"reference": 1.0}, "on": "all"}}
    roles = {"reference": {"of": "policy", "adapter": False}}
    c = config_of({**CASES[name], "objective": {"terms": terms}, "roles": roles}, checkpoint={"every": 0}, steps=2)
    run(c, str(tmp_path / "run"), devices=jax.devices()[:1])
    found = [r["train/divergence"] for r in metrics.read_metrics(str(tmp_path / "run")) if "train/divergence" in r]
    assert len(found) == 2
    assert min(found) > 1e-5


def test_a_loss_falls(finished):
    losses = [r["train/loss"] for r in metrics.read_metrics(str(finished("lora"))) if "train/loss" in r]
    assert losses[-1] < losses[0]


def test_what_cannot_be_honoured_is_refused():
    with pytest.raises(InputError, match=r"trainable = 'head': the adapter says"):
        parts_of({"adapter": LORA, "trainable": "head"})
    with pytest.raises(InputError, match=r"adapter.targets = 'q\|w': 'w' matches none .* layers/attention/q"):
        parts_of({"adapter": {**LORA, "targets": "q|w"}})
    with pytest.raises(InputError, match=r"adapter.also = 'heed': matches none of the parameters"):
        parts_of({"adapter": {**LORA, "also": "heed"}})
    with pytest.raises(
        InputError, match=r"adapter.targets = 'attention/\(q\|w\)': 'w' matches none .* layers/attention/q"
    ):
        parts_of({"adapter": {**LORA, "targets": "attention/(q|w)"}})
    with pytest.raises(InputError, match=r"adapter.also = '\(embed\|heed\)': 'heed' matches none of the parameters"):
        parts_of({"adapter": {**LORA, "also": "(embed|heed)"}})
    with pytest.raises(
        InputError, match=r"adapter.also = 'vera/\.\*': matches only what no run trains: .* VeRA's maps"
    ):
        parts_of({"adapter": {"kind": "vera", "rank": 2, "also": "vera/.*"}})
    with pytest.raises(InputError, match=r"adapter.tokens = 31: count in seq_len = 32"):
        parts_of({"adapter": {"kind": "prompt", "tokens": 31}})
    with pytest.raises(InputError, match=r"adapter.tokens = 10: positions begin after them"):
        parts_of({"adapter": {"kind": "prefix", "tokens": 10}, "model": {**MODEL, "max_length": 40}})
    with pytest.raises(InputError, match=r"adapter.rank = 17: is more than layers/attention/q can have"):
        parts_of({"adapter": {**LORA, "rank": 17}})
    with pytest.raises(InputError, match=r"roles.teacher.adapter = .*: must be of type bool"):
        parts_of({"adapter": LORA, "roles": {"teacher": {"init_from": "x", "adapter": LORA}}})
    with pytest.raises(InputError, match=r"adapter.alpha_pattern.q = nan: must be a finite number"):
        parts_of({"adapter": {**LORA, "alpha_pattern": {"q": float("nan")}}})
    with pytest.raises(InputError, match=r"adapter.d = 0: must not be 0"):
        parts_of({"adapter": {"kind": "vera", "rank": 2, "d": 0.0}})
    with pytest.raises(InputError, match=r"adapter.kind = 'begin': no module .* vera\.$") as error:
        parts_of({"adapter": {"kind": "begin"}})
    assert "starts" not in str(error.value)
    with pytest.raises(InputError, match=r"optimizer.name = 'muon': what is trained has no matrix for it"):
        parts_of({"adapter": {"kind": "prompt", "tokens": 3}}, optimizer={"name": "muon"})
    with pytest.raises(InputError, match=r"frozen_dtype = 'nf4': has no effect, since nothing is frozen"):
        parts_of({}, frozen_dtype="nf4")
    with pytest.raises(InputError, match=r"frozen_dtype = 'int8': has no effect, since no kernel of the layers is"):
        parts_of({"adapter": {"kind": "layers", "match": "layers/.*"}}, frozen_dtype="int8")


def test_what_is_trained_besides_is_no_constant_of_the_adapter():
    trained = parts_of({"adapter": {**LORA, "dropout": 0.1, "also": "layers/.*"}}).roles.trained["policy"]
    q = trained["layers"]["attention"]["q"]
    assert set(q) == {"kernel", "lora"}
    assert set(q["lora"]) == {"a", "b"}


def test_a_head_that_is_the_embedding_is_trained_with_it_or_refused():
    tied = {"model": {**MODEL, "tie_embeddings": True}}
    with pytest.raises(InputError, match=r"adapter.also = 'head': .* the head is 'embed'"):
        parts_of({**tied, "adapter": {**LORA, "also": "head"}})
    with pytest.raises(InputError, match=r"adapter.kind = 'head': .*its embedding is its head .*'match': 'embed'"):
        parts_of({**tied, "adapter": {"kind": "head"}})
    trained = parts_of({**tied, "adapter": {**LORA, "also": "embed"}}).roles.trained["policy"]
    assert "embed" in trained
    assert "head" not in trained
