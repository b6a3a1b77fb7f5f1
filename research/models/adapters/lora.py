"""LoRA (arXiv:2106.09685): beside a frozen kernel W the product of two narrow matrices, x W + scale (x A) B."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research.errors import InputError, did_you_mean
from research.models.adapters import starts
from research.models.adapters import targets as targets_lib
from research.models.adapters.targets import Target
from research.models.adapters.types import Adapter, also_trained
from research.models.specs import Specs
from research.params import Initializer, ParamSpec
from research.ranges import Fraction, Positive, Size

INITS = ("default", "gaussian", *starts.KINDS)
BIASES = ("none", "all", "lora_only")


def make(
    rank: Size = 16,
    alpha: Positive = 32.0,
    dropout: Fraction = 0.0,
    targets: str = targets_lib.ALL,
    exclude: str = "",
    rank_pattern: Mapping[str, Size] = {},
    alpha_pattern: Mapping[str, Positive] = {},
    rslora: bool = False,
    dora: bool = False,
    bias: str = "none",
    init: str = "default",
    decay: bool = False,
    also: str = "",
) -> Adapter:
    """Low-rank maps beside linear maps.

    Args:
      rank: r, the columns of A and rows of B.
      alpha: B and A are scaled by alpha / r.
      dropout: the share of a map's input that its low-rank part doesn't see in training.
      targets: the linear maps that have one: an expression that their names match, or the end of them from a slash on:
        "q|v", "attention/.*", "layers/3/.*"; "embed" is the embedding, "all" every map of the layers but routers.
      exclude: an expression for those of them that have none.
      rank_pattern, alpha_pattern: expression -> rank or alpha of the maps that it matches.
      rslora: the scale is alpha / sqrt(r) (arXiv:2312.03732).
      dora: each column of the sum is scaled to a magnitude that is trained too (arXiv:2402.09353).
      bias: which biases are trained: "none", "all", or "lora_only", those of the targets.
      init: "default": A uniform in +-1 / sqrt(inputs), "gaussian": A normal with a deviation of 1 / r; B is 0. The
        others are starts.KINDS.
      decay: whether weight decay applies to A and B.
      also: an expression on whole names of parameters that are trained besides, such as "head" or ".*norm/.*".

    Raises:
      InputError: a value can't be used.
    """
    for option, value, choices in (("init", init, INITS), ("bias", bias, BIASES)):
        if value not in choices:
            raise InputError(f"{option} = {value!r}: no such choice.{did_you_mean(value, choices)}")
    if init == "orthogonal" and (rank % 2 or rank_pattern):
        raise InputError("init = 'orthogonal': wants one even rank for all maps. Change rank and rank_pattern.")
    lora = Lora(rank, alpha, dropout, targets, exclude, rank_pattern, alpha_pattern, rslora, dora, init, decay, bias)
    trained = {"adapter.targets": LEAVES} | _trained_biases(bias, targets, exclude) | also_trained(also)
    begin = starts.Begin(init, dora) if dora or init in starts.KINDS else None
    changes_base = init in starts.CHANGE_BASE
    return Adapter(lora.specs, trained, begin, changes_base, dropout=dropout)


LEAVES = r"(.*/)?(embed_)?lora/(a|b|magnitude)"  # the names of what is trained
# The names of what no option trains: see `constant`, and VeRA's shared matrices.
CONSTANTS = r"(.*/)?((embed_)?(lora|vera)/(scale|dropout)|vera/[ab])"


def _trained_biases(bias: str, targets: str, exclude: str) -> dict[str, str]:
    """What the option `bias` adds to Adapter.trained."""
    if bias == "none":
        return {}
    maps = r"(attention|mlp)/\w+" if targets == targets_lib.ALL else targets
    but = f"(?!(.*/)?({exclude})/bias)" if exclude else ""
    return {"adapter.bias": ".*bias" if bias == "all" else f"{but}(.*/)?({maps})/bias"}


@dataclasses.dataclass(frozen=True)
class Lora:
    """The options of `make`."""

    rank: int
    alpha: float
    dropout: float
    targets: str
    exclude: str
    rank_pattern: Mapping[str, Any]
    alpha_pattern: Mapping[str, Any]
    rslora: bool
    dora: bool
    init: str
    decay: bool
    bias: str

    def specs(self, specs: Specs) -> Specs:
        """The specs of a model with those of the low-rank maps beside them.

        Raises:
          InputError: an expression matches nothing, or a rank is larger than its kernel.
        """
        if self.bias != "none" and not targets_lib.has_biases(specs):
            raise InputError(
                f"bias = {self.bias!r}: the model has no biases. Leave it out, or use the kind 'bias', which adds them."
            )
        targets = self.found(specs)
        ranks = targets_lib.by_pattern(targets, self.rank_pattern, self.rank, "rank_pattern")
        alphas = targets_lib.by_pattern(targets, self.alpha_pattern, self.alpha, "alpha_pattern")
        for target in targets:
            own = tuple(r if on else 0 for r, on in zip(ranks[target.name], target.chosen, strict=True))
            self._check_rank(target, max(own))
            if self.dropout and "experts" in target.kernel.axes[: target.num_lead]:
                raise InputError(
                    f"dropout = {self.dropout}: isn't there for experts, whose tokens are sorted. Set it to 0, or "
                    f"leave {target.name} out (exclude)."
                )
            low = self._low_rank(target, own, alphas[target.name])
            if target.path == ("embed",):
                specs = {**specs, "embed_lora": low}
            else:
                specs = targets_lib.put(specs, target.path, {"lora": low})
        return specs

    def found(self, specs: Specs) -> list[Target]:
        """The maps that have a low-rank part."""
        targets = targets_lib.find(specs, self.targets, self.exclude, embed=True)
        for target in targets:
            other = target.path == ("embed",) or "experts" in target.kernel.axes[: target.num_lead]
            if self.dora and (other or not all(target.chosen)):
                raise InputError(f"dora = True: isn't there for {target.name}, or for some layers of it. Leave it out.")
            if self.init in starts.KINDS and other:
                raise InputError(f"init = {self.init!r}: isn't there for {target.name}. Leave it out (exclude).")
        if "head" not in specs and any(target.path == ("embed",) for target in targets):
            raise InputError(
                f"targets = {self.targets!r}: the embedding is the head too (model.tie_embeddings), and a low-rank "
                "part would be of the embedding alone. Leave it out, or train both whole: also = 'embed'."
            )
        return targets

    def _check_rank(self, target: Target, rank: int) -> None:
        if rank > min(target.ins, target.outs):
            raise InputError(
                f"rank = {rank}: is more than {target.name} can have, whose kernel is {target.ins} x {target.outs}. "
                "Lower it, or give that map a rank of its own (rank_pattern)."
            )

    def _low_rank(self, target: Target, ranks: tuple[int, ...], alphas: list[float]) -> Specs:
        """The specs of one target. Layers of a lower rank than others have columns and rows that are 0 and stay 0: what
        they would be multiplied by is 0 too, so that they have no gradient."""
        kernel, lead, r = target.kernel, target.num_lead, max(ranks)
        ins = slice(lead, lead + target.num_in)
        outs = slice(ins.stop, None)
        fan_in = int(np.prod(kernel.shape[ins]))
        embed = target.path == ("embed",)
        a = ParamSpec(
            (*kernel.shape[: ins.stop], r),
            (*kernel.axes[: ins.stop], "rank"),
            jax.nn.initializers.zeros if embed else _initial(self.init, ranks, fan_in),
            kernel.contracts,
            decays=self.decay,
            padding=self._padding(target, ranks, target.ins),
        )
        b = ParamSpec(
            (*kernel.shape[:lead], r, *kernel.shape[outs]),
            (*kernel.axes[:lead], "rank", *kernel.axes[outs]),
            jax.nn.initializers.normal(1.0) if embed else jax.nn.initializers.zeros,
            ("rank",),
            decays=self.decay,
            padding=self._padding(target, ranks, target.outs),
        )
        scales = [
            0.0 if r == 0 else alpha / (r**0.5 if self.rslora else r) for r, alpha in zip(ranks, alphas, strict=True)
        ]
        low = {"a": a, "b": b, "scale": constant(target, scales)}
        if self.dora:
            axes = (*range(lead), *range(ins.stop, len(kernel.shape)))
            shape, names = tuple(kernel.shape[i] for i in axes), tuple(kernel.axes[i] for i in axes)
            low["magnitude"] = ParamSpec(shape, names, jax.nn.initializers.ones)
        return low | ({"dropout": constant(target, [self.dropout] * len(ranks))} if self.dropout and not embed else {})

    @staticmethod
    def _padding(target: Target, ranks: tuple[int, ...], size: int) -> tuple[int, ...]:
        experts = int(np.prod(target.kernel.shape[1 : target.num_lead]))
        return tuple((max(ranks) - r) * size * experts for r in ranks) if len(set(ranks)) > 1 else ()


def constant(target: Target, values: list[float]) -> ParamSpec:
    """The spec of a number for each layer, which stays."""
    shape, axes = ((len(values),), ("layers",)) if target.stacked else ((), ())
    array = np.asarray(values, np.float32).reshape(shape)
    return ParamSpec(shape, axes, Fixed(array.tobytes(), shape))


@dataclasses.dataclass(frozen=True)
class Fixed:
    """An initializer that gives the same float32 numbers each time."""

    numbers: bytes
    shape: tuple[int, ...]

    def __call__(self, key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        del key
        return jnp.asarray(np.frombuffer(self.numbers, np.float32).reshape(self.shape), dtype).reshape(shape)


def _initial(kind: str, ranks: tuple[int, ...], fan_in: int) -> Initializer:
    """How A [*lead, *in, r] begins."""
    return Narrow(kind, ranks, fan_in)


@dataclasses.dataclass(frozen=True)
class Narrow:
    """The initial A: columns beyond a layer's rank are 0.

    Attributes:
      kind: see `make`.
      ranks: of each layer.
      fan_in: the number of inputs.
    """

    kind: str
    ranks: tuple[int, ...]
    fan_in: int

    def __call__(self, key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        rank = np.asarray(self.ranks, np.int32).reshape((-1,) + (1,) * (len(shape) - 1))
        if self.kind == "gaussian":
            x = jax.random.normal(key, shape, dtype) / jnp.asarray(np.maximum(rank, 1), dtype)
        else:
            bound = self.fan_in**-0.5
            x = jax.random.uniform(key, shape, dtype, -bound, bound)
        column = np.arange(shape[-1], dtype=np.int32).reshape((1,) * (len(shape) - 1) + (-1,))
        return jnp.where(column < rank, x, jnp.zeros_like(x))
