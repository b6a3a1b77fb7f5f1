"""From a resolved config to models, optimizer and jitted programs. Nothing here touches a device but `initial_state`
and `read_frozen`; the mesh may be abstract."""

import concurrent.futures
import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from research import config as config_lib
from research import loading, optim, params, train
from research.config import Config
from research.devices import compilation, distributed, sharding
from research.errors import InputError, did_you_mean
from research.models import transformer
from research.objectives.terms import Terms, init_carry
from research.rollouts.answers import make_rollout
from research.sources import fields

Batch = Mapping[str, jax.ShapeDtypeStruct]


class Parts(NamedTuple):
    """What a run is made of, before anything is computed: functions and abstract arrays."""

    models: dict[str, transformer.Model]
    terms: Terms
    begin: Callable[[Any], train.TrainState]  # uint32 seed -> the state before the first step
    init_objectives: Callable[[jax.Array], dict[str, Any]]  # key -> parameters of objectives
    init_state: Callable[[dict[str, Any], jax.Array], train.TrainState]
    step: Callable[..., tuple[train.TrainState, train.Metrics]]
    evaluate: Callable[..., train.Metrics]
    rollout: Callable[..., dict[str, jax.Array]] | None  # (state, frozen, batch) -> batch with answers of the policy
    state: train.TrainState  # ShapeDtypeStructs with shardings
    frozen: dict[str, Any]  # the same, of the parameters of the other roles
    batch: dict[str, jax.ShapeDtypeStruct]


def assemble(
    config: Config,
    terms: Terms,
    mesh: Any,
    batch: Batch,
    vocab_size: int,
    *,
    stop_tokens: tuple[int, ...] = (),
) -> Parts:
    """Models, optimizer and programs for a mesh, which may be abstract.

    Args:
      config: checked.
      terms: of the objective.
      mesh: a Mesh or AbstractMesh with the axes of `sharding`.
      batch: the source's spec: the fields of a global batch.
      vocab_size: of the tokenizer.
      stop_tokens: ids that end an answer of the policy.

    Raises:
      InputError: the objective reads roles or fields that aren't there, or a size doesn't fit the mesh.
    """
    rules = sharding.make_rules(config.rules)
    sources = tuple(sorted(config.data["sources"]))
    models = make_models(config, terms, vocab_size, rules)
    _check_reads(config, terms, models, batch)
    _check_classes(config, models["policy"], batch)
    specs = {"policy": models["policy"].specs}
    own = {name: tree for name, term in terms.items() if (tree := term.specs(models))}
    if own:
        specs["objectives"] = own
    frozen = {role: transformer.in_compute_dtype(models[role]) for role in config.roles}
    trains = {"policy": params.matching(models["policy"].specs, config.trainable)} if config.trainable else None
    if trains and own:
        trains["objectives"] = params.matching(own, "")
    optimizer = optim.make_optimizer(
        config.optimizer, config.steps, params.decay_mask(specs), params.muon_dimensions(specs), trains
    )

    def init_state(values: dict[str, Any], key: jax.Array) -> train.TrainState:
        return train.init_state(values, optimizer, key, config.ema_decay > 0, init_carry(terms, batch))

    def begin(seed: jax.Array) -> train.TrainState:
        keys = jax.random.split(jax.random.PRNGKey(seed), 2)
        return init_state(params.init(specs, keys[0]), keys[1])

    placed = params.shardings(specs, mesh, rules)
    state = _place_state(init_state, optimizer, params.abstract(specs, placed), placed, mesh)
    rows = fields.shardings(mesh, batch, rules)
    where = jax.tree.map(lambda x: x.sharding, state)
    compiler_options = compilation.compiler_options(mesh)
    step = train.TrainStep(
        terms,
        models,
        optimizer,
        schedule=optim.make_schedule(config.optimizer, config.steps),
        microbatches=config.microbatches,
        ema_decay=config.ema_decay,
        trains=trains,
        sources=sources,
    )
    return Parts(
        models=models,
        terms=terms,
        begin=jax.jit(begin, out_shardings=where, compiler_options=compiler_options),
        init_objectives=jax.jit(
            lambda key: params.init({"objectives": own} if own else {}, key),
            out_shardings={"objectives": placed["objectives"]} if own else {},
        ),
        init_state=jax.jit(init_state, out_shardings=where, donate_argnums=0),
        step=jax.jit(step, donate_argnums=0, out_shardings=(where, None), compiler_options=compiler_options),
        evaluate=jax.jit(train.EvalStep(terms, models, sources)),
        rollout=_make_rollout(config, models["policy"], stop_tokens, vocab_size, rows),
        state=state,
        frozen=params.abstract(frozen, params.shardings(frozen, mesh, rules)),
        batch={k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=rows[k]) for k, v in batch.items()},
    )


def make_models(
    config: Config, terms: Terms, vocab_size: int, rules: Mapping[str, Any]
) -> dict[str, transformer.Model]:
    """The model of each role. One that reads tokens of its own has its own vocabulary."""
    reads_own = {role for term in terms.values() for role in term.objective.own_tokens}
    return {
        role: transformer.make_model(
            config_lib.model_config(config, 1 if role in reads_own else vocab_size, role=role), rules
        )
        for role in ("policy", *config.roles)
    }


def compile_step(parts: Parts, stack: contextlib.ExitStack) -> Callable[[], Any]:
    """Compiles the step in a thread, while the rest is made ready; returns what waits for the program. So does leaving
    `stack`. What the model or objective can't do shows in the trace, which is made at once.

    Several processes compile at once where they are: programs that are made side by side might differ in order.
    """
    lowered = parts.step.trace(parts.state, parts.frozen, parts.batch).lower()
    if distributed.several():
        program = lowered.compile()
        return lambda: program
    pool = stack.enter_context(concurrent.futures.ThreadPoolExecutor(1, "compile"))
    return pool.submit(lowered.compile).result


def initial_state(
    config: Config, parts: Parts, bases: Mapping[str, loading.Found], mesh: jax.sharding.Mesh
) -> train.TrainState:
    """The state before the first step, on the devices: random, or with the parameters of the policy's checkpoint."""
    seed = np.uint32(config.seed & 0xFFFFFFFF)
    if "policy" not in bases:
        return parts.begin(seed)
    keys = jax.random.split(jax.random.PRNGKey(seed), 2)
    initial = {"policy": _initial_policy(bases["policy"], parts, mesh, keys[0]), **parts.init_objectives(keys[0])}
    return parts.init_state(initial, keys[1])


def read_frozen(parts: Parts, bases: Mapping[str, loading.Found]) -> dict[str, Any]:
    """The parameters of the roles that aren't trained, on the devices."""
    return {role: _read(bases[role], like) for role, like in parts.frozen.items()}


def _initial_policy(base: loading.Found, parts: Parts, mesh: jax.sharding.Mesh, key: jax.Array) -> Any:
    """The policy's first parameters. A classifier made of a language model takes all but the head from it."""
    like, model = parts.state.params["policy"], parts.models["policy"]
    if model.config.num_labels == base.config.num_labels:
        return _read(base, like)
    body = transformer.make_model(
        dataclasses.replace(model.config, num_labels=0, head_bias=base.config.head_bias)
    ).specs
    values = base.read(body, params.shardings(body, mesh, base.rules))
    head = {name: model.specs[name] for name in like if name in ("head", "head_bias")}
    placed = {name: like[name].sharding for name in head}
    fresh = jax.jit(lambda key: params.init({"policy": head}, key)["policy"], out_shardings=placed)(key)
    return {name: fresh[name] if name in fresh else values[name] for name in like}


def _read(base: loading.Found, like: Any) -> Any:
    """The parameters of a checkpoint: `like` has their shapes, dtypes and shardings."""
    return base.read(like, jax.tree.map(lambda x: x.sharding, like))


def _make_rollout(
    config: Config, policy: transformer.Model, stop_tokens: tuple[int, ...], vocab_size: int, placed: dict[str, Any]
) -> Callable[..., dict[str, jax.Array]] | None:
    """(state, frozen, batch) -> batch with answers of the policy, jitted; None where the config asks for none."""
    if not config.rollout.share:
        return None
    sample = make_rollout(
        policy, config.rollout, seq_len=config.seq_len, stop_tokens=stop_tokens, vocab_size=vocab_size
    )

    def rollout(state: train.TrainState, frozen: Any, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        key = jax.random.fold_in(jax.random.fold_in(state.key, state.step), 1)
        return sample(state.params["policy"], batch, key)

    return jax.jit(rollout, out_shardings=placed)


def _place_state(init_state, optimizer, abstract, placed, mesh) -> train.TrainState:
    """The abstract TrainState: moments lie where their parameters lie, all else on every device."""
    replicated = sharding.named(mesh, ())
    state = jax.eval_shape(init_state, abstract, jax.ShapeDtypeStruct((2,), jnp.uint32))

    def hole(x: Any) -> bool:  # where one of several optimizers has nothing to do
        return isinstance(x, optax.MaskedNode)

    def like(moment: Any, parameter: Any) -> Any:
        if hole(moment):
            return moment
        where = parameter.sharding if moment.shape == parameter.shape else replicated
        return jax.ShapeDtypeStruct(moment.shape, moment.dtype, sharding=where)

    def everywhere(x: Any) -> Any:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated)

    opt_state = optax.tree_utils.tree_map_params(
        optimizer, like, state.opt_state, abstract, transform_non_params=everywhere, is_leaf=hole
    )
    rest = jax.tree.map(everywhere, state.replace(params=None, opt_state=None, ema=None))
    return rest.replace(params=abstract, opt_state=opt_state, ema=state.ema and abstract)


def _check_reads(config: Config, terms: Terms, models: Mapping[str, Any], batch: Batch) -> None:
    """Raises InputError where a term reads a role or a batch field that isn't there, or no term reads a role."""
    for name, term in terms.items():
        for role in term.objective.trainable + term.objective.frozen:
            if role not in models:
                raise InputError(
                    f"objective.terms.{name}: needs a model in the role {role!r}, and there are {', '.join(models)}. "
                    f'Name one: roles = {{"{role}": {{"init_from": ...}}}}.'
                )
        for field in term.objective.fields:
            if field not in batch:
                raise InputError(
                    f"objective.terms.{name}: reads the batch field {field!r}, which data.path = "
                    f"{config.data['path']!r} doesn't give.{did_you_mean(field, batch)}"
                )
    read = {role for term in terms.values() for role in term.objective.trainable + term.objective.frozen}
    if unread := [role for role in config.roles if role not in read]:
        raise InputError(f"roles.{unread[0]}: no term of the objective reads it. Leave it out, or add the term.")


def _check_classes(config: Config, policy: transformer.Model, batch: Batch) -> None:
    """Raises InputError where the head's classes aren't those of the data."""
    labels, num_labels = batch.get("label_probs"), policy.config.num_labels
    if labels is not None and num_labels and num_labels != labels.shape[-1]:
        raise InputError(
            f"model.num_labels = {num_labels}, and the labels of data.path = {config.data['path']!r} have "
            f"{labels.shape[-1]} classes. Set model.num_labels to that."
        )
