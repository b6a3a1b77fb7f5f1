"""What the machine can do: peaks of arithmetic and memory, measured, and the memory of a compiled program."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from research.bench import measure

Runner = Callable[[int], list[float]]


def matmul(mesh: Mesh, dtype: str) -> tuple[Runner, float]:
    """A square matrix product on every device of the mesh at once: a runner for `in_turn`, and its FLOPs in all."""
    size = measure.PRODUCT[mesh.devices.flat[0].platform != "cpu"]
    shape, where = (mesh.size, size, size), _one_each(mesh)
    a, b = (jax.jit(lambda: jax.numpy.ones(shape, dtype), out_shardings=where)() for _ in range(2))
    product = jax.jit(jax.numpy.matmul, out_shardings=where)
    return ready(lambda: product(a, b)), 2.0 * size**3 * mesh.size


def copy(mesh: Mesh, size: int = 0) -> tuple[Runner, float]:
    """The same for memory: y = x + 1, and the bytes that it reads and writes. `size` is 1 GiB, or 128 MiB on a CPU."""
    size = size or (2**27 if mesh.devices.flat[0].platform == "cpu" else 2**30)
    x = jax.jit(lambda: jax.numpy.ones((mesh.size, size // 4 // mesh.size), "float32"), out_shardings=_one_each(mesh))()
    add = jax.jit(lambda x: x + 1, donate_argnums=0)
    held = [add(x)]

    def again() -> Any:
        held[0] = add(held[0])
        return held[0]

    return ready(again), 2.0 * (size // 4 // mesh.size * mesh.size) * 4


def ready(work: Callable[[], Any]) -> Runner:
    """A runner of what returns arrays; it has run once."""
    jax.block_until_ready(work())
    return lambda n: measure.timed(lambda: jax.block_until_ready(work()), n)


def memory(compiled: Any) -> dict[str, int | None]:
    """Bytes of a device by the compiler's analysis of a program, and at the peak so far."""
    analysis = compiled.memory_analysis()
    stats = jax.local_devices()[0].memory_stats() or {}
    return {
        "arguments": analysis.argument_size_in_bytes,
        "temporaries": analysis.temp_size_in_bytes,
        "outputs": analysis.output_size_in_bytes - analysis.alias_size_in_bytes,
        "resident_peak": measure.peak_resident(),
        "device_peak": stats.get("peak_bytes_in_use"),
    }


def _one_each(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(mesh.axis_names))
