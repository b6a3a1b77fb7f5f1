"""The mesh, and the one table that maps the logical axes of arrays to its axes."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from research.errors import InputError, did_you_mean

AXES = ("data", "fsdp", "tensor")

# Logical axis -> mesh axis (or axes). What isn't named here is replicated.
RULES: dict[str, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),
    "embed": "fsdp",
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "layers": None,
    "embed_replicated": None,
    "head_dim": None,
    "positions": None,
    "token_types": None,
    "experts": None,
    "labels": None,
    "time": None,
}


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
    """A mesh of all devices (or those given) with axes AXES."""
    devices = jax.devices() if devices is None else devices
    shape = mesh_shape(sizes, len(devices))
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def make_abstract_mesh(sizes: Mapping[str, int], num_devices: int) -> AbstractMesh:
    """The same without devices, for tracing."""
    return AbstractMesh(mesh_shape(sizes, num_devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def partition(axes: Sequence[str | None], rules: Mapping[str, Any] = RULES) -> PartitionSpec:
    """Logical axes -> PartitionSpec. An axis missing from `rules` is a KeyError: a typo in a model."""
    return PartitionSpec(*(None if axis is None else rules[axis] for axis in axes))


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
        over = (over,) if isinstance(over, str) else over or ()
        parts = math.prod(mesh.shape[a] for a in over)
        if size % parts:
            raise InputError(
                f"{name}: its axis {axis!r} has size {size}, which mesh {'x'.join(over)} = {parts} doesn't divide. "
                f"Choose a mesh.{over[-1]} that divides it, or change the size."
            )
    return NamedSharding(mesh, spec)


def constrain(x: jax.Array, axes: Sequence[str | None], rules: Mapping[str, Any] = RULES) -> jax.Array:
    """Pins an activation's layout to the mesh in context (jax.set_mesh); without a mesh, does nothing."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition(axes, rules))
