"""How long a researcher waits: measures, on this machine, the parts of a run that decide it.

python -m research.benchmark --config=experiments/benchmark.py:small [--only=train,decode,...] [--against=hf,...]
    [--objectives=next_token,sft,distill,...] [--steps=N] [--profile=DIR] [--out=FILE.jsonl] [--config.a.b=value ...]

Takes any experiment: model, batch, objective, optimizer and mesh are the config's. Parts, in this order:

  train       the compiled train step; with --objectives, of each of these on the same model
  loop        what the loop of research.main adds to it, and how long it waits for data
  decode      greedy decoding: prompt and new tokens apart; many prompts of unequal lengths
  data        tokenising, from the text and from the cache; packing; batches
  loading     the model written and read: our checkpoints and safetensors
  checkpoint  how long the loop stands still for a save
  startup     from the start of the process to the end of the first step; with and without compiled programs

One JSON line each (or several) goes to standard output and FILE.jsonl, a readable one to standard error. Times are
{"median", "q1", "q3", "n"} after warm-up. --against measures another library on the same work in turn: hf is
transformers with torch, hf_compile the same compiled, jax plain jax.jit. --profile traces a few train steps for
Perfetto or TensorBoard, and names the costliest parts. Parameters are random and batches made up: neither data nor a
checkpoint is read, but by `loop`, `data` and `startup`. The status is 1 if a part failed; the others still run.
"""

import contextlib
import dataclasses
import json
import os
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags

from research import benchmark_peers, commands
from research.benchmark_peers import Failed, Peer
from research.errors import InputError, did_you_mean

_SECONDS = 20.0  # that a measurement takes, where --steps doesn't say
_ROUNDS = 4
_SCALAR = ("next_token", "sft")  # the objectives that peers know

Record = dict[str, Any]
Result = tuple[Record, str]  # what is written, and a readable line


class Bench(NamedTuple):
    """What the parts measure.

    Attributes:
      config: a research.config.Config, with the architectures of the checkpoints that it names.
      mesh: of the config, over all devices.
      vocab_size: of the tokenizer.
      steps: how often to measure; 0: for about 20 seconds.
      against: names of peers.
      objectives: of `train`; none are the config's own.
      decode: batch sizes.
      profile: a folder, or "".
      flags: those that describe the experiment, for processes of their own.
    """

    config: Any
    mesh: Any
    vocab_size: int
    steps: int
    against: tuple[str, ...]
    objectives: tuple[str, ...]
    decode: tuple[int, ...]
    profile: str
    flags: tuple[str, ...]


def main(argv: Sequence[str]) -> int:
    values = commands.experiment_flags(argv)
    flags.DEFINE_list("only", [], f"Of {', '.join(PARTS)}: these alone.", flag_values=values)
    known = ", ".join(benchmark_peers.PEERS)
    flags.DEFINE_list("against", [], f"Of {known}: measure these in turn.", flag_values=values)
    flags.DEFINE_list("objectives", [], "Of train: measure these instead of the config's.", flag_values=values)
    flags.DEFINE_list("decode_batch", ["1", "8"], "Of decode: batch sizes.", flag_values=values)
    flags.DEFINE_integer("steps", 0, "How often to measure; 0: for about 20 s.", lower_bound=0, flag_values=values)
    flags.DEFINE_string("profile", "", "A folder for traces of the train steps.", flag_values=values)
    flags.DEFINE_string("out", "", "Also append the JSON lines to this file.", flag_values=values)
    if {"--help", "-h"} & set(argv):
        print(f"{__doc__}{values.get_help()}")
        return 0

    def work() -> int:
        if not any(flag == "--config" or flag.startswith("--config=") for flag in argv):
            raise InputError("--config: names no experiment. For example: --config=experiments/benchmark.py:small")
        told = commands.parse_experiment(values, argv, "config", "--config=experiments/benchmark.py:small")
        for part in values.only:
            if part not in PARTS:
                raise InputError(f"--only={part}: there is no such part.{did_you_mean(part, PARTS)}")
        if not all(size.isdecimal() and int(size) for size in values.decode_batch):
            raise InputError(f"--decode_batch={','.join(values.decode_batch)}: give sizes from 1 on, such as 1,8.")
        benchmark_peers.check(values.against)
        if values.against:  # before jax begins: the peer needs room on the device too
            os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        bench = _make(
            {k: v for k, v in told.items() if k != "study"},
            steps=values.steps,
            against=tuple(values.against),
            objectives=tuple(values.objectives),
            decode=tuple(int(size) for size in values.decode_batch),
            profile=values.profile,
            flags=tuple(flag for flag in argv if flag.startswith("--config")),
        )
        with contextlib.ExitStack() as stack:
            files = [sys.stdout]
            if values.out:
                Path(values.out).parent.mkdir(parents=True, exist_ok=True)
                files.append(stack.enter_context(open(values.out, "a")))
            return _run(bench, [part for part in PARTS if part in (values.only or PARTS)], files)

    return commands.run(work)


def _make(told: Mapping[str, Any], **rest: Any) -> Bench:
    import jax

    from research import config as config_lib
    from research import plan, run, sharding

    config, bases = run.with_checkpoints(config_lib.parse(told), None, described=True)
    config_lib.check(config, num_devices=len(jax.devices()))
    mesh = sharding.make_mesh(dataclasses.asdict(config.mesh))
    bench = Bench(config, mesh, plan._vocab_size(config, bases.get("policy")), **rest)
    for name in bench.objectives:
        _with_objective(config, name)
    return bench


def _run(bench: Bench, parts: Sequence[str], files: Sequence[Any]) -> int:
    """Runs the parts, and returns the status."""
    import jax

    device, status = bench.mesh.devices.flat[0], 0
    common = {
        "config": next(flag for flag in bench.flags if flag.startswith("--config")).partition("=")[2],
        "device": device.device_kind,
        "devices": bench.mesh.size,
        "jax": jax.__version__,
    }

    def write(part: str, record: Record, text: str) -> None:
        for file in files:
            print(json.dumps({"part": part, **record, **common, "time": round(time.time(), 3)}), file=file, flush=True)
        print(f"{part:<10} {text}", file=sys.stderr, flush=True)

    for part in parts:
        results = PARTS[part](bench)
        try:
            while True:
                with contextlib.redirect_stdout(sys.stderr), jax.set_mesh(bench.mesh):
                    record, text = next(results)
                status = 1 if "error" in record else status
                write(part, record, text)
        except StopIteration:
            pass
        except Exception as error:
            if not isinstance(error, InputError):
                traceback.print_exc()
            text = f"{type(error).__name__}: {error}"
            write(part, {"error": text}, text)
            status = 1
    return status


# Measuring.


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
    rounds = min(_ROUNDS, n)
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
    return _ready(lambda: product(a, b)), 2.0 * size**3 * mesh.size


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

    return _ready(again), 2.0 * (size // 4 // mesh.size * mesh.size) * 4


def _one_each(mesh: Any) -> Any:
    import jax

    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(mesh.axis_names))


def _ready(work: Callable[[], Any]) -> Callable[[int], list[float]]:
    """A runner of what returns arrays; it has run once."""
    import jax

    jax.block_until_ready(work())
    return lambda n: benchmark_peers.timed(lambda: jax.block_until_ready(work()), n)


def _count(bench: Bench, seconds: float, most: int = 40) -> int:
    """How often to do what takes so many seconds."""
    return bench.steps or max(4, min(most, round(_SECONDS / max(seconds, 1e-9))))


def _memory(compiled: Any) -> Record:
    """Bytes of a device by the compiler's analysis, and at the peak so far."""
    import jax

    found = compiled.memory_analysis()
    stats = jax.local_devices()[0].memory_stats() or {}
    return {
        "arguments": found.argument_size_in_bytes,
        "temporaries": found.temp_size_in_bytes,
        "outputs": found.output_size_in_bytes - found.alias_size_in_bytes,
        "resident_peak": benchmark_peers.peak_resident(),
        "device_peak": stats.get("peak_bytes_in_use"),
    }


def _ms(times: Mapping[str, float]) -> str:
    return f"{1e3 * times['median']:.4g} ms ({1e3 * times['q1']:.4g} to {1e3 * times['q3']:.4g}, {times['n']} times)"


# What is measured: a step with made-up data.


def fake_batch(spec: Mapping[str, Any], vocab_size: int, *, packed: bool = True, seed: int = 0) -> dict[str, Any]:
    """A batch without data.

    Args:
      spec: name -> ShapeDtypeStruct, as plan.batch_spec gives it.
      vocab_size: tokens are random below it.
      packed: rows hold several documents; else each holds one.
      seed: of all that is random.

    Returns:
      name -> numpy array. A third of each document is its prompt (loss_mask 0); labels are of random classes, one at
      the end of each document; what a teacher said is sorted and adds up to 1.

    Raises:
      InputError: a field isn't one of those of plan.batch_spec.
    """
    import numpy as np

    rng = np.random.default_rng(seed)
    B, T = spec["tokens"].shape
    segments, positions, last = (np.zeros((B, T), np.int32) for _ in range(3))
    mask = np.zeros((B, T), np.float32)
    for row in range(B):
        start = number = 0
        while start < T:
            length = int(rng.integers(max(2, T // 8), max(3, T // 2))) if packed else T
            stop = T if T - (start + length) < 2 else start + length
            number += 1
            segments[row, start:stop] = number
            positions[row, start:stop] = np.arange(stop - start)
            mask[row, start + (stop - start) // 3 : stop] = 1
            last[row, stop - 1] = 1
            start = stop
    tokens = rng.integers(0, vocab_size, (2, B, T)).astype(np.int32)
    made = {"tokens": tokens[0], "segment_ids": segments, "positions": positions, "loss_mask": mask}
    made |= {"teacher_tokens": tokens[1], "teacher_segment_ids": segments, "teacher_positions": positions}
    made["teacher_at"] = np.where(last > 0, -1, np.arange(T, dtype=np.int32)[None])
    if "label_probs" in spec:
        classes = rng.integers(0, spec["label_probs"].shape[2], (B, T))
        made["label_probs"] = np.eye(spec["label_probs"].shape[2], dtype=np.float32)[classes] * last[:, :, None]
    if "teacher_ids" in spec:
        k = spec["teacher_ids"].shape[2]
        made["teacher_ids"] = (tokens[1][:, :, None] + np.arange(k, dtype=np.int32)) % vocab_size
        probs = -np.sort(-rng.dirichlet(np.ones(k + 1), (B, T)), axis=2)
        logs = np.log(np.maximum(probs, 1e-9)).astype(np.float32)
        made["teacher_log_probs"], made["teacher_rest"] = logs[:, :, :k], logs[:, :, k]
    for name in spec:
        if name not in made:
            raise InputError(f"objective: reads the batch field {name!r}, which a benchmark can't make up.")
    return {name: np.asarray(made[name], spec[name].dtype) for name in spec}


class Prepared(NamedTuple):
    """A compiled train step, and what it takes. `state` is given away by the first call."""

    parts: Any
    compiled: Any
    state: Any
    frozen: Any
    batch: Any
    numpy_batch: Mapping[str, Any]
    compile_seconds: float


def prepare(bench: Bench, config: Any, *, packed: bool = True) -> Prepared:
    """Assembles a run's step as research.run does, with random parameters and a made-up batch; under jax.set_mesh."""
    import jax

    from research import params, plan, run
    from research.models import transformer

    parts = run.assemble(config, bench.mesh, plan.batch_spec(config), bench.vocab_size)
    batch = fake_batch(parts.batch, bench.vocab_size, packed=packed, seed=config.seed)
    key = jax.random.PRNGKey(config.seed)
    specs = {role: transformer.in_compute_dtype(parts.models[role]) for role in parts.frozen}
    placed = jax.tree.map(lambda x: x.sharding, parts.frozen)
    began = time.perf_counter()
    compiled = parts.step.lower(parts.state, parts.frozen, parts.batch).compile()
    return Prepared(
        parts,
        compiled,
        parts.init_state(parts.init(key), key),
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
        return benchmark_peers.timed(self.step, n)

    def step(self) -> None:
        import jax

        self.state, self.out = self.compiled(self.state, self.frozen, self.batch)
        jax.block_until_ready((self.state, self.out))


def _with_objective(config: Any, name: str) -> Any:
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


# The parts.


def train(bench: Bench) -> Iterator[Result]:
    """The compiled step: time, tokens/s, model-FLOPs utilisation of the measured peak, memory; and that of peers."""
    for name in bench.objectives or ("",):
        config = _with_objective(bench.config, name) if name else bench.config
        yield _train(bench, config, name or "+".join(config.objective["terms"]))


def _train(bench: Bench, config: Any, name: str) -> Result:
    import jax

    from research import sharding

    _forget_peak()
    made = prepare(bench, config, packed=not bench.against)
    dtype = made.parts.models["policy"].config.dtype
    with contextlib.ExitStack() as stack:
        peers: dict[str, Peer | str] = {}
        losses: dict[str, float] = {}
        if bench.against:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            _write_work(folder, made, config)
            for peer in bench.against:
                try:
                    peers[peer], losses[peer] = _start_training(stack, peer, folder, config, made, name)
                except Failed as error:
                    peers[peer] = str(error)
        ours = Stepper(made)
        model, tokens = made.parts.models["policy"], config.batch_size * config.seq_len
        parts, compiled, compile_seconds = made.parts, made.compiled, made.compile_seconds
        del made  # the state is the stepper's now, to be given away
        ours.step()
        loss = float(_mean(ours.out["loss"]))
        warm = ours(1)[0]
        product, product_flops = matmul(bench.mesh, dtype)
        runners = {"": ours, " matmul": lambda n: product(3 * n)}
        runners |= {name: (lambda n, p=p: p.call("run", n=n)) for name, p in peers.items() if isinstance(p, Peer)}
        for peer in list(runners)[2:]:
            runners[peer](1)
        found = in_turn(runners, _count(bench, warm))
        if bench.profile:
            _profile(bench, ours, name)
        times, peak = spread(found[""]), product_flops / spread(found[" matmul"])["median"]
        flops = model_flops(parts.models, tokens, config.seq_len)
        record = {
            "case": name,
            "seconds": times,
            "tokens_per_second": tokens / times["median"],
            "mfu": flops / times["median"] / peak,
            "model_flops": flops,
            "matmul_flops_per_second": peak,
            "dtype": dtype,
            "batch": [config.batch_size, config.seq_len],
            "platform": sharding.platform(),
            "compile_seconds": compile_seconds,
            "loss": loss,
            "memory": _memory(compiled),
        }
        for peer, child in peers.items():
            theirs = child if isinstance(child, str) else found[peer]
            if isinstance(theirs, str):
                record.setdefault("against", {})[peer] = {"error": theirs}
                continue
            theirs = spread(theirs)
            record.setdefault("against", {})[peer] = {
                "seconds": theirs,
                "tokens_per_second": tokens / theirs["median"],
                "mfu": flops / theirs["median"] / peak,
                "ratio": theirs["median"] / times["median"],
                "loss": losses[peer],
                "memory": child.call("memory"),
            }
    del ours, model
    jax.clear_caches()
    text = (
        f"{name}: {_ms(times)}, {record['tokens_per_second']:.5g} tokens/s, MFU {record['mfu']:.1%} of "
        f"{peak / 1e12:.3g} TFLOP/s, {_peak_memory(record['memory'])}"
    )
    return record, text + _told(record)


def _told(record: Record) -> str:
    lines = ""
    for name, theirs in record.get("against", {}).items():
        if "error" in theirs:
            lines += f"\n{'':<10}   {name}: failed: {theirs['error']}"
            continue
        memory = f", {_peak_memory(theirs['memory'])}" if "memory" in theirs else ""
        lines += f"\n{'':<10}   {name}: {_ms(theirs['seconds'])}, {theirs['ratio']:.2f} times ours{memory}"
    return lines


def _peak_memory(memory: Record) -> str:
    device = memory["device_peak"]
    return f"{(device or memory['resident_peak'] or 0) / 1e6:,.0f} MB {'of the device' if device else 'resident'}"


def _mean(metric: Any) -> Any:
    return metric[0] / metric[1]


def _forget_peak() -> None:
    """Peak memory counts from here, where the system lets us."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _write_work(folder: str, made: Prepared, config: Any) -> None:
    """What peers read: config.json, safetensors, batch.npz. Raises Failed where they don't know the architecture."""
    import numpy as np

    from research.objectives.types import next_token_targets

    _write_model(folder, made.parts.models["policy"].config, made.state.params["policy"])
    batch = made.numpy_batch
    mask = batch["loss_mask"] if "sft" in config.objective["terms"] else None
    weights = np.asarray(next_token_targets(batch, mask)[1])
    labels = np.full_like(batch["tokens"], -100)
    labels[:, 1:] = np.where(weights[:, :-1] > 0, batch["tokens"][:, 1:], -100)
    np.savez(f"{folder}/batch.npz", labels=labels, **batch)


def _write_model(folder: str, model: Any, values: Any) -> int:
    """Writes a model as transformers does, float32; returns its bytes."""
    from research.pretrained import save

    family, described = save.choose(model, {})
    total = save.save(Path(folder), family, model, values, lambda name: "float32", int(5e9))
    Path(folder, "config.json").write_text(json.dumps({**described, "torch_dtype": "float32"}))
    return sum(total.values())


def _start_training(
    stack: contextlib.ExitStack, peer: str, folder: str, config: Any, made: Prepared, name: str
) -> tuple[Peer, float]:
    if name not in _SCALAR:
        raise Failed(f"peers know {' and '.join(_SCALAR)} alone")
    child = stack.enter_context(Peer(peer))
    o = config.optimizer
    chosen = {k: getattr(o, k) for k in ("learning_rate", "b1", "b2", "eps", "weight_decay", "clip_norm")}
    model = made.parts.models["policy"].config
    remat = model.remat != "none"
    told = child.call(
        "train", folder=folder, optimizer=chosen, microbatches=config.microbatches, dtype=model.dtype, remat=remat
    )
    return child, told["loss"]


def _profile(bench: Bench, ours: Stepper, name: str) -> None:
    raise NotImplementedError


PARTS: dict[str, Callable[[Bench], Iterator[Result]]] = {
    "train": train,
}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
