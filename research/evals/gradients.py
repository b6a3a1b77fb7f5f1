"""Gradients of single records: of the mean loss of a record's supervised tokens, by what is trained of a model."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research import params
from research.devices import distributed, sharding
from research.errors import InputError
from research.evals.scoring import Example, compute_windows
from research.models import transformer, virtual
from research.models.transformer import Model
from research.ops.losses import cross_entropy

Of = Callable[[jax.Array, Any], jax.Array]  # (a record's gradient [P] float32, what it is compared with) -> [D] float32


def check_on_long(on_long: str, scorer: str) -> None:
    """Raises InputError where records were to be scored in pieces."""
    if on_long == "split":
        raise InputError(
            f"--on_long = split: a gradient is of a whole record. Use error or truncate, or leave the scorer {scorer} "
            "out."
        )


@dataclasses.dataclass(frozen=True, eq=False)
class RecordGradients:
    """What is made of the gradient of each record.

    A batch's rows are on the devices that share in it, and on each device one row comes after the other, so that one
    gradient is held there at a time.

    Attributes:
      model: what it computes.
      of: what is made of a gradient.
      size: D, how many numbers that is.
      batch_tokens: see scoring.
    """

    model: Model
    of: Of
    size: int
    batch_tokens: int

    def __call__(self, whole: Any, own: Any, extra: Any, examples: Sequence[Example]) -> np.ndarray:
        """Of each example `of` its gradient, [N, D] float32. Call it under the mesh of the parameters.

        Args:
          whole: the model's parameters.
          own: those of them by which the gradient is taken, whose layers may lie in pieces.
          extra: what `of` is given.
          examples: at most model.max_length + 1 tokens each.
        """
        values = np.zeros((len(examples), self.size), np.float32)
        arguments = (whole, own, extra)
        for windows, out in compute_windows(
            self._compute, self.model, arguments, examples, self.batch_tokens, lambda tokens: None
        ):
            values[[window.example for window in windows]] = out[: len(windows)]
        return values

    @functools.cached_property
    def _compute(self) -> Callable[..., jax.Array]:
        axes = sharding.mesh_axes(self.model.rules["batch"])
        alone = transformer.make_model(self.model.config, {**self.model.rules, "batch": None}, self.model.adapter)
        return distributed.one_at_a_time(jax.jit(functools.partial(_rows, alone, self.of, axes)))


def _rows(
    model: Model, of: Of, axes: tuple[str, ...], arguments: tuple[Any, Any, Any], batch: Mapping[str, jax.Array]
) -> jax.Array:
    """`of` the gradient of each row, [B, D] float32 on every device.

    Args:
      model: whose own rules cut no batch.
      of: see RecordGradients.
      axes: of the mesh, among which the rows are shared out.
      arguments: whole, own and extra; see RecordGradients.
      batch: see scoring.
    """
    whole, own, extra = arguments
    there = tuple(axis for axis in axes if axis in jax.sharding.get_abstract_mesh().axis_names)
    parts = sharding.num_parts(there)

    def one(row: Mapping[str, jax.Array]) -> jax.Array:
        gradient = jax.grad(functools.partial(_loss, model, whole))(own, row)
        return of(flat(gradient), extra)

    rows = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]).swapaxes(0, 1), dict(batch))
    out = jax.lax.map(jax.vmap(one, spmd_axis_name=there or None), rows)
    return sharding.replicate(out.swapaxes(0, 1).reshape(-1, out.shape[-1]))


def _loss(model: Model, whole: Any, own: Any, row: Mapping[str, jax.Array]) -> jax.Array:
    """The mean loss of one row's weighted targets; 0 without any."""
    batch = {name: x[None] for name, x in row.items()}
    values = params.put(whole, jax.tree.map(lambda x, y: x.astype(y.dtype), own, _like(own, whole)))
    out = cross_entropy(virtual.hidden(model, values, batch), model.unembed(values), batch["targets"], batch["weights"])
    return out.loss_sum / jnp.maximum(out.weight_sum, 1.0)


def _like(own: Any, whole: Any) -> Any:
    """The leaves of `whole` by the paths of `own`, for their dtypes."""
    leaves = dict(params.named_leaves(whole))
    return jax.tree_util.tree_map_with_path(lambda path, _: leaves[params.whole_name(path)], own)


def flat(tree: Any) -> jax.Array:
    """All numbers of a tree in one array, [P] float32."""
    return jnp.concatenate([x.reshape(-1).astype(jnp.float32) for x in jax.tree.leaves(tree)])


def size(tree: Any) -> int:
    """P."""
    return sum(x.size for x in jax.tree.leaves(tree))
