"""The train step: pure, jitted once, the same for every objective."""

from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from research.devices import sharding
from research.objectives.types import Forward, LossOut, Objective

Params = Any
Carry = dict[str, Any]  # term -> pytree of arrays, for the objectives that have one
Metrics = dict[str, tuple[jax.Array, jax.Array]]  # name -> (sum, weight)


@flax.struct.dataclass
class TrainState:
    """All that a run changes, apart from its place in the data.

    Attributes:
      step: int32, batches seen.
      updates: int32, updates made: `step` less those skipped. The learning-rate schedule follows it.
      params: role -> parameters, for the trainable roles; under "objectives" those that belong to a term.
      opt_state: of optax.
      key: the run's random key; step t uses fold_in(key, t).
      ema: moving average of params (None unless asked for).
      bad_steps: int32, updates skipped in a row because the loss, the gradient or the update wasn't finite.
      carry: what objectives remember across steps.
    """

    step: jax.Array
    updates: jax.Array
    params: Params
    opt_state: Any
    key: jax.Array
    ema: Params | None
    bad_steps: jax.Array
    carry: Carry


def init_state(
    params: Params,
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    ema: bool = False,
    carry: Carry | None = None,
) -> TrainState:
    """The state before the first step. `key` is a raw uint32 key, which every checkpoint format can hold."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        updates=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        key=key,
        ema=jax.tree.map(jnp.copy, params) if ema else None,
        bad_steps=jnp.zeros((), jnp.int32),
        carry=carry or {},
    )


def init_carry(
    terms: Mapping[str, tuple[Objective, Any]], batch: Mapping[str, jax.Array | jax.ShapeDtypeStruct]
) -> Carry:
    """The first carries of those terms that have one; of `batch` only shapes and dtypes are read."""
    return {name: term.init_carry(batch) for name, (term, _) in terms.items() if term.init_carry is not None}


def make_train_step(
    terms: Mapping[str, tuple[Objective, Callable[[jax.Array], jax.Array]]],
    models: Mapping[str, Any],
    optimizer: optax.GradientTransformationExtraArgs,
    *,
    schedule: Callable[[jax.Array], jax.Array],
    microbatches: int = 1,
    ema_decay: float = 0.0,
    trains: Params | None = None,
) -> Callable[[TrainState, Params, Mapping[str, jax.Array]], tuple[TrainState, Metrics]]:
    """Returns step(state, frozen, batch) -> (state, metrics).

    The loss minimised is sum_i c_i(step) * S_i / W_i over the terms i, S_i and W_i being sums over the whole batch: the
    same for any number of microbatches, devices and hosts. W_i is treated as a constant.

    Args:
      terms: name -> (objective, weight c_i as a function of the step).
      models: role -> Model.
      optimizer: clipping and learning rate included; its `update` takes `ok` (see optim.make_optimizer).
      schedule: updates made -> learning rate, for the metrics.
      microbatches: the batch is cut along its first axis into this many parts, which run one after the other.
      ema_decay: of the moving average of parameters, where the state has one.
      trains: True for the parameters that take a gradient; by default all.
    """

    states = hidden_states(terms)

    def forward(params: Params, frozen: Params, carry: Carry, batch: Any, key: jax.Array, step: jax.Array):
        fwd = Forward(models, {**frozen, **params}, batch, states)
        return _losses(terms, fwd, batch, key, step, carry)

    def total(params, frozen, carry, batch, key, step, weights):
        if trains is not None:
            params = jax.tree.map(lambda p, t: p if t else jax.lax.stop_gradient(p), params, trains)
        outs = forward(params, frozen, carry, batch, key, step)
        if weights is None:
            weights = {name: out.weight for name, out in outs.items()}
        loss = sum(
            coefficient(step) * outs[name].loss_sum / _divisor(weights[name])
            for name, (_, coefficient) in terms.items()
        )
        return loss, outs

    def gradients(params, frozen, carry, batch, key, step):
        if microbatches == 1:
            return jax.grad(total, has_aux=True)(params, frozen, carry, batch, key, step, None)
        parts = jax.tree.map(lambda x: _split(x, microbatches), batch)
        keys = jax.random.split(key, microbatches)
        # The weights come first. Where they depend on the batch alone, as masks do, the compiler drops the forward
        # pass from this scan as dead code.
        _, weights = jax.lax.scan(
            lambda _, x: (None, {k: o.weight for k, o in forward(params, frozen, carry, *x, step).items()}),
            None,
            (parts, keys),
        )
        weights = jax.tree.map(lambda w: jnp.sum(w, axis=0), weights)

        def add(grads, x):
            more, outs = jax.grad(total, has_aux=True)(params, frozen, carry, *x, step, weights)
            return jax.tree.map(jnp.add, grads, more), outs

        grads, outs = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), (parts, keys))
        return grads, jax.tree.map(lambda x: jnp.sum(x, axis=0), outs)

    def step(state: TrainState, frozen: Params, batch: Mapping[str, jax.Array]) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(state.key, state.step)
        grads, outs = gradients(state.params, frozen, state.carry, batch, key, state.step)
        with jax.named_scope("optimizer"):
            grad_norm, param_norm = optax.tree.norm(grads), optax.tree.norm(state.params)
            loss_sums = sum(out.loss_sum for out in outs.values())
            finite = jnp.isfinite(loss_sums) & jnp.isfinite(grad_norm) & jnp.isfinite(param_norm)
            supervised = sum(out.weight for out in outs.values())
            real = jnp.sum(batch["segment_ids"] > 0).astype(jnp.float32)
            ok = finite & (supervised > 0)
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params, ok=ok)
            params = optax.apply_updates(state.params, updates)
            # Parameters change after all that reads the old ones, these norms too: otherwise XLA would copy them.
            update_norm = optax.tree.norm(updates)
            finite &= jnp.isfinite(update_norm)
            ok &= finite
            keep = lambda new, old: jax.tree.map(lambda a, b: jnp.where(ok, a, b), new, old)  # noqa: E731
            ema = state.ema
            if ema is not None:
                ema = keep(jax.tree.map(lambda e, p: ema_decay * e + (1 - ema_decay) * p, ema, params), ema)
            carry = {
                name: _replicated(term.update(state.carry[name], outs[name].statistics))
                for name, (term, _) in terms.items()
                if term.update is not None
            }
            new = TrainState(
                step=state.step + 1,
                updates=jnp.where(ok, state.updates + 1, state.updates),
                params=keep(params, state.params),
                opt_state=opt_state,
                key=state.key,
                ema=ema,
                bad_steps=jnp.where(finite, 0, state.bad_steps + 1),
                carry=keep(carry, state.carry),
            )
        return new, _metrics(terms, outs, state.step) | {
            "tokens": _one(real),
            "supervised_fraction": (next(iter(outs.values())).weight, real),
            "grad_norm": _one(grad_norm),
            "update_ratio": _one(update_norm / param_norm),
            "learning_rate": _one(schedule(state.updates)),
            "nonfinite": _one(~finite),
            "nonfinite_in_a_row": _one(new.bad_steps),
            "empty_batch": _one(supervised == 0),
        }

    return step


def make_eval_step(terms: Mapping[str, tuple[Objective, Any]], models: Mapping[str, Any]) -> Callable[..., Metrics]:
    """Returns evaluate(params, frozen, batch, key, carry) -> metrics of one batch; nothing is updated.

    `carry` is that of the TrainState; it may be left out where no term has one.
    """

    def evaluate(
        params: Params, frozen: Params, batch: Mapping[str, jax.Array], key: jax.Array, carry: Carry | None = None
    ) -> Metrics:
        fwd = Forward(models, {**frozen, **params}, batch, hidden_states(terms))
        step = jnp.zeros((), jnp.int32)
        return _metrics(terms, _losses(terms, fwd, batch, key, step, carry or {}), step)

    return evaluate


def hidden_states(terms: Mapping[str, tuple[Objective, Any]]) -> dict[str, tuple[int, ...]]:
    """Role -> the layers whose hidden states any of the terms reads."""
    found: dict[str, set[int]] = {}
    for term, _ in terms.values():
        for role, layers in term.states.items():
            found.setdefault(role, set()).update(layers)
    return {role: tuple(sorted(layers)) for role, layers in found.items()}


def _losses(terms, forward: Forward, batch, key: jax.Array, step: jax.Array, carry: Carry) -> dict[str, LossOut]:
    return {
        name: term.loss(forward, batch, key, step, *([] if term.init_carry is None else [carry[name]]))
        for name, (term, _) in terms.items()
    }


def _replicated(tree: Any) -> Any:
    return jax.tree.map(lambda x: sharding.constrain(x, (None,) * x.ndim), tree)


def _metrics(terms: Mapping[str, Any], outs: dict[str, LossOut], step: jax.Array) -> Metrics:
    """With one term, its metrics and `loss`; with several, "term/name" each, and their weighted sum as `loss`."""
    metrics: Metrics = {}
    for name, out in outs.items():
        prefix = "" if len(outs) == 1 else f"{name}/"
        metrics |= {prefix + k: v for k, v in out.metrics.items()} | {f"{prefix}loss": (out.loss_sum, out.weight)}
    if len(outs) > 1:
        sums = (c(step) * outs[n].loss_sum / _divisor(outs[n].weight) for n, (_, c) in terms.items())
        metrics["loss"] = _one(sum(sums))
    return metrics


def _one(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.asarray(x, jnp.float32), jnp.ones((), jnp.float32)


def _divisor(weight: jax.Array) -> jax.Array:
    """The constant to divide a loss sum by; 1 where nothing is supervised, whose sum is 0."""
    weight = jax.lax.stop_gradient(weight)
    return jnp.where(weight > 0, weight, jnp.ones_like(weight))


def _split(x: jax.Array, parts: int) -> jax.Array:
    """[B, ...] -> [parts, B / parts, ...], taking every parts-th row, so that each device's rows stay on it."""
    return jnp.moveaxis(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0)
