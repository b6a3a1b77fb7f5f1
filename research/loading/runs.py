"""The parameters of a role of a run: what it trains comes from a checkpoint, the rest from what the run began with."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from research import params
from research.devices import sharding
from research.errors import InputError
from research.loading import frozen
from research.loading.start import Start
from research.models import added_rows, kernels, virtual
from research.models.specs import make_specs
from research.ops import quantized
from research.pretrained import checkpoints


def read_run(
    workdir: str, start: Start, specs: Any, placements: Any, *, step: int | None = None, ema: bool = False
) -> Any:
    """The parameters of a role of a run: those that it trains of a checkpoint, the others from where it began.

    Args:
      workdir: of the run.
      start: of the role.
      specs, placements: see Start.read.
      step: of the checkpoint; by default the newest.
      ema: take the moving average.

    Raises:
      InputError: there is no such checkpoint, it has parameters of other shapes, or what the run began with is gone or
        has changed.
    """
    mesh, held = jax.tree.leaves(placements)[0].mesh, start.held(specs)
    plain = functools.partial(_dequantized, specs)
    roles = checkpoints.parameter_names(workdir, step=step, ema=ema)
    if roles and start.role not in roles:  # nothing of it is trained
        values = start.read(held, params.shardings(held, mesh, start.model.rules))
        return values if held == specs else jax.jit(plain, out_shardings=placements)(values)
    names = roles.get(start.role, {})
    trained = params.named(specs, names)
    marks = frozen.marks_of(workdir, start.role)
    if trained == specs or marks is None:
        like = params.abstract(specs, placements)
        return checkpoints.restore_params(workdir, {start.role: like}, step=step, ema=ema)[0][start.role]
    values = start.read(held, params.shardings(held, mesh, start.model.rules))
    frozen.check_unchanged(workdir, start, marks, values)
    own = read_trained(workdir, start.role, trained, dict(params.named_leaves(placements)), step=step, ema=ema)
    put = lambda values, own: params.put(plain(values), own)  # noqa: E731
    donated = 0 if held == specs else ()  # quantised kernels have no room for others
    return jax.jit(put, donate_argnums=donated, out_shardings=placements)(values, own)


def read_trained(workdir: str, role: str, specs: Any, where: Mapping[str, Any], **which: Any) -> Any:
    """What a run has trained of a role.

    Args:
      workdir: of the run.
      role: its name.
      specs: of what is trained, whose layers may lie in pieces.
      where: name of a parameter, without pieces -> its sharding.
      which: the checkpoint's `step`, and whether to take the moving average, `ema`.

    Raises:
      InputError: there is no such checkpoint, or it has parameters of other shapes.
    """
    like = jax.tree_util.tree_map_with_path(
        lambda path, s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where[params.whole_name(path)]),
        specs,
        is_leaf=params.is_spec,
    )
    return checkpoints.restore_params(workdir, {role: like}, **which)[0][role]


def read_untrained(workdir: str, start: Start, specs: Any, placements: Any) -> Any:
    """A role's parameters as a run began, or where its checkpoints hold all of them, as in the newest one: what isn't
    trained is the same in both.

    Args: see `read_run`.

    Raises:
      InputError: what the run began with is gone, or has changed.
    """
    marks = frozen.marks_of(workdir, start.role)
    if marks is None:
        return read_run(workdir, start, specs, placements)
    values = start.read(specs, placements)
    frozen.check_unchanged(workdir, start, marks, values)
    return values


def _dequantized(specs: Any, values: Any) -> Any:
    """Parameters as their specs say, of which none is quantised."""
    return quantized.hold(quantized.read_all(values, jnp.float32), specs)


def read_policy(workdir: str, start: Start, specs: Any, placements: Any, **which: Any) -> Any:
    """The parameters of a run's policy as a model without an adapter and without added rows has them.

    Where some of the specs are quantised, one kernel is read at a time of a checkpoint that holds all of them.

    Args: see `read_run`; the specs are those of added_rows.whole(start.model.config).
    """
    if not quantized.any_in(specs):
        return _read_whole(workdir, start, specs, placements, **which)
    names = checkpoints.parameter_names(workdir, **which).get(start.role, {})
    whole = not start.model.config.added_rows and params.named(specs, names) == specs
    mesh, rules = jax.tree.leaves(placements)[0].mesh, start.model.rules
    values = []
    for part in quantized.kernel_by_kernel(specs) if whole else [specs]:
        plain = quantized.float_specs(part)
        read = _read_whole(workdir, start, plain, params.shardings(plain, mesh, rules), **which)
        hold = jax.jit(lambda x, part=part: quantized.hold(x, part), out_shardings=params.shardings(part, mesh, rules))
        values.append(hold(read))
    return params.join(*values)


def _read_whole(workdir: str, start: Start, specs: Any, placements: Any, **which: Any) -> Any:
    """The parameters of a run's policy with all rows of embedding and head in one matrix, and its adapter merged.

    Args: see `read_run`; the specs are those of added_rows.whole(start.model.config).
    """
    c, rules = start.model.config, start.model.rules
    if not c.added_rows:
        return _read_merged(workdir, start, specs, placements, **which)
    apart = added_rows.apart(c, specs)
    where = params.shardings(apart, jax.tree.leaves(placements)[0].mesh, rules) | placements
    values = _read_merged(workdir, start, apart, where, **which)
    to = {name: placements[name] for name in added_rows.grown_names(c)}
    joined = jax.jit(functools.partial(added_rows.join, c), out_shardings=to)
    parts = {name: values[name] for name in apart if name in to or name not in specs}
    return {name: values[name] for name in specs} | joined(parts)


def _read_merged(workdir: str, start: Start, specs: Any, placements: Any, **which: Any) -> Any:
    """The parameters of a run's policy with its adapter merged.

    Args: see `read_run`; the specs are those of the model alone, with those of Adapter.merged.
    """
    adapter, model = start.model.adapter, kernels.bare(specs)
    if adapter is None:
        return read_run(workdir, start, specs, placements, **which)
    names = make_specs(start.model.config)
    if adapter.merged is not None and model == specs:
        raise InputError(
            f"{workdir}: its adapter ({adapter.kind}) puts something in front of every document, which can't be merged "
            "into a model. Use the run itself to generate, score and evaluate; an export without --merge has it alone."
        )
    whole = adapter.specs(params.held_in(params.named(specs, names), jnp.float32))
    where = params.shardings(whole, jax.tree.leaves(placements)[0].mesh, start.model.rules)
    values = read_run(workdir, start, whole, params.overlay(where, kernels.bare(placements)), **which)
    return jax.jit(functools.partial(_merge, specs), donate_argnums=0, out_shardings=placements)(
        *params.split(values, params.like(names, values))
    )


def _merge(specs: Any, values: Any, added: Any) -> Any:
    """A model's parameters, in the dtypes of the specs, with those of its adapter merged, or `realized`. Biases that
    only some of the layers' maps have are 0 in the others."""
    merged = virtual.realized(kernels.merge(params.join(values, added)))
    zeros = params.tree_map(lambda spec: jnp.zeros(spec.shape, spec.dtype), specs)
    return jax.tree.map(lambda x, spec: x.astype(spec.dtype), params.overlay(zeros, merged), specs)


def holding_error(workdir: str, start: Start) -> tuple[str, float] | None:
    """See ModelSource.holding_error."""
    kind, specs = start.frozen_dtype, start.model.specs
    marks = frozen.marks_of(workdir, start.role) or {}
    if kind not in quantized.KINDS or not any(name.endswith(f"kernel/{kind}") for name in marks):
        return None
    values = start.read(specs, params.shardings(specs, sharding.make_mesh({}, jax.devices()[:1])))
    held = start.held(specs)
    return kind, float(jax.jit(lambda x: quantized.relative_error(quantized.hold(x, held), x))(values))
