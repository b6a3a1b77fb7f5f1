"""A run whose answers come from servers: it learns from them as from its own, and outlives them."""

import threading

import jax
import numpy as np
import pytest
from fake_vllm import FakeServer, FakeWeights, OwnModel
from runs import small

from research import config
from research.errors import InputError, Unavailable
from research.run import checkpoint, engines, metrics, run
from research.run.loop import Preempted

pytestmark = pytest.mark.slow

SIZES = {"num_layers": 1, "d_model": 32, "num_heads": 2, "num_kv_heads": 2, "d_ff": 64}


def config_of(urls, **rollout):
    return small(
        steps=4,
        batch_size=8,
        data={"path": "tasks:copy", "examples": 40, "pack": False},
        model=SIZES,
        rewards={"length": {"unit": "characters", "most": 1, "over": 8}},
        objective={"terms": {"policy_gradient": {"old": "trainer"}}},
        checkpoint={"every": 0},
        rollout={
            **{"answers": 4, "max_new_tokens": 6, "temperature": 0.8, "engine": "vllm", "servers": tuple(urls)},
            **rollout,
        },
    )


@pytest.fixture
def servers(monkeypatch):
    """Two servers of the run's model."""
    a, b = servers = [FakeServer(None, 0), FakeServer(None, 0)]

    def make_weights(policy, folder, **options):
        for server in servers:
            server.model, server.vocab_size = OwnModel(policy.model), policy.model.config.vocab_size
        return Weights(servers)

    monkeypatch.setattr(engines, "make_weights", make_weights)
    with a, b:
        yield servers


class Weights(FakeWeights):
    """Servers go with version `lost`, and `stop` is set then. What is staged is copied, since updates delete
    parameters."""

    lost, stop = None, threading.Event()

    def stage(self, params, version):
        super().stage(jax.tree.map(np.array, params), version)

    def commit(self, server, version):
        super().commit(server, version)
        if version == Weights.lost:
            self.servers[server].end()
            Weights.stop.set()


def test_a_run_learns_from_servers_saves_when_they_are_gone_and_goes_on(servers, tmp_path, monkeypatch):
    c, workdir = config_of([server.url for server in servers], outage_seconds=0.1), str(tmp_path / "run")
    monkeypatch.setattr(Weights, "lost", 2)
    with pytest.raises(Unavailable, match=r"^rollout\.servers: none can be used"):
        run.run(c, workdir, devices=jax.devices()[:1])
    assert checkpoint.steps(workdir) == [2]
    for server in servers:
        server.begin()
    monkeypatch.setattr(Weights, "lost", 3)
    monkeypatch.setattr(Weights, "stop", threading.Event())
    waiting = config_of([server.url for server in servers], outage_seconds=600.0)
    with pytest.raises(Preempted, match="saved step 3 of 4"):
        run.run(waiting, workdir, devices=jax.devices()[:1], stop=Weights.stop)
    for server in servers:
        server.begin()
    monkeypatch.setattr(Weights, "lost", None)
    run.run(c, workdir, devices=jax.devices()[:1])
    lines = [line for line in metrics.read_metrics(workdir) if "train/loss" in line]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert max(line["train/rollout/log_prob_gap"] for line in lines) < 1e-4
    assert lines[0]["train/ratio"] == pytest.approx(1, abs=1e-4)
    assert {line["train/rollout/dropped/version"] for line in lines} == {0}
    assert min(line["train/reward/deviation"] for line in lines) > 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"servers": ()}, r"^rollout\.servers = \(\): engine = 'vllm' asks servers"),
        ({"servers": ("localhost:8000",)}, r"^rollout\.servers = 'localhost:8000': isn't the URL"),
        ({"servers": ("http://a", "http://a/")}, r"^rollout\.servers: http://a/ is there twice"),
        ({"engine": "vlm"}, r"^rollout\.engine = 'vlm': must be one of local, vllm. Did you mean 'vllm'"),
        ({"engine": "local"}, r"^rollout\.servers = .*: is of servers. Set rollout.engine = 'vllm'"),
        ({"slots": 4}, r"^rollout\.slots = 4: has no effect on servers"),
        ({"in_flight": 0}, r"^rollout\.in_flight = 0: must be at least 1"),
        ({"outage_seconds": 0.0}, r"^rollout\.outage_seconds = 0.0: must be above 0"),
        ({"staleness": -1}, r"^rollout\.staleness = -1: must be at least 0"),
        ({"min_p": 0.1, "top_p": 0.9}, r"^rollout\.min_p = 0.1 with rollout.top_p = 0.9: vLLM applies"),
    ],
)
def test_what_cannot_work_is_refused(fields, message):
    with pytest.raises(InputError, match=message):
        config.check(config_of(["http://a"], **fields), num_devices=1)
