"""The benchmark: every part says something sane of a tiny model, in turn with a peer, and fails alone."""

import ctypes
import json
import re
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import safetensors.numpy

from experiments import benchmark as experiment
from research import config as config_lib
from research import params
from research.bench import (
    libraries,
    measure,
    mkl,
    names,
    parts,
    peers,
    preferences,
    prepared,
    profiling,
    reinforcement,
    steps,
)
from research.commands import benchmark
from research.devices import sharding
from research.errors import Exit, InputError
from research.models.config import ModelConfig
from research.models.specs import make_specs
from research.planning import abstract
from research.sources import fields

CONFIG = "--config=experiments/benchmark.py:debug"
TINY = ["--config.seq_len=32", "--config.tokenizer.kind=byte", "--config.mesh.data=1", "--config.mesh.fsdp=-1"]
TINY += ["--config.model.num_layers=1", "--config.data.path=tasks:copy"]


@pytest.fixture
def lines(capsys):
    """lines(flags...) -> (exit status, JSON lines, what else it said)."""

    def run(*flags):
        steps = [] if any(flag.startswith("--steps") for flag in flags) else ["--steps=2"]
        status = benchmark.main([CONFIG, *TINY, *steps, *flags])
        captured = capsys.readouterr()
        return status, [json.loads(line) for line in captured.out.splitlines()], captured.err

    return run


class InProcess(peers.Peer):
    """A peer without a process of its own."""

    def __init__(self, name, environment):
        assert environment == {}  # it has no torch
        self.peer = libraries.PlainJax()

    def close(self):
        pass

    def call(self, name, **values):
        if not hasattr(self.peer, name):
            raise measure.Failed(f"jax has no {name}")
        mesh = jax.set_mesh(sharding.make_mesh({}, jax.devices()[:1]))
        with mesh, jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # optax's needs
            return json.loads(json.dumps(getattr(self.peer, name)(**values)))


@pytest.mark.slow
def test_train_step_in_turn_with_a_peer(lines, monkeypatch, tmp_path):
    monkeypatch.setattr(peers, "Peer", InProcess)
    out = tmp_path / "out.jsonl"
    flags = ["--only=train", "--objectives=sft", "--against=jax", f"--profile={tmp_path}", f"--output={out}"]
    status, (sft,), said = lines(*flags)
    assert status == 0
    assert [json.loads(line) for line in out.read_text().splitlines()] == [sft]
    tokens = 8 * 32
    # One layer, D 64, 4 query and 2 key/value heads of 16, F 128, gated; V 384 (byte, in whole tiles); T 32.
    weights = 64 * (4 + 2 + 2 + 4) * 16 + 3 * 64 * 128 + 64 * 384
    flops = tokens * (6 * weights + 6 * 4 * 16 * 32)
    assert sft["model_flops"] == flops
    seconds = sft["seconds"]
    assert 0 < seconds["q1"] <= seconds["median"] <= seconds["q3"]
    assert seconds["n"] == 2
    assert sft["tokens_per_second"] == pytest.approx(tokens / seconds["median"])
    assert sft["mfu"] == pytest.approx(flops / seconds["median"] / sft["matmul_flops_per_second"])
    theirs = sft["against"]["jax"]
    assert theirs["loss"] == pytest.approx(sft["loss"], rel=1e-4)  # the same work
    assert theirs["ratio"] == pytest.approx(theirs["seconds"]["median"] / seconds["median"])
    assert theirs["own_mfu"] == pytest.approx(flops / theirs["seconds"]["median"] / theirs["matmul_flops_per_second"])
    assert "of its own" in said
    memory = sft["memory"]
    state = 12 * (weights + 64 * 384) / 8  # parameters, the look-up too, and two moments, of each of 8 devices
    assert state < memory["arguments"] < 1.1 * state
    assert memory["resident_peak"] > memory["temporaries"] > 0
    assert list(tmp_path.rglob("perfetto_trace.json.gz"))
    if "by signal" in sft.get("profile_error", ""):
        assert sft["profile_error"] in said
        pytest.skip(f"this jax aborts a process that reads a profile: {sft['profile_error']}")
    scopes = [each["scope"] for each in sft["costliest"]]
    ranked = profiling.read(tmp_path / "sft", most=1000)
    # Some compilers join a product with what the optimizer makes of it: "optimizer/layers/mlp (backward)".
    for part in ("layers/attention (backward)", "layers/mlp (backward)"):
        assert any(scope.endswith(part) for scope in scopes), scopes
    # Of so small a step, whether this is among the ten costliest is chance.
    assert "layers/mlp" in {each["scope"] for each in ranked}
    assert [each["scope"] for each in sft["costliest"]] == [each["scope"] for each in ranked[:10]]
    assert sum(each["share"] for each in sft["costliest"]) <= 1.001
    assert sum(each["share"] for each in ranked) == pytest.approx(1)
    assert "layers/mlp (backward)" in said


@pytest.mark.parametrize("objective", ["match", "classify", "weak_to_strong", "reward"])
def test_other_objectives_trace(objective):
    """What each objective wants of roles, labels and fields is there; the batch is made of it."""
    config = config_lib.parse(experiment.get_config("debug").to_dict())
    run = abstract.describe(prepared.with_objective(config, objective), jax.devices()[:1])
    spec = abstract.batch_spec(run.config)
    batch = fields.fake(spec, 300)
    assert {k: (x.shape, x.dtype) for k, x in batch.items()} == {k: (x.shape, x.dtype) for k, x in spec.items()}
    with jax.set_mesh(run.mesh):
        assembled = run.assemble()
        assert assembled.step.trace(assembled.state, assembled.frozen, assembled.batch)


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
def test_loop_decode_data_loading_checkpoint(lines):
    short = "--config.model.max_length=128"
    status, records, _ = lines("--only=loop,decode,data,loading,checkpoint", "--decode_batch=8", short)
    assert status == 0, [r for r in records if "error" in r]
    found = {(r["part"], r.get("case")): r for r in records}
    loop = found["loop", None]
    assert 0.1 < loop["seconds"]["median"] / loop["bare_seconds"]["median"] < 50  # both are seconds of a step
    assert 0 <= loop["data_wait_fraction"] <= 1
    assert loop["overhead"]["n"] == measure.ROUNDS
    batch = found["decode", "batch 8"]
    assert batch["tokens_per_second"] == pytest.approx(8 * 64 / batch["seconds"]["median"])
    assert 0 < batch["prefill_seconds"]["median"] < batch["seconds"]["median"]
    # Weights without the look-up (untied), and the cache, half full of new tokens on average; float32.
    c = ModelConfig(384, 1, 64, 4, 2, d_ff=128, tie_embeddings=False)
    sizes = [np.prod(s.shape) for s in jax.tree.leaves(make_specs(c), is_leaf=lambda x: hasattr(x, "axes"))]
    assert batch["bytes_per_token"] == 4 * (sum(sizes) - 384 * 64 + 2 * 2 * 16 * 8 * (32 + 32))
    queue = found["decode", "64 prompts, 8 at once"]
    assert queue["new_tokens"]["padded"] == queue["new_tokens"]["refilled"] > 64
    byte, bpe = found["data", "byte"], found["data", "bpe"]
    assert byte["tokens"] > bpe["tokens"] > 0
    assert bpe["first_seconds"] > bpe["cached_seconds"]["median"]
    assert found["loading", "safetensors"]["bytes"] == 4 * sum(sizes)
    assert found["loading", "checkpoint"]["bytes"] > 12 * sum(sizes)  # parameters and two moments
    for case in ("safetensors", "checkpoint"):
        assert found["loading", case]["read_bytes_per_second"] > 0
    assert found["checkpoint", None]["stall_seconds"]["median"] > 0
    assert not {part for part, _ in found} - set(parts.PARTS)


def test_a_peer_says_what_it_does_not_know(tmp_path):
    with pytest.raises(measure.Failed, match="know next_token and sft alone"):
        steps.write_work(str(tmp_path), None, None, "distill")


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
def test_startup(lines):
    status, (record,), _ = lines("--only=startup", "--steps=1")
    assert status == 0
    seconds = {cached: times["median"] for cached, times in record["seconds_to_first_step"].items()}
    assert {"nothing", "tokens_and_programs"} <= seconds.keys()
    assert all(0 < value < 300 for value in (*seconds.values(), record["import"]["median"]))


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
def test_a_peer_is_a_process(lines):
    status, (record,), _ = lines("--only=train", "--against=jax")
    assert status == 0
    assert record["against"]["jax"]["loss"] == pytest.approx(record["loss"], rel=1e-4)


@pytest.mark.slow
def test_transformers_finds_the_same_loss_and_tokens(lines):
    pytest.importorskip("torch", reason="the peer hf needs torch")
    status, (record, batch, _), _ = lines("--only=train,decode", "--against=hf", "--decode_batch=8")
    assert status == 0
    assert record["against"]["hf"]["loss"] == pytest.approx(record["loss"], rel=1e-4)
    assert batch["against"]["hf"]["same_tokens"] > 0.95


@pytest.mark.slow
def test_peft_finds_the_same_loss(lines):
    pytest.importorskip("peft", reason="the peer peft needs torch and peft")
    adapter = '--config.adapter={"kind": "lora", "rank": 4}'
    status, (record,), _ = lines("--only=train", "--against=peft,hf", adapter)
    assert status == 0
    theirs = record["against"]["peft"]
    assert theirs["loss"] == pytest.approx(record["loss"], rel=1e-4)
    assert theirs["mkl"].startswith(("intel", "own ("))
    assert record["against"]["hf"]["error"] == "trains all of a model"
    _, (plain,), _ = lines("--only=train", "--against=peft")
    assert plain["against"]["peft"]["error"] == "trains adapters, and the config has none"
    assert plain["loss"] != pytest.approx(record["loss"], rel=1e-4)  # B is not 0


def test_a_peer_has_the_policy_and_its_adapter(tmp_path):
    """What begins as 0 is elsewhere; the base goes out bare, and the adapter beside it with as many parameters."""
    config = experiment.get_config("debug,lora")
    config.tokenizer.kind = "byte"
    config.model.num_layers = 1
    run = abstract.describe(config_lib.parse(config.to_dict()), jax.devices()[:1])
    with jax.set_mesh(run.mesh):
        assembled = run.assemble()
        state, frozen = assembled.begin(np.uint32(0))
        step = prepared.Prepared(assembled, None, state, frozen, {}, {}, {}, 0.0).away_from_zero()
    prepared.write_policy(str(tmp_path), step, run.config)
    tensors = safetensors.numpy.load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert sum(x.size for x in tensors.values()) == params.count(assembled.roles.trained["policy"])
    assert all(x.any() for x in tensors.values())
    base = safetensors.numpy.load_file(next(tmp_path.glob("*.safetensors")))
    assert sum(x.size for x in base.values()) == params.count(make_specs(assembled.models["policy"].config))


@pytest.mark.parametrize(
    ("variant", "peer", "message"),
    [
        ("lora", "hf_compile", "trains all of a model"),
        ("small", "peft_compile", "the config has none"),
        ("nf4", "peft", "knows no base in nf4"),
    ],
)
def test_a_peer_does_the_config_s_work_or_none(variant, peer, message):
    with pytest.raises(measure.Failed, match=message):
        steps.check_peer(peer, config_lib.parse(experiment.get_config(variant).to_dict()))


@pytest.mark.parametrize(
    ("objective", "roles", "message"),
    [
        ({"terms": {"sft": 1.0}}, {}, "trl knows preference alone"),
        ({"terms": {"preference": 1.0, "sft": 1.0}}, {}, "trl knows preference alone"),
        ({"terms": {"preference": {"kind": "kto"}}}, {}, "trl knows kind of sigmoid"),
        ({"terms": {"preference": 1.0}, "preference": {"sft": 0.1}}, {}, "with beta and cached alone"),
        ({"terms": {"preference": 1.0}}, {"of": "policy", "sync_every": 2}, "a reference of its own"),
    ],
)
def test_trl_does_the_config_s_work_or_none(objective, roles, message):
    values = experiment.get_config("debug,dpo").to_dict() | {"objective": objective}
    values["roles"] = {"reference": roles} if roles else {}
    with pytest.raises(measure.Failed, match=message):
        preferences.trl_options(config_lib.parse(values))


def test_trl_has_the_options_of_the_objective():
    def options(variant, **term):
        values = experiment.get_config(variant)
        values.objective["terms"]["preference"].update(term)
        return preferences.trl_options(config_lib.parse(values.to_dict()))

    assert options("dpo") == {"loss_type": "sigmoid", "beta": 0.1, "precompute_ref_log_probs": False}
    hinge = {"loss_type": "hinge", "beta": 0.5, "precompute_ref_log_probs": True}
    assert options("dpo,cached", kind="hinge", beta=0.5) == hinge


def test_trl_reads_the_documents_of_the_pairs():
    """Of two packed rows: chosen answers first, each document padded at its end."""
    columns = ("tokens", "segment_ids", "positions", "loss_mask", "pair", "side", "reference_log_prob")
    batch = fields.fake(fields.spec(columns, 2, {"time": 64}), 300)
    written = preferences.documents(batch)
    count = batch["pair"].max(axis=1).sum()
    assert count > 2
    assert len(written["input_ids"]) == 2 * count
    row = 0
    first, second = ((batch["pair"][row] == 1) & (batch["side"][row] == side) for side in (0, 1))
    for which, i in ((first, 0), (second, count)):
        length = which.sum()
        assert written["attention_mask"][i].tolist() == [1] * length + [0] * (written["input_ids"].shape[1] - length)
        np.testing.assert_array_equal(written["input_ids"][i, :length], batch["tokens"][row, which])
        np.testing.assert_array_equal(written["completion_mask"][i, :length], batch["loss_mask"][row, which])
        answer = np.flatnonzero(which & (batch["loss_mask"][row] > 0))
        log_prob = batch["reference_log_prob"][row, answer - 1].sum()  # a position speaks of the token after it
        assert written["reference"][i] == pytest.approx(log_prob, rel=1e-5)
    assert written["completion_mask"].sum() == batch["loss_mask"].sum()


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["dpo", "dpo,cached"])
def test_trl_finds_the_same_loss(variant, capsys):
    pytest.importorskip("trl", reason="the peer trl needs torch and trl")
    flags = [CONFIG + "," + variant, "--only=train", "--steps=2", "--against=trl,hf", "--config.model.num_layers=1"]
    assert benchmark.main(flags) == 0
    (record,) = map(json.loads, capsys.readouterr().out.splitlines())
    peer = record["against"]["trl"]
    assert peer["loss"] == pytest.approx(record["loss"], rel=1e-5)
    assert record["loss"] != pytest.approx(np.log(2), rel=1e-3)  # the reference is another model
    assert peer["seconds"]["n"] == 2
    assert record["against"]["hf"]["error"] == "peers know next_token and sft alone"


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
def test_a_step_with_rewards_is_a_rollout_and_its_updates(monkeypatch, capsys):
    """Of 8 answers of 8 tokens; both updates of the rollout are in its time."""
    monkeypatch.setattr(peers, "check", lambda names: None)  # none is started
    flags = ["--only=train", "--steps=2", "--against=trl,hf", "--config.rollout.epochs=2"]
    assert benchmark.main([CONFIG + ",grpo", *TINY, *flags]) == 0
    out, said = capsys.readouterr()
    (record,) = map(json.loads, out.splitlines())
    assert record["new_tokens"] == 8 * 8
    assert record["tokens_per_second"] == pytest.approx(64 / record["seconds"]["median"])
    assert set(record["shares"]) == {"generation", "reward", "scores", "training"}
    assert sum(record["shares"].values()) == pytest.approx(1, abs=0.2)  # each is a median
    assert record["entropy"] == pytest.approx(np.log(258), abs=0.1)  # of bytes and their special tokens
    assert record["against"]["trl"]["error"] == "trl knows advantage.kind = group, one epoch and all answers"
    assert "peers know" in record["against"]["hf"]["error"]
    assert ", generation " in said


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": {"terms": {"policy_gradient": 1.0}}}, "aggregation = seq-mean-token-mean"),
        ({"objective": {"terms": {"policy_gradient": 1.0, "value": 0.5}}}, "policy_gradient alone"),
        ({"objective.terms.policy_gradient.kind": "cispo"}, "kind = ppo"),
        ({"objective.terms.policy_gradient.dual_clip": 3.0}, "kind = ppo"),
        ({"rollout.filter_rounds": 1}, "one epoch and all answers"),
        ({"advantage.whiten": "tokens"}, "advantage.kind = group"),
        ({"batch_size": 4, "rollout.prompts": 2}, "one update a rollout"),
    ],
)
def test_trl_learns_from_rewards_as_the_config_does_or_not(changes, message):
    config = experiment.get_config("debug,grpo")
    config.rollout.prompts = 0
    config.update_from_flattened_dict(changes)
    with pytest.raises(measure.Failed, match=message):
        reinforcement.trl_options(config_lib.parse(config.to_dict()))


def test_trl_has_the_options_of_the_rewards_and_the_loss():
    options = reinforcement.trl_options(config_lib.parse(experiment.get_config("grpo").to_dict()))
    assert options["rewards"].keys() == {"length"}
    known = {"num_generations": 4, "max_completion_length": 128, "beta": 0.0, "loss_type": "grpo", "epsilon": 0.2}
    assert options.items() >= (known | {"temperature": 1.0, "top_k": 0, "scale_rewards": "group"}).items()


@pytest.mark.slow
def test_trl_answers_the_same_prompts_at_the_same_length(capsys):
    """With the same parameters its answers have the same entropy, but for chance."""
    pytest.importorskip("trl", reason="the peer trl needs torch and trl")
    flags = [CONFIG + ",grpo", "--only=train", "--steps=2", "--against=trl", "--config.model.num_layers=1"]
    assert benchmark.main(flags) == 0
    (record,) = map(json.loads, capsys.readouterr().out.splitlines())
    peer = record["against"]["trl"]
    assert peer["new_tokens"] == record["new_tokens"] == 8 * 8
    assert peer["entropy"] == pytest.approx(record["entropy"], abs=0.02)
    assert peer["seconds"]["n"] == 2


def test_kernels_of_mkl_are_told_and_said(monkeypatch, tmp_path):
    monkeypatch.setenv("UNDERSTUDY_CACHE", str(tmp_path))
    monkeypatch.setattr(mkl, "_is_intel", lambda: False)
    monkeypatch.setattr(mkl, "_build", mkl._build.__wrapped__)
    assert mkl.choose("own") == ("own", {}, "as asked for")
    found = mkl.choose("intel")
    if found.kernels == "intel":
        assert ctypes.CDLL(found.environment["LD_PRELOAD"].split(":")[0]).mkl_serv_intel_cpu_true() == 1
    monkeypatch.setattr(mkl.shutil, "which", lambda name: None)
    assert mkl.choose("intel") == ("own", {}, "no C compiler")
    monkeypatch.setattr(mkl, "_is_intel", lambda: True)
    assert mkl.choose("intel") == ("intel", {}, "")


def test_a_part_that_fails_leaves_the_others(lines, monkeypatch):
    def broken(bench):
        raise RuntimeError("no room")
        yield

    monkeypatch.setattr(
        parts, "PARTS", parts.PARTS | {"train": broken, "data": lambda bench: iter([({"case": "x"}, "x")])}
    )
    status, records, said = lines("--only=train,data")
    assert status == 1
    assert records[0]["error"] == "RuntimeError: no room"
    assert records[1]["case"] == "x"
    assert "no room" in said


def test_a_peer_that_fails_leaves_the_others():
    def fails(n):
        raise measure.Failed("it ended with status 1")

    seconds = measure.in_turn({"a": lambda n: [1.0] * n, "b": fails}, 7)
    assert seconds == {"a": [1.0] * 7, "b": "it ended with status 1"}


@pytest.mark.parametrize(("part", "slow"), [(0.47, True), (0.95, False)])
def test_a_peer_s_own_peak_stands_beside_ours(part, slow):
    """Of a peer that takes twice as long: with half of our peak it uses as much of its own as we do."""
    record = {"model_flops": 30.0, "mfu": 0.3, "matmul_flops_per_second": 100.0, "seconds": {"median": 1.0}}
    others = peers.Others(answers={"hf": {"loss": 1.0}})
    others.processes["hf"] = SimpleNamespace(call=lambda name: {"device_peak": None, "resident_peak": 10**8})
    seconds = {"hf": [2.0] * 4, "hf matmul": [4.0 / part] * 12}
    record |= others.compare(seconds, lambda times: {"ratio": times["median"]})
    peers.with_peaks(record, 400.0, 100.0)
    figures = record["against"]["hf"]
    assert figures["peak_ratio"] == pytest.approx(part)
    assert figures["own_mfu"] == pytest.approx(30 / 2 / (100 * part))
    assert ("this build is slow on this processor" in peers.describe(record)) == slow
    others.processes.clear()


def test_a_product_says_a_peer_s_peak():
    seconds = libraries.PlainJax().matmul(2, "float32")
    assert len(seconds) == 2
    assert min(seconds) > 0


def test_runs_take_turns():
    order = []
    measure.in_turn({name: lambda n, name=name: order.extend([name] * n) or [0.0] * n for name in "ab"}, 6)
    assert "".join(order) == "abaabbabaabb"


def test_a_process_that_dies_is_a_failure(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with peers.Peer("jax") as peer, pytest.raises(measure.Failed, match="status 1"):
        peer.call("train")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--config: is missing. Example: understudy benchmark"),
        ([CONFIG, "--only=trian"], "Did you mean 'train'"),
        ([CONFIG, "--against=hff"], "Did you mean 'hf'"),
        ([CONFIG, "--decode_batch=0"], "--decode_batch = 0: give sizes"),
        ([CONFIG, "--objectives=stf"], "Did you mean 'sft'"),
        ([CONFIG, "--config.sed=1"], "Did you mean"),
    ],
)
def test_bad_flags_are_errors(flags, message, capsys):
    assert benchmark.main(flags) == Exit.BAD_INPUT
    assert message in capsys.readouterr().err


def test_a_peer_that_is_not_installed_says_how_to(monkeypatch):
    monkeypatch.setitem(peers.PEERS, "hf", ("torch_that_is_not_here",))
    with pytest.raises(InputError, match="pip install torch_that_is_not_here"):
        peers.check(["hf"])


def test_a_profile_that_cannot_be_read_is_a_line(tmp_path):
    (tmp_path / "trace.xplane.pb").write_bytes(b"no trace at all")
    (tmp_path / profiling.PROGRAM).write_text("")
    with pytest.raises(profiling.Unreadable, match="can't be read: the process that read it ended"):
        profiling.read(tmp_path)
    assert profiling.describe({"profile_error": "why"}).strip() == "why"


def test_a_profile_without_the_step_s_operations_says_so(tmp_path):
    (tmp_path / profiling.PROGRAM).write_text("")
    with pytest.raises(profiling.Unreadable, match="holds no operation of the step"):
        profiling.read(tmp_path)


def test_a_plane_without_operations_hides_no_other():
    host = {"layers/mlp": 2.0}
    empty = "/device:CUSTOM:Megascale Trace"
    assert profiling.seconds_of({"/host:CPU": host, empty: {}}) == host
    device = {"layers/mlp": 3.0, "optimizer": 1.0}
    planes = {"/host:CPU": host, empty: {}, "/device:TPU:0": device, "/device:TPU:1": device}
    assert profiling.seconds_of(planes) == {"layers/mlp": 6.0, "optimizer": 2.0}


@pytest.mark.parametrize(
    ("op_name", "scope"),
    [
        ("jit(step)/jvp(layers)/while/body/closed_call/mlp/mul", "layers/mlp"),
        ("jit(step)/transpose(jvp(layers))/while/body/closed_call/attention/mul", "layers/attention (backward)"),
        (
            "jit(step)/transpose(jvp(layers))/while/body/checkpoint/rematted_computation/attention/dot",
            "layers/attention (again)",
        ),
        ("jit(step)/attention/jit(_where)/broadcast_in_dim", "layers/attention"),
        ("jit(step)/optimizer/div", "optimizer"),
        ("jit(step)/lt", "other"),
        ("", "other"),
    ],
)
def test_scopes(op_name, scope):
    assert profiling.scope(op_name) == scope


def test_shapes_are_those_of_the_models_they_are_named_after():
    counts = {}
    for size in experiment.SHAPES:
        c = config_lib.model_config(config_lib.parse(experiment.get_config(size).to_dict()), 4096)
        counts[size] = sum(np.prod(s.shape) for s in jax.tree.leaves(make_specs(c), is_leaf=_is_spec))
    assert counts["small"] == pytest.approx(6.82e6, rel=1e-3)
    assert counts["smol"] == 134_515_008  # SmolLM2-135M's
    assert counts["360m"] == 361_821_120  # SmolLM2-360M's
    assert counts["1b"] == 1_235_814_400  # Llama 3.2 1B's


def _is_spec(x):
    return hasattr(x, "axes")


def test_the_parts_are_those_of_the_documentation():
    listed = re.findall(r"^  (\w+)  +\S", benchmark.__doc__, re.M)
    assert listed == list(parts.PARTS) == list(names.PARTS)
