"""What the benchmark measures with: a train step on made-up data, peaks of the machine, and work done in turn."""

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from research.devices import startup

ROUNDS = 4


class Failed(Exception):
    """What is measured in turn with others couldn't do its work: it is left out, and they go on."""


def peak_resident() -> int | None:
    """Bytes of this process's memory at its peak; None where the system doesn't say."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM")), None)


def timed(work: Callable[[], Any], n: int) -> list[float]:
    """Seconds of each of n calls; each returns when all is done."""
    seconds = []
    for _ in range(n):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return seconds


def forget_peak() -> None:
    """Peak memory counts from here, where the system lets us; without what is free already."""
    startup.release_memory()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Median and quartiles of some measurements, and how many there were."""
    q1, median, q3 = statistics.quantiles(seconds, method="inclusive") if len(seconds) > 1 else seconds * 3
    return {"median": median, "q1": q1, "q3": q3, "n": len(seconds)}


def in_turn(runners: Mapping[str, Callable[[int], list[float]]], n: int) -> dict[str, list[float] | str]:
    """Runs each n times, a few at a time in turn, so that all see the same hours of a busy machine.

    Args:
      runners: name -> function that does its work k times and returns the seconds of each.
      n: how often.

    Returns:
      name -> n times; or, of a peer that failed, why.
    """
    rounds = min(ROUNDS, n)
    found: dict[str, Any] = {name: [] for name in runners}
    for i in range(rounds):
        for name, runner in runners.items():
            if isinstance(found[name], str):
                continue
            try:
                found[name] += runner(n * (i + 1) // rounds - n * i // rounds)
            except Failed as error:
                found[name] = str(error)
    return found


def matmul(mesh: Any, dtype: str, size: int = 0) -> tuple[Callable[[int], list[float]], float]:
    """A square matrix product on every device of the mesh at once: a runner for `in_turn`, and its FLOPs in all.

    `size` is 8192, or 1024 on a CPU, by default.
    """
    import jax

    size = size or (1024 if mesh.devices.flat[0].platform == "cpu" else 8192)
    shape, where = (mesh.size, size, size), _one_each(mesh)
    a, b = (jax.jit(lambda: jax.numpy.ones(shape, dtype), out_shardings=where)() for _ in range(2))
    product = jax.jit(jax.numpy.matmul, out_shardings=where)
    return ready(lambda: product(a, b)), 2.0 * size**3 * mesh.size


def copy(mesh: Any, size: int = 0) -> tuple[Callable[[int], list[float]], float]:
    """The same for memory: y = x + 1, and the bytes that it reads and writes. `size` is 1 GiB, or 128 MiB on a CPU."""
    import jax

    size = size or (2**27 if mesh.devices.flat[0].platform == "cpu" else 2**30)
    where = _one_each(mesh)
    x = jax.jit(lambda: jax.numpy.ones((mesh.size, size // 4 // mesh.size), "float32"), out_shardings=where)()
    add = jax.jit(lambda x: x + 1, donate_argnums=0)
    held = [add(x)]

    def again() -> Any:
        held[0] = add(held[0])
        return held[0]

    return ready(again), 2.0 * (size // 4 // mesh.size * mesh.size) * 4


def _one_each(mesh: Any) -> Any:
    import jax

    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(mesh.axis_names))


def ready(work: Callable[[], Any]) -> Callable[[int], list[float]]:
    """A runner of what returns arrays; it has run once."""
    import jax

    jax.block_until_ready(work())
    return lambda n: timed(lambda: jax.block_until_ready(work()), n)


def memory(compiled: Any) -> dict[str, int | None]:
    """Bytes of a device by the compiler's analysis, and at the peak so far."""
    import jax

    found = compiled.memory_analysis()
    stats = jax.local_devices()[0].memory_stats() or {}
    return {
        "arguments": found.argument_size_in_bytes,
        "temporaries": found.temp_size_in_bytes,
        "outputs": found.output_size_in_bytes - found.alias_size_in_bytes,
        "resident_peak": peak_resident(),
        "device_peak": stats.get("peak_bytes_in_use"),
    }


class Prepared(NamedTuple):
    """A compiled train step, and what it takes. `state` is given away by the first call."""

    parts: Any
    compiled: Any
    state: Any
    frozen: Any
    batch: Any
    numpy_batch: Mapping[str, Any]
    compile_seconds: float


def prepare(config: Any, mesh: Any, vocab_size: int, *, packed: bool = True) -> Prepared:
    """Assembles a run's step as research.run does, with random parameters and a made-up batch; under jax.set_mesh."""
    import jax
    import numpy as np

    from research import params
    from research.models import transformer
    from research.planning import abstract
    from research.run import run
    from research.sources import fields

    parts = run.assemble(config, mesh, abstract.batch_spec(config), vocab_size)
    batch = fields.fake(parts.batch, vocab_size, packed=packed, seed=config.seed)
    key = jax.random.PRNGKey(config.seed)
    specs = {role: transformer.in_compute_dtype(parts.models[role]) for role in parts.frozen}
    placed = jax.tree.map(lambda x: x.sharding, parts.frozen)
    began = time.perf_counter()
    compiled = parts.step.lower(parts.state, parts.frozen, parts.batch).compile()
    return Prepared(
        parts,
        compiled,
        parts.begin(np.uint32(config.seed & 0xFFFFFFFF)),
        jax.jit(lambda key: params.init(specs, key), out_shardings=placed)(key),
        {name: jax.device_put(x, parts.batch[name].sharding) for name, x in batch.items()},
        batch,
        time.perf_counter() - began,
    )


class Stepper:
    """Runs a prepared step. Its calls are runners for `in_turn`; `out` holds the last metrics."""

    def __init__(self, made: Prepared):
        self.compiled, self.state, self.frozen, self.batch = made.compiled, made.state, made.frozen, made.batch

    def __call__(self, n: int) -> list[float]:
        return timed(self.step, n)

    def step(self) -> None:
        import jax

        self.state, self.out = self.compiled(self.state, self.frozen, self.batch)
        jax.block_until_ready((self.state, self.out))


def with_objective(config: Any, name: str) -> Any:
    """The config with one objective on the same model; what it wants of other roles is of the policy's architecture."""
    from research import objectives

    spec = {"terms": {name: 1.0}, **{k: v for k, v in config.objective.items() if k == name}}
    term, _ = objectives.load(spec)[name]
    described = {**config.model, "init_from": ""}
    roles = {role: config.roles.get(role, described) for role in (*term.frozen, *term.trainable) if role != "policy"}
    model = config.model
    if "label_probs" in term.fields and not model["num_labels"]:
        model = {**model, "num_labels": config.data["num_classes"] or len(config.data["labels"]) or 2}
    return dataclasses.replace(config, objective=spec, roles=roles, model=model)


def model_flops(models: Mapping[str, Any], tokens: int, length: int) -> float:
    """Of a step, by transformer.flops_per_token; a frozen model's forward pass is a third of a training step's."""
    from research.models import transformer

    each = {role: transformer.flops_per_token(model.config, length) for role, model in models.items()}
    return tokens * sum(flops if role == "policy" else flops / 3 for role, flops in each.items())
