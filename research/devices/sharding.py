"""The mesh, and the rules that lay arrays out on it: each logical axis of an array is cut along some of its axes.

An experiment may override some of RULES. So what lays out an array is handed the rules, and never reads RULES itself.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from research.errors import InputError, did_you_mean

# The outermost first: what talks least and may be furthest apart. Slices of a multi-slice TPU are cut along "data".
AXES = ("data", "fsdp", "expert", "sequence", "tensor")

Axes = str | tuple[str, ...] | None


class Rules(Mapping[str, Axes]):
    """Logical axis -> mesh axis, several or None (replicated).

    Hashable, so that it may be a static part of a pytree.
    """

    def __init__(self, table: Mapping[str, Any]):
        # JSON has lists for tuples.
        self._table = {name: tuple(axes) if isinstance(axes, list) else axes for name, axes in table.items()}

    def __getitem__(self, name: str) -> Axes:
        return self._table[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._table)

    def __len__(self) -> int:
        return len(self._table)

    def __hash__(self) -> int:
        return hash(frozenset(self._table.items()))

    def __repr__(self) -> str:
        return f"Rules({self._table})"


RULES = Rules(
    {
        "batch": ("data", "fsdp", "expert"),
        "time": "sequence",
        "embed": "fsdp",
        "vocab": "tensor",
        "added_tokens": None,
        "heads": "tensor",
        "kv_heads": "tensor",
        "mlp": "tensor",
        "layers": None,
        "embed_replicated": None,
        "head_dim": None,
        "positions": None,
        "token_types": None,
        "experts": "expert",
        "labels": None,
        "block": None,
        "rank": None,
        "virtual_tokens": None,
    }
)


def make_rules(overrides: Mapping[str, Any]) -> Rules:
    """RULES, but for what a config's `rules` say."""
    return Rules({**RULES, **overrides})


def mesh_shape(sizes: Mapping[str, int], num_devices: int) -> tuple[int, ...]:
    """Sizes of AXES, with the one -1 (at most) filled in so that their product is `num_devices`.

    Raises:
      InputError: unknown axis, two -1, or a product that isn't the number of devices.
    """
    for axis in sizes:
        if axis not in AXES:
            raise InputError(f"mesh.{axis}: no such mesh axis.{did_you_mean(axis, AXES)}")
    shape = [int(sizes.get(axis, 1)) for axis in AXES]
    shown = ", ".join(f"{a}={n}" for a, n in zip(AXES, shape, strict=True))
    if shape.count(-1) > 1 or any(n < 1 and n != -1 for n in shape):
        raise InputError(f"mesh: {shown}: sizes are positive, with at most one -1 (the devices that are left).")
    if -1 in shape:
        rest = math.prod(n for n in shape if n != -1)
        if num_devices % rest:
            raise InputError(f"mesh: {shown}: {num_devices} devices can't be divided by {rest}. Change mesh.*.")
        shape[shape.index(-1)] = num_devices // rest
    if math.prod(shape) != num_devices:
        raise InputError(
            f"mesh: {shown} asks for {math.prod(shape)} devices, and there are {num_devices}. "
            "Set one axis to -1 to take what is there."
        )
    return tuple(shape)


def make_mesh(sizes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of all devices (or those given) with axes AXES.

    Where the devices are of several slices (TPU slices that are joined by a data-centre network), the data axis goes
    over the slices first, so that all other axes lie within one.

    Raises:
      InputError: see `mesh_shape`; or mesh.data isn't a multiple of the number of slices.
    """
    devices = jax.devices() if devices is None else devices
    shape, types = mesh_shape(sizes, len(devices)), (AxisType.Auto,) * len(AXES)
    slices = len({getattr(device, "slice_index", None) for device in devices})
    if devices[0].platform != "tpu":
        return jax.make_mesh(shape, AXES, axis_types=types, devices=devices)
    if slices == 1:  # an axis may be a part of one of the torus's, such as 8 of 4x4x4
        laid_out = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        return Mesh(laid_out, AXES, axis_types=types)
    if shape[0] % slices:
        raise InputError(
            f"mesh.data = {shape[0]}: the devices are in {slices} slices, which the data axis goes over. Make it a "
            f"multiple of {slices}."
        )
    within, across = (shape[0] // slices, *shape[1:]), (slices, *(1,) * (len(AXES) - 1))
    laid_out = mesh_utils.create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=True)
    return Mesh(laid_out, AXES, axis_types=types)


def make_abstract_mesh(sizes: Mapping[str, int], num_devices: int) -> AbstractMesh:
    """The same without devices, for tracing."""
    return AbstractMesh(mesh_shape(sizes, num_devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def partition(axes: Sequence[str | None], rules: Mapping[str, Any]) -> PartitionSpec:
    """Logical axes -> PartitionSpec. An axis missing from `rules` is a KeyError: a typo in a model.

    An axis "a+b" is cut by what cuts a and b.

    Raises:
      InputError: rules cut two axes of the array by the same mesh axis.
    """
    cut: dict[str, str] = {}  # mesh axis -> the logical axis that it cuts
    for axis in (name for joined in filter(None, axes) for name in joined.split("+")):
        for over in mesh_axes(rules[axis]):
            if over in cut:
                raise InputError(
                    f"rules.{axis} = {rules[axis]!r}: an array has the axes {', '.join(filter(None, axes))}, and "
                    f"{cut[over]!r} is cut by mesh.{over} already (rules.{cut[over]} = {rules[cut[over]]!r}). Cut one "
                    "of them by another mesh axis, or by None."
                )
            cut[over] = axis
    return PartitionSpec(*(_cut_by(axis, rules) for axis in axes))


def _cut_by(axis: str | None, rules: Mapping[str, Any]) -> Axes:
    if axis is None or "+" not in axis:
        return None if axis is None else rules[axis]
    return tuple(over for name in axis.split("+") for over in mesh_axes(rules[name])) or None


def named(
    mesh: Mesh | AbstractMesh,
    axes: Sequence[str | None],
    rules: Mapping[str, Any] = RULES,
    *,
    shape: Sequence[int] = (),
    name: str = "array",
) -> NamedSharding:
    """A NamedSharding from logical axes; with `shape`, divisibility is checked (InputError names the array)."""
    spec = partition(axes, rules)
    for size, axis, over in zip(shape, axes, spec, strict=False):
        parts = num_parts(over, mesh)
        if size % parts:
            over = mesh_axes(over)
            raise InputError(
                f"{name}: its axis {axis!r} has size {size}, which mesh {'x'.join(over)} = {parts} doesn't divide. "
                f"Choose a mesh.{over[-1]} that divides it, or change the size."
            )
    return NamedSharding(mesh, spec)


def fitted(where: NamedSharding, shape: Sequence[int]) -> NamedSharding:
    """The same cut of an array of other sizes: axes that it divides evenly are cut, the others whole."""
    spec = (*where.spec, *(None,) * (len(shape) - len(where.spec)))
    cut = (over if size % num_parts(over, where.mesh) == 0 else None for size, over in zip(shape, spec, strict=True))
    return NamedSharding(where.mesh, PartitionSpec(*cut))


def local_rows(mesh: Mesh, batch_size: int, rules: Mapping[str, Any]) -> list[int]:
    """The rows of a global batch that devices of this process hold, in order."""
    rows = range(batch_size)
    held = NamedSharding(mesh, partition(("batch",), rules)).addressable_devices_indices_map((batch_size,))
    return sorted({row for (index,) in held.values() for row in rows[index]})


def constrain(x: jax.Array, axes: Sequence[str | None], rules: Mapping[str, Any]) -> jax.Array:
    """Pins an activation's layout to the mesh in context (jax.set_mesh); without a mesh, does nothing."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition(axes, rules))


def replicate(x: jax.Array) -> jax.Array:
    """Pins an array to be whole on each device of the mesh in context."""
    return constrain(x, (None,) * x.ndim, {})


def axis_parts(axis: str, rules: Mapping[str, Any] | None) -> int:
    """Into how many parts the mesh in context cuts a logical axis; 1 without a mesh, or without rules."""
    return 1 if rules is None else num_parts(rules[axis])


def num_parts(axes: str | Sequence[str] | None, mesh: Mesh | AbstractMesh | None = None) -> int:
    """Into how many parts an array's dimension is cut by mesh axes, as a PartitionSpec has them; of the mesh in context
    by default, and 1 without one."""
    shape = (jax.sharding.get_abstract_mesh() if mesh is None else mesh).shape or {}
    return math.prod(shape.get(axis, 1) for axis in mesh_axes(axes))


def mesh_axes(axes: str | Sequence[str] | None) -> tuple[str, ...]:
    """What a rule says, which may be one mesh axis, several or none."""
    return (axes,) if isinstance(axes, str) else tuple(axes or ())


def device_count() -> int:
    """Of the mesh in context; 1 without one."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.size


def platform() -> str:
    """ "cpu", "gpu" or "tpu": that of the mesh in context, which this process may only compile for; else its own."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return device.platform if device is not None else jax.default_backend()
