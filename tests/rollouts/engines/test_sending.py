"""Weights on their way to servers: what is written, and how a server that fails keeps what it has."""

import http.server
import json
import sys
import threading
from pathlib import Path
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from research import params
from research.errors import InputError
from research.models import adapters, transformer
from research.models.config import ModelConfig
from research.pretrained import load
from research.rollouts.engines import sending, weights
from research.rollouts.engines.nccl import NcclWeights
from research.rollouts.engines.policy import Policy
from research.rollouts.engines.weights import ServerError

sys.path.insert(0, str(Path(__file__).parents[3] / "launch" / "vllm_plugin"))
from understudy_vllm import folder as plugin

CONFIG = ModelConfig(vocab_size=32, num_layers=2, d_model=16, num_heads=2, num_kv_heads=1, d_ff=32, max_length=32)


def policy(tie=True, **options):
    config = ModelConfig(**{**CONFIG.__dict__, "tie_embeddings": tie})
    return Policy(transformer.make_model(config, adapter=adapters.load(options)), options, {}, "base")


def values_of(of, seed=0):
    """Random parameters, none of them 0."""
    values = params.init(of.model.specs, jax.random.key(seed))
    noise = lambda x, i: x + 0.1 * jax.random.normal(jax.random.key(seed + i), x.shape, x.dtype)  # noqa: E731
    leaves, tree = jax.tree.flatten(values)
    return jax.tree.unflatten(tree, [noise(x, i) if x.ndim > 1 else x for i, x in enumerate(leaves)])


class FakeServer:
    """The routes of vLLM that weights go by. `broken` ones answer with an error, `missing` ones aren't there."""

    def __init__(self):
        self.stamp, self.adapters, self.prepared, self.paused = "default", {}, None, False
        self.calls, self.broken, self.missing = [], set(), set()
        fake = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.answer({})

            def do_POST(self):
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                self.answer(json.loads(body) if body else {})

            def answer(self, body):
                status, value = fake.answer(self.path.partition("?")[0], body)
                self.send_response(status)
                self.end_headers()
                self.wfile.write(json.dumps(value).encode())

            def log_message(self, *args):
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def answer(self, path, body):
        self.calls.append(path)
        if path in self.missing:
            return 404, {"detail": "Not Found"}
        if path in self.broken:
            return 500, {"error": f"{path} is broken"}
        if path == "/weight_info":
            return 200, {"weight_version": self.stamp}
        if path == "/get_world_size":
            return 200, {"world_size": 2}
        if path == "/v1/models":
            return 200, {"data": [{"id": name} for name in ("policy", *self.adapters)]}
        if path == "/v1/load_lora_adapter":
            self.adapters[body["lora_name"]] = body["lora_path"]
        elif path == "/v1/unload_lora_adapter":
            del self.adapters[body["lora_name"]]
        elif path == "/init_weight_transfer_engine" and "folder" not in body["init_info"]:
            self.joined = body["init_info"]
        elif path == "/update_weights" and "names" in body["update_info"]:
            self.told = body["update_info"]
        elif path == "/init_weight_transfer_engine":
            try:
                plugin.check(Path(body["init_info"]["folder"]))
            except ValueError as error:
                return 500, {"error": str(error)}
            self.prepared = body["init_info"]["folder"]
        elif path == "/update_weights" and body["update_info"]["folder"] != self.prepared:
            return 500, {"error": "isn't prepared"}
        elif path == "/update_weight_version":
            self.stamp = body["new_version"]
        elif path == "/finish_weight_update":
            self.stamp = body["weight_version"]
        elif path in ("/pause", "/resume"):
            self.paused = path == "/pause"
        return 200, {}


@pytest.fixture
def servers():
    fakes = [FakeServer(), FakeServer()]
    yield fakes
    for fake in fakes:
        fake.http.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize("tie", [True, False])
def test_whole_weights_are_the_models(tmp_path, tie):
    """What a server reads is what the run computes with, and the plugin finds each tensor as it was written."""
    of = policy(tie, kind="vera", rank=4)
    values, w = values_of(of), sending.make_weights(of, tmp_path, dtype="float32")
    w.stage(values, 3)
    path = next(tmp_path.iterdir())
    manifest = plugin.check(path)
    assert (manifest["version"], path.name) == (3, w.stamp(3))
    assert ("lm_head.weight" in manifest["tensors"]) is not tie
    found = load.open_pretrained(str(path))
    plain = transformer.make_model(of.config)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("x",))
    where = params.tree_map(lambda s: jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()), plain.specs)
    read = load.load(found, plain.specs, where)
    ids = jnp.arange(8)[None]
    batch = {"tokens": ids, "segment_ids": jnp.ones_like(ids), "positions": ids}
    np.testing.assert_allclose(plain.hidden(read, batch), of.model.hidden(values, batch), rtol=1e-4, atol=1e-5)


def test_a_damaged_version_is_not_taken(tmp_path):
    of = policy()
    w = sending.make_weights(of, tmp_path, dtype="float32")
    w.stage(values_of(of), 1)
    path = next(tmp_path.iterdir())
    file = path / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-4] + b"\0\0\0\0")
    with pytest.raises(ValueError, match=r"isn't the one that was written"):
        plugin.check(path)
    file.write_bytes(whole[:-4])
    with pytest.raises(ValueError, match=r"ends too early"):
        plugin.check(path)
    file.write_bytes(whole)
    plugin.check(path)
    (path / "COMMIT").unlink()
    with pytest.raises(ValueError, match=r"isn't complete"):
        plugin.check(path)


def test_a_version_of_another_model_is_not_taken(tmp_path):
    entries = {"a": np.zeros((2, 3), np.float32), "b": np.zeros(1, np.float32)}
    safetensors.numpy.save_file(entries, tmp_path / "model.safetensors")

    def manifest(**shapes):
        return {"tensors": {name: {"shape": shape} for name, shape in shapes.items()}}

    plugin.check_like(manifest(a=[2, 3], b=[1]), tmp_path)
    for shapes, message in (({"a": [2, 4], "b": [1]}, "shape"), ({"a": [2, 3]}, "b: isn't in the version")):
        with pytest.raises(ValueError, match=message):
            plugin.check_like(manifest(**shapes), tmp_path)


def test_whole_weights_in_two_phases(tmp_path, servers):
    of, urls = policy(), [fake.url for fake in servers]
    w = sending.make_weights(of, tmp_path, dtype="float32")
    assert isinstance(w, sending.WholeWeights)
    w.stage(values_of(of), 1)
    assert w.served(urls[0]) is None
    assert weights.sync(w, urls, 1) == {}
    assert [w.served(url) for url in urls] == [1, 1]
    order = [path for path in servers[0].calls if path != "/weight_info"]
    assert order == [
        "/init_weight_transfer_engine",
        "/pause",
        "/update_weight_version",
        "/start_weight_update",
        "/update_weights",
        "/reset_prefix_cache",
        "/finish_weight_update",
        "/resume",
    ]

    servers[1].broken.add("/init_weight_transfer_engine")  # fails in the first phase, and serves on what it has
    w.stage(values_of(of, 1), 2)
    assert "is broken" in str(weights.sync(w, urls, 2)[urls[1]])
    assert [w.served(url) for url in urls] == [2, 1]

    servers[1].broken = {"/update_weights"}  # in the second: it has neither version, and answers are of none
    assert urls[1] in weights.sync(w, urls, 2)
    assert w.served(urls[1]) is None
    assert servers[1].stamp not in (w.stamp(1), w.stamp(2))
    assert not servers[1].paused

    servers[1].broken = set()
    assert weights.sync(w, urls, 2) == {}
    assert [w.served(url) for url in urls] == [2, 2]
    assert servers[0].calls.count("/update_weights") == 2  # it wasn't given again what it has


def test_a_server_that_is_gone(tmp_path, servers):
    of = policy()
    w = sending.make_weights(of, tmp_path, dtype="float32")
    w.stage(values_of(of), 1)
    servers[1].http.shutdown()
    servers[1].http.server_close()
    failures = weights.sync(w, [fake.url for fake in servers], 1)
    assert list(failures) == [servers[1].url]
    with pytest.raises(ServerError, match=servers[1].url):
        w.served(servers[1].url)


def test_adapters_are_loaded_beside_each_other(tmp_path, servers):
    of, fake = policy(kind="lora", rank=4, rslora=True, targets="q|v"), servers[0]
    w = sending.make_weights(of, tmp_path)
    assert isinstance(w, sending.AdapterWeights)
    for version in (4, 6, 9):
        w.stage(values_of(of, version), version)
        assert weights.sync(w, [fake.url], version) == {}
        assert w.served(fake.url) == version
        assert w.model(version) in fake.adapters
    assert list(fake.adapters) == [w.model(6), w.model(9)]  # answers of the last version may be under way
    assert w.stamp(9) == "default"
    path = Path(fake.adapters[w.model(9)])
    saved = json.loads((path / "adapter_config.json").read_text())
    assert (saved["r"], saved["use_rslora"], saved["target_modules"]) == (4, True, ["q_proj", "v_proj"])

    again = sending.make_weights(of, tmp_path)  # the run was killed, and goes on from an earlier step
    again.stage(values_of(of, 7), 7)
    weights.sync(again, [fake.url], 7)
    assert (again.served(fake.url), list(fake.adapters)) == (7, [again.model(7)])

    fake.adapters.clear()  # the server was started anew between the phases
    with pytest.raises(ServerError, match=r"hasn't loaded"):
        again.commit(fake.url, 7)
    fake.missing.add("/v1/load_lora_adapter")
    with pytest.raises(ServerError, match=r"SERVER_LORA_RANK"):
        again.prepare(fake.url, 7)
    fake.stamp = "3-0123456789ab"
    with pytest.raises(ServerError, match=r"changed since its start"):
        again.prepare(fake.url, 7)


class FakeGroup:
    """A group of NCCL, which notes what is sent."""

    sent: ClassVar[list] = []
    fails = False

    def __init__(self, number, size):
        self.size = size

    def broadcast(self, tensors):
        if self.fails:
            raise OSError("ncclBroadcast gave status 3")
        self.sent[:] = tensors


def test_whole_weights_by_nccl(tmp_path, servers, monkeypatch):
    """What the run sends is what it tells the server, in this order; NCCL itself isn't here."""
    of, fake = policy(), servers[0]
    with pytest.raises(InputError, match="from GPU to GPU, and this run is on cpu"):
        sending.make_weights(of, tmp_path, transfer="nccl")
    with monkeypatch.context() as patch:
        patch.setattr(jax, "default_backend", lambda: "gpu")
        assert isinstance(sending.make_weights(of, tmp_path, transfer="nccl"), NcclWeights)
    w = NcclWeights(of, "policy", "bfloat16", 10.0, FakeGroup)
    w.stage(values_of(of), 5)
    assert weights.sync(w, [fake.url], 5) == {}
    assert (w.served(fake.url), fake.joined["world_size"], fake.joined["packed"]) == (5, 3, False)
    assert fake.told["shapes"] == [list(x.shape) for x in FakeGroup.sent]
    assert {x.dtype.name for x in FakeGroup.sent} == set(fake.told["dtype_names"]) == {"bfloat16"}
    embed = FakeGroup.sent[fake.told["names"].index("model.embed_tokens.weight")]
    np.testing.assert_array_equal(embed, np.asarray(values_of(of)["embed"]).astype(embed.dtype))

    monkeypatch.setattr(FakeGroup, "fails", True)
    w.stage(values_of(of, 1), 6)
    assert "status 3" in str(weights.sync(w, [fake.url], 6)[fake.url])
    assert w.served(fake.url) is None
    assert not fake.paused
    monkeypatch.undo()
    assert weights.sync(w, [fake.url], 6) == {}
    assert fake.calls.count("/init_weight_transfer_engine") == 2  # the group was formed anew


@pytest.mark.parametrize(
    "options",
    [
        {"kind": "lora", "dora": True},
        {"kind": "lora", "also": "final_norm/.*"},
        {"kind": "lora", "targets": "embed"},
        {"kind": "lora", "init": "pissa"},
        {"kind": "vera"},
        {"kind": "ia3"},
    ],
)
def test_other_adapters_are_merged(options):
    rank = {"rank": 4} if "ia3" not in options.values() else {}
    assert not policy(tie=options.get("targets") != "embed", **options, **rank).hot


def test_a_lora_goes_by_a_folder_alone(tmp_path):
    with pytest.raises(InputError, match=r"rollout.transfer = 'nccl'"):
        sending.make_weights(policy(kind="lora", rank=4), tmp_path, transfer="nccl")


@pytest.mark.parametrize("options", [{"kind": "prefix", "tokens": 2}, {"kind": "prompt", "tokens": 2}])
def test_what_stands_before_documents_is_refused(options, tmp_path):
    with pytest.raises(InputError, match=r"adapter.kind = '(prefix|prompt)'.*'local'"):
        sending.make_weights(policy(**options), tmp_path)
