"""Compiles a run's train step for a topology, and works out what a step needs there and how long it takes."""

import dataclasses
import time
from collections.abc import Mapping
from typing import Any

import jax

from research import config as config_lib
from research import params
from research.config import Config, ModelSection
from research.devices import sharding
from research.devices.memory import bytes_on_a_device
from research.models import transformer
from research.planning import abstract, hlo, servers
from research.planning.abstract import Described
from research.planning.hlo import Collective
from research.planning.servers import ServerMemory
from research.planning.topology import Topology
from research.run import assemble, checks
from research.run.assemble import Parts
from research.run.roles import make_roles


@dataclasses.dataclass(frozen=True)
class Adapted:
    """What a policy of which a part is trained holds, and what it would hold if all of it were. Bytes of one chip.

    Attributes:
      parameters: how many are trained.
      base: what isn't trained.
      trained: an adapter's parameters, or whichever are trained.
      gradients: of these; a part of the temporary bytes.
      optimizer: its state.
      full: kind -> bytes of full fine-tuning in float32: trained, gradients, optimizer.
    """

    parameters: int
    base: int
    trained: int
    gradients: int
    optimizer: int
    full: Mapping[str, int]

    @property
    def used(self) -> int:
        return self.base + self.trained + self.gradients + self.optimizer

    @property
    def saved(self) -> int:
        """Bytes fewer than of full fine-tuning."""
        return sum(self.full.values()) - self.used


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a step needs and takes. Bytes are of one chip.

    Attributes:
      mesh: its axes' sizes.
      parameters: of the roles that are trained, in part or all.
      frozen_parameters: of the others; a role counts what is its own.
      bytes_of: kind -> bytes: parameters, optimizer, frozen, batch, temporary (activations and gradients), code.
      policy: of a policy that isn't trained whole, bytes by kind: see `Adapted`; None of one that is.
      memory: bytes that the chip has.
      compiler: what it says of a program that doesn't fit; "" of one that does.
      tokens: of a step.
      model_flops: of a step, by models.flops.
      collectives: of a step.
      seconds: "compute" (model FLOPs and what rematerialisation repeats, at the peak), "memory" (each chip's state and
        temporary bytes read and written once) and "network" (bytes of collectives over all links): a step takes at
        least the longest, and their sum where nothing overlaps.
      compile_seconds: that the compiler took.
      servers: of a run whose answers servers write, what each of them needs; None of any other.
    """

    mesh: Mapping[str, int]
    parameters: int
    frozen_parameters: int
    bytes_of: Mapping[str, int]
    policy: "Adapted | None"
    memory: float
    compiler: str
    tokens: int
    model_flops: float
    collectives: tuple[Collective, ...]
    seconds: Mapping[str, float]
    compile_seconds: float
    servers: ServerMemory | None = None

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


def make(config: Config, topology: Topology) -> Plan:
    """Compiles a run's train step for a topology.

    Raises:
      InputError: the config can't work there, whatever the memory.
    """
    described = abstract.describe(config, topology.devices)
    described = dataclasses.replace(described, config=with_dtypes(described.config, topology))
    parts, config = described.assemble(), described.config
    compiled, compiler, compile_seconds = _compile(parts, described.mesh)
    tokens = config.batch_size * config.seq_len
    flops = parts.roles.flops(config.seq_len)
    repeated = flops["policy"].forward if parts.models["policy"].config.remat == "full" else 0.0
    in_updates = checks.roles_of_updates(parts.terms, parts.models)
    model_flops = tokens * sum(each.total for role, each in flops.items() if role in in_updates)
    bytes_of = {
        "parameters": bytes_on_a_device(parts.state.params),
        "optimizer": bytes_on_a_device([parts.state.opt_state, parts.state.ema, parts.state.carry, parts.state.synced]),
        "frozen": bytes_on_a_device(parts.frozen),
        "batch": bytes_on_a_device(parts.batch),
    }
    moved, collectives = 0, ()
    if compiled is not None:
        memory = compiled.memory_analysis()
        bytes_of |= {"temporary": memory.temp_size_in_bytes, "code": memory.generated_code_size_in_bytes}
        moved = 2 * (bytes_of["parameters"] + bytes_of["optimizer"] + bytes_of["temporary"]) + bytes_of["frozen"]
        collectives = tuple(hlo.find_collectives(compiled.as_text()))
    counts = {role: params.count(specs) for role, specs in parts.roles.whole.items()}
    trained = sum(count for role, count in counts.items() if role in parts.roles.cut)
    return Plan(
        mesh=dict(described.mesh.shape),
        parameters=trained,
        frozen_parameters=sum(counts.values()) - trained,
        bytes_of=bytes_of,
        policy=adapted(described, parts) if "policy" in parts.roles.divided else None,
        memory=topology.chip.memory,
        compiler=compiler,
        tokens=tokens,
        model_flops=model_flops,
        collectives=collectives,
        seconds={
            "compute": (model_flops + tokens * repeated) / (topology.count * topology.chip.flops),
            "memory": moved / topology.chip.memory_bandwidth,
            "network": sum(each.bytes for each in collectives) / topology.chip.link_bandwidth,
        },
        compile_seconds=compile_seconds,
        servers=servers.make(config, described.vocab_size),
    )


def with_dtypes(config: Config, topology: Topology) -> Config:
    """The config with the compute dtype that "auto" means there; this process's platform is another."""
    auto = "float32" if topology.kind == "cpu" else "bfloat16"
    roles = {role: _with_dtype(section, auto) for role, section in config.roles.items()}
    return dataclasses.replace(config, model=_with_dtype(config.model, auto), roles=roles)


def _with_dtype(section: ModelSection, auto: str) -> ModelSection:
    return dataclasses.replace(section, dtype=auto if section.dtype == "auto" else section.dtype)


def _compile(parts: Any, mesh: jax.sharding.Mesh) -> tuple[Any, str, float]:
    """(the compiled step, or None where it needs too much memory; what the compiler says of that; seconds)."""
    with jax.set_mesh(mesh):
        lowered = parts.step.trace(parts.state, parts.frozen, parts.batch, parts.rates).lower()
        began, compiled, compiler = time.perf_counter(), None, ""
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            compiler = hlo.out_of_memory(str(error))
            if not compiler:
                raise
    return compiled, compiler, time.perf_counter() - began


def adapted(described: Described, parts: Parts) -> Adapted:
    """Bytes of the policy by kind, and of full fine-tuning of the same model with the same optimizer."""
    config, rules = described.config, sharding.make_rules(described.config.rules)
    optimizer = dataclasses.replace(config.optimizer, groups={})  # which may name parameters of an adapter
    full = dataclasses.replace(
        config, adapter={}, trainable="", frozen_dtype="auto", trained_dtype="float32", roles={}, optimizer=optimizer
    )
    model = transformer.make_model(config_lib.model_config(full, described.vocab_size), rules)
    roles = make_roles(full, {"policy"}, {"policy": model}, {})
    trained = params.abstract(roles.trained, params.shardings(roles.trained, described.mesh, rules))
    own = parts.state.params["policy"]
    return Adapted(
        parameters=params.count(parts.roles.trained["policy"]),
        base=bytes_on_a_device(parts.frozen["policy"]),
        trained=bytes_on_a_device(own),
        gradients=bytes_on_a_device(own),
        optimizer=bytes_on_a_device(parts.state.opt_state),
        full={
            "trained": bytes_on_a_device(trained),
            "gradients": bytes_on_a_device(trained),
            "optimizer": bytes_on_a_device(assemble.abstract_moments(full, roles, trained, described.mesh)),
        },
    )
