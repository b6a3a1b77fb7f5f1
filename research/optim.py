"""Learning-rate schedules and optimizers: plain data in, optax out."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from research import moments, options, ranges, updates
from research import params as params_lib
from research.errors import InputError, did_you_mean
from research.ranges import Count, Fraction, NotNegative, Part, Positive, Share, Size

OPTIMIZERS = ("adamw", "lion", "adafactor", "muon", "sgd")
SCHEDULES = ("cosine", "linear", "wsd", "constant", "inverse_sqrt")
DECAY_SHAPES = ("linear", "cosine", "1-sqrt")
# Options of one schedule -> that schedule.
_OF_SCHEDULE = {"decay_fraction": "wsd", "decay_shape": "wsd", "timescale": "inverse_sqrt", "cycles": "cosine"}
GROUP_FIELDS = ("match", "learning_rate", "weight_decay", "delay_steps", "warmup_steps", "clip_norm")
Tree = Any  # a pytree
Schedule = Callable[..., jax.Array]  # (step, the highest rate, by default the spec's own) -> learning rate
Rates = Mapping[str, jax.typing.ArrayLike]  # group of parameters, "" for the rest -> the highest learning rate


@dataclasses.dataclass(frozen=True)
class OptimizerSpec:
    """An optimizer, its learning rate over the steps, weight decay and clipping.

    Attributes:
      name: "adamw", "lion", "adafactor", "muon" (matrices inside the layers; the rest by adamw) or "sgd".
      learning_rate: the highest of the schedule.
      schedule: of the learning rate after the warm-up: "cosine", "linear", "wsd" (constant, then down to the end),
        "constant" or "inverse_sqrt".
      delay_steps: steps at a rate of 0 before the schedule, which then has the rest: of a group that waits for another,
        such as a policy for its critic.
      warmup_steps: steps of linear warm-up, counted in `steps`. Step 0 runs at start_ratio, step `warmup_steps` is the
        first at `learning_rate`.
      warmup_share: in its place, the warm-up as a share of the run's steps; 0: as warmup_steps says.
      start_ratio: where the warm-up starts, as a fraction of learning_rate. With 0 the first step changes nothing.
      end_ratio: the fraction of learning_rate that cosine, linear and wsd end at; a floor under inverse_sqrt.
      decay_fraction: the last part of all steps, over which wsd decays.
      decay_shape: how wsd decays: "linear", "cosine" or "1-sqrt" (arXiv:2405.18392).
      timescale: of inverse_sqrt: steps after the warm-up until it has fallen to sqrt(1/2); 0: as many as of warm-up.
      cycles: of cosine: how often it falls from the top to the end, in equal parts of the steps; 1 is without restarts.
      weight_decay: decoupled, hence multiplied by the learning rate; with sgd it is added to the gradient (L2).
      b1, b2: decay of the moments: adamw, lion (whose paper has 0.9 and 0.99), and adamw under muon.
      eps: of adamw, and adamw under muon: added to the root of the second moment.
      momentum: of muon and sgd.
      nesterov: of muon and sgd: Nesterov's momentum, which adds the gradient once more.
      muon_scaling: what an orthogonalised matrix of i inputs and o outputs is multiplied by: "match_rms_adamw" is
        0.2 sqrt(max(i, o)), so that adamw's learning rate suits it (arXiv:2502.16982, equation 4); "original" is
        sqrt(max(1, o / i)).
      scale_by_parameter: adafactor's step is relative to the root mean square of the parameter, as in its paper, and
        wants a higher learning rate (1e-3 to 1e-2). Otherwise it is absolute, as with the others.
      factor_min_size: adafactor factors the second moment where two axes are at least so long.
      clip_norm: the gradient's global norm is clipped to this; 0 means never.
      mu_dtype: dtype of the first moment or momentum, "float32" or "bfloat16".
      moments: in which adamw holds both moments: "float32" (the first as mu_dtype says), or "int8": blocks of 8-bit
        numbers with a scale each, a quarter of the room (docs/models.md).
      rounding: of parameters that are trained in bfloat16 (trained_dtype), after each update: to the "nearest", by
        which small updates are lost, or "stochastic", by which the mean is right.
      groups: parameters with values of their own: {"head": {"match": "policy/head.*", "learning_rate": 1e-3}}. `match`
        is a regular expression on whole names, whose first part is the role ("value/.*" is all of a role); the others
        are learning_rate, weight_decay, delay_steps, warmup_steps and clip_norm. A group with a clip_norm is clipped by
        its own norm, and counts in no other. What a group leaves out, and what is in no group, goes by the fields
        above.
    """

    name: str = "adamw"
    learning_rate: NotNegative = 1e-3
    schedule: str = "cosine"
    delay_steps: Count = 0
    warmup_steps: Count = 0
    warmup_share: Share = 0.0
    start_ratio: Share = 0.0
    end_ratio: Share = 0.0
    decay_fraction: Part = 0.2
    decay_shape: str = "linear"
    timescale: Count = 0
    cycles: Size = 1
    weight_decay: NotNegative = 0.1
    b1: Fraction = 0.9
    b2: Fraction = 0.95
    eps: Positive = 1e-8
    momentum: Fraction = 0.95
    nesterov: bool = True
    muon_scaling: str = "match_rms_adamw"
    scale_by_parameter: bool = False
    factor_min_size: Size = 128
    clip_norm: NotNegative = 1.0
    mu_dtype: str = "float32"
    moments: str = "float32"
    rounding: str = "nearest"
    groups: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def check(spec: OptimizerSpec, steps: int, section: str = "optimizer") -> None:
    """Raises InputError for the first field of `spec` that can't be used in a run of `steps` steps."""
    for field, choices in (
        ("name", OPTIMIZERS),
        ("schedule", SCHEDULES),
        ("decay_shape", DECAY_SHAPES),
        ("muon_scaling", ("match_rms_adamw", "original")),
        ("mu_dtype", ("float32", "bfloat16")),
        ("moments", moments.KINDS),
        ("rounding", updates.ROUNDINGS),
    ):
        value = getattr(spec, field)
        if value not in choices:
            raise InputError(f"{section}.{field} = {value!r}: not known.{did_you_mean(str(value), choices)}")
    ranges.check(spec, section)
    if spec.moments == "int8" and (spec.name != "adamw" or spec.mu_dtype != "float32"):
        other = f"name = {spec.name!r}" if spec.name != "adamw" else f"mu_dtype = {spec.mu_dtype!r}"
        remedy = "Set name to 'adamw'" if spec.name != "adamw" else "Leave that out"
        raise InputError(
            f"{section}.moments = 'int8': holds both of adamw's moments in 8 bits, and {section}.{other}. {remedy}, or "
            f"set {section}.moments = 'float32'."
        )
    if steps < 1:
        raise InputError(f"steps = {steps}: must be 1 or more.")
    if spec.delay_steps and spec.delay_steps >= steps:
        raise InputError(
            f"{section}.delay_steps = {spec.delay_steps}: leaves none of steps = {steps}. Lower it, or raise steps."
        )
    if spec.warmup_share and spec.warmup_steps:
        raise InputError(
            f"{section}.warmup_share = {spec.warmup_share}: and {section}.warmup_steps = {spec.warmup_steps}, which is "
            "the same in steps. Set one of them to 0."
        )
    steps -= spec.delay_steps
    spec = _with_warmup(spec, steps)
    if spec.warmup_steps > steps:
        raise InputError(
            f"{section}.warmup_steps = {spec.warmup_steps} is more than steps = {steps}. Lower it, or raise steps."
        )
    for field, schedule in _OF_SCHEDULE.items():
        if getattr(spec, field) != getattr(OptimizerSpec, field) and spec.schedule != schedule:
            raise InputError(
                f"{section}.{field} = {getattr(spec, field)!r}: is of the schedule {schedule!r}, and "
                f"{section}.schedule = {spec.schedule!r}. Leave it out, or change the schedule."
            )
    if spec.cycles > max(steps - spec.warmup_steps, 1):
        raise InputError(f"{section}.cycles = {spec.cycles}: is more than the steps after the warm-up. Lower it.")
    if spec.schedule == "wsd" and spec.warmup_steps + _decay_steps(spec, steps) > steps:
        raise InputError(
            f"{section}.warmup_steps = {spec.warmup_steps} and the {_decay_steps(spec, steps)} steps of decay that "
            f"optimizer.decay_fraction = {spec.decay_fraction} asks for are more than steps = {steps}. Lower either."
        )
    for name in spec.groups:
        check(group_spec(spec, name), steps + spec.delay_steps, f"optimizer.groups.{name}")


def _with_warmup(spec: OptimizerSpec, steps: int) -> OptimizerSpec:
    """The spec with the warm-up in steps, of a schedule of so many."""
    if not spec.warmup_share:
        return spec
    return dataclasses.replace(spec, warmup_steps=round(spec.warmup_share * steps), warmup_share=0.0)


def group_spec(spec: OptimizerSpec, name: str) -> OptimizerSpec:
    """What a group of parameters goes by: the spec with the group's fields in the place of its own.

    Raises:
      InputError: the group lacks `match`, or has a field that isn't known or of another type.
    """
    group, where = spec.groups[name], f"optimizer.groups.{name}"
    if not isinstance(group, Mapping) or not isinstance(group.get("match"), str):
        raise InputError(f'{where}: needs a field match, a regular expression on names: {{"match": "policy/head.*"}}.')
    own = {field: value for field, value in group.items() if field != "match"}
    for field, value in own.items():
        if field not in GROUP_FIELDS:
            raise InputError(f"{where}.{field}: no such field of a group.{did_you_mean(field, GROUP_FIELDS)}")
        own[field] = options.convert(ranges.hints(OptimizerSpec)[field], value, f"{where}.{field}")
    if "warmup_steps" in own:
        own["warmup_share"] = 0.0
    return dataclasses.replace(spec, **own, groups={})


def group_labels(spec: OptimizerSpec, specs: Tree) -> Tree:
    """The name of the group that each parameter belongs to, "" for none.

    Args:
      spec: the optimizer.
      specs: role -> nested dicts of ParamSpec, of what is trained.

    Raises:
      InputError: a group matches nothing, or two match the same parameter.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(specs, is_leaf=params_lib.is_spec)
    labels = [""] * len(leaves)
    for name in spec.groups:
        field, pattern = f"optimizer.groups.{name}.match", spec.groups[name]["match"]
        for i, member in enumerate(jax.tree.leaves(params_lib.matching(specs, pattern, field))):
            if member and labels[i]:
                raise InputError(
                    f"{field} = {pattern!r}: matches {params_lib.path_name(leaves[i][0])}, which is in "
                    f"optimizer.groups.{labels[i]} too. A parameter is in one group: make one expression narrower."
                )
            labels[i] = name if member else labels[i]
    return structure.unflatten(labels)


def rates(spec: OptimizerSpec) -> dict[str, np.ndarray]:
    """The highest learning rate of each group of parameters, and of those in none under "".

    They are arguments of the compiled step, so that runs that differ in nothing else share one program.
    """
    highest = {"": spec.learning_rate} | {name: group_spec(spec, name).learning_rate for name in spec.groups}
    return {name: np.asarray(rate, jnp.result_type(float)) for name, rate in highest.items()}


def make_schedule(spec: OptimizerSpec, steps: int) -> Schedule:
    """Returns schedule(t), the learning rate used at step t = 0 ... steps - 1 (afterwards it stays where it ended).

    With w = warmup_steps, or warmup_share of the steps, and r = (steps - t) / (steps - w), the fraction that remains,
    the part after the warm-up is
      cosine:        end + (1 - end) (1 - cos(pi r)) / 2   (arXiv:1608.03983, equation 5). With n = `cycles` the part
                     that remains of one of n equal cycles is in the place of r: at the start of each it is 1 again
      linear:        end + (1 - end) r
      wsd:           1, then down over the last `decay_fraction` of all steps   (arXiv:2404.06395, section 4.2): with d
                     the fraction of these that remains, end + (1 - end) times d ("linear"), (1 - cos(pi d)) / 2
                     ("cosine") or 1 - sqrt(1 - d) ("1-sqrt")
      constant:      1
      inverse_sqrt:  sqrt(s / (t - w + s)) with s = `timescale`, by default w, or 10 000 where w = 0; at least end
    times learning_rate, in whose place schedule(t, rate) has another. It starts there, where the warm-up ends. With
    d = delay_steps it is 0 before step d, and t and steps are counted from there.

    Raises:
      InputError: see `check`.
    """
    check(spec, steps)
    steps -= spec.delay_steps
    spec = _with_warmup(spec, steps)
    warmup, end = spec.warmup_steps, spec.end_ratio
    decay_steps = _decay_steps(spec, steps) if spec.schedule == "wsd" else max(steps - warmup, 1)
    timescale = spec.timescale or warmup or 10_000

    def schedule(step: jax.typing.ArrayLike, highest: jax.typing.ArrayLike = spec.learning_rate) -> jax.Array:
        t = jnp.asarray(step, dtype=float) - spec.delay_steps
        remaining = jnp.clip((steps - t) / decay_steps, 0.0, 1.0)
        if spec.cycles > 1:  # in whole numbers, so that it is 1 at the first step of a cycle
            remaining = jnp.where(t < steps, 1 - (t - warmup) * spec.cycles % decay_steps / decay_steps, 0.0)
        match spec.schedule, spec.decay_shape:
            case ("cosine", _) | ("wsd", "cosine"):  # sin^2 of half the angle: 1 - cos would lose its digits at the end
                ratio = end + (1 - end) * jnp.square(jnp.sin(jnp.pi / 2 * remaining))
            case "wsd", "1-sqrt":
                ratio = end + (1 - end) * (1 - jnp.sqrt(1 - remaining))
            case (("linear" | "wsd"), _):
                ratio = end + (1 - end) * remaining
            case "inverse_sqrt", _:
                ratio = jnp.maximum(jnp.sqrt(timescale / jnp.maximum(t - warmup + timescale, timescale)), end)
            case "constant", _:
                ratio = jnp.ones_like(t)
        rise = spec.start_ratio + (1 - spec.start_ratio) * t / max(warmup, 1)
        rate = highest * jnp.where(t < warmup, rise, ratio)
        return jnp.where(t < 0, jnp.zeros_like(rate), rate) if spec.delay_steps else rate

    return schedule


def make_group_schedules(spec: OptimizerSpec, steps: int) -> dict[str, Schedule]:
    """The schedule of each group of parameters, by its name."""
    return {name: make_schedule(group_spec(spec, name), steps) for name in spec.groups}


def make_optimizer(
    spec: OptimizerSpec, steps: int, decay_mask: Tree, muon_dims: Tree = None, labels: Tree = None
) -> optax.GradientTransformationExtraArgs:
    """The optimizer, in this order: clipping, direction, weight decay, learning rate.

    Whatever the dtype of the parameters, all is computed and kept in float32 at least, updates too. `update` takes two
    arguments more than optax's: `ok`, a bool scalar, where which is False the state stays as it was; and `rates`, the
    highest learning rates, by default the spec's own (see `rates`).

    The directions:
      adamw:      m / (sqrt(v) + eps), bias-corrected (arXiv:1711.05101)
      lion:       sign(b1 m + (1 - b1) g) (arXiv:2302.06675)
      adafactor:  g / sqrt(v), v factored for matrices, clipped to a root mean square of 1, without momentum
                  (arXiv:1804.04235). A stack of layers is one array to it: factored over its two longest axes, and
                  clipped as one.
      muon:       the momentum's matrices orthogonalised by Newton-Schulz (see `_orthogonalize`), adamw for the rest
      sgd:        momentum, of a gradient that the weight decay is already added to

    Args:
      spec: what to make.
      steps: length of the run, for the schedule.
      decay_mask: for each parameter that is trained, whether weight decay applies to it.
      muon_dims: for each parameter the optax.contrib.MuonDimensionNumbers of the matrices it holds (axes in neither of
        the two, like that of layers, count matrices), or None where adamw applies. Only muon needs it.
      labels: for each parameter the group it belongs to (see `group_labels`). Only a spec with groups needs it.

    Raises:
      InputError: see `check`.
    """
    check(spec, steps)
    decay = _decays(spec, decay_mask, labels)
    direction = _direction(spec, muon_dims)
    parts = [*decay, *direction] if spec.name == "sgd" else [*direction, *decay]
    chain = optax.chain(*itertools.starmap(_clip, clips(spec, labels)), *parts, _scale_by_rates(spec, steps, labels))

    def wide(tree: Tree) -> Tree:
        return jax.tree.map(params_lib.widened, tree)

    def update(
        updates: Tree, state: Tree, params: Tree = None, *, ok: jax.typing.ArrayLike = True, rates: Rates | None = None
    ):
        with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes: integer counts, bfloat16 moments
            return chain.update(wide(updates), state, wide(params), ok=ok, rates=rates)

    return optax.GradientTransformationExtraArgs(lambda params: chain.init(wide(params)), update)


def _direction(spec: OptimizerSpec, muon_dims: Tree) -> list[optax.GradientTransformation]:
    """From the clipped gradient to the direction of the update."""
    momentum = _kept(optax.trace(spec.momentum, nesterov=spec.nesterov, accumulator_dtype=spec.mu_dtype))
    match spec.name:
        case "adamw":
            return [_adam(spec)]
        case "lion":
            return [_kept(optax.scale_by_lion(b1=spec.b1, b2=spec.b2, mu_dtype=spec.mu_dtype))]
        case "adafactor":
            rms = _kept(optax.scale_by_factored_rms(min_dim_size_to_factor=spec.factor_min_size))
            relative = [optax.scale_by_param_block_rms()] if spec.scale_by_parameter else []
            return [rms, optax.clip_by_block_rms(1.0), *relative]
        case "muon":
            muon = optax.chain(momentum, _orthogonalize(muon_dims, spec.muon_scaling))
            labels = jax.tree.map(lambda d: "adamw" if d is None else "muon", muon_dims, is_leaf=_is_dims)
            if "muon" not in jax.tree.leaves(labels):
                raise InputError("optimizer.name = 'muon': what is trained has no matrix for it. Set it to 'adamw'.")
            return [optax.partition({"muon": muon, "adamw": _adam(spec)}, labels)]
    return [momentum]


def _decays(spec: OptimizerSpec, decay_mask: Tree, labels: Tree) -> list[optax.GradientTransformation]:
    """Weight decay, of each group at its own rate."""
    if not spec.groups:
        return [optax.add_decayed_weights(spec.weight_decay, mask=decay_mask)] if spec.weight_decay else []
    rates = {"": spec.weight_decay} | {name: group_spec(spec, name).weight_decay for name in spec.groups}

    def add(updates: Tree, params: Tree) -> Tree:
        return jax.tree.map(
            lambda g, p, decays, label: g + rates[label] * p if decays and rates[label] else g,
            updates,
            params,
            decay_mask,
            labels,
        )

    return [optax.stateless(add)] if any(rates.values()) else []


def clips(spec: OptimizerSpec, labels: Tree) -> list[tuple[float, Tree]]:
    """What gradients are clipped to: of each group with a clip_norm of its own, and of all others together.

    Args:
      spec: the optimizer.
      labels: see `group_labels`.

    Returns:
      (largest norm, True for each parameter that it is of; None where that is all) each.
    """
    alone = {name for name, group in spec.groups.items() if "clip_norm" in group}
    if not alone:
        return [(spec.clip_norm, None)] if spec.clip_norm else []
    norms = {"": spec.clip_norm} | {name: group_spec(spec, name).clip_norm for name in sorted(alone)}
    kind = jax.tree.map(lambda label: label if label in alone else "", labels)
    used = set(jax.tree.leaves(kind))
    return [
        (largest, jax.tree.map(lambda label, name=name: label == name, kind))
        for name, largest in norms.items()
        if largest and name in used
    ]


def _scale_by_rates(spec: OptimizerSpec, steps: int, labels: Tree) -> optax.GradientTransformationExtraArgs:
    """Multiplies each update by its group's learning rate, and by -1."""
    schedules = {"": make_schedule(spec, steps)} | make_group_schedules(spec, steps)
    own = rates(spec)

    def update(
        updates: Tree, state: Any, params: Tree = None, *, ok: jax.typing.ArrayLike = True, rates: Rates | None = None
    ) -> tuple[Tree, Any]:
        del params
        now = {name: -schedule(state.count, (rates or own)[name]) for name, schedule in schedules.items()}
        groups = labels if spec.groups else jax.tree.map(lambda _: "", updates)
        updates = jax.tree.map(lambda u, label: now[label].astype(u.dtype) * u, updates, groups)
        count = jnp.where(ok, optax.safe_increment(state.count), state.count)
        return updates, optax.ScaleByScheduleState(count)

    def init(params: Tree) -> optax.ScaleByScheduleState:
        del params
        return optax.ScaleByScheduleState(jnp.zeros((), jnp.int32))

    return optax.GradientTransformationExtraArgs(init, update)


def _kept(transform: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`transform`, whose state stays as it was where `ok` is False."""

    def update(updates: Tree, state: Tree, params: Tree = None, *, ok: jax.typing.ArrayLike = True, **_: Any):
        updates, new = transform.update(updates, state, params)
        return updates, jax.tree.map(lambda a, b: jnp.where(ok, a, b), new, state)

    return optax.GradientTransformationExtraArgs(transform.init, update)


def _clip(largest: float, members: Tree = None) -> optax.GradientTransformation:
    """Clips `members`, by default all, to a global norm, by one factor that XLA fuses with what follows; it would write
    out optax's quotients."""

    def update(grads: Tree, params: Tree = None) -> Tree:
        del params
        clipped = members or jax.tree.map(lambda _: True, grads)
        norm = optax.tree.norm([g for g, m in zip(*map(jax.tree.leaves, (grads, clipped)), strict=True) if m])
        scale = jnp.where(norm < largest, jnp.ones_like(norm), largest / norm)
        return jax.tree.map(lambda g, m: g * scale.astype(g.dtype) if m else g, grads, clipped)

    return optax.stateless(update)


def _adam(spec: OptimizerSpec) -> optax.GradientTransformationExtraArgs:
    """optax.scale_by_adam, but for two things: the state stays as it was where `ok` is False, and the direction is made
    of the moments as they are kept, so that nothing needs the old ones and XLA writes the new ones over them."""
    if spec.moments == "int8":
        return _kept(moments.adam(spec.b1, spec.b2, spec.eps))
    adam = _kept(optax.scale_by_adam(b1=spec.b1, b2=spec.b2, eps=spec.eps, mu_dtype=spec.mu_dtype))

    def update(grads: Tree, state: Tree, params: Tree = None, *, ok: jax.typing.ArrayLike = True, **_: Any):
        _, state = adam.update(grads, state, ok=ok)
        count = jnp.maximum(state.count, 1)  # 0 where the very first update was skipped
        mu = optax.tree.bias_correction(state.mu, spec.b1, count)
        nu = optax.tree.bias_correction(state.nu, spec.b2, count)
        return jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + spec.eps), mu, nu), state

    return optax.GradientTransformationExtraArgs(adam.init, update)


def _orthogonalize(dims: Tree, scaling: str) -> optax.GradientTransformation:
    """Replaces each matrix by U S V^T with singular values S between about 0.7 and 1.2, times the factor of `scaling`.

    The quintic Newton-Schulz iteration of Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon), in float32.
    """

    def one(dims: optax.contrib.MuonDimensionNumbers, x: jax.Array) -> jax.Array:
        inputs, outputs = _axes(dims.reduction_axis, x), _axes(dims.output_axis, x)
        stack = tuple(i for i in range(x.ndim) if i not in inputs + outputs)
        order = stack + inputs + outputs
        size = lambda axes: math.prod(x.shape[i] for i in axes)  # noqa: E731
        i, o = size(inputs), size(outputs)
        y = x.astype(jnp.float32).transpose(order).reshape(size(stack), i, o)
        y = _newton_schulz(y) if i <= o else jnp.matrix_transpose(_newton_schulz(jnp.matrix_transpose(y)))
        y *= max(1, o / i) ** 0.5 if scaling == "original" else 0.2 * max(i, o) ** 0.5
        y = y.reshape(tuple(x.shape[axis] for axis in order))
        return y.transpose([order.index(axis) for axis in range(x.ndim)]).astype(x.dtype)

    def update(updates: Tree, params: Tree = None) -> Tree:
        # optax.partition leaves holes in `updates` where `dims` has None: neither counts as a leaf.
        leaves, structure = jax.tree.flatten(updates)
        matrices = [d for d in jax.tree.leaves(dims, is_leaf=_is_dims) if d is not None]
        return structure.unflatten([one(d, x) for d, x in zip(matrices, leaves, strict=True)])

    return optax.stateless(update)


def _newton_schulz(x: jax.Array) -> jax.Array:
    """x [N, i, o] with i <= o, float32. Five steps of x <- a x + b (x x^T) x + c (x x^T)^2 x."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x /= jnp.maximum(jnp.linalg.norm(x, axis=(1, 2), keepdims=True), 1e-7)
    for _ in range(5):
        gram = x @ jnp.matrix_transpose(x)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def _is_dims(x: Any) -> bool:
    return x is None or isinstance(x, optax.contrib.MuonDimensionNumbers)


def _axes(axes: Any, x: jax.Array) -> tuple[int, ...]:
    return tuple(axis % x.ndim for axis in ((axes,) if isinstance(axes, int) else axes))


def _decay_steps(spec: OptimizerSpec, steps: int) -> int:
    return max(1, round(spec.decay_fraction * steps))


def _is_size(x: float) -> bool:
    return 0 <= x < math.inf
