"""The train step: pure, jitted once, the same for every objective."""

import dataclasses
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from research import params as params_lib
from research import step_signals, updates
from research.devices import sharding
from research.models import kernels
from research.objectives import terms as terms_lib
from research.objectives.terms import Carry, Inputs, Metrics, Terms, Weights
from research.objectives.types import Batch, Forward, LossOut
from research.optim import Rates

Params = Any
Schedule = Callable[..., jax.Array]  # (updates made, the highest rate if it is another) -> learning rate


@flax.struct.dataclass
class TrainState:
    """All that a run changes, apart from its place in the data.

    Attributes:
      step: int32, batches seen.
      updates: int32, updates made: `step` less those skipped. The learning-rate schedule follows it.
      params: role -> the parameters that are trained, and no others (see params.split); under "objectives" those that
        belong to a term.
      opt_state: of optax.
      key: the run's random key; step t uses fold_in(key, t).
      ema: moving average of params, in float32 at least (None unless asked for).
      bad_steps: int32, updates skipped in a row because the loss, the gradient or the update wasn't finite.
      carry: what objectives remember across steps.
      synced: role -> the parameters of a role that follows another: what is trained of that one, as it was.
    """

    step: jax.Array
    updates: jax.Array
    params: Params
    opt_state: Any
    key: jax.Array
    ema: Params | None
    bad_steps: jax.Array
    carry: Carry
    synced: Params = flax.struct.field(default_factory=dict)


class Sync(NamedTuple):
    """How a role follows another.

    Attributes:
      owner: the role that it follows.
      every: steps from one move to the next.
      weight: how far it moves; see config.RoleSection.
    """

    owner: str
    every: int
    weight: float


def init_state(
    params: Params,
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    ema: bool = False,
    carry: Carry | None = None,
    syncs: Mapping[str, Sync] | None = None,
) -> TrainState:
    """The state before the first step. `key` is a raw uint32 key, which every checkpoint format can hold."""
    syncs = syncs or {}
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        updates=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        key=key,
        ema=jax.tree.map(lambda p: params_lib.widened(jnp.copy(p)), params) if ema else None,
        bad_steps=jnp.zeros((), jnp.int32),
        carry=carry or {},
        synced={role: jax.tree.map(jnp.copy, params[sync.owner]) for role, sync in syncs.items()},
    )


@dataclasses.dataclass(frozen=True, eq=False)
class TrainStep:
    """One update, (state, frozen, batch, rates) -> (state, metrics): pure, and the same for every objective.

    `rates` are the highest learning rates (see optim.rates), by default those that the optimizer was made with: as an
    argument they are no part of the compiled program, and runs at other rates share it.

    The loss minimised is sum_i c_i(step) * S_i / W_i over the terms i, S_i and W_i being sums over the whole batch: the
    same for any number of microbatches, devices and hosts. W_i is treated as a constant.

    Attributes:
      terms: of the objective, by name.
      models: role -> Model.
      optimizer: clipping and learning rate included; its `update` takes `ok` and `rates` (see optim.make_optimizer).
      schedule: updates made -> learning rate, for the metrics (see optim.make_schedule).
      group_schedules: the same of each group of parameters that has its own (see optim.make_group_schedules).
      microbatches: the batch is cut along its first axis into this many parts, which run one after the other.
      ema_decay: of the moving average of parameters, where the state has one.
      sources: the names of the data's sources, in the order of the batch field `source`.
      syncs: of each role that follows another.
      clips: what optim clips gradients to, for the metrics (see optim.clips).
      sampled: of each parameter that is trained the axis along which the update's effect is sampled (see
        step_signals.update_shares); None for any.
      log_every: what costs a part of a step is measured at the steps whose number is a multiple of this, and
      last: at the step of this number. Elsewhere it has the weight 0.
      rounding: of parameters in bfloat16 after an update, "nearest" or "stochastic".
    """

    __name__ = "step"  # what jax.jit calls the program, and traces show

    terms: Terms
    models: Mapping[str, Any]
    optimizer: optax.GradientTransformationExtraArgs
    schedule: Schedule
    microbatches: int = 1
    ema_decay: float = 0.0
    sources: tuple[str, ...] = ()
    group_schedules: Mapping[str, Schedule] = dataclasses.field(default_factory=dict)
    syncs: Mapping[str, Sync] = dataclasses.field(default_factory=dict)
    clips: step_signals.Clips = ()
    sampled: Any = None
    log_every: int = 1
    last: int = 0
    rounding: str = "nearest"

    def __call__(
        self, state: TrainState, frozen: Params, batch: Batch, rates: Rates | None = None
    ) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(state.key, state.step)
        inputs = Inputs(key, state.step, terms_lib.row_numbers(batch), state.carry)
        grads, outs = self.gradients(state.params, {**frozen, **state.synced}, batch, inputs)
        return self.update(state, grads, outs, batch, rates)

    def forward(
        self, params: Params, frozen: Params, batch: Batch, inputs: Inputs, probes: Params | None = None
    ) -> Forward:
        """The models on a batch, or on a part of it."""
        key = jax.random.fold_in(inputs.key, np.uint32(zlib.crc32(b"dropout")))
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, inputs.rows)
        whole, states = params_lib.join(params, frozen, probes or {}), terms_lib.hidden_states(self.terms)
        return Forward(self.models, whole, batch, states, keys)

    def logged(self, step: jax.Array) -> jax.Array | bool:
        """Whether a line of the log is due after a step from the state with this `step`."""
        number = step + 1
        return True if self.log_every == 1 else (number % self.log_every == 0) | (number == self.last)

    @property
    def reads(self) -> set[str]:
        """The batch fields that any term reads."""
        return {field for term in self.terms.values() for field in term.objective.fields}

    def objective(
        self,
        params: Params,
        frozen: Params,
        batch: Batch,
        inputs: Inputs,
        weights: Weights | None = None,
        probes: Params | None = None,
    ) -> tuple[jax.Array, dict[str, LossOut]]:
        """The scalar whose gradient is taken, sum_i c_i S_i / W_i; the W_i are `weights`, by default the batch's. And
        what each term makes of the batch, or of a part of it, with what is measured of the predictions."""
        forward = self.forward(params, frozen, batch, inputs, probes)
        outs = terms_lib.losses(self.terms, forward, inputs, self.sources)
        outs = step_signals.attach(outs, forward, self.reads, self.logged(inputs.step))
        return terms_lib.weighted_sum(self.terms, outs, inputs.step, weights), outs

    def gradients(
        self, params: Params, frozen: Params, batch: Batch, inputs: Inputs
    ) -> tuple[Params, dict[str, LossOut]]:
        """The gradient by the parameters, and each term's sums over the whole batch."""
        if self.microbatches == 1:
            return self.gradient(params, frozen, batch, inputs)
        parts = jax.tree.map(lambda x: _split(x, self.microbatches), (batch, inputs.rows))
        inputs = inputs._replace(gathered=self.gathered(params, frozen, parts, inputs))
        weights = self.weights(params, frozen, parts, inputs)

        def add(grads: Params, part: tuple[Batch, jax.Array]) -> tuple[Params, dict[str, LossOut]]:
            batch, rows = part
            more, outs = self.gradient(params, frozen, batch, inputs._replace(rows=rows), weights)
            return jax.tree.map(lambda total, g: total + g.astype(total.dtype), grads, more), outs

        zeros = jax.tree.map(lambda p: params_lib.widened(jnp.zeros_like(p)), params)
        grads, outs = jax.lax.scan(add, zeros, parts)
        return grads, jax.tree.map(lambda x: jnp.sum(x, axis=0), outs)

    def gradient(
        self, params: Params, frozen: Params, batch: Batch, inputs: Inputs, weights: Weights | None = None
    ) -> tuple[Params, dict[str, LossOut]]:
        """The gradient of `objective` by the parameters, and what else it gives, with what was lost in 8 bits."""
        probes = self.probes(params, frozen, inputs.step)
        gradient = jax.grad(self.objective, argnums=(0, 5), has_aux=True)
        (grads, counts), outs = gradient(params, frozen, batch, inputs, weights, probes)
        return grads, step_signals.attach_rounding(outs, counts)

    def probes(self, params: Params, frozen: Params, step: jax.Array) -> Params:
        """Probes of the trained roles that multiply in 8 bits, which count where a line of the log is due."""
        due, whole = jnp.asarray(self.logged(step), jnp.float32), params_lib.join(params, frozen)
        rounded = [r for r in params if r in self.models and self.models[r].config.precision != "dtype"]
        return {role: kernels.probes(whole[role], due) for role in rounded}

    def gathered(
        self, params: Params, frozen: Params, parts: tuple[Batch, jax.Array], inputs: Inputs
    ) -> dict[str, Any]:
        """What the terms gather of the whole batch, by row, from its parts. Costs nothing where none gathers."""

        def gather(_: None, part: tuple[Batch, jax.Array]) -> tuple[None, dict[str, Any]]:
            batch, rows = part
            forward = self.forward(params, frozen, batch, inputs._replace(rows=rows))
            return None, terms_lib.gather(self.terms, forward, self.sources)

        _, values = jax.lax.scan(gather, None, parts)
        return jax.tree.map(_join, values)

    def weights(self, params: Params, frozen: Params, parts: tuple[Batch, jax.Array], inputs: Inputs) -> Weights:
        """The divisors W_i of the whole batch, added up over its parts. Where they depend on the batch alone, as masks
        do, the compiler drops the forward passes as dead code."""

        def weigh(_: None, part: tuple[Batch, jax.Array]) -> tuple[None, Weights]:
            batch, rows = part
            inputs_of_part = inputs._replace(rows=rows)
            forward = self.forward(params, frozen, batch, inputs_of_part)
            outs = terms_lib.losses(self.terms, forward, inputs_of_part, self.sources)
            return None, {name: out.weight for name, out in outs.items()}

        _, weights = jax.lax.scan(weigh, None, parts)
        return jax.tree.map(lambda w: jnp.sum(w, axis=0), weights)

    @jax.named_scope("optimizer")
    def update(
        self, state: TrainState, grads: Params, outs: dict[str, LossOut], batch: Batch, rates: Rates | None = None
    ) -> tuple[TrainState, Metrics]:
        """The next state; that of a bad or an empty batch has the old one's parameters, moments and carries."""
        outs, seen = step_signals.detach(outs)
        grads = jax.tree.map(params_lib.widened, grads)
        grad_norm = optax.tree.norm(grads)
        param_norm = optax.tree.norm(jax.tree.map(params_lib.widened, state.params))
        loss_sums = sum(out.loss_sum for out in outs.values())
        finite = jnp.isfinite(loss_sums) & jnp.isfinite(grad_norm) & jnp.isfinite(param_norm)
        supervised = sum(out.weight for out in outs.values())
        real = jnp.sum(batch["segment_ids"] > 0).astype(jnp.float32)
        ok = finite & (supervised > 0)
        changes, opt_state = self.optimizer.update(grads, state.opt_state, state.params, ok=ok, rates=rates)
        key = self.rounding_key(state)
        params = updates.apply(state.params, changes, key)
        # Parameters change after all that reads the old ones, these norms too: otherwise XLA would copy them.
        update_norm = optax.tree.norm(changes)
        due = self.logged(state.step)
        norms = step_signals.where(due, step_signals.gradient_norms, grads)
        shares = step_signals.update_shares(state.params, changes, self.sampled, due, key)
        finite &= jnp.isfinite(update_norm) & step_signals.settled(seen, shares)
        ok &= finite
        kept = _choose(ok, params, state.params)
        new = TrainState(
            step=state.step + 1,
            updates=jnp.where(ok, state.updates + 1, state.updates),
            params=kept,
            opt_state=opt_state,
            key=state.key,
            ema=None if state.ema is None else _choose(ok, self.average(state.ema, params), state.ema),
            bad_steps=jnp.where(finite, 0, state.bad_steps + 1),
            carry=_choose(ok, self.carries(state.carry, outs), state.carry),
            synced={role: self.moved(role, state, kept) for role in state.synced},
        )
        measured = seen | terms_lib.metrics(self.terms, outs, state.step) | step_signals.of_batch(batch, self.reads)
        return new, measured | terms_lib.source_tokens(batch, self.sources) | {
            "tokens": _one(real),
            "supervised_fraction": (next(iter(outs.values())).weight, real),
            "grad_norm": _one(grad_norm),
            **norms,
            **step_signals.clipped(grads, self.clips),
            "param_norm": _one(param_norm),
            **step_signals.made(shares, ok),
            "update_ratio": _ratio(update_norm, param_norm),
            **self.learning_rates(state.updates, rates),
            "nonfinite": _one(~finite),
            "nonfinite_in_a_row": _one(new.bad_steps),
            "empty_batch": _one(supervised == 0),
            **_adapter_metrics(params),
        }

    def rounding_key(self, state: TrainState) -> jax.Array | None:
        """The key of a step's stochastic rounding; None where there is none."""
        if self.rounding == "nearest":
            return None
        return jax.random.fold_in(jax.random.fold_in(state.key, state.step), np.uint32(zlib.crc32(b"rounding")))

    def learning_rates(self, updates: jax.Array, rates: Rates | None) -> Metrics:
        """The learning rate of the next update, and those of groups that have their own."""
        schedules = {"": self.schedule, **self.group_schedules}
        highest = {name: () if rates is None else (rates[name],) for name in schedules}
        return {
            "learning_rate" + (f"/{name}" if name else ""): _one(schedule(updates, *highest[name]))
            for name, schedule in schedules.items()
        }

    def moved(self, role: str, state: TrainState, params: Params) -> Params:
        """The parameters of a role that follows another, after a step that has left that one with `params`.

        TR-DPO (arXiv:2404.09656), equations 4 and 5: ref <- weight * policy + (1 - weight) * ref.
        """
        owner, every, weight = self.syncs[role]
        due = (state.step + 1) % every == 0
        return jax.tree.map(
            lambda own, new: jnp.where(due, weight * new + (1 - weight) * own, own), state.synced[role], params[owner]
        )

    def average(self, ema: Params, params: Params) -> Params:
        """The moving average of the parameters after an update."""
        decay = self.ema_decay
        return jax.tree.map(lambda e, p: decay * e + (1 - decay) * p.astype(e.dtype), ema, params)

    def carries(self, carry: Carry, outs: dict[str, LossOut]) -> Carry:
        """The next carry of each term that has one."""
        return {
            name: _replicated(term.objective.update(carry[name], outs[name].statistics))
            for name, term in self.terms.items()
            if term.objective.update is not None
        }


@dataclasses.dataclass(frozen=True, eq=False)
class EvalStep:
    """The metrics of one batch, (params, frozen, batch, key, carry) -> metrics; nothing is updated.

    Attributes:
      terms, models, sources: see TrainStep.
    """

    __name__ = "evaluate"

    terms: Terms
    models: Mapping[str, Any]
    sources: tuple[str, ...] = ()

    def __call__(
        self,
        params: Params,
        frozen: Params,
        batch: Batch,
        key: jax.Array,
        carry: Carry | None = None,
        first: jax.Array | int = 0,
    ) -> Metrics:
        """`carry` is that of the TrainState; it may be left out where no term has one. `first`: see Context."""
        inputs = Inputs(key, jnp.zeros((), jnp.int32), terms_lib.row_numbers(batch), carry or {}, first=first)
        forward = Forward(self.models, params_lib.join(params, frozen), batch, terms_lib.hidden_states(self.terms))
        outs = terms_lib.losses(self.terms, forward, inputs, self.sources)
        return terms_lib.metrics(self.terms, outs, inputs.step) | terms_lib.source_tokens(batch, self.sources)


def means(parts: Iterable[Mapping[str, tuple[Any, Any]]]) -> dict[str, float]:
    """Adds up metrics over steps or batches, then divides: the mean over all of them, not a mean of means.

    Args:
      parts: one mapping per step or batch, name -> (sum, weight), scalars of any dtype; a sum may also be a vector
        (see LossOut). A name may be missing from some. Keep them as they come and call this at the end: until then
        nothing waits for the devices.

    Returns:
      name -> sum / weight, added in float64; of a vector the absolute values of its sums are added. A name whose
      weights add up to 0 has no mean, and is left out.
    """
    sums: dict[str, Any] = {}
    weights: dict[str, float] = {}
    for part in jax.device_get(list(parts)):
        for name, (total, weight) in part.items():
            sums[name] = sums.get(name, 0.0) + np.asarray(total, np.float64)
            weights[name] = weights.get(name, 0.0) + float(weight)
    totals = {name: float(np.sum(np.abs(total)) if np.ndim(total) else total) for name, total in sums.items()}
    return {name: totals[name] / weights[name] for name in sums if weights[name] != 0.0}


def _adapter_metrics(params: Params) -> Metrics:
    """`adapter_zero`, where there are adapters that begin as 0: of how many maps they are 0 still."""
    zero = [flag for role in params.values() for flag in kernels.still_zero(role)]
    return {"adapter_zero": _one(sum(flag.astype(jnp.float32) for flag in zero))} if zero else {}


def _choose(ok: jax.Array, new: Any, old: Any) -> Any:
    """`new` where `ok`, else `old`, leaf by leaf."""
    return jax.tree.map(lambda a, b: jnp.where(ok, a, b), new, old)


def _replicated(tree: Any) -> Any:
    """A pytree that every device holds whole."""
    return jax.tree.map(sharding.replicate, tree)


def _one(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.asarray(x, jnp.float32), jnp.ones((), jnp.float32)


def _ratio(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x / y as a metric, which has no value where y is 0."""
    return x / jnp.where(y == 0, 1, y), (y != 0).astype(jnp.float32)


def _split(x: jax.Array, parts: int) -> jax.Array:
    """[B, ...] -> [parts, B / parts, ...], taking every parts-th row, so that each device's rows stay on it."""
    return jnp.moveaxis(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0)


def _join(x: jax.Array) -> jax.Array:
    """[parts, B / parts, ...] -> [B, ...], the inverse of `_split`."""
    return jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:])
