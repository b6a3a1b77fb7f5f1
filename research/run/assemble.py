"""From a resolved config to models, optimizer and jitted programs. Nothing here touches a device but `initial` and
`resumed_frozen`; the mesh may be abstract."""

import concurrent.futures
import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from research import config as config_lib
from research import loading, moments, optim, params, step_signals, train
from research.config import Config
from research.devices import compilation, distributed, memory, sharding
from research.errors import InputError
from research.models import adapters, transformer
from research.models.shared_prompts import SharedPrompts
from research.objectives import terms as terms_lib
from research.objectives.terms import Terms, init_carry
from research.objectives.types import Sampler
from research.rollouts import model_rewards
from research.rollouts import scores as scores_lib
from research.rollouts.answers import make_rollout
from research.run import checks
from research.run import roles as roles_lib
from research.sources import fields
from research.sources.tokenizers import Tokenizer


class Parts(NamedTuple):
    """What a run is made of, before anything is computed: functions and abstract arrays."""

    models: dict[str, transformer.Model]
    terms: Terms
    roles: roles_lib.Roles
    begin: Callable[[Any], tuple[train.TrainState, Any]]  # uint32 seed -> random (state, frozen), of the trained roles
    init_state: Callable[[dict[str, Any], jax.Array], train.TrainState]  # (trained parameters, key) -> state
    step: Callable[..., tuple[train.TrainState, train.Metrics]]  # (state, frozen, batch, rates) -> (state, metrics)
    evaluate: Callable[..., train.Metrics]
    rollout: Callable[..., dict[str, jax.Array]] | None  # (state, frozen, batch) -> batch with answers of the policy
    scores: Callable[..., dict[str, jax.Array]] | None  # (state, frozen, batch) -> what models say of it; see Scores
    reward_members: Callable[..., dict[str, jax.Array]] | None  # (frozen, batch) -> see model_rewards.Members
    state: train.TrainState  # ShapeDtypeStructs with shardings
    frozen: dict[str, Any]  # the same, of the parameters of each role that aren't trained
    batch: dict[str, jax.ShapeDtypeStruct]
    rates: dict[str, jax.ShapeDtypeStruct]  # see optim.rates


@dataclasses.dataclass(frozen=True)
class Beginning:
    """The state before the first step, pure.

    Attributes:
      roles: the parameters.
      optimizer: of what is trained.
      ema: whether there is a moving average.
      carry: of the terms.
      syncs: of the roles that follow another.
    """

    roles: roles_lib.Roles
    optimizer: optax.GradientTransformation
    ema: bool
    carry: Callable[[], Any]
    syncs: Mapping[str, train.Sync] = dataclasses.field(default_factory=dict)

    def state(self, trained: dict[str, Any], key: jax.Array) -> train.TrainState:
        """The state with some parameters."""
        return train.init_state(trained, self.optimizer, key, self.ema, self.carry(), self.syncs)

    def draw(self, seed: jax.Array) -> tuple[train.TrainState, dict[str, Any]]:
        """The state with random parameters, and what isn't trained of its roles."""
        keys = jax.random.split(jax.random.PRNGKey(seed), 2)
        trained, frozen = self.roles.arrange(self.roles.draw(keys[0]))
        return self.state(trained, keys[1]), frozen


def assemble(
    config: Config,
    terms: Terms,
    mesh: Any,
    batch: checks.Batch,
    vocab_size: int,
    *,
    tokenizer: Tokenizer | None = None,
) -> Parts:
    """Models, optimizer and programs for a mesh, which may be abstract.

    Args:
      config: checked.
      terms: of the objective.
      mesh: a Mesh or AbstractMesh with the axes of `sharding`.
      batch: the source's spec: the fields of a global batch.
      vocab_size: of the tokenizer.
      tokenizer: of the run, which says what ends an answer of the policy and which tokens an adapter begins with; None
        where only shapes are to be known.

    Raises:
      InputError: the objective reads roles or fields that aren't there, or a size doesn't fit the mesh.
    """
    rules = sharding.make_rules(config.rules)
    sources = tuple(sorted(config.data.sources))
    models = make_models(config, terms, vocab_size, rules, tokenizer)
    checks.check(config, terms, models, batch)
    term_specs = {name: tree for name, term in terms.items() if (tree := term.specs(models))}
    roles = roles_lib.make_roles(config, checks.trained_roles(terms), models, term_specs)
    optimizer = _make_optimizer(config, roles)
    beginning = Beginning(
        roles, optimizer, config.ema_decay > 0, functools.partial(init_carry, terms, batch), _syncs(config)
    )
    placed = params.shardings(roles.trained, mesh, rules)
    state = _place_state(beginning, params.abstract(roles.trained, placed), mesh)
    frozen = params.abstract(roles.frozen, params.shardings(roles.frozen, mesh, rules))
    rows = fields.shardings(mesh, batch, rules)
    where = jax.tree.map(lambda x: x.sharding, (state, {role: frozen[role] for role in roles.partial}))
    compiler_options = compilation.compiler_options(mesh)
    step = _make_step(config, terms, _sharing(config, terms, models, mesh, rules), optimizer, sources)
    step = dataclasses.replace(
        step,
        clips=optim.clips(config.optimizer, optim.group_labels(config.optimizer, roles.trained)),
        sampled=jax.tree.map(step_signals.free_axis, state.params),
    )
    return Parts(
        models=models,
        terms=terms,
        roles=roles,
        begin=jax.jit(beginning.draw, out_shardings=where, compiler_options=compiler_options),
        init_state=jax.jit(beginning.state, out_shardings=where[0], donate_argnums=0),
        step=jax.jit(step, donate_argnums=0, out_shardings=(where[0], None), compiler_options=compiler_options),
        evaluate=jax.jit(train.EvalStep(terms_lib.on_data(terms, config.rollout.pairs), models, sources)),
        rollout=_make_rollout(config, models["policy"], tokenizer.stop if tokenizer else (), vocab_size, rows),
        scores=_make_scores(config, models, vocab_size, batch, mesh),
        reward_members=_make_reward_members(config, models, mesh),
        state=state,
        frozen=frozen,
        batch={k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=rows[k]) for k, v in batch.items()},
        rates={
            name: jax.ShapeDtypeStruct(rate.shape, rate.dtype, sharding=sharding.named(mesh, ()))
            for name, rate in optim.rates(config.optimizer).items()
        },
    )


def check_memory(config: Config, parts: Parts, mesh: jax.sharding.Mesh) -> None:
    """Refuses a run whose parameters and optimizer state alone are more than its devices can hold.

    Gradients and activations aren't counted, so that nothing is refused that could run.

    Raises:
      InputError: they are more.
    """
    own = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]
    most = memory.most_on_a_device(own[0], len(own)) if own else None
    state, frozen = memory.bytes_on_a_device(parts.state), memory.bytes_on_a_device(parts.frozen)
    if most is None or state + frozen <= most:
        return
    c = parts.models["policy"].config
    names = ("d_model", "num_layers", "d_ff", "vocab_size")
    shape = ", ".join(f"model.{name} = {getattr(c, name):,}" for name in names)
    beside = f" and {frozen / 1e9:,.1f} GB that isn't trained" if frozen else ""
    raise InputError(
        f"{shape}: parameters and the state of optimizer.name = {config.optimizer.name!r} take {state / 1e9:,.1f} GB "
        f"on each device{beside}, and a device holds {most / 1e9:,.1f} GB. Lower the sizes, part them among more "
        "devices (mesh.fsdp, mesh.tensor), train a part (adapter), or take an optimizer with less state; "
        "understudy plan says what fits."
    )


def learning_rates(config: Config, parts: Parts) -> optim.Rates:
    """The highest learning rates, which the step takes, on every device."""
    return {
        name: jax.make_array_from_callback(rate.shape, parts.rates[name].sharding, lambda _, rate=rate: rate)
        for name, rate in optim.rates(config.optimizer).items()
    }


def _make_step(
    config: Config,
    terms: Terms,
    models: Mapping[str, transformer.Model],
    optimizer: optax.GradientTransformationExtraArgs,
    sources: tuple[str, ...],
) -> train.TrainStep:
    return train.TrainStep(
        terms,
        models,
        optimizer,
        schedule=optim.make_schedule(config.optimizer, config.steps),
        group_schedules=optim.make_group_schedules(config.optimizer, config.steps),
        microbatches=config.microbatches,
        ema_decay=config.ema_decay,
        sources=sources,
        syncs=_syncs(config),
        log_every=config.log.every,
        last=config.steps,
        rounding=config.optimizer.rounding,
    )


def _sharing(
    config: Config, terms: Terms, models: Mapping[str, transformer.Model], mesh: Any, rules: sharding.Rules
) -> Mapping[str, transformer.Model]:
    """The models of a step, whose policy computes the prompts of a batch once where rollout.shared_prompts says so.

    Raises:
      InputError: it can't.
    """
    if not config.rollout.shared_prompts:
        return models
    field, answers = "rollout.shared_prompts = True", config.rollout.answers
    parts, times = (sharding.num_parts(rules[axis], mesh) for axis in ("batch", "time"))
    together = answers * config.microbatches * parts
    if config.batch_size % together:
        raise InputError(
            f"{field}: batch_size = {config.batch_size} isn't a multiple of {together}: rollout.answers = {answers} "
            f"stay together in each of microbatches = {config.microbatches} on each of {parts} parts of the mesh. "
            "Change any of them, or leave it out."
        )
    if own := [name for name, term in terms.items() if term.objective.gives or term.objective.hides is not None]:
        raise InputError(
            f"{field}: objective.terms.{own[0]} shows the policy other prompts in each row. Leave one of them out."
        )
    if times > 1:
        raise InputError(f"{field}: goes with no mesh.sequence, which cuts rows. Leave one of them out.")
    adapter = models["policy"].adapter
    if adapter is not None and adapter.dropout:
        raise InputError(
            f"{field}: adapter.dropout = {adapter.dropout} leaves out other inputs in each row. Leave one of them out."
        )
    prompts = SharedPrompts(answers, config.seq_len - config.rollout.max_new_tokens)
    return {**models, "policy": transformer.sharing(models["policy"], prompts)}


def _make_optimizer(config: Config, roles: roles_lib.Roles) -> optax.GradientTransformationExtraArgs:
    specs = roles.trained
    if config.optimizer.moments == "int8":
        moments.check(specs)
    return optim.make_optimizer(
        config.optimizer,
        config.steps,
        params.decay_mask(specs),
        params.muon_dimensions(specs),
        optim.group_labels(config.optimizer, specs),
    )


def abstract_moments(config: Config, roles: roles_lib.Roles, trained: Any, mesh: Any) -> Any:
    """The optimizer's state, abstract: that of `roles.trained`, whose abstract parameters are `trained`."""
    return _place_state(Beginning(roles, _make_optimizer(config, roles), False, dict), trained, mesh).opt_state


def make_models(
    config: Config, terms: Terms, vocab_size: int, rules: Mapping[str, Any], tokenizer: Tokenizer | None = None
) -> dict[str, transformer.Model]:
    """The model of each role. One that reads tokens of its own has its own vocabulary."""
    reads_own = {role for term in terms.values() for role in term.objective.own_tokens}
    adapter = adapters.load(config.adapter, tokenizer=tokenizer)
    configs = {
        role: config_lib.model_config(config, 1 if role in reads_own else vocab_size, role=role)
        for role in ("policy", *config.roles)
    }
    with adapters.naming_fields():
        models = {"policy": transformer.make_model(configs["policy"], rules, adapter)}
    for role, section in config.roles.items():
        shared = adapter if section.of == "policy" and (section.adapter or adapter.changes_base) else None
        models[role] = transformer.make_model(configs[role], rules, shared)._replace(
            of=section.of, synced=section.sync_every > 0
        )
    return models


def _syncs(config: Config) -> dict[str, train.Sync]:
    """Of each role that follows another."""
    return {
        role: train.Sync(section.of, section.sync_every, section.sync_weight)
        for role, section in config.roles.items()
        if section.sync_every
    }


def compile_step(parts: Parts, stack: contextlib.ExitStack) -> Callable[[], Any]:
    """Compiles the step in a thread, while the rest is made ready; returns what waits for the program, which takes what
    Parts.step takes. So does leaving `stack`. What the model or objective can't do shows in the trace, which is made at
    once.

    Several processes compile at once where they are: programs that are made side by side might differ in order.
    """
    lowered = parts.step.trace(parts.state, parts.frozen, parts.batch, parts.rates).lower()
    if distributed.several():
        program = lowered.compile()
        return lambda: program
    pool = stack.enter_context(concurrent.futures.ThreadPoolExecutor(1, "compile"))
    return pool.submit(lowered.compile).result


def initial(
    config: Config, parts: Parts, bases: Mapping[str, loading.ModelSource], mesh: jax.sharding.Mesh
) -> tuple[train.TrainState, dict[str, Any]]:
    """The state before the first step and the frozen parameters, on the devices: random, or of other models."""
    roles = parts.roles
    # A run of which a part is frozen draws it as it will when it goes on: programs differ in the last digits.
    if not (roles.cut.keys() & bases.keys() or roles.divided):
        state, frozen = parts.begin(np.uint32(config.seed & 0xFFFFFFFF))
    else:
        keys = loading.initial_keys(config.seed)
        values = {
            role: _start(config, parts, role, bases).read(*_whole(config, roles, role, mesh)) for role in roles.cut
        }
        if "objectives" in roles.trained:
            placed = jax.tree.map(lambda x: x.sharding, parts.state.params["objectives"])
            values |= jax.jit(roles.draw_terms, out_shardings={"objectives": placed})(keys[0])
        trained, frozen = _arrange(parts, values)
        state = parts.init_state(trained, keys[1])
    return state, frozen | _read_others(config, parts, bases, mesh)


def resumed_frozen(
    config: Config, parts: Parts, bases: Mapping[str, loading.ModelSource], mesh: jax.sharding.Mesh, workdir: str
) -> dict[str, Any]:
    """The frozen parameters of a run that goes on.

    Raises:
      InputError: what the run began with is gone, or has changed.
    """
    roles, frozen = parts.roles, {}
    for role in roles.divided:
        whole = loading.read_untrained(workdir, _start(config, parts, role, bases), *_whole(config, roles, role, mesh))
        frozen |= _arrange(parts, {role: whole})[1]
    return frozen | _read_others(config, parts, bases, mesh)


def _arrange(parts: Parts, values: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Roles.arrange, where the arrays are to lie. Arrays that stay as they are aren't copied."""
    halves = jax.eval_shape(parts.roles.arrange, values)
    if jax.tree.structure(halves[0]) == jax.tree.structure(values):
        return values, {}
    like = {name: parts.state.params[name] for name in halves[0]}, {name: parts.frozen[name] for name in halves[1]}
    where = jax.tree.map(lambda x: x.sharding, like)
    return jax.jit(parts.roles.arrange, out_shardings=where)(values)


def _read_others(
    config: Config, parts: Parts, bases: Mapping[str, loading.ModelSource], mesh: jax.sharding.Mesh
) -> dict[str, Any]:
    """The parameters of the roles of which nothing is trained."""
    roles = parts.roles
    return {
        role: _start(config, parts, role, bases).read(*_whole(config, roles, role, mesh))
        for role in parts.frozen
        if role not in roles.partial
    }


def _start(config: Config, parts: Parts, role: str, bases: Mapping[str, loading.ModelSource]) -> loading.Start:
    return loading.make_start(config, role, parts.models[role], bases)


def _whole(config: Config, roles: roles_lib.Roles, role: str, mesh: jax.sharding.Mesh) -> tuple[Any, Any]:
    """The specs and placements to read a role with."""
    specs = roles.whole[role]
    return specs, params.shardings(specs, mesh, sharding.make_rules(config.rules))


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
        return sample(params.join(state.params, frozen)["policy"], batch, key)

    return jax.jit(rollout, out_shardings=placed)


def sampler(config: Config, vocab_size: int) -> Sampler:
    """What the policy's answers are drawn from, where rewards judge them.

    Args:
      config: of the run.
      vocab_size: of the tokenizer.
    """
    if not config.rewards:
        return Sampler(vocab_size=vocab_size)
    return Sampler(config.rollout.temperature, vocab_size, config.rollout.cut_short, config.rollout.ahead)


def _make_scores(
    config: Config, models: Mapping[str, transformer.Model], vocab_size: int, batch: checks.Batch, mesh: Any
) -> Callable[..., dict[str, jax.Array]] | None:
    """See Scores, jitted, the results on every device; None where models are to say nothing."""
    if not (names := checks.scored_fields(config, batch)):
        return None
    scores = scores_lib.Scores(models, names, sampler(config, vocab_size))
    return jax.jit(scores, out_shardings=sharding.named(mesh, ()))


def _make_reward_members(
    config: Config, models: Mapping[str, transformer.Model], mesh: Any
) -> Callable[..., dict[str, jax.Array]] | None:
    """See model_rewards.Members, jitted, the results on every device; None where no model gives a reward."""
    if not (roles := checks.reward_roles(config)):
        return None
    members = model_rewards.Members(models, tuple(sorted(set(roles.values()))))
    return jax.jit(members, out_shardings=sharding.named(mesh, ()))


def _place_state(beginning: Beginning, abstract: dict[str, Any], mesh: Any) -> train.TrainState:
    """The abstract TrainState: moments and their scales lie where their parameters lie, all else on every device."""
    replicated = sharding.named(mesh, ())
    state = jax.eval_shape(beginning.state, abstract, jax.ShapeDtypeStruct((2,), jnp.uint32))

    def hole(x: Any) -> bool:  # where one of several optimizers has nothing to do
        return isinstance(x, optax.MaskedNode)

    def like(moment: Any, parameter: Any) -> Any:
        if hole(moment):
            return moment
        alike = len(moment.shape) == len(parameter.shape)
        where = sharding.fitted(parameter.sharding, moment.shape) if alike else replicated
        return jax.ShapeDtypeStruct(moment.shape, moment.dtype, sharding=where)

    def everywhere(x: Any) -> Any:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated)

    opt_state = optax.tree_utils.tree_map_params(
        beginning.optimizer, like, state.opt_state, abstract, transform_non_params=everywhere, is_leaf=hole
    )
    rest = jax.tree.map(everywhere, state.replace(params=None, opt_state=None, ema=None, synced={}))
    synced = {role: abstract[sync.owner] for role, sync in beginning.syncs.items()}
    ema = state.ema and jax.tree.map(
        lambda average, x: jax.ShapeDtypeStruct(x.shape, average.dtype, sharding=x.sharding), state.ema, abstract
    )
    return rest.replace(params=abstract, opt_state=opt_state, ema=ema, synced=synced)
