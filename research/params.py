"""Parameters as data: a ParamSpec per array, from which come its initial value, abstract shape and sharding."""

import dataclasses
import hashlib
import math
import re
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax.contrib

from research.devices import sharding
from research.errors import InputError

Tree = Any  # a pytree
Initializer = Callable[[jax.Array, tuple[int, ...], Any], jax.Array]


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """One array of a model.

    Attributes:
      shape: its dimensions.
      axes: the logical name of each dimension, which sharding.RULES maps to mesh axes; layers are stacked on "layers".
      init: (key, shape, dtype) -> array.
      contracts: the axes that are summed over where the parameter is applied (an embedding table contracts "vocab",
        being applied to one-hot tokens). Empty for scales and biases, which neither decay nor get Muon's update.
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    init: Initializer
    contracts: tuple[str, ...] = ()
    dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        assert len(self.shape) == len(self.axes), f"{self.shape} has other dimensions than {self.axes}"


def is_spec(x: Any) -> bool:
    return isinstance(x, ParamSpec)


def tree_map(f: Callable[[ParamSpec], Any], specs: Tree) -> Tree:
    """Applies `f` to every ParamSpec of a pytree."""
    return jax.tree.map(f, specs, is_leaf=is_spec)


def path_name(path: tuple) -> str:
    """("layers", "attention", "q") keys of a pytree path as "layers/attention/q"."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def init(specs: Tree, key: jax.Array) -> Tree:
    """Initial values. Each parameter's key depends on its path alone, so that adding one changes no other."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(specs, is_leaf=is_spec)
    numbers = jnp.asarray([zlib.crc32(path_name(path).encode()) for path, _ in leaves], jnp.uint32)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, numbers)  # at once: for CPUs each would be a loop to compile
    return structure.unflatten([spec.init(keys[i], spec.shape, spec.dtype) for i, (_, spec) in enumerate(leaves)])


def shardings(specs: Tree, mesh: jax.sharding.Mesh, rules: Mapping[str, Any] = sharding.RULES) -> Tree:
    """A NamedSharding for every parameter.

    Raises:
      InputError: a dimension is not divisible by the mesh axes that it is sharded over.
    """

    def one(path: tuple, spec: ParamSpec) -> jax.sharding.NamedSharding:
        return sharding.named(mesh, spec.axes, rules, shape=spec.shape, name=path_name(path))

    return jax.tree_util.tree_map_with_path(one, specs, is_leaf=is_spec)


def abstract(specs: Tree, placements: Tree) -> Tree:
    """ShapeDtypeStructs with shardings: what a jitted function is traced or a checkpoint restored with."""
    return jax.tree.map(
        lambda spec, s: jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=s),
        specs,
        placements,
        is_leaf=is_spec,
    )


def decay_mask(specs: Tree) -> Tree:
    """True where weight decay applies: everything that contracts, hence not norms and biases."""
    return tree_map(lambda s: bool(s.contracts), specs)


def matching(specs: Tree, pattern: str) -> Tree:
    """True for the parameters whose whole name matches a regular expression; "" matches all.

    Raises:
      InputError: no name matches, or the expression is faulty.
    """
    try:
        names = re.compile(pattern or ".*")
    except re.error as error:
        raise InputError(f"trainable = {pattern!r}: is no regular expression ({error}).") from error
    made = jax.tree_util.tree_map_with_path(lambda p, _: bool(names.fullmatch(path_name(p))), specs, is_leaf=is_spec)
    if not any(jax.tree.leaves(made)):
        every = [path_name(p) for p, _ in jax.tree_util.tree_leaves_with_path(specs, is_leaf=is_spec)]
        raise InputError(f"trainable = {pattern!r}: matches none of the parameters, which are {', '.join(every)}.")
    return made


def muon_dimensions(specs: Tree) -> Tree:
    """For Muon: optax's MuonDimensionNumbers (what is contracted, what comes out) of matrices; None for what takes
    AdamW's update instead: scales, biases, embeddings and heads."""

    def one(spec: ParamSpec) -> Any:
        if not spec.contracts or {"vocab", "labels", "positions", "token_types"} & set(spec.axes):
            return None
        inputs = tuple(i for i, axis in enumerate(spec.axes) if axis in spec.contracts)
        stacked = ("layers",) if spec.axes[-1] == "experts" else ("layers", "experts")
        outputs = tuple(i for i, axis in enumerate(spec.axes) if axis not in (*spec.contracts, *stacked))
        return optax.contrib.MuonDimensionNumbers(inputs, outputs)

    return tree_map(one, specs)


def count(specs: Tree) -> int:
    """Number of parameters."""
    return sum(math.prod(s.shape) for s in jax.tree.leaves(specs, is_leaf=is_spec))


def checksum(values: Tree) -> str:
    """Tells parameters apart, however they are sharded: sums of their bits, modulo 2^32, are exact in any order."""

    @jax.jit
    def sums(leaves: list[jax.Array]) -> list[jax.Array]:
        unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}
        bits = [jax.lax.bitcast_convert_type(x, unsigned[x.dtype.itemsize]) for x in leaves]
        return [jnp.sum(x.astype(jnp.uint32), dtype=jnp.uint32) for x in bits]

    found = jax.device_get(sums(jax.tree.leaves(values)))
    return hashlib.blake2b(str([int(x) for x in found]).encode(), digest_size=16).hexdigest()
