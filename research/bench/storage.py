"""The model written and read, and what a save costs the loop."""

import contextlib
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

from research.bench import measure, prepared
from research.bench.types import Bench, Result, in_ms
from research.pretrained import load
from research.rollouts.experience import Place
from research.run import checkpoint

_LARGE = 4e9  # bytes of a state that is written once alone


def loading(bench: Bench) -> Iterator[Result]:
    """Writes and reads the model: a whole training state as our checkpoint, its parameters as safetensors. The files
    are read from the system's cache where they fit."""
    step = prepared.prepare(bench.run)
    size = sum(x.nbytes for x in jax.tree.leaves(step.state))
    repeats = 1 if size > _LARGE else bench.few()
    rounds = [_checkpoint(step) for _ in range(repeats)]
    yield _rates("checkpoint", size, rounds)
    policy, values = step.parts.models["policy"], step.state.params["policy"]
    placed = jax.tree.map(lambda x: x.sharding, step.parts.state.params["policy"])
    rounds, total = [], 0
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            began = time.perf_counter()
            total = prepared.write_model(folder, policy.config, values)
            written = time.perf_counter()
            jax.block_until_ready(load.load(load.open_pretrained(folder), policy.specs, placed))
            rounds.append((written - began, time.perf_counter() - written))
    yield _rates("safetensors", total, rounds)


def _checkpoint(step: prepared.Prepared) -> tuple[float, float]:
    """Seconds that our checkpoint takes to be written, and read."""
    with tempfile.TemporaryDirectory() as folder, contextlib.closing(checkpoint.Checkpointer(folder)) as saver:
        began = time.perf_counter()
        saver.save(step.state, Place({"row": 0}), {}, {})
        saver.wait()
        written = time.perf_counter()
        jax.block_until_ready(saver.restore(step.parts.state)[0].params)
        return written - began, time.perf_counter() - written


def _rates(case: str, size: int, rounds: Sequence[tuple[float, float]]) -> Result:
    """A record of seconds to write and to read so many bytes."""
    write, read = (measure.spread(seconds) for seconds in zip(*rounds, strict=True))
    record = {"case": case, "bytes": size, "write_seconds": write, "read_seconds": read}
    record |= {"write_bytes_per_second": size / write["median"], "read_bytes_per_second": size / read["median"]}
    text = (
        f"{case}, {size / 1e6:,.0f} MB: written in {write['median']:.3g} s ({size / write['median'] / 1e9:.3g} GB/s), "
        f"read in {read['median']:.3g} s ({size / read['median'] / 1e9:.3g} GB/s)"
    )
    return record, text


def save(bench: Bench) -> Iterator[Result]:
    """How long a save holds the loop up, and how much slower the ten steps after it are, while files are written."""
    ours = prepared.Stepper(prepared.prepare(bench.run))
    ours(2)
    after = bench.few(10)
    with tempfile.TemporaryDirectory() as folder, contextlib.closing(checkpoint.Checkpointer(folder)) as saver:
        saves = [_save(ours, saver, number, after) for number in range(4)][1:]  # the first also starts Orbax
    stalls, slowed, plain = zip(*saves, strict=True)
    stall, step = measure.spread(stalls), statistics.median(plain)
    record: Mapping[str, Any] = {
        "stall_seconds": stall,
        "stall_steps": stall["median"] / step,
        "slowed_seconds": measure.spread(slowed),
        "slowed_over_steps": after,
        "step_seconds": step,
    }
    text = (
        f"the loop stands still for {in_ms(stall)}, {record['stall_steps']:.2g} steps; the {after} steps "
        f"after it take {1e3 * record['slowed_seconds']['median']:.3g} ms longer"
    )
    yield dict(record), text


def _save(ours: prepared.Stepper, saver: Any, number: int, after: int) -> tuple[float, float, float]:
    """Seconds that a save stalls, that the steps after it take longer in all, and of a step before it."""
    step = statistics.median(ours(min(after, 5)))
    began = time.perf_counter()
    saver.save(ours.state, Place({"row": number}), {}, {})
    stall = time.perf_counter() - began
    slowed = sum(ours(after)) - after * step
    saver.wait()
    return stall, slowed, step
