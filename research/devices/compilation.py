"""How XLA compiles: options of a program, and the cache of compiled ones."""

import functools
import os
from typing import Any

import jax

from research.devices import distributed
from research.files import cache_root

_EMITTERS = "xla_cpu_use_fusion_emitters"


def compiler_options(mesh: Any) -> dict[str, Any] | None:
    """XLA options that make programs for CPUs compile faster. Options set in XLA_FLAGS win.

    LLVM's highest level makes no step faster, but its compilation 1.15 times as long, and 2.5 times that of initial
    values; the results are the same. For the rest see `_older_emitters`.

    Args:
      mesh: what a program is for; one that isn't of CPUs gets no options.
    """
    if not isinstance(mesh, jax.sharding.Mesh) or mesh.devices.flat[0].platform != "cpu":
        return None
    options = {"xla_backend_optimization_level": 2, **_older_emitters()}
    return {name: value for name, value in options.items() if name not in os.environ.get("XLA_FLAGS", "")}


@functools.cache
def _older_emitters() -> dict[str, bool]:
    """The option for XLA's older emitters of CPU kernels; nothing where this XLA has none (jax 0.12), and refuses it.

    With the newer ones a cold start to the first step of experiments/benchmark.py:small takes 1.82 times as long (95 %
    interval 1.39 to 2.57; 18.6 s and not 8.6), a warm one 1.43 times (0.76 to 2.00), and a step 0.91 times (0.84 to
    1.04; 0.79 s and not 0.83): 7 interleaved rounds of processes with jax 0.10 on 2 busy cores. A long run may want
    XLA_FLAGS=--xla_cpu_use_fusion_emitters=true.
    """
    option = {_EMITTERS: False}
    try:
        jax.jit(lambda: 0, compiler_options=option).lower().compile()
    except jax.errors.JaxRuntimeError:
        return {}
    return option


def temporaries(compiled: Any) -> int:
    """Bytes of memory that a compiled program needs beside its arguments and results; 0 where XLA doesn't say."""
    memory = compiled.memory_analysis()
    return 0 if memory is None else memory.temp_size_in_bytes


def use_compilation_cache(cache_dir: str = "") -> None:
    """Keeps compiled programs in the cache folder, for the next start.

    Does nothing where several processes have CPUs: only the first writes, and the others look under other keys. They
    would compile what the first one reads, and it would give up waiting for them (Gloo's 30 s).
    """
    if distributed.several() and jax.default_backend() == "cpu":
        return
    jax.config.update("jax_compilation_cache_dir", str(cache_root(cache_dir) / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
