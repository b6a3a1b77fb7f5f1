"""A real vLLM server, for the tests that need one; without it they are skipped.

    launch/vllm_cpu.sh vllm_env
    understudy export --model=SmolLM2-135M-Instruct --output=smol --dtype=float32
    UNDERSTUDY_VLLM=vllm_env/bin/vllm UNDERSTUDY_VLLM_MODEL=smol pytest -n0 -m slow tests/rollouts/engines

With UNDERSTUDY_VLLM_SERVER=http://127.0.0.1:8100 they ask one that is there, which must be as it was started.
"""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

LAUNCH = Path(__file__).parents[3] / "launch"


class VllmServer(NamedTuple):
    url: str
    model: str  # the folder that it was started with


@pytest.fixture(scope="session")
def vllm_server() -> Iterator[VllmServer]:
    """A server with one model for all tests; some of them change its weights."""
    program, model, url = (os.environ.get(f"UNDERSTUDY_VLLM{name}", "") for name in ("", "_MODEL", "_SERVER"))
    if not model or not (program or url):
        pytest.skip("vLLM: UNDERSTUDY_VLLM (its program) and UNDERSTUDY_VLLM_MODEL (an exported model) aren't set")
    if url:
        yield VllmServer(url, model)
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = ["SERVERS=1", f"SERVER_MODEL={model}", f"VLLM={program}", f"SERVER_PORT={port}"]
    settings += ["SERVER_LORA_RANK=16", "SERVER_OPTIONS=--max-model-len 512"]
    with subprocess.Popen([sys.executable, LAUNCH / "servers.py", *settings]) as launcher:
        try:
            url = f"http://127.0.0.1:{port}"
            _wait(launcher, url)
            yield VllmServer(url, model)
        finally:
            launcher.send_signal(signal.SIGTERM)


def _wait(launcher: subprocess.Popen, url: str) -> None:
    until = time.monotonic() + 600
    while True:
        assert launcher.poll() is None, "the server can't be started"
        assert time.monotonic() < until
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=10):
                return
        except OSError:
            time.sleep(1)
