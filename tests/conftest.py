"""Tests run on 8 simulated CPU devices, with strict dtype and rank promotion."""

import gc
import os
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
# Tests compile hundreds of small programs and run each a few times: LLVM's optimisations cost more than they give,
# and so do XLA's newer emitters of kernels (with the older ones tests/test_train.py takes 78 s, not 134) and
# its cutting of a program into parts that are compiled side by side, where two processes test already.
# A busy machine may keep one of 8 simulated devices waiting for longer than XLA's 40 s, which then aborts the process;
# with its default scheduler and few threads they may also wait forever (see research/devices/distributed.py).
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 "
    "--xla_cpu_parallel_codegen_split_count=1 "
    "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters "
    "--xla_cpu_collective_call_terminate_timeout_seconds=300 "
    "--xla_cpu_scheduler_type=CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED " + os.environ.get("XLA_FLAGS", "")
)
os.environ["PJRT_NPROC"] = "64"

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_traceback_in_locations_limit", 0)  # who called what is looked up at each operation, for nobody
gc.set_threshold(10_000, 10, 10)  # 700 by default; tracing makes many objects that stay


@pytest.fixture(scope="session", autouse=True)
def _cache_dir(tmp_path_factory):
    """Keeps the token and compilation caches of tests out of the user's own."""
    path = tmp_path_factory.mktemp("cache")
    os.environ["UNDERSTUDY_CACHE"] = str(path)
    return path


@pytest.fixture
def one_device(monkeypatch):
    """The test sees only the first device, and so do programs that it starts: what a mesh has nothing to do with
    compiles and runs in less time."""
    first = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *backend: first)
    monkeypatch.setattr(jax, "device_count", lambda *backend: 1)
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1"))


_MAPS = Path("/proc/self/maps")
_MOST_MAPS = 20_000


@pytest.fixture(scope="module", autouse=True)
def _few_programs():
    """Forgets compiled programs once there are many: each is several pieces of mapped memory, of which Linux lets a
    process have 65,530, and XLA aborts where it can have no more."""
    yield
    if _MAPS.exists() and _MAPS.read_bytes().count(b"\n") > _MOST_MAPS:
        jax.clear_caches()
        gc.collect()
