"""How long a researcher waits: measures, on this machine, the parts of a run that decide it.

understudy benchmark --config=experiments/benchmark.py:small [--only=train,decode,...] [--against=hf,...]
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
checkpoint is read, but by `loop`, `data` and `startup`. Rows hold several documents each; with --against one, so that
all do the same work and find the same loss. The status is 1 if a part failed; the others still run.
"""

import contextlib
import dataclasses
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags

from research import cli
from research.bench import measure, peers, profiling
from research.bench.peers import Peer
from research.devices import startup as process_startup
from research.errors import InputError, did_you_mean

_SECONDS = 20.0  # that a measurement takes, where --steps doesn't say
_WITH_PEERS = ("next_token", "sft")  # the objectives that peers know

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
    values = cli.experiment_flags(argv)
    flags.DEFINE_list("only", [], f"Of {', '.join(PARTS)}: these alone.", flag_values=values)
    known = ", ".join(peers.PEERS)
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
        told = cli.parse_experiment(values, argv, "config", "--config=experiments/benchmark.py:small")
        for part in values.only:
            if part not in PARTS:
                raise InputError(f"--only={part}: there is no such part.{did_you_mean(part, PARTS)}")
        if not all(size.isdecimal() and int(size) for size in values.decode_batch):
            raise InputError(f"--decode_batch={','.join(values.decode_batch)}: give sizes from 1 on, such as 1,8.")
        peers.check(values.against)
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

    return cli.run(work)


def _make(told: Mapping[str, Any], **rest: Any) -> Bench:
    import jax

    from research import config as config_lib
    from research.devices import sharding
    from research.planning import abstract
    from research.run import run

    config, bases = run.with_checkpoints(config_lib.parse(told), None, described=True)
    config_lib.check(config, num_devices=len(jax.devices()))
    mesh = sharding.make_mesh(dataclasses.asdict(config.mesh))
    bench = Bench(config, mesh, abstract.find_vocab_size(config, bases.get("policy")), **rest)
    for name in bench.objectives:
        measure.with_objective(config, name)
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
        line = json.dumps({"part": part, **record, **common, "time": round(time.time(), 3)})
        for file in files:
            print(line, file=file, flush=True)
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


def _count(bench: Bench, seconds: float, most: int = 40) -> int:
    """How often to do what takes so many seconds."""
    return bench.steps or max(4, min(most, round(_SECONDS / max(seconds, 1e-9))))


def _ms(times: Mapping[str, float]) -> str:
    return f"{1e3 * times['median']:.4g} ms ({1e3 * times['q1']:.4g} to {1e3 * times['q3']:.4g}, {times['n']} times)"


def train(bench: Bench) -> Iterator[Result]:
    """The compiled step: time, tokens/s, model-FLOPs utilisation of the measured peak, memory; and that of peers."""
    for name in bench.objectives or ("",):
        config = measure.with_objective(bench.config, name) if name else bench.config
        yield _train(bench, config, name or "+".join(config.objective["terms"]))


def _train(bench: Bench, config: Any, name: str) -> Result:
    import jax

    from research.devices import sharding

    made = measure.prepare(config, bench.mesh, bench.vocab_size, packed=not bench.against)
    dtype = made.parts.models["policy"].config.dtype
    with contextlib.ExitStack() as stack:
        peers: dict[str, Peer | str] = {}
        losses: dict[str, float] = {}
        if bench.against:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            for peer in bench.against:
                try:
                    _write_work(folder, made, config, name)
                    peers[peer], losses[peer] = _start_training(stack, peer, folder, config, made)
                except (measure.Failed, InputError) as error:
                    peers[peer] = str(error)
        ours = measure.Stepper(made)
        model, tokens = made.parts.models["policy"], config.batch_size * config.seq_len
        parts, compiled, compile_seconds = made.parts, made.compiled, made.compile_seconds
        del made  # the state is the stepper's now, to be given away
        ours.step()
        loss = float(_mean(ours.out["loss"]))
        warm = ours(1)[0]
        measure.forget_peak()
        product, product_flops = measure.matmul(bench.mesh, dtype)
        runners = {"": ours, " matmul": lambda n: product(3 * n)}
        runners |= {name: (lambda n, p=p: p.call("run", n=n)) for name, p in peers.items() if isinstance(p, Peer)}
        found = measure.in_turn(runners, _count(bench, warm))
        costliest = _profile(bench, ours, name) if bench.profile else None
        times, peak = measure.spread(found[""]), product_flops / measure.spread(found[" matmul"])["median"]
        flops = measure.model_flops(parts.models, tokens, config.seq_len)
        record = {
            "case": name,
            "seconds": times,
            "tokens_per_second": tokens / times["median"],
            "mfu": flops / times["median"] / peak,
            "model_flops": flops,
            "matmul_flops_per_second": peak,
            "dtype": dtype,
            "batch": [config.batch_size, config.seq_len],
            "packed": not bench.against,
            "platform": sharding.platform(),
            "compile_seconds": compile_seconds,
            "loss": loss,
            "memory": measure.memory(compiled),
        }
        for peer, child in peers.items():
            theirs = child if isinstance(child, str) else found[peer]
            if isinstance(theirs, str):
                record.setdefault("against", {})[peer] = {"error": theirs}
                continue
            theirs = measure.spread(theirs)
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
    if costliest is not None:
        record["costliest"] = costliest
    return record, text + _told(record) + profiling.describe(costliest or [])


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


def _write_work(folder: str, made: measure.Prepared, config: Any, name: str) -> None:
    """What peers read, if it isn't there: config.json, safetensors, batch.npz.

    Raises:
      Failed: peers don't know the objective.
      InputError: transformers has no such architecture.
    """
    import numpy as np

    from research.objectives.types import next_token_targets

    if name not in _WITH_PEERS:
        raise measure.Failed(f"peers know {' and '.join(_WITH_PEERS)} alone")
    if Path(folder, "batch.npz").exists():
        return
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
    stack: contextlib.ExitStack, peer: str, folder: str, config: Any, made: measure.Prepared
) -> tuple[Peer, float]:
    """The process, which has made two steps, and the loss of the first."""
    child = stack.enter_context(Peer(peer))
    o = config.optimizer
    chosen = {k: getattr(o, k) for k in ("learning_rate", "b1", "b2", "eps", "weight_decay", "clip_norm")}
    model = made.parts.models["policy"].config
    remat = model.remat == "full"
    told = child.call(
        "train", folder=folder, optimizer=chosen, microbatches=config.microbatches, dtype=model.dtype, remat=remat
    )
    child.call("run", n=1)
    return child, told["loss"]


def _profile(bench: Bench, ours: measure.Stepper, name: str) -> list[Record]:
    """Traces a few steps into FOLDER/NAME; returns what took the most time, in seconds of a step."""
    import jax

    folder, steps = str(Path(bench.profile) / name), 3
    with jax.profiler.trace(folder, create_perfetto_trace=True):
        for _ in range(steps):
            ours.step()
    found = profiling.costliest(folder, [ours.compiled.as_text()])
    return [{**each, "seconds": each["seconds"] / steps} for each in found]


def loop(bench: Bench) -> Iterator[Result]:
    """Runs research.run for a few steps, and the bare step as often, in turn: what the loop adds, as a share of it."""
    from research.run import metrics, run

    config = dataclasses.replace(
        bench.config,
        eval=dataclasses.replace(bench.config.eval, every=0),
        checkpoint=dataclasses.replace(bench.config.checkpoint, every=0, best_metric=""),
    )
    ours = measure.Stepper(measure.prepare(config, bench.mesh, bench.vocab_size))
    ours(2)
    n = max(3, _count(bench, ours(1)[0] * measure.ROUNDS))
    before = 2 * config.log.every  # Orbax and TensorBoard are imported beside the first steps
    shares, waits, bare, looped = [], [], [], []
    for _ in range(measure.ROUNDS):
        with tempfile.TemporaryDirectory() as workdir:
            try:
                run.run(dataclasses.replace(config, steps=before + n), workdir)
            except run.Preempted as stop:
                raise KeyboardInterrupt from stop
            lines = [line for line in metrics.read_metrics(workdir) if "train/tokens_per_second" in line]
        lines = [line for line in lines if line["step"] > before]
        looped.append(statistics.mean(line["train/tokens"] / line["train/tokens_per_second"] for line in lines))
        waits.append(statistics.mean(line["train/data_wait_fraction"] for line in lines))
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
        f"{_ms(record['seconds'])} a step, {_ms(record['bare_seconds'])} without the loop: "
        f"{record['overhead']['median']:+.1%}; waits for data {record['data_wait_fraction']:.2%} of the time"
    )
    yield record, text


def decode(bench: Bench) -> Iterator[Result]:
    """Greedy decoding of prompts of equal length; then of many that begin and end at different lengths."""
    import jax
    import numpy as np

    from research import config as config_lib
    from research import params
    from research.devices import sharding
    from research.models import generation, transformer
    from research.models.sampling import SamplingConfig

    rules = {**sharding.RULES, **bench.config.rules}
    model = transformer.make_model(config_lib.model_config(bench.config, bench.vocab_size), rules)
    c, rng, key = model.config, np.random.default_rng(0), jax.random.PRNGKey(0)
    specs = transformer.in_compute_dtype(model)
    values = jax.jit(lambda key: params.init(specs, key), out_shardings=params.shardings(specs, bench.mesh, rules))(key)
    unit = sharding.num_parts(rules["batch"], bench.mesh)
    prompt, new = min(32, c.max_length // 2), min(128, c.max_length // 2)
    move, moved = measure.copy(bench.mesh)
    weights = sum(x.nbytes for x in jax.tree.leaves(values)) - (0 if c.tie_embeddings else values["embed"].nbytes)
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        if bench.against:
            _write_model(folder, c, values)
        for size in sorted({-(-size // unit) * unit for size in bench.decode}):
            prompts = rng.integers(0, bench.vocab_size, (size, prompt)).astype(np.int32)
            lengths = np.full(size, prompt, np.int32)

            def make(n: int, prompts: Any = prompts, lengths: Any = lengths) -> Callable[[], Any]:
                generate = generation.make_generate(model, SamplingConfig(max_new_tokens=n), bench.vocab_size)
                return lambda: generate(values, prompts, lengths, key)

            whole = make(new)
            runners = {"": measure.ready(whole), " first": measure.ready(make(1)), " copy": move}
            children: dict[str, Peer] = {}
            theirs: dict[str, Any] = {}
            np.savez(f"{folder}/batch.npz", prompts=prompts)
            for peer in bench.against:
                try:
                    children[peer] = stack.enter_context(Peer(peer))
                    theirs[peer] = children[peer].call("decode", folder=folder, new_tokens=new, dtype=c.dtype)["tokens"]
                    runners[peer] = lambda n, p=children[peer]: p.call("run", n=n)
                except measure.Failed as error:
                    theirs[peer] = str(error)
            tokens = np.asarray(whole().tokens)
            measure.forget_peak()
            found = measure.in_turn(runners, _count(bench, runners[""](1)[0], 15))
            times, first = measure.spread(found[""]), measure.spread(found[" first"])
            per_token = (times["median"] - first["median"]) / max(new - 1, 1)
            cached = 2 * c.num_layers * c.num_kv_heads * c.dim_per_head * size * (prompt + new / 2)
            read = weights + cached * jax.numpy.dtype(c.dtype).itemsize
            bandwidth = moved / measure.spread(found[" copy"])["median"]
            record = {
                "case": f"batch {size}",
                "seconds": times,
                "tokens_per_second": size * new / times["median"],
                "prefill_seconds": first,
                "seconds_per_token": per_token,
                "prompt": prompt,
                "new_tokens": new,
                "dtype": c.dtype,
                "bytes_per_token": read,
                "bytes_per_second": bandwidth,
                "of_bandwidth": read / bandwidth / per_token,
                "resident_peak": measure.peak_resident(),
            }
            for peer, answer in theirs.items():
                answer = found[peer] if isinstance(found.get(peer), str) else answer
                if isinstance(answer, str):
                    record.setdefault("against", {})[peer] = {"error": answer}
                    continue
                peer_times = measure.spread(found[peer])
                record.setdefault("against", {})[peer] = {
                    "seconds": peer_times,
                    "tokens_per_second": size * new / peer_times["median"],
                    "ratio": peer_times["median"] / times["median"],
                    "same_tokens": float(np.mean(np.asarray(answer) == tokens)),
                    "memory": children[peer].call("memory"),
                }
            for child in children.values():
                child.close()
            text = (
                f"batch {size}: {record['tokens_per_second']:.5g} tokens/s, prompt {_ms(first)}, then "
                f"{1e3 * per_token:.4g} ms a token, {record['of_bandwidth']:.0%} of {bandwidth / 1e9:.3g} GB/s"
            )
            yield record, text + _told(record)
    yield _queue(bench, model, values, -(-max(bench.decode) // unit) * unit)


def _queue(bench: Bench, model: Any, values: Any, size: int) -> Result:
    """Many prompts of unequal lengths, which end at unequal lengths too: generate_batches, which gives the place of a
    row that has ended to the next, against one padded batch after the other."""
    import jax
    import numpy as np

    from research.models import generation
    from research.models.sampling import SamplingConfig

    rng, key, longest = np.random.default_rng(0), jax.random.PRNGKey(0), min(256, model.config.max_length // 4)
    new, count = min(256, model.config.max_length // 2), 8 * size
    lengths = np.sort(np.exp(rng.uniform(np.log(max(1, longest // 32)), np.log(longest), count)).astype(int))
    prompts = [rng.integers(0, bench.vocab_size, n).tolist() for n in lengths]
    # Of random weights every token is about as likely: one that ends a row comes after 64 tokens, on average.
    stop = tuple(range(max(1, bench.vocab_size // 64)))
    config = SamplingConfig(max_new_tokens=new, temperature=1.0, stop_tokens=stop)
    generate = generation.make_generate(model, config, bench.vocab_size)
    made: dict[str, int] = {}

    def all_of(name: str, at_once: int) -> Callable[[], None]:
        def work() -> None:
            made[name] = 0
            for first in range(0, count, at_once):
                done = generation.generate_batches(
                    generate,
                    values,
                    prompts[first : first + at_once],
                    key,
                    batch_size=size,
                    bucket=32,
                    first_row=first,
                )
                made[name] += sum(len(completion.tokens) for completion in done)

        return work

    runners = {"padded": measure.ready(all_of("padded", size)), "refilled": measure.ready(all_of("refilled", count))}
    found = measure.in_turn(runners, _count(bench, runners["padded"](1)[0], 8))
    record: Record = {"case": f"{count} prompts, {size} at once", "new_tokens": made}
    for name, seconds in found.items():
        record[name] = {"seconds": measure.spread(seconds)}
        record[name]["tokens_per_second"] = made[name] / record[name]["seconds"]["median"]
    record["ratio"] = record["refilled"]["tokens_per_second"] / record["padded"]["tokens_per_second"]
    text = (
        f"{record['case']}, places refilled: {record['refilled']['tokens_per_second']:.5g} tokens/s, "
        f"{record['ratio']:.2f} times padded batches ({record['padded']['tokens_per_second']:.5g})"
    )
    return record, text


def data(bench: Bench) -> Iterator[Result]:
    """The config's data with bytes and with a BPE: tokenising its texts, preparing it from the text and from the cache;
    batches; packing."""
    import numpy as np

    from research import config as config_lib
    from research.sources import dataset, packing, tokenizers

    config = bench.config
    wanted = config_lib.data_spec(config)
    for kind in ("byte", "bpe"):
        with tempfile.TemporaryDirectory() as folder:
            spec = dataclasses.replace(wanted, cache_dir=folder)
            size = config.tokenizer.vocab_size
            told = tokenizers.TokenizerSpec(kind=kind, vocab_size=size)
            began = time.perf_counter()
            found = dataset.load(spec, told, seed=config.seed)
            first = time.perf_counter() - began
            texts = _texts(found)
            began, cpu = time.perf_counter(), time.process_time()
            tokens = sum(len(ids) for ids in found.tokenizer.encode_batch(texts))
            seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
            warm = measure.spread(
                measure.timed(lambda: dataset.load(spec, told, seed=config.seed), 5)  # noqa: B023
            )
            source = dataset.make_source(found.train, batch_size=config.batch_size, seed=config.seed)
            state = [source.init()]

            def batch() -> None:
                _, state[0] = source.next(state[0])  # noqa: B023

            batch()
            batches = measure.spread(measure.timed(batch, 50))
        record = {
            "case": kind,
            "tokens": tokens,
            "tokenize_seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "tokens_per_cpu_second": tokens / cpu,
            "first_seconds": first,
            "cached_seconds": warm,
            "packing_efficiency": found.report["train"]["packing_efficiency"],
            "batch_seconds": batches,
            "batches_per_second": 1 / batches["median"],
        }
        text = (
            f"{kind}: {record['tokens_per_second'] / 1e6:.3g} M tokens/s, "
            f"{record['tokens_per_cpu_second'] / 1e6:.3g} M a core; all is ready after {first:.3g} s the first time, "
            f"from the cache {_ms(warm)}; "
            f"{record['batches_per_second']:.4g} batches/s"
        )
        yield record, text
    lengths = np.random.default_rng(0).integers(1, config.seq_len + 1, 1_000_000)
    seconds = measure.spread(measure.timed(lambda: packing.best_fit_decreasing(lengths, config.seq_len), 3))
    record = {"case": "packing", "examples": len(lengths), "seconds": seconds}
    yield record, f"packing a million examples: {_ms(seconds)}"


def _texts(found: Any, most: int = 2_000_000) -> list[str]:
    """Texts of the training data, of at most so many tokens: the pieces that were packed."""
    import numpy as np

    texts, tokens = [], 0
    for rows, _ in found.train:
        for row in range(len(rows)):
            if tokens >= most:
                break
            batch = rows.batch(np.array([row]))
            ids, segments = batch["tokens"][0], batch["segment_ids"][0]
            texts += [found.tokenizer.decode(ids[segments == n].tolist()) for n in range(1, segments.max() + 1)]
            tokens += int((segments > 0).sum())
    return texts


def loading(bench: Bench) -> Iterator[Result]:
    """Writes and reads the model: a whole training state as our checkpoint, its parameters as safetensors. The files
    are read from the system's cache where they fit."""
    import jax

    from research.pretrained import load
    from research.run import checkpoint

    made = measure.prepare(bench.config, bench.mesh, bench.vocab_size)
    state, policy = made.state, made.parts.models["policy"]
    size = sum(x.nbytes for x in jax.tree.leaves(state))
    repeats = 1 if size > 4e9 else min(bench.steps, 3) or 3
    times: dict[str, list[float]] = {"write": [], "read": []}
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder, contextlib.closing(checkpoint.Checkpointer(folder)) as saver:

            def write(saver: Any = saver) -> None:
                saver.save(state, {"step": 0}, {}, {})
                saver.wait()

            times["write"] += measure.timed(write, 1)
            read = lambda saver=saver: jax.block_until_ready(saver.restore(made.parts.state)[0].params)  # noqa: E731
            times["read"] += measure.timed(read, 1)
    yield _rates("checkpoint", size, times)
    times, total, values = {"write": [], "read": []}, 0, state.params["policy"]
    placed = jax.tree.map(lambda x: x.sharding, made.parts.state.params["policy"])
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            began = time.perf_counter()
            total = _write_model(folder, policy.config, values)
            times["write"].append(time.perf_counter() - began)
            began = time.perf_counter()
            jax.block_until_ready(load.load(load.open_pretrained(folder), policy.specs, placed))
            times["read"].append(time.perf_counter() - began)
    yield _rates("safetensors", total, times)


def _rates(case: str, size: int, times: Mapping[str, Sequence[float]]) -> Result:
    write, read = measure.spread(times["write"]), measure.spread(times["read"])
    record = {"case": case, "bytes": size, "write_seconds": write, "read_seconds": read}
    record |= {"write_bytes_per_second": size / write["median"], "read_bytes_per_second": size / read["median"]}
    text = (
        f"{case}, {size / 1e6:,.0f} MB: written in {write['median']:.3g} s ({size / write['median'] / 1e9:.3g} GB/s), "
        f"read in {read['median']:.3g} s ({size / read['median'] / 1e9:.3g} GB/s)"
    )
    return record, text


def save(bench: Bench) -> Iterator[Result]:
    """How long a save holds the loop up, and how much slower the ten steps after it are, while files are written."""
    from research.run import checkpoint

    ours = measure.Stepper(measure.prepare(bench.config, bench.mesh, bench.vocab_size))
    ours(2)
    stalls, slowed, plain, after = [], [], [], min(bench.steps, 10) or 10
    with tempfile.TemporaryDirectory() as folder, contextlib.closing(checkpoint.Checkpointer(folder)) as saver:
        for i in range(4):
            step = statistics.median(ours(min(after, 5)))
            began = time.perf_counter()
            saver.save(ours.state, {"step": i}, {}, {})
            stall = time.perf_counter() - began
            more = sum(ours(after)) - after * step
            saver.wait()
            if i:  # the first also starts Orbax
                stalls.append(stall)
                slowed.append(more)
                plain.append(step)
    stall, step = measure.spread(stalls), statistics.median(plain)
    record = {
        "stall_seconds": stall,
        "stall_steps": stall["median"] / step,
        "slowed_seconds": measure.spread(slowed),
        "slowed_over_steps": after,
        "step_seconds": step,
    }
    text = (
        f"the loop stands still for {_ms(stall)}, {record['stall_steps']:.2g} steps; the {after} steps "
        f"after it take {1e3 * record['slowed_seconds']['median']:.3g} ms longer"
    )
    yield record, text


def startup(bench: Bench) -> Iterator[Result]:
    """Processes of research.main: seconds to the end of the first step, by what an earlier one left in the cache; and
    what importing takes."""
    from research.run import metrics

    seconds: dict[str, list[float]] = {"nothing": [], "tokens": [], "tokens_and_programs": []}
    steps = (
        "steps=2",
        "optimizer.warmup_steps=0",
        "eval.every=0",
        "checkpoint.every=0",
        "checkpoint.best_metric=",
        "compilation_cache=True",
    )
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "UNDERSTUDY_CACHE": f"{folder}/cache"}

        def child(*argv: str) -> float:
            began = time.perf_counter()
            done = subprocess.run([sys.executable, *argv], env=environment, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"{' '.join(argv)} ended with status {done.returncode}: {done.stderr[-500:]}")
            return time.perf_counter() - began

        def start(cached: str) -> None:
            workdir = f"{folder}/{cached}-{len(seconds[cached])}"
            told = [f"--config.{field}" for field in (*steps, f"data.cache_dir={folder}/cache")]
            child("-m", "research.main", *bench.flags, *told, f"--workdir={workdir}")
            lines = [line for line in metrics.read_metrics(workdir) if "startup/seconds_to_first_step" in line]
            seconds[cached].append(lines[0]["startup/seconds_to_first_step"])
            shutil.rmtree(workdir)

        start("nothing")
        repeats = min(bench.steps, 3) or 3
        for _ in range(repeats):
            shutil.rmtree(f"{folder}/cache/xla", ignore_errors=True)
            start("tokens")
            start("tokens_and_programs")
        imports = [child("-c", "import research.run.run") for _ in range(repeats)]
    times = {cached: measure.spread(each) for cached, each in seconds.items()}
    record = {"seconds_to_first_step": times, "import": measure.spread(imports)}
    told = {cached: each["median"] for cached, each in times.items()}
    text = (
        f"first step after {told['tokens_and_programs']:.3g} s, without compiled programs {told['tokens']:.3g} s, "
        f"without tokens either {told['nothing']:.3g} s; importing takes {record['import']['median']:.3g} s"
    )
    yield record, text


PARTS: dict[str, Callable[[Bench], Iterator[Result]]] = {
    "train": train,
    "loop": loop,
    "decode": decode,
    "data": data,
    "loading": loading,
    "checkpoint": save,
    "startup": startup,
}


if __name__ == "__main__":
    process_startup.leave_loops()
    process_startup.use_huge_pages()
    sys.exit(main(sys.argv[1:]))
