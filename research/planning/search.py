"""Tries meshes, rematerialisation and microbatches, and finds the fastest that fits."""

import dataclasses
import math
from collections.abc import Callable, Iterator

import jax

from research import config as config_lib
from research import params
from research.config import Config
from research.errors import InputError
from research.planning import abstract, estimate
from research.planning.estimate import Plan
from research.planning.topology import Topology
from research.run import checks

Attempt = tuple[Config, Plan]


@dataclasses.dataclass(frozen=True, order=True)
class Guess:
    """What a setting does, worked out by hand; only the order of guesses matters.

    Attributes:
      too_large: it can't fit.
      seconds: of a step.
    """

    too_large: bool
    seconds: float


def search(
    config: Config, topology: Topology, max_compiles: int, show: Callable[[Config, Plan], None] = lambda *_: None
) -> list[Attempt]:
    """Compiles the most promising settings, best guess first; the last of the list is the fastest that fits.

    Tried are powers of two for fsdp, tensor and, for long rows, sequence (and expert as it is), every remat policy, and
    microbatches that leave each device whole rows.

    Args:
      config: of the run.
      topology: where it is to be.
      max_compiles: how many settings to compile.
      show: is called with each setting when it has been compiled.

    Raises:
      InputError: no setting fits.
    """
    guesses, work = [], _Work.of(config, topology)
    for candidate in _candidates(config, topology):
        try:
            config_lib.check(candidate, num_devices=len(topology.devices))
            guesses.append((_guess(candidate, topology, work), candidate))
        except InputError:
            continue
    guesses.sort(key=lambda pair: pair[0])
    attempts: list[Attempt] = []
    for guess, candidate in guesses:
        if len(attempts) >= max_compiles:
            break
        best = min((plan.most for _, plan in attempts if plan.fits), default=math.inf)
        if guess.too_large or guess.seconds > best:
            continue
        try:
            plan = estimate.make(candidate, topology)
        except InputError:
            continue
        attempts.append((candidate, plan))
        show(candidate, plan)
    if not attempts:
        raise InputError(
            f"--topology={topology.name}: the state alone doesn't fit. Take more chips, or a smaller model."
        )
    fitting = [attempt for attempt in attempts if attempt[1].fits]
    best_attempt = min(fitting, key=lambda attempt: attempt[1].most) if fitting else attempts[-1]
    return [attempt for attempt in attempts if attempt is not best_attempt] + [best_attempt]


@dataclasses.dataclass(frozen=True)
class _Work:
    """What every setting of a search has to hold and to compute.

    Attributes:
      trained, frozen: bytes of what is trained, with its gradients and two moments in float32, and of what isn't.
      weights: parameters of the policy.
      forward, total: model FLOPs of a token: of the policy's forward pass, and in all.
    """

    trained: float
    frozen: float
    weights: int
    forward: float
    total: float

    @classmethod
    def of(cls, config: Config, topology: Topology) -> "_Work":
        config = estimate.with_dtypes(dataclasses.replace(config, mesh=config_lib.MeshConfig()), topology)
        parts = abstract.describe(config, topology.devices[:1]).assemble()
        roles, in_updates = parts.roles, checks.roles_of_updates(parts.terms, parts.models)
        flops = roles.flops(config.seq_len)
        held = jax.tree.leaves(roles.frozen, is_leaf=params.is_spec)
        return cls(
            trained=16.0 * params.count(roles.trained),
            frozen=float(sum(math.prod(spec.shape) * jax.numpy.dtype(spec.dtype).itemsize for spec in held)),
            weights=params.count(roles.models["policy"].specs),
            forward=flops["policy"].forward,
            total=sum(each.total for role, each in flops.items() if role in in_updates),
        )


def _candidates(config: Config, topology: Topology) -> Iterator[Config]:
    for mesh in _meshes(config, topology):
        for remat in ("none", "attention", "dots", "full"):
            for microbatches in (1, 2, 4, 8, 16, 32):
                model = dataclasses.replace(config.model, remat=remat)
                yield dataclasses.replace(config, mesh=mesh, model=model, microbatches=microbatches)


def _meshes(config: Config, topology: Topology) -> Iterator[config_lib.MeshConfig]:
    n = len(topology.devices)
    powers = [2**i for i in range(n.bit_length()) if n % 2**i == 0]
    sequences = [s for s in powers if s <= 8 and config.seq_len // s >= 2048] or [1]
    for tensor in (t for t in powers if t <= 16):
        for sequence in sequences:
            rest = n // (tensor * sequence * config.mesh.expert)
            for fsdp in {rest, rest // topology.slices} - {0}:
                yield dataclasses.replace(config.mesh, data=-1, fsdp=fsdp, sequence=sequence, tensor=tensor)


def _guess(config: Config, topology: Topology, work: _Work) -> Guess:
    """Works a setting out by hand.

    Activations kept of a layer and token, in units of d_model: 1 of its input with remat "full", 2 with "attention",
    roughly 5 + 2 d_ff / d_model with "dots", 2.5 times that with "none". Each microbatch gathers all parameters of its
    tensor shard, in the forward and the backward pass, and scatters the gradients; tensor parallelism reduces two
    activations a layer, in either pass.
    """
    model = config_lib.model_config(config, config.model.vocab_size or 32_000, "tpu")
    size, chip, n = work.weights, topology.chip, topology.count
    tensor, sequence = config.mesh.tensor, config.mesh.sequence
    tokens = config.batch_size * config.seq_len
    local = tokens / (n / tensor) / config.microbatches  # of a device, at once; time is cut like the batch
    dense = 5 + 2 * model.d_ff * max(1, model.experts_per_token * bool(model.num_experts)) / model.d_model
    kept = {"full": 1, "attention": 2, "dots": dense / tensor, "none": 2.5 * dense / tensor}[model.remat]
    activations = local * model.d_model * 2 * model.num_layers * kept
    state = (work.trained + work.frozen) / n
    repeated = {"full": 1.0, "attention": 0.9, "dots": 0.15, "none": 0.0}[model.remat]  # of the policy's forward pass
    flops = tokens * (work.total + work.forward * repeated)
    gathered = config.microbatches * 2 * 2 * size / tensor + 4 * size / tensor
    reduced = 8 * (tokens / (n / tensor)) * model.d_model * 2 * model.num_layers * (tensor > 1)
    around = 4 * local * config.microbatches * sequence * 2 * model.num_kv_heads * model.dim_per_head * model.num_layers
    network = (gathered + reduced + around * (sequence > 1)) / chip.link_bandwidth
    return Guess(state + activations > 1.1 * chip.memory, flops / (n * chip.flops) + network)
