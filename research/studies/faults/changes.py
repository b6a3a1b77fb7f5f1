"""Faults that no config can say: changes of a run's programs, of its batches and of what it begins with; losses.py
has those of a loss."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from research.devices import compilation
from research.diagnosis.subject import Subject
from research.models import transformer
from research.objectives.types import Batch
from research.run.assemble import Parts
from research.train import TrainState, TrainStep

ChangeParts = Callable[[Parts], Parts]
ChangeBatch = Callable[[dict[str, jax.Array]], dict[str, jax.Array]]
EXPLODES_AT, LOST_EVERY = 25, 8
_FACTOR = 1000.0
_LETTERS = slice(ord("a"), ord("z") + 1)


def with_step(parts: Parts, change: Callable[[TrainStep], TrainStep]) -> Parts:
    """The parts with another train step, jitted anew."""
    options = compilation.compiler_options(parts.state.step.sharding.mesh)
    return parts._replace(step=jax.jit(change(inspect.unwrap(parts.step)), donate_argnums=0, compiler_options=options))


def of_kind(kind: type[TrainStep]) -> ChangeParts:
    """Changes the train step's class."""

    def change(step: TrainStep) -> TrainStep:
        return kind(**{field.name: getattr(step, field.name) for field in dataclasses.fields(step)})

    return lambda parts: with_step(parts, change)


class Unreached(TrainStep):
    """The loss doesn't reach what is trained."""

    def objective(self, params: Any, *rest: Any) -> Any:
        return super().objective(jax.lax.stop_gradient(params), *rest)


class Ascending(TrainStep):
    """The gradient has the wrong sign."""

    def gradients(self, *args: Any) -> Any:
        grads, outs = super().gradients(*args)
        return jax.tree.map(jnp.negative, grads), outs


class Exploding(TrainStep):
    """One gradient is far too large."""

    def gradients(self, params: Any, frozen: Any, batch: Batch, inputs: Any) -> Any:
        grads, outs = super().gradients(params, frozen, batch, inputs)
        factor = jnp.where(inputs.step == EXPLODES_AT, _FACTOR, 1.0)
        return jax.tree.map(lambda g: g * factor, grads), outs


class Accumulating(TrainStep):
    """Gradients aren't zeroed: those of all steps before are added. The optimizer's state has them beside its own."""

    def update(self, state: TrainState, grads: Any, *rest: Any) -> Any:
        own, before = state.opt_state
        whole = jax.tree.map(jnp.add, before, grads)
        after, metrics = super().update(state.replace(opt_state=own), whole, *rest)
        return after.replace(opt_state=(after.opt_state, whole)), metrics


class Forgetful(TrainStep):
    """The optimizer's moments are lost every few steps."""

    def update(self, state: TrainState, *rest: Any) -> Any:
        after, metrics = super().update(state, *rest)
        lost = after.step % LOST_EVERY == 0
        kept = jax.tree.map(lambda x: jnp.where(lost, jnp.zeros_like(x), x), after.opt_state)
        return after.replace(opt_state=kept), metrics


def with_sums(subject: Subject) -> Subject:
    """The subject with room for the gradients of Accumulating."""
    state = subject.state
    return dataclasses.replace(
        subject, state=state.replace(opt_state=(state.opt_state, jax.tree.map(jnp.zeros_like, state.params)))
    )


def stale(parts: Parts) -> Parts:
    """The optimizer updates other parameters than those that are trained."""

    def change(step: TrainStep) -> TrainStep:
        own = step.optimizer

        def update(*args: Any, **options: Any) -> Any:
            updates, state = own.update(*args, **options)
            return jax.tree.map(jnp.zeros_like, updates), state

        return dataclasses.replace(step, optimizer=optax.GradientTransformationExtraArgs(own.init, update))

    return with_step(parts, change)


def with_hidden(change: Callable[[Any], Callable[..., Any]], training_only: bool = False) -> ChangeParts:
    """Changes the policy's pass; `change` is handed its model. With `training_only`, in the train step alone."""

    def other(models: Any) -> Any:
        return {**models, "policy": models["policy"]._replace(hidden=change(models["policy"]))}

    def change_parts(parts: Parts) -> Parts:
        changed = with_step(parts, lambda step: dataclasses.replace(step, models=other(step.models)))
        if training_only:
            return changed
        evaluate = inspect.unwrap(parts.evaluate)
        evaluate = dataclasses.replace(evaluate, models=other(evaluate.models))
        return changed._replace(models=other(parts.models), evaluate=jax.jit(evaluate))

    return change_parts


def not_causal(model: Any) -> Callable[..., Any]:
    """A pass in which all tokens of a document see each other."""
    return functools.partial(transformer.hidden, dataclasses.replace(model.config, causal=False), model.rules)


def across_documents(model: Any) -> Callable[..., Any]:
    """A pass in which the documents of a row see each other."""

    def hidden(params: Any, batch: Batch) -> jax.Array:
        place = jnp.broadcast_to(jnp.arange(batch["tokens"].shape[1], dtype=jnp.int32), batch["tokens"].shape)
        real = (batch["segment_ids"] > 0).astype(jnp.int32)
        return model.hidden(params, {**batch, "segment_ids": real, "positions": place})

    return hidden


def without_positions(model: Any) -> Callable[..., Any]:
    """A pass in which all tokens stand at one position."""
    return lambda params, batch: model.hidden(params, {**batch, "positions": jnp.zeros_like(batch["positions"])})


def other_base(model: Any) -> Callable[..., Any]:
    """A pass with another base of RoPE than the one that the config names."""
    return functools.partial(transformer.hidden, dataclasses.replace(model.config, rope_theta=20.0), model.rules)


def dropping(rate: float) -> Callable[[Any], Callable[..., Any]]:
    """A pass of which so much of the last hidden states is left out; of a batch the same each time."""

    def change(model: Any) -> Callable[..., Any]:
        def hidden(params: Any, batch: Batch) -> jax.Array:
            y = model.hidden(params, batch)
            key = jax.random.fold_in(jax.random.PRNGKey(0), jnp.sum(batch["tokens"]).astype(jnp.uint32))
            kept = jax.random.bernoulli(key, 1 - rate, y.shape)
            return jnp.where(kept, y / jnp.asarray(1 - rate, y.dtype), jnp.zeros_like(y))

        return hidden

    return change


def masked(batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Nothing is supervised."""
    return {**batch, "loss_mask": jnp.zeros_like(batch["loss_mask"])}


def mostly_masked(batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """One token in a hundred of those that were supervised still is."""
    kept = jax.random.bernoulli(_key(batch), 0.01, batch["loss_mask"].shape)
    return {**batch, "loss_mask": jnp.where(kept, batch["loss_mask"], 0.0)}


def sometimes_masked(batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """In half of the batches nothing is supervised."""
    return {**batch, "loss_mask": jnp.where(jax.random.bernoulli(_key(batch), 0.5), batch["loss_mask"], 0.0)}


def infinite(batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Weights of tokens are infinite."""
    return {**batch, "loss_mask": jnp.where(batch["loss_mask"] > 0, jnp.inf, 0.0)}


def sometimes_infinite(batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The same in a quarter of the batches."""
    return jax.tree.map(lambda a, b: jnp.where(jax.random.bernoulli(_key(batch), 0.25), a, b), infinite(batch), batch)


def without_ends(ends: tuple[int, ...]) -> ChangeBatch:
    """The tokens that end an answer aren't supervised."""

    def change(batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        end = jnp.isin(batch["tokens"], jnp.asarray(ends, jnp.int32))
        return {**batch, "loss_mask": jnp.where(end, 0.0, batch["loss_mask"])}

    return change


def beyond(batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Some ids are larger than the vocabulary."""
    tokens = batch["tokens"]
    return {**batch, "tokens": jnp.where((tokens > ord("m")) & (tokens < 256), tokens + 512, tokens)}


def twice_begun(begin: int) -> ChangeBatch:
    """Documents have the token that begins them twice."""

    def change(batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        second = (batch["positions"] == 1) & (batch["segment_ids"] > 0)
        return {**batch, "tokens": jnp.where(second, begin, batch["tokens"])}

    return change


def always_the_first() -> ChangeBatch:
    """Gives the first batch that it was handed each time."""
    first: list[dict[str, jax.Array]] = []

    def change(batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        first.append(batch)
        del first[1:]
        return first[0]

    return change


def begun(subject: Subject, change: Callable[[Any], Any], role: str = "policy") -> Subject:
    """The subject, whose run begins with other parameters of a role."""
    own = subject.state.params[role]
    # Where they lie already: the compiled programs are for that.
    placed = jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), change(own), own)
    params = {**subject.state.params, role: placed}
    return dataclasses.replace(
        subject,
        state=subject.state.replace(params=params),
        first_params=lambda: jax.tree.map(jnp.copy, params),
    )


def kernel(params: Any, path: str, change: Callable[[jax.Array], jax.Array]) -> Any:
    """Parameters with one changed: "layers/mlp/up/kernel"."""
    name, _, rest = path.partition("/")
    return {**params, name: kernel(params[name], rest, change) if rest else change(params[name])}


def saturated(params: Any) -> Any:
    """Queries and keys are so large that each token sees one other alone."""
    for name in ("q", "k"):
        params = kernel(params, f"layers/attention/{name}/kernel", lambda w: 25 * w)
    return params


def dead_mlp(params: Any) -> Any:
    """The two factors of each product of the MLP are 0."""
    for name in ("up", "down"):
        params = kernel(params, f"layers/mlp/{name}/kernel", jnp.zeros_like)
    return params


def dead_units(params: Any) -> Any:
    """The MLP's units are below 0 for all inputs."""
    return kernel(params, "layers/mlp/up/bias", lambda b: b - 50)


def same_router(params: Any) -> Any:
    """The routers of a mixture of experts tell no expert from another."""
    return kernel(params, "layers/mlp/router/kernel", jnp.zeros_like)


def both_zero(params: Any) -> Any:
    """Both matrices of each low-rank map are 0."""

    def one(path: tuple, x: jax.Array) -> jax.Array:
        return jnp.zeros_like(x) if any(getattr(key, "key", "") == "lora" for key in path[-2:-1]) else x

    return jax.tree_util.tree_map_with_path(one, params)


def drawn_anew(only_layers: bool) -> Callable[[Any], Any]:
    """Parameters, or those of the layers alone, are random."""

    def change(params: Any) -> Any:
        def one(path: tuple, x: jax.Array) -> jax.Array:
            name = jax.tree_util.keystr(path)
            if "scale" in name or (only_layers and "layers" not in name):
                return x
            key = jax.random.fold_in(jax.random.PRNGKey(7), sum(name.encode()))
            return 0.02 * jax.random.normal(key, x.shape, x.dtype)

        return jax.tree_util.tree_map_with_path(one, params)

    return change


def new_rows(params: Any) -> Any:
    """The embeddings of half of the small letters are as they were drawn, far larger than the trained ones."""
    rows = params["embed"]
    own = jax.random.normal(jax.random.PRNGKey(3), rows[_LETTERS].shape, rows.dtype)
    odd = jnp.arange(own.shape[0])[:, None] % 2 == 1
    scale = 8 * jnp.sqrt(jnp.mean(jnp.square(rows[_LETTERS])))
    return {**params, "embed": rows.at[_LETTERS].set(jnp.where(odd, scale * own, rows[_LETTERS]))}


def in_bfloat16(params: Any) -> Any:
    """Parameters are stored in bfloat16."""
    return jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)


def teacher_of_other_tokens(subject: Subject) -> Subject:
    """The teacher's ids mean other tokens."""
    teacher = subject.frozen["teacher"]
    order = jax.random.permutation(jax.random.PRNGKey(5), 256)
    rows = teacher["embed"].at[:256].set(teacher["embed"][order])
    return dataclasses.replace(subject, frozen={**subject.frozen, "teacher": {**teacher, "embed": rows}})


def _key(batch: dict[str, jax.Array]) -> jax.Array:
    """A random key that depends on the batch alone."""
    return jax.random.fold_in(jax.random.PRNGKey(11), jnp.sum(batch["tokens"]).astype(jnp.uint32))
