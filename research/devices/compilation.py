"""How XLA compiles: options of a program, and the cache of compiled ones."""

import functools
import os
from typing import Any

import jax

from research.devices import distributed
from research.files import cache_root

_EMITTERS = "xla_cpu_use_fusion_emitters"


def compiler_options(mesh: Any) -> dict[str, Any] | None:
    """What makes programs for CPUs compile faster. What XLA_FLAGS says stands.

    LLVM's highest level makes no step faster, but its compilation 1.15 times as long, and 2.5 times that of initial
    values; the results are the same. XLA's newer emitters of kernels take more than twice the time of the older ones,
    whose steps take about 4 % longer.
    """
    if not isinstance(mesh, jax.sharding.Mesh) or mesh.devices.flat[0].platform != "cpu":
        return None
    options = {"xla_backend_optimization_level": 2} | ({_EMITTERS: False} if _has_older_emitters() else {})
    return {name: value for name, value in options.items() if name not in os.environ.get("XLA_FLAGS", "")}


@functools.cache
def _has_older_emitters() -> bool:
    """Whether this XLA has them: later ones refuse the option."""
    try:
        jax.jit(lambda: 0, compiler_options={_EMITTERS: False}).lower().compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True


def use_compilation_cache(cache_dir: str = "") -> None:
    """Keeps compiled programs in the cache folder, for the next start.

    Not where several processes have CPUs: only the first writes, the others look under other keys, and while they
    compiled what it finds it would give up waiting for them (Gloo's 30 s).
    """
    if distributed.several() and jax.default_backend() == "cpu":
        return
    jax.config.update("jax_compilation_cache_dir", str(cache_root(cache_dir) / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
