"""The train step: pure, jitted once, the same for every objective."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax

from research.devices import sharding
from research.objectives.types import Batch, Forward, LossOut, Objective

Params = Any
Terms = Mapping[str, tuple[Objective, Callable[[jax.Array], jax.Array]]]
Weights = dict[str, jax.Array]  # term -> what its loss sum is divided by
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


def init_carry(terms: Terms, batch: Mapping[str, jax.Array | jax.ShapeDtypeStruct]) -> Carry:
    """The first carries of those terms that have one; of `batch` only shapes and dtypes are read."""
    return {name: term.init_carry(batch) for name, (term, _) in terms.items() if term.init_carry is not None}


class Inputs(NamedTuple):
    """What the losses of a step read besides the trained parameters and the batch.

    Attributes:
      frozen: role -> parameters, of the roles that aren't trained.
      carry: what each term remembers of the steps before.
      key: of this step.
      step: int32, its number.
    """

    frozen: Params
    carry: Carry
    key: jax.Array
    step: jax.Array


@dataclasses.dataclass(frozen=True, eq=False)
class TrainStep:
    """One update, (state, frozen, batch) -> (state, metrics): pure, and the same for every objective.

    The loss minimised is sum_i c_i(step) * S_i / W_i over the terms i, S_i and W_i being sums over the whole batch: the
    same for any number of microbatches, devices and hosts. W_i is treated as a constant.

    Attributes:
      terms: name -> (objective, weight c_i as a function of the step).
      models: role -> Model.
      optimizer: clipping and learning rate included; its `update` takes `ok` (see optim.make_optimizer).
      schedule: updates made -> learning rate, for the metrics.
      microbatches: the batch is cut along its first axis into this many parts, which run one after the other.
      ema_decay: of the moving average of parameters, where the state has one.
      trains: True for the parameters that take a gradient; by default all.
    """

    __name__ = "step"  # what jax.jit calls the program, and traces show

    terms: Terms
    models: Mapping[str, Any]
    optimizer: optax.GradientTransformationExtraArgs
    schedule: Callable[[jax.Array], jax.Array]
    microbatches: int = 1
    ema_decay: float = 0.0
    trains: Params | None = None

    def __call__(self, state: TrainState, frozen: Params, batch: Batch) -> tuple[TrainState, Metrics]:
        inputs = Inputs(frozen, state.carry, jax.random.fold_in(state.key, state.step), state.step)
        grads, outs = self.gradients(state.params, batch, inputs)
        return self.update(state, grads, outs, batch)

    def losses(self, params: Params, batch: Batch, inputs: Inputs) -> dict[str, LossOut]:
        """What each term makes of the batch, or of a part of it."""
        return losses(self.terms, self.models, params, batch, inputs)

    def objective(
        self, params: Params, batch: Batch, inputs: Inputs, weights: Weights | None = None
    ) -> tuple[jax.Array, dict[str, LossOut]]:
        """The scalar whose gradient is taken, sum_i c_i S_i / W_i; the W_i are `weights`, by default the batch's."""
        if self.trains is not None:
            params = jax.tree.map(lambda p, t: p if t else jax.lax.stop_gradient(p), params, self.trains)
        outs = self.losses(params, batch, inputs)
        return weighted_sum(self.terms, outs, inputs.step, weights), outs

    def gradients(self, params: Params, batch: Batch, inputs: Inputs) -> tuple[Params, dict[str, LossOut]]:
        """The gradient by the parameters, and each term's sums over the whole batch."""
        gradient = jax.grad(self.objective, has_aux=True)
        if self.microbatches == 1:
            return gradient(params, batch, inputs)
        parts = (
            jax.tree.map(lambda x: _split(x, self.microbatches), batch),
            jax.random.split(inputs.key, self.microbatches),
        )
        weights = self.weights(params, parts, inputs)

        def add(grads: Params, part: Any) -> tuple[Params, dict[str, LossOut]]:
            batch, key = part
            more, outs = gradient(params, batch, inputs._replace(key=key), weights)
            return jax.tree.map(jnp.add, grads, more), outs

        grads, outs = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), parts)
        return grads, jax.tree.map(lambda x: jnp.sum(x, axis=0), outs)

    def weights(self, params: Params, parts: Any, inputs: Inputs) -> Weights:
        """The divisors W_i of the whole batch, added up over its parts. Where they depend on the batch alone, as masks
        do, the compiler drops the forward passes as dead code."""

        def weigh(_: None, part: Any) -> tuple[None, Weights]:
            batch, key = part
            outs = self.losses(params, batch, inputs._replace(key=key))
            return None, {name: out.weight for name, out in outs.items()}

        _, weights = jax.lax.scan(weigh, None, parts)
        return jax.tree.map(lambda w: jnp.sum(w, axis=0), weights)

    @jax.named_scope("optimizer")
    def update(
        self, state: TrainState, grads: Params, outs: dict[str, LossOut], batch: Batch
    ) -> tuple[TrainState, Metrics]:
        """The next state; that of a bad or an empty batch has the old one's parameters, moments and carries."""
        grad_norm, param_norm = optax.tree.norm(grads), optax.tree.norm(state.params)
        loss_sums = sum(out.loss_sum for out in outs.values())
        finite = jnp.isfinite(loss_sums) & jnp.isfinite(grad_norm) & jnp.isfinite(param_norm)
        supervised = sum(out.weight for out in outs.values())
        real = jnp.sum(batch["segment_ids"] > 0).astype(jnp.float32)
        ok = finite & (supervised > 0)
        updates, opt_state = self.optimizer.update(grads, state.opt_state, state.params, ok=ok)
        params = optax.apply_updates(state.params, updates)
        # Parameters change after all that reads the old ones, these norms too: otherwise XLA would copy them.
        update_norm = optax.tree.norm(updates)
        finite &= jnp.isfinite(update_norm)
        ok &= finite
        new = TrainState(
            step=state.step + 1,
            updates=jnp.where(ok, state.updates + 1, state.updates),
            params=_choose(ok, params, state.params),
            opt_state=opt_state,
            key=state.key,
            ema=None if state.ema is None else _choose(ok, self.average(state.ema, params), state.ema),
            bad_steps=jnp.where(finite, 0, state.bad_steps + 1),
            carry=_choose(ok, self.carries(state.carry, outs), state.carry),
        )
        return new, term_metrics(self.terms, outs, state.step) | {
            "tokens": _one(real),
            "supervised_fraction": (next(iter(outs.values())).weight, real),
            "grad_norm": _one(grad_norm),
            "update_ratio": _one(update_norm / param_norm),
            "learning_rate": _one(self.schedule(state.updates)),
            "nonfinite": _one(~finite),
            "nonfinite_in_a_row": _one(new.bad_steps),
            "empty_batch": _one(supervised == 0),
        }

    def average(self, ema: Params, params: Params) -> Params:
        """The moving average of the parameters after an update."""
        return jax.tree.map(lambda e, p: self.ema_decay * e + (1 - self.ema_decay) * p, ema, params)

    def carries(self, carry: Carry, outs: dict[str, LossOut]) -> Carry:
        """The next carry of each term that has one."""
        return {
            name: _replicated(term.update(carry[name], outs[name].statistics))
            for name, (term, _) in self.terms.items()
            if term.update is not None
        }


@dataclasses.dataclass(frozen=True, eq=False)
class EvalStep:
    """The metrics of one batch, (params, frozen, batch, key, carry) -> metrics; nothing is updated.

    Attributes:
      terms, models: see TrainStep.
    """

    __name__ = "evaluate"

    terms: Terms
    models: Mapping[str, Any]

    def __call__(
        self, params: Params, frozen: Params, batch: Batch, key: jax.Array, carry: Carry | None = None
    ) -> Metrics:
        """`carry` is that of the TrainState; it may be left out where no term has one."""
        step = jnp.zeros((), jnp.int32)
        inputs = Inputs(frozen, carry or {}, key, step)
        return term_metrics(self.terms, losses(self.terms, self.models, params, batch, inputs), step)


make_train_step, make_eval_step = TrainStep, EvalStep  # their names until all callers have moved


def losses(terms: Terms, models: Mapping[str, Any], params: Params, batch: Batch, inputs: Inputs) -> dict[str, LossOut]:
    """What each term makes of a batch; every forward pass is made once, however many terms read it."""
    forward = Forward(models, {**inputs.frozen, **params}, batch, hidden_states(terms))
    return {
        name: term.loss(
            forward, batch, inputs.key, inputs.step, *([] if term.init_carry is None else [inputs.carry[name]])
        )
        for name, (term, _) in terms.items()
    }


def weighted_sum(
    terms: Terms, outs: Mapping[str, LossOut], step: jax.Array, weights: Weights | None = None
) -> jax.Array:
    """sum_i c_i(step) S_i / W_i, the W_i constants: those of `weights`, by default the terms' own."""
    weights = weights or {name: out.weight for name, out in outs.items()}
    return sum(c(step) * outs[name].loss_sum / _divisor(weights[name]) for name, (_, c) in terms.items())


def hidden_states(terms: Terms) -> dict[str, tuple[int, ...]]:
    """Role -> the layers whose hidden states any of the terms reads."""
    states: dict[str, set[int]] = {}
    for term, _ in terms.values():
        for role, layers in term.states.items():
            states.setdefault(role, set()).update(layers)
    return {role: tuple(sorted(layers)) for role, layers in states.items()}


def _choose(ok: jax.Array, new: Any, old: Any) -> Any:
    """`new` where `ok`, else `old`, leaf by leaf."""
    return jax.tree.map(lambda a, b: jnp.where(ok, a, b), new, old)


def _replicated(tree: Any) -> Any:
    """A pytree that every device holds whole."""
    return jax.tree.map(lambda x: sharding.constrain(x, (None,) * x.ndim), tree)


def term_metrics(terms: Terms, outs: Mapping[str, LossOut], step: jax.Array) -> Metrics:
    """With one term, its metrics and `loss`; with several, "term/name" each, and their weighted sum as `loss`."""
    metrics: Metrics = {}
    for name, out in outs.items():
        prefix = "" if len(outs) == 1 else f"{name}/"
        metrics |= {prefix + k: v for k, v in out.metrics.items()} | {f"{prefix}loss": (out.loss_sum, out.weight)}
    if len(outs) > 1:
        metrics["loss"] = _one(weighted_sum(terms, outs, step))
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
