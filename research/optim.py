"""Learning-rate schedules and optimizers: plain data in, optax out."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from research.errors import InputError, did_you_mean

OPTIMIZERS = ("adamw", "lion", "adafactor", "muon", "sgd")
SCHEDULES = ("cosine", "linear", "wsd", "constant", "inverse_sqrt")
Tree = Any  # a pytree


@dataclasses.dataclass(frozen=True)
class OptimizerSpec:
    """An optimizer, its learning rate over the steps, weight decay and clipping.

    Attributes:
      name: one of OPTIMIZERS. See `make_optimizer`.
      learning_rate: the highest of the schedule.
      schedule: one of SCHEDULES. See `make_schedule`.
      warmup_steps: steps of linear warm-up, counted in `steps`. Step 0 runs at start_ratio, step `warmup_steps` is the
        first at `learning_rate`.
      start_ratio: where the warm-up starts, as a fraction of learning_rate. With 0 the first step changes nothing.
      end_ratio: the fraction of learning_rate that cosine, linear and wsd end at; a floor under inverse_sqrt.
      decay_fraction: the last part of all steps, over which wsd decays.
      weight_decay: decoupled, hence multiplied by the learning rate; with sgd it is added to the gradient (L2).
      b1, b2: decay of the moments: adamw, lion (whose paper has 0.9 and 0.99), and adamw under muon.
      eps: of adamw, and adamw under muon.
      momentum, nesterov: of muon and sgd.
      muon_scaling: what an orthogonalised matrix of i inputs and o outputs is multiplied by: "match_rms_adamw" is
        0.2 sqrt(max(i, o)), so that adamw's learning rate suits it (arXiv:2502.16982, equation 4); "original" is
        sqrt(max(1, o / i)).
      scale_by_parameter: adafactor's step is relative to the root mean square of the parameter, as in its paper, and
        wants a higher learning rate (1e-3 to 1e-2). Otherwise it is absolute, as with the others.
      factor_min_size: adafactor factors the second moment where two axes are at least so long.
      clip_norm: the gradient's global norm is clipped to this; 0 means never.
      mu_dtype: dtype of the first moment or momentum, "float32" or "bfloat16".
    """

    name: str = "adamw"
    learning_rate: float = 1e-3
    schedule: str = "cosine"
    warmup_steps: int = 0
    start_ratio: float = 0.0
    end_ratio: float = 0.0
    decay_fraction: float = 0.2
    weight_decay: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    momentum: float = 0.95
    nesterov: bool = True
    muon_scaling: str = "match_rms_adamw"
    scale_by_parameter: bool = False
    factor_min_size: int = 128
    clip_norm: float = 1.0
    mu_dtype: str = "float32"


def check(spec: OptimizerSpec, steps: int) -> None:
    """Raises InputError for the first field of `spec` that can't be used in a run of `steps` steps."""
    for field, options in (
        ("name", OPTIMIZERS),
        ("schedule", SCHEDULES),
        ("muon_scaling", ("match_rms_adamw", "original")),
        ("mu_dtype", ("float32", "bfloat16")),
    ):
        value = getattr(spec, field)
        if value not in options:
            raise InputError(f"optimizer.{field} = {value!r}: not known.{did_you_mean(str(value), options)}")
    for field in ("learning_rate", "weight_decay", "clip_norm", "warmup_steps"):
        _require(spec, field, 0 <= getattr(spec, field) < math.inf, "must be 0 or more, and finite")
    for field in ("b1", "b2", "momentum"):
        _require(spec, field, 0 <= getattr(spec, field) < 1, "must be in [0, 1)")
    for field in ("start_ratio", "end_ratio"):
        _require(spec, field, 0 <= getattr(spec, field) <= 1, "is a fraction of learning_rate: must be in [0, 1]")
    _require(spec, "decay_fraction", 0 < spec.decay_fraction <= 1, "is a fraction of all steps: must be in (0, 1]")
    _require(spec, "eps", 0 < spec.eps < math.inf, "must be above 0, and finite")
    _require(spec, "factor_min_size", spec.factor_min_size >= 1, "must be 1 or more")
    if steps < 1:
        raise InputError(f"steps = {steps}: must be 1 or more.")
    if spec.warmup_steps > steps:
        raise InputError(
            f"optimizer.warmup_steps = {spec.warmup_steps} is more than steps = {steps}. Lower it, or raise steps."
        )
    if spec.schedule == "wsd" and spec.warmup_steps + _decay_steps(spec, steps) > steps:
        raise InputError(
            f"optimizer.warmup_steps = {spec.warmup_steps} and the {_decay_steps(spec, steps)} steps of decay that "
            f"optimizer.decay_fraction = {spec.decay_fraction} asks for are more than steps = {steps}. Lower either."
        )


def make_schedule(spec: OptimizerSpec, steps: int) -> Callable[[jax.typing.ArrayLike], jax.Array]:
    """Returns schedule(t), the learning rate used at step t = 0 ... steps - 1 (afterwards it stays where it ended).

    With w = warmup_steps and r = (steps - t) / (steps - w), the fraction that remains, the part after the warm-up is
      cosine:        end + (1 - end) (1 - cos(pi r)) / 2   (arXiv:1608.03983, equation 5, without restarts)
      linear:        end + (1 - end) r
      wsd:           1, then linear over the last `decay_fraction` of all steps   (arXiv:2404.06395, section 4.2)
      constant:      1
      inverse_sqrt:  sqrt(s / (t - w + s)) with s = w, or 10 000 where w = 0; at least end
    times learning_rate. It starts at learning_rate, where the warm-up ends.

    Raises:
      InputError: see `check`.
    """
    check(spec, steps)
    warmup, end = spec.warmup_steps, spec.end_ratio
    decay_steps = _decay_steps(spec, steps) if spec.schedule == "wsd" else max(steps - warmup, 1)
    timescale = warmup or 10_000

    def schedule(step: jax.typing.ArrayLike) -> jax.Array:
        t = jnp.asarray(step, dtype=float)
        remaining = jnp.clip((steps - t) / decay_steps, 0.0, 1.0)
        match spec.schedule:
            case "cosine":  # sin^2 of half the angle: 1 - cos would lose its digits near the end
                ratio = end + (1 - end) * jnp.square(jnp.sin(jnp.pi / 2 * remaining))
            case "linear" | "wsd":
                ratio = end + (1 - end) * remaining
            case "inverse_sqrt":
                ratio = jnp.maximum(jnp.sqrt(timescale / jnp.maximum(t - warmup + timescale, timescale)), end)
            case "constant":
                ratio = jnp.ones_like(t)
        rise = spec.start_ratio + (1 - spec.start_ratio) * t / max(warmup, 1)
        return spec.learning_rate * jnp.where(t < warmup, rise, ratio)

    return schedule


def make_optimizer(
    spec: OptimizerSpec, steps: int, decay_mask: Tree, muon_dims: Tree = None, trains: Tree = None
) -> optax.GradientTransformationExtraArgs:
    """The optimizer, in this order: clipping, direction, weight decay, learning rate.

    `update` takes an argument more than optax's: `ok`, a bool scalar. Where it is False the state stays as it was.

    The directions:
      adamw:      m / (sqrt(v) + eps), bias-corrected (arXiv:1711.05101)
      lion:       sign(b1 m + (1 - b1) g) (arXiv:2302.06675)
      adafactor:  g / sqrt(v), v factored for matrices, clipped to a root mean square of 1, without momentum
                  (arXiv:1804.04235). A stack of layers is one array to it: factored over its two longest axes, and
                  clipped as one.
      muon:       the momentum's matrices orthogonalised by Newton-Schulz (see `_orthogonalize`), adamw for the rest
      sgd:        momentum

    Args:
      spec: what to make.
      steps: length of the run, for the schedule.
      decay_mask: for each parameter, whether weight decay applies to it.
      muon_dims: for each parameter the optax.contrib.MuonDimensionNumbers of the matrices it holds (axes in neither of
        the two, like that of layers, count matrices), or None where adamw applies. Only muon needs it.
      trains: for each parameter, whether it is updated; the others have no state. By default all are.

    Raises:
      InputError: see `check`.
    """
    if trains is not None:
        hide = lambda x, t: x if t else optax.MaskedNode()  # noqa: E731
        decay_mask = jax.tree.map(hide, decay_mask, trains)
        if muon_dims is not None:
            muon_dims = jax.tree.map(hide, muon_dims, trains, is_leaf=_is_dims)
        return optax.masked(make_optimizer(spec, steps, decay_mask, muon_dims), trains)
    schedule = make_schedule(spec, steps)
    decay = [optax.add_decayed_weights(spec.weight_decay, mask=decay_mask)] if spec.weight_decay else []
    adam = _adam(spec)
    momentum = _kept(optax.trace(spec.momentum, nesterov=spec.nesterov, accumulator_dtype=spec.mu_dtype))
    match spec.name:
        case "adamw":
            direction = [adam, *decay]
        case "lion":
            direction = [_kept(optax.scale_by_lion(b1=spec.b1, b2=spec.b2, mu_dtype=spec.mu_dtype)), *decay]
        case "adafactor":
            rms = _kept(optax.scale_by_factored_rms(min_dim_size_to_factor=spec.factor_min_size))
            relative = [optax.scale_by_param_block_rms()] if spec.scale_by_parameter else []
            direction = [rms, optax.clip_by_block_rms(1.0), *relative, *decay]
        case "muon":
            muon = optax.chain(momentum, _orthogonalize(muon_dims, spec.muon_scaling))
            labels = jax.tree.map(lambda d: "adamw" if d is None else "muon", muon_dims, is_leaf=_is_dims)
            if "muon" not in jax.tree.leaves(labels):
                raise InputError("optimizer.name = 'muon': the model has no matrix for it. Set it to 'adamw'.")
            direction = [optax.partition({"muon": muon, "adamw": adam}, labels), *decay]
        case "sgd":
            direction = [*decay, momentum]
    clip = [_clip(spec.clip_norm)] if spec.clip_norm else []
    chain = optax.chain(*clip, *direction, _kept(optax.scale_by_learning_rate(schedule)))

    def update(updates: Tree, state: Tree, params: Tree = None, *, ok: jax.typing.ArrayLike = True):
        with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes: integer counts, bfloat16 moments
            return chain.update(updates, state, params, ok=ok)

    return optax.GradientTransformationExtraArgs(chain.init, update)


def _kept(transform: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`transform`, whose state stays as it was where `ok` is False."""

    def update(updates: Tree, state: Tree, params: Tree = None, *, ok: jax.typing.ArrayLike = True):
        updates, new = transform.update(updates, state, params)
        return updates, jax.tree.map(lambda a, b: jnp.where(ok, a, b), new, state)

    return optax.GradientTransformationExtraArgs(transform.init, update)


def _clip(largest: float) -> optax.GradientTransformation:
    """Clips to a global norm by one factor, which XLA fuses with what follows; it would write out optax's quotients."""

    def update(grads: Tree, params: Tree = None) -> Tree:
        norm = optax.tree.norm(grads)
        scale = jnp.where(norm < largest, jnp.ones_like(norm), largest / norm)
        return jax.tree.map(lambda g: g * scale.astype(g.dtype), grads)

    return optax.stateless(update)


def _adam(spec: OptimizerSpec) -> optax.GradientTransformationExtraArgs:
    """optax.scale_by_adam, but for two things: the state stays as it was where `ok` is False, and the direction is made
    of the moments as they are kept, so that nothing needs the old ones and XLA writes the new ones over them."""
    adam = _kept(optax.scale_by_adam(b1=spec.b1, b2=spec.b2, eps=spec.eps, mu_dtype=spec.mu_dtype))

    def update(grads: Tree, state: Tree, params: Tree = None, *, ok: jax.typing.ArrayLike = True):
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


def _require(spec: OptimizerSpec, field: str, ok: bool, remedy: str) -> None:
    if not ok:
        raise InputError(f"optimizer.{field} = {getattr(spec, field)}: {remedy}.")
