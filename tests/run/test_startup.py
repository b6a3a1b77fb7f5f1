"""What a start waits for, and what it doesn't."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import load

from research import objectives, params
from research.devices import distributed, sharding, startup
from research.run import assemble, run

# What a run needs later or not at all: each takes 0.05 s to seconds.
LATER = (
    *("datasets", "gguf", "grain", "huggingface_hub", "matplotlib", "orbax", "pandas"),
    *("scipy", "tensorboardX", "tensorstore", "torch", "transformers"),
)


def test_heavy_modules_are_not_imported_before_they_are_needed():
    code = "import sys, research.main, research.run.run; print(*sys.modules, sep=chr(10))"
    imported = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert "jax" in imported
    assert [name for name in LATER if name in imported] == []


def test_an_error_of_the_compiler_ends_the_run(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no room for this program")

    monkeypatch.setattr(jax.stages.Lowered, "compile", fail)
    with pytest.raises(RuntimeError, match="no room for this program"):
        run.run(load("sft", **{"eval.every": 0, "checkpoint.best_metric": ""}), str(tmp_path))


@pytest.mark.parametrize("seed", [0, 2**31 + 5])
def test_the_first_state_is_that_of_the_key_of_the_seed(seed):
    config = load("sft", ema_decay=0.9)
    mesh = sharding.make_mesh(dataclasses.asdict(config.mesh))
    fields = {k: jax.ShapeDtypeStruct((8, 128), jnp.int32) for k in ("tokens", "segment_ids", "positions")}
    fields |= {"loss_mask": jax.ShapeDtypeStruct((8, 128), jnp.float32)}
    with jax.set_mesh(mesh):
        parts = assemble.assemble(config, objectives.load(config.objective), mesh, fields, vocab_size=300)
        keys, specs = jax.random.split(jax.random.PRNGKey(seed)), {"policy": parts.models["policy"].specs}
        jax.tree.map(
            np.testing.assert_array_equal,
            parts.begin(np.uint32(seed))[0],
            parts.init_state(jax.jit(lambda key: params.init(specs, key))(keys[0]), keys[1]),
        )


PROGRAM = """
import os, sys
from research.devices import startup
startup.use_huge_pages()
print(os.environ.get("GLIBC_TUNABLES"), startup.describe() != [], sys.argv[1:])
print(sorted(set(os.environ) - set(startup.without_huge_pages(os.environ))))
"""


@pytest.mark.skipif(not startup._offered(), reason="this system has no huge pages to ask for")
@pytest.mark.parametrize(
    ("environment", "tunables", "described"),
    [
        ({}, "glibc.malloc.hugetlb=1", True),
        ({"GLIBC_TUNABLES": "glibc.malloc.check=0"}, "glibc.malloc.check=0:glibc.malloc.hugetlb=1", True),
        ({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}, "glibc.malloc.hugetlb=0", False),
        ({"UNDERSTUDY_HUGE_PAGES": "0"}, "None", False),
        ({"JAX_PLATFORMS": "cuda"}, "None", False),
    ],
)
def test_a_process_begins_anew_with_huge_pages(tmp_path, environment, tunables, described):
    (tmp_path / "program.py").write_text(PROGRAM)
    inherited = {k: v for k, v in os.environ.items() if k not in ("GLIBC_TUNABLES", "UNDERSTUDY_HUGE_PAGES")}
    command = [sys.executable, tmp_path / "program.py", "--a=b c"]
    done = subprocess.run(command, env=inherited | environment, check=True, capture_output=True, text=True)
    first, second = done.stdout.splitlines()
    assert first == f"{tunables} {described} ['--a=b c']"
    added = (
        ["GLIBC_TUNABLES", "UNDERSTUDY_HUGE_PAGES"] if described else [*environment.keys() & {"UNDERSTUDY_HUGE_PAGES"}]
    )
    assert second == str([name for name in added if name != "GLIBC_TUNABLES" or "GLIBC_TUNABLES" not in environment])


KEEPING = """
import os, sys, threading
import numpy as np
from research.devices import startup
startup.use_huge_pages()
from research.devices import temporaries
temporaries.keep(None, int(sys.argv[1]))
resident = lambda: int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
before = resident()
thread = threading.Thread(target=lambda: np.ones(2**24, np.float32))
thread.start()
thread.join()
print(resident() - before)
"""

# A step with two arrays of 96 MiB beside its state, and what eight calls of it cost after the first ten.
STEPPING = """
import json, resource, sys
from research.devices import startup
startup.use_huge_pages()
import jax, jax.numpy as jnp
from research.devices import compilation, temporaries

def step(state):
    wide = jax.lax.optimization_barrier(jnp.broadcast_to(state, (24 * 2**20,)) * 2)
    wider = jax.lax.optimization_barrier(jnp.flip(wide))
    return state + wider[0], {"sum": jnp.sum(wide * wider)}

state = jnp.ones(())
compiled = jax.jit(step, donate_argnums=0).lower(state).compile()
size = compilation.temporaries(compiled)
program = temporaries.keep(compiled, size) if sys.argv[1] == "kept" else compiled
resident = lambda: int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
before, kept = resident(), []
for i in range(18):
    if i == 10:
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    state, out = program(state)
    float(out["sum"])
    kept.append(resident() - before)
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
print(json.dumps([size / 2**20, faults, min(kept[-3:]) / size]))
"""


def output_of(program, argument):
    """What a program prints that is called without a word of huge pages."""
    environment = {k: v for k, v in os.environ.items() if k not in ("GLIBC_TUNABLES", "UNDERSTUDY_HUGE_PAGES")}
    environment["XLA_FLAGS"] = ""  # one device
    command = [sys.executable, "-c", program, argument]
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout


@pytest.mark.skipif(not startup._offered(), reason="this system has no huge pages to ask for")
@pytest.mark.parametrize("temporaries", [2**20, 2**30])
def test_what_a_step_frees_is_kept_for_the_next(temporaries):
    assert float(output_of(KEEPING, str(temporaries))) > 50  # of the thread's 64 MiB


@pytest.mark.skipif(not startup._offered(), reason="this system has no huge pages to ask for")
def test_each_step_has_the_memory_of_the_last():
    """So that none is cleared anew, and no more of it is kept than a step takes."""
    size, faults, kept = json.loads(output_of(STEPPING, "kept"))
    assert 160 < size < 400
    assert kept < 1.4
    _, otherwise, _ = json.loads(output_of(STEPPING, "given back"))
    assert faults < otherwise / 4


@pytest.mark.parametrize("given", ["", "--xla_dump_to=/x", "--xla_backend_extra_options=a"])
def test_loops_are_left_unless_the_user_has_extra_options(monkeypatch, given):
    monkeypatch.setenv("XLA_FLAGS", given)
    startup.leave_loops()
    ours = "--xla_backend_extra_options=xla_cpu_disable_loop_unrolling"
    asked = "extra" in given
    assert os.environ["XLA_FLAGS"].split() == given.split() + ([] if asked else [ours])
    assert any(ours in line for line in startup.describe()) != asked


@pytest.mark.parametrize(
    ("given", "simulated"),
    [
        ({}, False),
        ({"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}, True),
        ({"JAX_NUM_CPU_DEVICES": "2"}, True),
    ],
)
def test_simulated_devices_get_threads_and_a_scheduler_that_do_not_hang(monkeypatch, given, simulated):
    for name, value in ({"XLA_FLAGS": "", "JAX_NUM_CPU_DEVICES": "", "PJRT_NPROC": ""} | given).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("PJRT_NPROC")
    distributed.start()
    assert (os.environ.get("PJRT_NPROC") == "64") == simulated
    for option in ("xla_cpu_scheduler_type", "xla_cpu_experimental_ynn_fusion_type"):
        assert (option in os.environ["XLA_FLAGS"]) == simulated


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="this system doesn't say when a process began")
def test_the_start_of_a_process_is_before_its_first_line():
    code = "import time; first = time.time(); time.sleep(0.5)\n"
    code += "from research.devices import startup; print(startup.start_time(), first)"
    before = time.time()
    child = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    start, first = map(float, child.stdout.split())
    assert before - 0.02 < start < first + 0.02  # ticks of 10 ms


def test_where_the_start_of_a_process_is_not_known_it_is_now(monkeypatch):
    def missing(*_):
        raise FileNotFoundError

    monkeypatch.setattr("builtins.open", missing)
    before = time.time()
    assert before <= startup.start_time() <= time.time()
