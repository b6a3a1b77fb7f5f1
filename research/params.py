"""Parameters as data: a ParamSpec per array, from which come its initial value, abstract shape and sharding; and which
of them are trained."""

import dataclasses
import hashlib
import itertools
import math
import re
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

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
      density: parameters of the model that each number stands for, where kernels are quantised (ops/quantized.py).
      decays: whether weight decay applies to one that contracts.
      padding: of a stack of layers, how many numbers of each are 0 and stay so; () for none.
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    init: Initializer
    contracts: tuple[str, ...] = ()
    dtype: Any = jnp.float32
    density: float = 1.0
    decays: bool = True
    padding: tuple[int, ...] = ()

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


def named_leaves(tree: Tree) -> list[tuple[str, Any]]:
    """(path_name, leaf) of all leaves of nested dicts: arrays or ParamSpecs."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_spec)
    return [(path_name(path), leaf) for path, leaf in leaves]


def init(specs: Tree, key: jax.Array) -> Tree:
    """Initial values, drawn in float32. Each parameter's key depends on its path alone, so that adding one changes no
    other."""
    leaves, structure = jax.tree.flatten(specs, is_leaf=is_spec)
    keys = keys_by_name(key, specs)
    drawn = (spec.init(keys[i], spec.shape, jnp.float32) for i, spec in enumerate(leaves))
    return structure.unflatten([x.astype(spec.dtype) for x, spec in zip(drawn, leaves, strict=True)])


def keys_by_name(key: jax.Array, tree: Tree) -> jax.Array:
    """A key for each leaf of nested dicts, raw as `key` is: [leaves, 2]. Each depends on its leaf's path alone."""
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_spec)]
    numbers = jnp.asarray([zlib.crc32(path_name(path).encode()) for path in paths], jnp.uint32)
    return jax.vmap(jax.random.fold_in, (None, 0))(key, numbers)  # at once: for CPUs each would be a loop to compile


def held_in(specs: Tree, dtype: Any) -> Tree:
    """Specs of parameters of which kernels are held in `dtype`, all others as they are."""
    return tree_map(lambda s: dataclasses.replace(s, dtype=jnp.dtype(dtype)) if s.contracts else s, specs)


def widened(x: jax.Array) -> jax.Array:
    """A floating array in float32, or in its own dtype where that is wider."""
    return x if jnp.dtype(x.dtype).itemsize >= 4 else x.astype(jnp.float32)


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
    """True where weight decay applies: what contracts, hence not norms and biases, but for what is spared."""
    return tree_map(lambda s: bool(s.contracts) and s.decays, specs)


def matching(specs: Tree, pattern: str, field: str = "trainable", prefix: str = "", *, as_written: bool = True) -> Tree:
    """True for the parameters whose whole name matches a regular expression; "" matches all.

    A parameter that is stacked over layers goes by several names: "layers/attention/q/kernel" means all layers, and
    "layers/3/attention/q/kernel" layer 3, counted from 0. Where a pattern tells layers apart, `cut` the specs by it
    first.

    Args:
      specs: nested dicts of ParamSpec.
      pattern: the expression.
      field: of the config, for errors.
      prefix: what all names begin with.
      as_written: whether the expression is the user's own; not that which an option stands for, of which some
        alternatives may match nothing.

    Raises:
      InputError: no name matches the expression, or one of its `alternatives`; or it is faulty.
    """
    masks = _masks(specs, pattern, field, prefix)
    if not any(any(mask) for mask in masks.values()):
        raise _matches_none(specs, f"{field} = {pattern!r}:", pattern, prefix)
    for part, narrowed in alternatives(pattern) if as_written else ():
        if not any(any(mask) for mask in _masks(specs, narrowed, field, prefix).values()):
            raise _matches_none(specs, f"{field} = {pattern!r}: {part!r}", part, prefix)
    assert all(any(mask) == all(mask) for mask in masks.values()), f"{pattern!r} matches a part of a stack of layers"
    return jax.tree_util.tree_map_with_path(lambda path, _: any(masks[path]), specs, is_leaf=is_spec)


def alternatives(pattern: str) -> list[tuple[str, str]]:
    """The alternatives of an expression and of its groups, each with the expression that has it alone in its place.

    Those of groups that are repeated, or that are more than a group, such as (?!...), stay together. So does all of an
    expression that refers to its groups by number.
    """
    if re.search(r"\\\d", pattern):
        return []
    parts, groups = _parse(pattern)
    if len(parts) > 1:
        return [(part, part) for part in parts] + [pair for part in parts for pair in alternatives(part)]
    return [
        (part, f"{pattern[:start]}(?:{narrowed}){pattern[stop:]}")
        for start, stop in groups
        for part, narrowed in alternatives(re.sub(r"^\((\?:)?", "", pattern[start : stop - 1]))
    ]


_TOKEN = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|.", re.DOTALL)  # an escape, a class such as [a|b], or a character


def _parse(pattern: str) -> tuple[list[str], list[tuple[int, int]]]:
    """The alternatives of an expression that are in no group, and where its plain groups are: (start, stop)."""
    bars, groups, opened = [], [], []
    for token in _TOKEN.finditer(pattern):
        match token[0]:
            case "(":
                opened.append(token.start())
            case ")" if opened:
                start, stop = opened.pop(), token.end()
                plain = pattern[start : start + 2] != "(?" or pattern.startswith("(?:", start)
                if not opened and plain and pattern[stop : stop + 1] not in ("*", "+", "?", "{"):
                    groups.append((start, stop))
            case "|" if not opened:
                bars.append(token.start())
    edges = [-1, *bars, len(pattern)]
    return [pattern[a + 1 : b] for a, b in itertools.pairwise(edges)], groups


def cut(specs: Tree, pattern: str, field: str = "trainable", prefix: str = "") -> Tree:
    """Specs whose layers lie in pieces, so that a pattern matches all of each parameter or nothing of it.

    A model whose `layers` are in pieces has {"layers": {"0-2": specs, "3": specs, "4-7": specs}} for 8 layers of which
    the fourth is another piece. It stays as it is where the pattern tells no layers apart.

    Args: see `matching`; `specs` are those of one model.

    Raises:
      InputError: the expression is faulty.
    """
    if not specs.get("layers"):
        return specs
    masks = _masks({"layers": specs["layers"]}, pattern, field, prefix)
    pieces = layer_pieces(specs["layers"])
    bounds = {0, pieces[-1].stop, *(piece.first for piece in pieces)}
    for path, mask in masks.items():
        first = _layers_of(path_name(path), len(mask)).start
        bounds |= {first + i for i in range(1, len(mask)) if mask[i] != mask[i - 1]}
    edges = sorted(bounds)
    if len(edges) == 2:
        return specs
    return {**specs, "layers": {_piece_name(a, b): _cut_range(pieces, a, b) for a, b in itertools.pairwise(edges)}}


def split(tree: Tree, trained: Tree) -> tuple[Tree, Tree]:
    """Two trees of nested dicts, each without the leaves of the other: those where `trained` is True, and the rest."""
    if not isinstance(trained, Mapping):
        return (tree, {}) if trained else ({}, tree)
    halves = {name: split(tree[name], trained[name]) for name in trained}
    return tuple({name: half[i] for name, half in halves.items() if not _empty(half[i])} for i in (0, 1))


def join(*trees: Tree) -> Tree:
    """One tree of nested dicts with the leaves of all, none of which two have: undoes `split`."""
    whole: dict[str, Any] = {}
    for tree in trees:
        for name, part in tree.items():
            if name in whole and not (isinstance(part, Mapping) and isinstance(whole[name], Mapping)):
                raise ValueError(f"{name!r} is in two of the trees")
            whole[name] = join(whole[name], part) if name in whole else part
    return whole


def overlay(base: Tree, own: Tree) -> Tree:
    """`base` with the leaves of `own` in the place of those of the same name."""
    if not isinstance(own, Mapping) or not isinstance(base, Mapping):
        return own
    return {**base, **{name: overlay(base[name], part) if name in base else part for name, part in own.items()}}


def like(part: Tree, tree: Tree) -> Tree:
    """True for the leaves of `tree` that `part` has too."""
    if not (isinstance(tree, Mapping) and isinstance(part, Mapping)):
        return True
    return {name: like(part[name], below) if name in part else False for name, below in tree.items()}


class Piece(NamedTuple):
    """Layers `first` to `stop` - 1 of a model, counted from 0, and their parameters, stacked."""

    first: int
    stop: int
    values: Tree


def layer_pieces(layers: Tree) -> list[Piece]:
    """The pieces that layers are held in, in order; a single one where they aren't cut (see `cut`)."""
    if not all(_PIECE.fullmatch(name) for name in layers):
        return [Piece(0, jax.tree.leaves(layers, is_leaf=is_spec)[0].shape[0], layers)]
    ranges = {name: _layers_of(name, 0) for name in layers}
    return sorted((Piece(r.start, r.stop, layers[name]) for name, r in ranges.items()), key=lambda piece: piece.first)


def layer_range(layers: Tree, first: int, stop: int) -> Tree:
    """Layers `first` to `stop` - 1, stacked, which must lie in one piece."""
    piece = _piece_around(layer_pieces(layers), first, stop)
    return jax.tree.map(lambda w: w[first - piece.first : stop - piece.first], piece.values)


def layer(layers: Tree, number: int) -> Tree:
    """The parameters of one layer, counted from 0."""
    return jax.tree.map(lambda w: w[0], layer_range(layers, number, number + 1))


def in_pieces(values: Tree, like: Tree) -> Tree:
    """A model's arrays with their layers cut as those of `like`, which may lack some of the names."""
    if not isinstance(like, Mapping):
        return values
    if "layers" not in like or not all(_PIECE.fullmatch(name) for name in like["layers"]):
        return {name: in_pieces(values[name], part) for name, part in like.items()}
    layers = {
        name: in_pieces(layer_range(values["layers"], r.start, r.stop), part)
        for name, part in like["layers"].items()
        for r in (_layers_of(name, 0),)
    }
    return {**in_pieces(values, {k: v for k, v in like.items() if k != "layers"}), "layers": layers}


def stacked(values: Tree) -> Tree:
    """A model's arrays with the pieces of its layers joined: undoes `in_pieces`. Not for a step, as it copies them."""
    pieces = layer_pieces(values["layers"]) if values.get("layers") else []
    if len(pieces) < 2:
        return values
    layers = jax.tree.map(lambda *w: jnp.concatenate(w), *(piece.values for piece in pieces))
    return {**values, "layers": layers}


def named(specs: Tree, names: Tree) -> Tree:
    """The specs of those parameters that are leaves of `names`, which may have pieces of the layers."""
    if not isinstance(names, Mapping):
        return specs
    names = {name: part for name, part in names.items() if _PIECE.fullmatch(name) or name in specs}
    parts = {name: named(specs[name], part) for name, part in names.items() if name != "layers"}
    if "layers" not in names:
        return parts
    if not all(_PIECE.fullmatch(name) for name in names["layers"]):
        return {**parts, "layers": named(specs["layers"], names["layers"])}
    whole = layer_pieces(specs["layers"])
    ranges = {name: _layers_of(name, 0) for name in names["layers"]}
    pieces = {name: _cut_range(whole, r.start, r.stop) for name, r in ranges.items()}
    return {**parts, "layers": {name: named(pieces[name], part) for name, part in names["layers"].items()}}


def put(values: Tree, own: Tree) -> Tree:
    """A model's arrays with those of `own` in their place; pieces of its layers are written into the stacks."""
    if "layers" not in own or not all(_PIECE.fullmatch(name) for name in own["layers"]):
        return overlay(values, own)
    layers = values["layers"]
    for first, stop, piece in layer_pieces(own["layers"]):
        part, _ = split(layers, like(piece, layers))
        layers = overlay(layers, jax.tree.map(lambda w, p, a=first, b=stop: w.at[a:b].set(p), part, piece))
    return {**overlay(values, {name: part for name, part in own.items() if name != "layers"}), "layers": layers}


def fingerprint(values: Tree) -> dict[str, tuple[float, float]]:
    """Tells whether a model's arrays are those of another time: the sum and the norm of each, by its name.

    They hold up to rounding: of sums, and of kernels that are held in bfloat16 here and in float32 there. A stack of
    layers has those of each layer, so that pieces compare with whole stacks.

    Args:
      values: a model's arrays, or some of them.
    """

    def one(path: tuple, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        if x.dtype == jnp.uint8:  # around 0, so that the sum of many is as exact as their norm
            x = x.astype(jnp.float32) - 127.5
        x = x.astype(jnp.bfloat16).astype(jnp.float32)
        axes = tuple(range("layers" in path_name(path).split("/"), x.ndim))
        return jnp.sum(x, axes), jnp.sqrt(jnp.sum(jnp.square(x), axes))

    def measures(values: Tree) -> Tree:
        return {path_name(path): one(path, x) for path, x in jax.tree_util.tree_leaves_with_path(values)}

    placement = jax.tree.leaves(values)[0].sharding
    if isinstance(placement, jax.sharding.NamedSharding):  # every process gets all of them
        placement = sharding.named(placement.mesh, ())
    marks = {}
    for name, (total, norm) in jax.device_get(jax.jit(measures, out_shardings=placement)(values)).items():
        if total.ndim == 0:
            marks[name] = (float(total), float(norm))
            continue
        for layer, *pair in zip(_layers_of(name, len(total)), total, norm, strict=True):
            marks[_of_layer(_without_piece(name), layer)] = tuple(map(float, pair))
    return marks


def first_difference(
    before: Mapping[str, tuple[float, float]], now: Mapping[str, tuple[float, float]], tolerance: float
) -> str | None:
    """The first parameter of two fingerprints that isn't the same in both; None where all that both have are.

    Args:
      before, now: see `fingerprint`.
      tolerance: the share of a norm by which sums and norms may differ.
    """
    for name in filter(now.__contains__, before):
        total, norm = before[name]
        if max(abs(now[name][0] - total), abs(now[name][1] - norm)) > tolerance * norm + 1e-6:
            return name
    return None


_PIECE = re.compile(r"(\d+)(?:-(\d+))?")


def _piece_name(first: int, stop: int) -> str:
    return f"{first}-{stop - 1}" if stop - first > 1 else f"{first}"


def _layers_of(name: str, whole: int) -> range:
    """The layers that a name speaks of: of "3-5" or "layers/3-5/..." 3 to 5, of "layers/..." all `whole` of them."""
    parts = name.split("/")
    ranges = _PIECE.fullmatch(parts[parts.index("layers") + 1] if "layers" in parts else name)
    if ranges is None:
        return range(whole)
    first, last = ranges.groups()
    return range(int(first), int(last or first) + 1)


def _cut_range(pieces: list[Piece], first: int, stop: int) -> Tree:
    """The specs of layers that lie in one of the pieces."""
    piece = _piece_around(pieces, first, stop)
    at = slice(first - piece.first, stop - piece.first)
    return tree_map(
        lambda spec: dataclasses.replace(spec, shape=(stop - first, *spec.shape[1:]), padding=spec.padding[at]),
        piece.values,
    )


def _piece_around(pieces: list[Piece], first: int, stop: int) -> Piece:
    for piece in pieces:
        if piece.first <= first and stop <= piece.stop:
            return piece
    raise ValueError(f"layers {first} to {stop - 1} don't lie in one piece of {[piece[:2] for piece in pieces]}")


def whole_name(path: tuple) -> str:
    """path_name, without the piece that its layers lie in."""
    return _without_piece(path_name(path))


def _without_piece(name: str) -> str:
    """A name without the piece that its layers lie in."""
    return re.sub(r"(^|/)layers/\d+(-\d+)?/", r"\1layers/", name)


def _of_layer(name: str, layer: int) -> str:
    """The name of a stack of layers -> that of one of them."""
    return re.sub(r"(^|/)layers/", rf"\g<1>layers/{layer}/", name, count=1)


def _masks(specs: Tree, pattern: str, field: str, prefix: str) -> dict[tuple, list[bool]]:
    """For each parameter, by its path, whether `pattern` matches; one answer for each layer of a stack."""
    try:
        names = re.compile(pattern or ".*")
    except re.error as error:
        raise InputError(f"{field} = {pattern!r}: is no regular expression ({error}).") from error

    def mask(path: tuple, spec: ParamSpec) -> list[bool]:
        name = prefix + whole_name(path)
        whole = bool(names.fullmatch(name))
        if spec.axes[:1] != ("layers",) or "layers/" not in name:
            return [whole]
        layers = _layers_of(path_name(path), spec.shape[0])
        return [whole or bool(names.fullmatch(_of_layer(name, i))) for i in layers]

    return {path: mask(path, spec) for path, spec in jax.tree_util.tree_leaves_with_path(specs, is_leaf=is_spec)}


def _matches_none(specs: Tree, subject: str, pattern: str, prefix: str) -> InputError:
    """The error for a pattern, or an alternative of one, without effect. `subject` begins the sentence."""
    tied = "head" in pattern and "embed" in specs and "head" not in specs
    hint = " Where embeddings are tied (model.tie_embeddings), the head is 'embed'." if tied else ""
    return InputError(f"{subject} matches none of the parameters, which are {_listing(specs, prefix)}.{hint}")


def _listing(specs: Tree, prefix: str) -> str:
    """The names of all parameters, and how to name those of one layer."""
    leaves = jax.tree_util.tree_leaves_with_path(specs, is_leaf=is_spec)
    names = ", ".join(dict.fromkeys(prefix + whole_name(path) for path, _ in leaves))
    layers: dict[str, set[int]] = {}  # what a layer's name begins with -> the layers
    for path, spec in leaves:
        before, stack, _ = f"/{prefix}{whole_name(path)}".rpartition("/layers/")
        if stack and spec.axes[:1] == ("layers",):
            layers.setdefault(f"{before}{stack}"[1:], set()).update(_layers_of(path_name(path), spec.shape[0]))
    ranges = [f"{name}{min(numbers)}/... to {name}{max(numbers)}/..." for name, numbers in layers.items()]
    return names + (f" (of one layer alone: {', '.join(ranges)})" if ranges else "")


def _empty(tree: Any) -> bool:
    return isinstance(tree, Mapping) and not tree


_TABLES = {"vocab", "added_tokens", "virtual_tokens", "labels", "positions", "token_types"}  # axes of embeddings, heads


def muon_dimensions(specs: Tree) -> Tree:
    """For Muon: optax's MuonDimensionNumbers (what is contracted, what comes out) of matrices; None for what takes
    AdamW's update instead: scales, biases, embeddings (of virtual tokens and prefixes too) and heads."""

    def one(spec: ParamSpec) -> Any:
        if not spec.contracts or _TABLES & set(spec.axes):
            return None
        inputs = tuple(i for i, axis in enumerate(spec.axes) if axis in spec.contracts)
        stacked = ("layers",) if spec.axes[-1] == "experts" else ("layers", "experts")
        outputs = tuple(i for i, axis in enumerate(spec.axes) if axis not in (*spec.contracts, *stacked))
        return optax.contrib.MuonDimensionNumbers(inputs, outputs)

    return tree_map(one, specs)


def count(specs: Tree) -> int:
    """Number of parameters without padding; of a quantised kernel as many as of the kernel itself."""
    leaves = jax.tree.leaves(specs, is_leaf=is_spec)
    return sum(int(s.density * math.prod(s.shape)) - sum(s.padding) for s in leaves)


def checksum(values: Tree) -> str:
    """Tells parameters apart, however they are sharded: sums of their bits, modulo 2^32, are exact in any order."""

    @jax.jit
    def sums(leaves: list[jax.Array]) -> list[jax.Array]:
        unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}
        bits = [jax.lax.bitcast_convert_type(x, unsigned[x.dtype.itemsize]) for x in leaves]
        return [jnp.sum(x.astype(jnp.uint32), dtype=jnp.uint32) for x in bits]

    totals = jax.device_get(sums(jax.tree.leaves(values)))
    return hashlib.blake2b(str([int(x) for x in totals]).encode(), digest_size=16).hexdigest()
