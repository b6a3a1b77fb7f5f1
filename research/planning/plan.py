"""Whether a run fits a machine, how fast it can be and what it costs, before the machine is there.

understudy plan --config=experiments/x.py --topology=v5e:16x16 [--search] [--json=FILE] [--config.a.b=value ...]

Compiles the real train step, with its real shardings, for a TPU topology (v4, v5e, v5p, v6e; 2*v5p:4x4x4 is two slices)
with no TPU attached: pip install 'understudy[tpu]'. For gpu:8xH100 and cpu:8 it compiles for as many simulated CPU
devices, and what it says is an estimate. --search tries meshes, rematerialisation and microbatches, and names the
fastest that fits. Roles without init_from have the shape that their section describes.
"""

import contextlib
import dataclasses
import json
import math
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags

from research import cli
from research.errors import InputError, did_you_mean

GIB = 2**30


class Chip(NamedTuple):
    """What a chip has, by its maker's data sheet.

    Attributes:
      flops: peak FLOP/s of bfloat16 matrix products.
      memory: bytes.
      memory_bandwidth: bytes/s.
      link_bandwidth: bytes/s that it can send to other chips of its slice, over all links.
    """

    flops: float
    memory: float
    memory_bandwidth: float
    link_bandwidth: float


# Of TPUs: "Key chip specifications" in cloud.google.com/tpu/docs, pages v4 to v6e; link bandwidth is the sum one way
# ("interchip interconnect BW", Gbps). Of GPUs: NVIDIA's data sheets, NVLink one way.
CHIPS = {
    "v4": Chip(275e12, 32 * GIB, 1.2e12, 2400e9 / 8),
    "v5e": Chip(197e12, 16 * GIB, 819e9, 1600e9 / 8),
    "v5p": Chip(459e12, 95 * GIB, 2.765e12, 4800e9 / 8),
    "v6e": Chip(918e12, 32 * GIB, 1.6e12, 3200e9 / 8),
    "A100": Chip(312e12, 80e9, 2.0e12, 300e9),
    "H100": Chip(989.5e12, 80e9, 3.35e12, 450e9),
    "H200": Chip(989.5e12, 141e9, 4.8e12, 450e9),
    "B200": Chip(2250e12, 180e9, 8.0e12, 900e9),
}
_SIMULATED = Chip(1e11, 16 * GIB, 2e10, 1e10)  # a laptop's CPU, shared: an order of magnitude


class Topology(NamedTuple):
    """Where the run is to be.

    Attributes:
      name: as given.
      kind: a key of CHIPS, or "cpu".
      chips: how many, in all slices.
      slices: joined by a data-centre network.
      devices: to make a mesh of; only compiled for.
      chip: what each has.
    """

    name: str
    kind: str
    chips: int
    slices: int
    devices: Sequence[Any]
    chip: Chip


class Collective(NamedTuple):
    """One kind of communication in a step: calls, and bytes that each chip gets by them."""

    kind: str
    calls: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a step needs and takes. Bytes are of one chip.

    Attributes:
      mesh: its axes' sizes.
      parameters: of the policy; frozen_parameters: of the other roles.
      bytes_of: kind -> bytes: parameters, optimizer, frozen, batch, temporary (activations and gradients), code.
      memory: bytes that the chip has.
      compiler: what it says of a program that doesn't fit; else "".
      tokens: of a step.
      model_flops: of a step, by transformer.flops_per_token.
      collectives: of a step.
      seconds: "compute" (model FLOPs and what rematerialisation repeats, at the peak), "memory" (each chip's state and
        temporary bytes read and written once) and "network" (bytes of collectives over all links): a step takes at
        least the longest, and their sum where nothing overlaps.
      compile_seconds: that the compiler took.
    """

    mesh: Mapping[str, int]
    parameters: int
    frozen_parameters: int
    bytes_of: Mapping[str, int]
    memory: float
    compiler: str
    tokens: int
    model_flops: float
    collectives: tuple[Collective, ...]
    seconds: Mapping[str, float]
    compile_seconds: float

    @property
    def used(self) -> int:
        return sum(self.bytes_of.values())

    @property
    def fits(self) -> bool:
        return not self.compiler and self.used <= self.memory

    @property
    def least(self) -> float:
        """Seconds of a step where all overlaps."""
        return max(self.seconds.values())

    @property
    def most(self) -> float:
        """Seconds of a step where nothing does."""
        return sum(self.seconds.values())


def main(argv: Sequence[str]) -> int:
    values = cli.experiment_flags(argv)
    flags.DEFINE_string("topology", None, "v5e:16x16, 2*v5p:4x4x4, gpu:8xH100 or cpu:8.", flag_values=values)
    flags.DEFINE_bool("search", False, "Try meshes, remat policies and microbatches.", flag_values=values)
    flags.DEFINE_integer("max_compiles", 8, "Of --search: how many to compile, the most promising.", flag_values=values)
    flags.DEFINE_string("json", "", "Also write the figures there.", flag_values=values)
    if {"--help", "-h"} & set(argv):
        print(f"{__doc__}{values.get_help()}")
        return 0

    def work() -> int:
        told = cli.parse_experiment(values, argv, "topology", "--config=experiments/x.py --topology=v5e:4x4")
        topology = find(values.topology)

        from research import config as config_lib  # late, because jax must know of simulated devices first

        config = config_lib.parse({k: v for k, v in told.items() if k != "study"})
        found = search(config, topology, values.max_compiles) if values.search else [(config, make(config, topology))]
        best, plan = found[-1]
        print(describe(best, topology, plan))
        if values.json:
            records = [_record(each, topology, plan) for each, plan in found]
            Path(values.json).write_text(json.dumps(records, indent=2) + "\n")
        return 0 if plan.fits else 1

    return cli.run(work)


def find(name: str) -> Topology:
    """The machine of a name such as v5e:16x16, 2*v5p:4x4x4, gpu:8xH100 or cpu:8; must precede other use of jax.

    Raises:
      InputError: there is no such machine, or the compiler for it isn't installed.
    """
    parsed = re.fullmatch(r"(?:(\d+)\*)?(\w+):([\w]+)", name)
    if not parsed:
        raise InputError(f"--topology={name}: isn't of the form KIND:SHAPE, such as v5e:16x16, gpu:8xH100 or cpu:8.")
    slices, kind, shape = int(parsed[1] or 1), parsed[2], parsed[3]
    if kind in ("cpu", "gpu"):
        gpus = re.fullmatch(r"(\d+)x(\w+)", shape) if kind == "gpu" else re.fullmatch(r"(\d+)()", shape)
        if not gpus or (gpus[2] and gpus[2] not in CHIPS):
            known = [k for k in CHIPS if not k.startswith("v")]
            raise InputError(f"--topology={name}: give cpu:COUNT or gpu:COUNTxKIND.{did_you_mean(shape, known)}")
        count = int(gpus[1]) * slices
        return Topology(name, gpus[2] or "cpu", count, slices, _simulated(count), CHIPS.get(gpus[2], _SIMULATED))
    tpus = [k for k in CHIPS if k.startswith("v")]
    if kind not in tpus:
        raise InputError(f"--topology={name}: {kind!r} isn't known.{did_you_mean(kind, [*tpus, 'gpu', 'cpu'])}")
    # Without these libtpu asks a server of Google's cloud what it runs on, and lets in one process at a time.
    environment = {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-1",
        "TPU_WORKER_ID": "0",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "JAX_PLATFORMS": "cpu",
        "TPU_STDERR_LOG_LEVEL": "3",
        "TPU_MIN_LOG_LEVEL": "3",
    }
    for variable, value in environment.items():
        os.environ.setdefault(variable, value)
    from jax.experimental import topologies

    try:
        options = {"num_slices": slices} if slices > 1 else {}
        devices = topologies.get_topology_desc(platform="tpu", topology_name=f"{kind}:{shape}", **options).devices
    except Exception as error:
        text = str(error).splitlines()[0]
        if "not installed" in text or "libtpu" in text.lower():
            raise InputError(
                f"--topology={name}: the TPU compiler isn't here ({text}). pip install 'understudy[tpu]'"
            ) from error
        raise InputError(f"--topology={name}: {text}. Give a shape that {kind} comes in, such as 4x4.") from error
    chip = CHIPS[kind]
    count = len(devices)
    cores = count // (slices * math.prod(int(n) for n in shape.split("x")))
    if cores > 1:  # a device is one of the chip's cores
        chip = Chip(*(x / cores for x in chip))
    return Topology(name, kind, count, slices, devices, chip)


def _simulated(count: int) -> Sequence[Any]:
    import jax

    jax.config.update("jax_platforms", "cpu")
    with contextlib.suppress(RuntimeError):  # the devices are there already, as in tests
        jax.config.update("jax_num_cpu_devices", count)
    if len(jax.devices()) < count:
        raise InputError(f"--topology: {count} devices can't be simulated, as jax has begun with {len(jax.devices())}.")
    return jax.devices()[:count]


def make(config: Any, topology: Topology) -> Plan:
    """Compiles a run's train step for a topology.

    Args:
      config: a research.config.Config.
      topology: of `find`.

    Raises:
      InputError: the config can't work there, whatever the memory.
    """
    import jax

    from research import config as config_lib
    from research import params
    from research.devices import sharding
    from research.models import transformer
    from research.run import run

    config, bases = run.with_checkpoints(config, None, described=True)
    config_lib.check(config, num_devices=len(topology.devices))
    mesh = sharding.make_mesh(dataclasses.asdict(config.mesh), topology.devices)
    config, vocab_size = _for(config, topology), find_vocab_size(config, bases.get("policy"))
    parts = run.assemble(config, mesh, batch_spec(config), vocab_size)
    with jax.set_mesh(mesh):
        lowered = parts.step.trace(parts.state, parts.frozen, parts.batch).lower()
        began, compiler, compiled = time.time(), "", None
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            compiler = _out_of_memory(str(error))
            if not compiler:
                raise
        seconds = time.time() - began
    policy = parts.models["policy"]
    frozen = {role: m for role, m in parts.models.items() if role != "policy"}
    tokens = config.batch_size * config.seq_len
    # A frozen model's forward pass is a third of a training step's; rematerialisation repeats the policy's.
    flops = tokens * transformer.flops_per_token(policy.config, config.seq_len)
    repeated = flops / 3 if policy.config.remat == "full" else 0.0
    others = sum(tokens * transformer.flops_per_token(m.config, config.seq_len) / 3 for m in frozen.values())
    bytes_of = {
        "parameters": _bytes(parts.state.params),
        "optimizer": _bytes([parts.state.opt_state, parts.state.ema, parts.state.carry]),
        "frozen": _bytes(parts.frozen),
        "batch": _bytes(parts.batch),
    }
    used, collectives = 0, ()
    if compiled is not None:
        memory = compiled.memory_analysis()
        bytes_of["temporary"] = memory.temp_size_in_bytes
        bytes_of["code"] = memory.generated_code_size_in_bytes
        used = 2 * (bytes_of["parameters"] + bytes_of["optimizer"] + bytes_of["temporary"]) + bytes_of["frozen"]
        collectives = tuple(find_collectives(compiled.as_text()))
    return Plan(
        mesh=dict(mesh.shape),
        parameters=params.count(policy.specs),
        frozen_parameters=sum(params.count(m.specs) for m in frozen.values()),
        bytes_of=bytes_of,
        memory=topology.chip.memory,
        compiler=compiler,
        tokens=tokens,
        model_flops=flops + others,
        collectives=collectives,
        seconds={
            "compute": (flops + repeated + others) / (topology.chips * topology.chip.flops),
            "memory": used / topology.chip.memory_bandwidth,
            "network": sum(c.bytes for c in collectives) / topology.chip.link_bandwidth,
        },
        compile_seconds=seconds,
    )


def _for(config: Any, topology: Topology) -> Any:
    """The config with the compute dtype that "auto" means there; this process's platform is another."""
    dtype = "float32" if topology.kind == "cpu" else "bfloat16"

    def told(section: Mapping[str, Any]) -> dict[str, Any]:
        given = section.get("dtype", "auto")
        return {**section, "dtype": dtype if given == "auto" else given}

    roles = {role: told(section) for role, section in config.roles.items()}
    return dataclasses.replace(config, model=told(config.model), roles=roles)


def find_vocab_size(config: Any, base: Any) -> int:
    """The model's, or else the tokenizer's, which nothing is read for; `base`: what model.init_from found, or None."""
    from research.run import run
    from research.sources import tokenizers

    if config.model["vocab_size"]:
        return config.model["vocab_size"]
    if config.tokenizer.kind == "bpe":
        return config.tokenizer.vocab_size
    made = run.given_tokenizer(config, base) or tokenizers.make_tokenizer(config.tokenizer, lambda: iter(()))
    return made.size


def batch_spec(config: Any) -> dict[str, Any]:
    """The fields of a global batch, without the data: those of any text, and what the objective's terms read.

    Raises:
      InputError: it depends on the data, which isn't read: of labels, how many classes there are.
    """
    from research import objectives
    from research.sources import fields

    read = {name for term, _ in objectives.load(config.objective).values() for name in term.fields}
    names = fields.read_with(read)
    classes = config.data["num_classes"] or config.model["num_labels"] or len(config.data["labels"])
    if "label_probs" in names and not classes:
        raise InputError("data.num_classes = 0: must be told, as the data isn't read.")
    sizes = {"time": config.seq_len, "labels": classes, "candidates": fields.CANDIDATES}
    return fields.spec(names, config.batch_size, sizes)


def _bytes(tree: Any) -> int:
    """Of abstract arrays on one chip."""
    import jax

    leaves = jax.tree.leaves(tree)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


def _out_of_memory(text: str) -> str:
    """What the compiler says of a program that needs too much memory; "" if that isn't it."""
    if said := re.search(r"Used ([\d.]+\w) of ([\d.]+\w) hbm.*?Exceeded hbm capacity by ([\d.]+\w)", text, re.S):
        return f"needs {said[1]} of {said[2]}: {said[3]} too much"
    if said := re.search(r"HLO temporaries \(([\d.]+)G\) exceeds available HBM \(([\d.]+)G\)", text):
        over = float(said[1]) - float(said[2])
        return f"needs {said[1]}G of {said[2]}G for temporaries alone: {over:.2f}G too much"
    return text.splitlines()[0][:200] if "RESOURCE_EXHAUSTED" in text or "Ran out of memory" in text else ""


_KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute|collective-broadcast|ragged-all-to-all"
_ITEM = {"pred": 1, "s4": 1, "u4": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4}
_ITEM |= {"u32": 4, "f64": 8, "s64": 8, "u64": 8}


def find_collectives(hlo: str) -> Iterator[Collective]:
    """The collectives of a compiled program's text, those in loops as often as these run.

    The bytes of one are those of its result on a chip; where it scatters, those of its operand. The TPU compiler writes
    an asynchronous one into several computations, which share its channel, and tells an all-reduce that scatters by the
    name of its computation alone.
    """
    bodies = _computations(hlo)
    found: dict[str, tuple[str, int, int]] = {}  # channel -> kind, calls, bytes

    def walk(name: str, times: int) -> None:
        for line in bodies.get(name, ()):
            made = re.match(rf"\s*(?:ROOT )?%?([\w.-]+) = (.*?) ({_KINDS})(-start)?\(", line)
            if made:
                kind, size = made[3], _size(made[2])
                if made[4] and kind in ("all-gather", "collective-permute"):  # (operand, result, ...)
                    size = max(_sizes(made[2]), default=0)
                elif kind == "reduce-scatter":
                    size *= _group(line)
                elif name.startswith("all-reduce-scatter"):
                    kind = "reduce-scatter"
                channel = re.search(r"channel_id=(\d+)", line)
                key = channel[1] if channel else f"{name}/{made[1]}"
                calls = max(times, found.get(key, ("", 0, 0))[1])
                found[key] = kind, calls, size
                continue  # what it applies is arithmetic
            trips = 1
            if loop := re.search(r" while\(.*condition=%?([\w.-]+)", line):
                known = re.search(r'known_trip_count\D*?"n"\D*?(\d+)', line)
                limits = re.findall(r"s32\[\]\S* constant\((\d+)\)", "\n".join(bodies.get(loop[1], ())))
                trips = int(known[1]) if known else max((int(n) for n in limits), default=1)
            for callee in re.findall(r"(?:body|to_apply|calls|\w+_computations)=\{?%?([\w.-]+)", line):
                walk(callee, times * trips)

    entry = next((name for name in bodies if name.startswith("ENTRY ")), None)
    if entry:
        walk(entry, 1)
    kinds: dict[str, Collective] = {}
    for kind, calls, size in found.values():
        before = kinds.get(kind, Collective(kind, 0, 0))
        kinds[kind] = Collective(kind, before.calls + calls, before.bytes + calls * size)
    return iter(sorted(kinds.values(), key=lambda c: -c.bytes))


def _computations(hlo: str) -> dict[str, list[str]]:
    """Name -> lines; the entry's name begins with "ENTRY "."""
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in hlo.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.-]+) .*\{$", line) if not line.startswith(" ") else None
        if head:
            lines = found.setdefault((head[1] or "") + head[2], [])
        elif line.startswith(" "):
            lines.append(line)
    return found


def _sizes(shapes: str) -> list[int]:
    """Bytes of each array in a type such as (bf16[8,128]{1,0:T(8,128)}, f32[])."""
    return [
        _ITEM.get(dtype, 4) * math.prod(int(n) for n in dims.split(",") if n)
        for dtype, dims in re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", shapes)
    ]


def _size(shapes: str) -> int:
    return sum(_sizes(shapes))


def _group(line: str) -> int:
    """Members of a collective's group: {{0,1},{2,3}}, [2,2]<=[4] or mesh['x'=2,'y'=2] {'y'}."""
    named = re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", line)
    if named:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", named[2]))
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]", line)
    if iota:
        return int(iota[2])
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", line)
    return len(listed[1].split(",")) if listed else 1


def describe(config: Any, topology: Topology, plan: Plan) -> str:
    """The figures, for people."""
    estimate = "" if topology.kind.startswith("v") else " (an estimate: compiled for simulated CPU devices)"
    shape = ", ".join(f"{axis} {n}" for axis, n in plan.mesh.items() if n > 1) or "one chip"
    lines = [
        f"topology    {topology.name}: {topology.chips} devices, mesh {shape}{estimate}",
        f"model       {plan.parameters / 1e9:.2f} B parameters"
        + (f", frozen {plan.frozen_parameters / 1e9:.2f} B" if plan.frozen_parameters else "")
        + f"; remat {config.model['remat']}, {config.microbatches} microbatches",
        f"step        {plan.tokens:,} tokens, {plan.model_flops:.3g} model FLOPs",
    ]
    kinds = ", ".join(f"{kind} {size / GIB:.2f}" for kind, size in plan.bytes_of.items() if size >= 0.005 * GIB)
    memory = plan.memory / GIB
    if plan.compiler:
        lines.append(f"memory      DOESN'T FIT: the compiler {plan.compiler}. GiB a chip before temporaries: {kinds}")
    else:
        verdict = "fits" if plan.fits else f"DOESN'T FIT, by {plan.used / GIB - memory:.2f} GiB"
        lines.append(f"memory      {plan.used / GIB:.2f} of {memory:.1f} GiB a chip: {verdict}. {kinds}")
    if not plan.fits:
        lines.append(f"            {_advice(config, topology, plan)}")
    if plan.collectives:
        lines += [
            f"network     {c.kind}: {c.calls:,} calls, {c.bytes / GIB:.2f} GiB a chip"
            for c in plan.collectives
            if c.bytes
        ]
    if not plan.compiler:
        parts = ", ".join(f"{kind} {seconds:.3g} s" for kind, seconds in plan.seconds.items())
        mfu = [
            plan.model_flops / (seconds * topology.chips * topology.chip.flops) for seconds in (plan.most, plan.least)
        ]
        day = [86400 * plan.tokens / seconds / 1e9 for seconds in (plan.most, plan.least)]
        lines += [
            f"roofline    {parts}",
            f"estimate    {plan.least:.3g} s a step where all overlaps, {plan.most:.3g} s where nothing does: "
            f"MFU {mfu[1]:.0%} to {mfu[0]:.0%}, {day[1]:.2f} to {day[0]:.2f} B tokens a day",
        ]
        price = config.plan.prices.get(topology.kind, 0.0)
        if price:
            hours = [config.steps * seconds / 3600 for seconds in (plan.least, plan.most)]
            cost = [h * topology.chips * price for h in hours]
            lines.append(
                f"cost        {config.steps:,} steps: {hours[0]:.2f} to {hours[1]:.2f} h, {cost[0]:,.2f} to "
                f"{cost[1]:,.2f} (plan.prices.{topology.kind} = {price} a chip and hour)"
            )
    lines.append(f"compiled    in {plan.compile_seconds:.0f} s")
    return "\n".join(lines)


def _advice(config: Any, topology: Topology, plan: Plan) -> str:
    """What would make it fit."""
    state = sum(plan.bytes_of.get(kind, 0) for kind in ("parameters", "optimizer", "frozen"))
    unsharded = plan.mesh["data"] * plan.mesh["sequence"] * plan.mesh["expert"]
    if state > plan.memory * 0.9:
        if unsharded > 1:
            return f"Parameters and optimizer alone are too much: give mesh.fsdp the {unsharded} of the other axes."
        need = math.ceil(topology.chips * state / (plan.memory * 0.8))
        return f"Parameters and optimizer alone are too much: take {need} chips or more."
    if config.model["remat"] != "full":
        return "Set model.remat='full', or raise microbatches; --search tries them."
    rows = config.batch_size // (config.microbatches * plan.mesh["data"] * plan.mesh["fsdp"] * plan.mesh["expert"])
    if rows > 1:
        return f"Raise microbatches: each chip takes {rows} rows at a time; --search tries."
    return "One row a chip is too much: raise mesh.sequence or mesh.tensor; --search tries."


def search(config: Any, topology: Topology, max_compiles: int) -> list[tuple[Any, Plan]]:
    """Compiles the most promising settings, best guess first; the last of the list is the fastest that fits.

    Tried are powers of two for fsdp, tensor and, for long rows, sequence (and expert as it is), every remat policy, and
    microbatches that leave each device whole rows.
    """
    from research import config as config_lib

    guesses = []
    for candidate in _candidates(config, topology):
        try:
            config_lib.check(candidate, num_devices=len(topology.devices))
            guesses.append((_guess(candidate, topology), candidate))
        except InputError:
            continue
    guesses.sort(key=lambda guess: guess[0])
    found: list[tuple[Any, Plan]] = []
    for guess, candidate in guesses:
        if len(found) >= max_compiles:
            break
        best = min((plan.most for _, plan in found if plan.fits), default=math.inf)
        if guess[0] or guess[1] > best:  # it won't fit, or can't be faster
            continue
        try:
            plan = make(candidate, topology)
        except InputError:
            continue
        found.append((candidate, plan))
        shape = ", ".join(f"{axis} {n}" for axis, n in plan.mesh.items() if n > 1)
        verdict = (
            f"{plan.least:.3g} to {plan.most:.3g} s" if plan.fits else f"doesn't fit ({plan.compiler or 'memory'})"
        )
        print(
            f"tried       {shape}; remat {candidate.model['remat']}, {candidate.microbatches} microbatches: {verdict}",
            flush=True,
        )
    if not found:
        raise InputError(
            f"--topology={topology.name}: the state alone doesn't fit. Take more chips, or a smaller model."
        )
    fitting = [each for each in found if each[1].fits]
    best = min(fitting, key=lambda each: each[1].most) if fitting else found[-1]
    return [each for each in found if each is not best] + [best]


def _candidates(config: Any, topology: Topology) -> Iterator[Any]:
    n = len(topology.devices)
    powers = [2**i for i in range(n.bit_length()) if n % 2**i == 0]
    sequences = [s for s in powers if s <= 8 and config.seq_len // s >= 2048] or [1]
    for tensor in (t for t in powers if t <= 16):
        for sequence in sequences:
            rest = n // (tensor * sequence * config.mesh.expert)
            for fsdp in {rest, rest // topology.slices} - {0}:
                sizes = {"data": -1, "fsdp": fsdp, "expert": config.mesh.expert, "sequence": sequence, "tensor": tensor}
                mesh = dataclasses.replace(config.mesh, **sizes)
                for remat in ("none", "attention", "dots", "full"):
                    for microbatches in (1, 2, 4, 8, 16, 32):
                        model = {**config.model, "remat": remat}
                        yield dataclasses.replace(config, mesh=mesh, model=model, microbatches=microbatches)


def _guess(config: Any, topology: Topology) -> tuple[bool, float]:
    """(whether it can't fit, seconds of a step), by hand; only the order matters.

    Activations kept of a layer and token, in units of d_model: 1 of its input with remat "full", 2 with "attention",
    roughly 5 + 2 d_ff / d_model with "dots", 2.5 times that with "none". Each microbatch gathers all parameters of its
    tensor shard, in the forward and the backward pass, and scatters the gradients; tensor parallelism reduces two
    activations a layer, in either pass.
    """
    from research import config as config_lib
    from research import params
    from research.models import transformer
    from research.models.specs import make_specs

    model = config_lib.model_config(config, config.model["vocab_size"] or 32_000, "tpu")
    size, chip, n = params.count(make_specs(model)), topology.chip, topology.chips
    tensor, sequence = config.mesh.tensor, config.mesh.sequence
    tokens = config.batch_size * config.seq_len
    local = tokens / (n / tensor) / config.microbatches  # of a device, at once; time is cut like the batch
    dense = 5 + 2 * model.d_ff * max(1, model.experts_per_token * bool(model.num_experts)) / model.d_model
    kept = {"full": 1, "attention": 2, "dots": dense / tensor, "none": 2.5 * dense / tensor}[model.remat]
    activations = local * model.d_model * 2 * model.num_layers * kept
    state = 16 * size / n  # parameters, two moments and gradients, float32
    repeated = {"full": 1 / 3, "attention": 0.3, "dots": 0.05, "none": 0.0}[model.remat]
    flops = tokens * transformer.flops_per_token(model, config.seq_len) * (1 + repeated)
    gathered = config.microbatches * 2 * 2 * size / tensor + 4 * size / tensor
    reduced = 8 * (tokens / (n / tensor)) * model.d_model * 2 * model.num_layers * (tensor > 1)
    around = 4 * local * config.microbatches * sequence * 2 * model.num_kv_heads * model.dim_per_head * model.num_layers
    network = (gathered + reduced + around * (sequence > 1)) / chip.link_bandwidth
    seconds = flops / (n * chip.flops) + network
    return state + activations > 1.1 * chip.memory, seconds


def _record(config: Any, topology: Topology, plan: Plan) -> dict[str, Any]:
    return {
        "topology": topology.name,
        "remat": config.model["remat"],
        "microbatches": config.microbatches,
        "fits": plan.fits,
        "used": plan.used,
        **dataclasses.asdict(plan),
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
