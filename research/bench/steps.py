"""The train step, and what the loop of a run adds to it."""

import contextlib
import dataclasses
import statistics
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from research.bench import machine, measure, peers, preferences, prepared, profiling, reinforcement
from research.bench.types import Bench, Record, Result, in_ms, peak_memory
from research.config import Config
from research.devices import compilation, sharding, temporaries
from research.errors import InputError
from research.objectives.types import next_token_targets
from research.ops import quantized
from research.run import metrics, run

_WITH_PEERS = ("next_token", "sft")  # the objectives that peers know
_TRACED_STEPS = 3


def train(bench: Bench) -> Iterator[Result]:
    """The compiled step: time, tokens/s, model-FLOPs utilisation of the measured peak, memory; and that of peers."""
    for name in bench.objectives or ("",):
        config = prepared.with_objective(bench.config, name) if name else bench.config
        yield _train(dataclasses.replace(bench, run=dataclasses.replace(bench.run, config=config)), name)
        jax.clear_caches()


def _train(bench: Bench, name: str) -> Result:
    name = name or "+".join(bench.config.objective["terms"])
    step = prepared.prepare(bench.run, packed=not bench.against)
    if bench.against:
        step = step.away_from_zero()
    dtype = step.parts.models["policy"].config.dtype
    with contextlib.ExitStack() as stack:
        others = stack.enter_context(peers.Others(bench.mkl))
        if bench.against:
            _start_peers(others, bench, step, name, stack.enter_context(tempfile.TemporaryDirectory()))
        ours = _stepper(bench, step, stack)
        ours.step()
        loss, losses_weight = ours.out["loss"]
        warm = ours(1)[0]
        measure.forget_peak()
        ours.program = temporaries.keep(step.compiled, compilation.temporaries(step.compiled))
        product, product_flops = machine.matmul(bench.mesh, dtype)
        runners = {"": ours, " matmul": lambda n: product(3 * n), **others.runners(), **others.products(dtype)}
        seconds = measure.in_turn(runners, bench.count(warm))
        profile = _profile(bench, ours, name) if bench.profile else {}
        peak = product_flops / measure.spread(seconds[" matmul"])["median"]
        record = _describe(bench, step, measure.spread(seconds[""]), peak)
        record |= {"case": name, "matmul_flops_per_second": peak, "dtype": dtype, "loss": float(loss / losses_weight)}
        if bench.config.rewards:
            record |= reinforcement.describe(ours, step, record)
        tokens = record["tokens_per_second"] * record["seconds"]["median"]
        record |= others.compare(
            seconds,
            lambda times: {
                "tokens_per_second": tokens / times["median"],
                "mfu": record["model_flops"] / times["median"] / peak,
                "ratio": times["median"] / record["seconds"]["median"],
            },
        )
        peers.with_peaks(record, product_flops / bench.mesh.size, peak / bench.mesh.size)
    text = (
        f"{name}: {in_ms(record['seconds'])}, {record['tokens_per_second']:.5g} tokens/s, MFU {record['mfu']:.1%} of "
        f"{peak / 1e12:.3g} TFLOP/s, {peak_memory(record['memory'])}"
    )
    shares = "".join(f", {name} {share:.0%}" for name, share in record.get("shares", {}).items())
    return record | profile, text + shares + peers.describe(record) + profiling.describe(profile)


def _stepper(bench: Bench, step: prepared.Prepared, stack: contextlib.ExitStack) -> prepared.Stepper:
    """What makes our steps; of a run with rewards each with its rollout."""
    if not bench.config.rewards:
        return prepared.Stepper(step)
    return reinforcement.Stepper(step, bench.config, bench.vocab_size, stack)


def _describe(bench: Bench, step: prepared.Prepared, times: Mapping[str, float], peak: float) -> Record:
    """What our own step took."""
    config = bench.config
    tokens = config.batch_size * config.seq_len
    flops = tokens * sum(each.total for each in step.parts.roles.flops(config.seq_len).values())
    return {
        "seconds": times,
        "tokens_per_second": tokens / times["median"],
        "mfu": flops / times["median"] / peak,
        "model_flops": flops,
        "batch": [config.batch_size, config.seq_len],
        "packed": not bench.against,
        "platform": sharding.platform(),
        "compile_seconds": step.compile_seconds,
        "memory": machine.memory(step.compiled),
    }


def _start_peers(others: peers.Others, bench: Bench, step: prepared.Prepared, name: str, folder: str) -> None:
    """Starts the peers, each of which makes two steps; they say the loss of the first."""
    config, model = bench.config, step.parts.models["policy"].config
    fields = ("learning_rate", "b1", "b2", "eps", "weight_decay", "clip_norm")
    optimizer = {field: getattr(config.optimizer, field) for field in fields}
    if config.adapter and not config.adapter.get("decay"):
        optimizer["weight_decay"] = 0.0
    work = {
        "folder": folder,
        "optimizer": optimizer,
        "microbatches": config.microbatches,
        "dtype": model.dtype,
        "remat": model.remat == "full",
    }
    for peer in bench.against:
        try:
            check_peer(peer, config)
            method, more = _write(peer, bench, step, name, folder)
        except (measure.Failed, InputError) as error:
            others.fail(peer, str(error))
        else:
            others.start(peer, method, work | more, warm=1)


def _write(peer: str, bench: Bench, step: prepared.Prepared, name: str, folder: str) -> tuple[str, Record]:
    """Writes what a peer reads; returns the method of libraries.Library that does the work, and what else it takes.

    Raises:
      Failed, InputError: the peer can't do it.
    """
    config = bench.config
    if config.rewards and peer.startswith("trl"):
        options = reinforcement.trl_options(config)
        reinforcement.write_prompts(folder, step, config, bench.vocab_size)
        return "reinforce", {"options": options}
    if peer.startswith("trl"):
        options = preferences.trl_options(config)
        preferences.write_pairs(folder, step, config)
        return "train", {"options": options}
    write_work(folder, step, config, name)
    return "train", {}


def check_peer(peer: str, config: Config) -> None:
    """Raises Failed where a peer would do other work than the config's."""
    if bool(config.adapter) != peer.startswith("peft"):
        raise measure.Failed("trains all of a model" if config.adapter else "trains adapters, and the config has none")
    if config.frozen_dtype in quantized.KINDS:
        raise measure.Failed(f"knows no base in {config.frozen_dtype}")


def write_work(folder: str, step: prepared.Prepared, config: Config, name: str) -> None:
    """Writes what peers read, if it isn't there: config.json, safetensors, batch.npz, and an adapter as PEFT has it.

    Raises:
      Failed: peers don't know the objective.
      InputError: transformers has no such architecture, or PEFT no such adapter.
    """
    if name not in _WITH_PEERS:
        raise measure.Failed(f"peers know {' and '.join(_WITH_PEERS)} alone")
    if Path(folder, "batch.npz").exists():
        return
    prepared.write_policy(folder, step, config)
    batch = step.numpy_batch
    mask = batch["loss_mask"] if "sft" in config.objective["terms"] else None
    weights = np.asarray(next_token_targets(batch, mask)[1])
    labels = np.full_like(batch["tokens"], -100)
    labels[:, 1:] = np.where(weights[:, :-1] > 0, batch["tokens"][:, 1:], -100)
    np.savez(f"{folder}/batch.npz", labels=labels, **batch)


def _profile(bench: Bench, ours: prepared.Stepper, name: str) -> Record:
    """Traces a few steps into FOLDER/NAME: "costliest", in seconds of a step, or "profile_error"."""
    folder = Path(bench.profile) / name
    with jax.profiler.trace(str(folder), create_perfetto_trace=True):
        for _ in range(_TRACED_STEPS):
            ours.update()
    (folder / profiling.PROGRAM).write_text(ours.compiled.as_text())
    try:
        parts = profiling.read(folder)
    except profiling.Unreadable as error:
        return {"profile_error": str(error)}
    return {"costliest": [{**part, "seconds": part["seconds"] / _TRACED_STEPS} for part in parts]}


def loop(bench: Bench) -> Iterator[Result]:
    """Runs research.run for a few steps, and the bare step as often, in turn: what the loop adds, as a share of it."""
    config = dataclasses.replace(
        bench.config,
        eval=dataclasses.replace(bench.config.eval, every=0),
        checkpoint=dataclasses.replace(bench.config.checkpoint, every=0, best_metric=""),
    )
    ours = prepared.Stepper(prepared.prepare(dataclasses.replace(bench.run, config=config)))
    ours(2)
    n = max(3, bench.count(ours(1)[0] * measure.ROUNDS))
    shares, waits, bare, looped = [], [], [], []
    for _ in range(measure.ROUNDS):
        seconds, waited = _run_loop(config, n)
        looped.append(seconds)
        waits.append(waited)
        bare.append(statistics.mean(ours(n)))
        shares.append(looped[-1] / bare[-1] - 1)
    record = {
        "seconds": measure.spread(looped),
        "bare_seconds": measure.spread(bare),
        "overhead": measure.spread(shares),
        "data_wait_fraction": statistics.median(waits),
        "steps": n,
        "log_every": config.log.every,
    }
    text = (
        f"{in_ms(record['seconds'])} a step, {in_ms(record['bare_seconds'])} without the loop: "
        f"{record['overhead']['median']:+.1%}; waits for data {record['data_wait_fraction']:.2%} of the time"
    )
    yield record, text


def _run_loop(config: Any, n: int) -> tuple[float, float]:
    """(seconds of a step, share of the time that it waits for data) of n steps of a run."""
    before = 2 * config.log.every  # Orbax and TensorBoard are imported beside the first steps
    with tempfile.TemporaryDirectory() as workdir:
        try:
            run.run(dataclasses.replace(config, steps=before + n), workdir)
        except run.Preempted as stop:
            raise KeyboardInterrupt from stop
        lines = [line for line in metrics.read_metrics(workdir) if "train/tokens_per_second" in line]
    lines = [line for line in lines if line["step"] > before]
    seconds = statistics.mean(line["train/tokens"] / line["train/tokens_per_second"] for line in lines)
    return seconds, statistics.mean(line["train/data_wait_fraction"] for line in lines)
