"""From a config to all that it names: models, tokenizer, data and objective, found and checked.

Bad input shows here, before anything is compiled or written.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from research import config as config_lib
from research import files, loading, objectives, optim, progress
from research.config import Config
from research.devices import compilation, sharding
from research.errors import InputError, located
from research.evals import tasks as eval_tasks
from research.models import adapters
from research.objectives import Terms
from research.pretrained import wholeness
from research.run import assemble, checkpoint, checks, eval_sets, metrics, resume, rollouts
from research.sources import adaptive, annotations, dataset, fields, identity, opening, tokenizers
from research.sources.prompts import Prompts
from research.sources.rows import Rows
from research.sources.types import Source


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What a run reads.

    Attributes:
      config: checked, with the architectures of the checkpoints that it names.
      workdir: of the run.
      step: of the checkpoint that it goes on from; None of a new run.
      mesh: of the run's devices.
      bases: role -> the model that its parameters are read from.
      terms: the objective's, by name.
      data: tokenised, split and laid into rows.
      source: of the data's rows.
      batch: the fields of a batch for training: the source's, or with rewards those of answers.
      prompts: what the policy answers, where rewards judge that; else None.
      rows: numbers of the rows of a global batch that this process holds.
      changes: what differs from what the run last ran with, where it goes on.
      data_identity: what the data is made of; see sources.identity.
      tasks: task of eval.tasks -> what its records are (evals.tasks.identity).
      sets: name -> rows, of eval.sets.
      frozen_sources: role -> what it is read from (loading.identity), of those of which nothing is trained.
    """

    config: Config
    workdir: str
    step: int | None
    mesh: jax.sharding.Mesh
    bases: dict[str, loading.ModelSource]
    terms: Terms
    data: dataset.Data
    source: Source
    batch: fields.Spec
    prompts: Prompts | None
    rows: list[int]
    changes: list[resume.Change]
    data_identity: dict[str, Any]
    tasks: dict[str, Any]
    frozen_sources: dict[str, Any]
    sets: dict[str, Rows] = dataclasses.field(default_factory=dict)

    @property
    def resumed(self) -> bool:
        return self.step is not None

    def put(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """This process's rows of a batch -> global arrays."""
        placed = fields.shardings(self.mesh, batch, sharding.make_rules(self.config.rules))
        return {name: self._put(value, placed[name]) for name, value in batch.items()}

    def _put(self, value: np.ndarray, placement: jax.sharding.NamedSharding) -> jax.Array:
        def of_device(index: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = index[0].indices(self.config.batch_size)
            first = int(np.searchsorted(self.rows, start))
            return value[(slice(first, first + stop - start), *index[1:])]

        return jax.make_array_from_callback((self.config.batch_size, *value.shape[1:]), placement, of_device)


def resolve(
    config: Config,
    workdir: str,
    devices: Sequence[Any] | None = None,
    objective: Mapping[str, Any] | None = None,
    step: int | None = None,
) -> Inputs:
    """Finds and checks all that a run reads.

    Args:
      config: of the run.
      workdir: of the run, which may hold checkpoints of it.
      devices: to make the mesh of; by default all.
      objective: the one whose special tokens the tokenizer is to have; by default the config's.
      step: of the checkpoint that it goes on from; None of a new run.

    Raises:
      InputError: something in the config can't work. Nothing has been written.
    """
    devices = jax.devices() if devices is None else devices
    resumed, before = step is not None, {}
    if resumed:
        wholeness.check_outline(Path(workdir) / checkpoint.FOLDER / str(step))
        before = wholeness.read_record(workdir)
        wholeness.check_files(workdir, before)
        config = _with_steps_so_far(config, config_lib.parse(before["config"]))
        if not config.epochs:
            resume.check_steps(workdir, step, config)
    config, bases = with_checkpoints(config, workdir if resumed else None)
    changes = resume.check(workdir, config_lib.parse(before["config"]), config) if resumed else []
    config_lib.check(config, num_devices=len(devices))
    if config.log.wandb:
        metrics.check_wandb({"project": config.log.wandb})
    if config.compilation_cache:
        compilation.use_compilation_cache(config.data.cache_dir)
    mesh = sharding.make_mesh(dataclasses.asdict(config.mesh), devices)
    if resumed:
        tokenizer = _resumed_tokenizer(config, workdir)
    else:
        config, tokenizer = with_tokenizer(config, bases, objective)
    data, terms = read_data(config, bases, tokenizer)
    config = with_steps(config, data)
    if resumed:
        resume.check_steps(workdir, step, config)
    data_identity = identity.identity(data, config_lib.data_spec(config))
    tasks = {spec: eval_tasks.identity(spec) for spec in config.eval.tasks}
    frozen_sources = {role: loading.identity(name) for role, name in _frozen_names(config, terms).items()}
    if resumed:
        resume.check_data(workdir, before.get("data"), data_identity, changes)
        resume.check_sources(workdir, before.get("frozen"), frozen_sources)
        changes += resume.task_changes(before.get("tasks"), tasks)
    _check_held_out(config, data)
    load = functools.partial(
        dataset.load,
        tokenizer_spec=config.tokenizer,
        tokenizer=tokenizer,
        seed=config.seed + 1,
        teacher=_teacher_tokenizer(config, bases, terms),
        virtual=virtual_ids(config, tokenizer.size),
    )
    sets = eval_sets.read(config, terms, load) if config.eval.every else {}
    rows = sharding.local_rows(mesh, config.batch_size, sharding.make_rules(config.rules))
    order = {"batch_size": config.batch_size, "seed": config.seed, "shuffle": config.data.shuffle, "mine": rows}
    if name := checks.drawing_term(config, terms):
        if data.streams:
            raise InputError(
                f"objective.terms.{name}: draws the sources by chances that change, and a stream is read in one order. "
                "Set data.streaming to False."
            )
        source = adaptive.make_source(data.train, **order)
    else:
        source = dataset.source_of(data, **order)
    return Inputs(
        config=config,
        workdir=workdir,
        step=step,
        mesh=mesh,
        bases=bases,
        terms=terms,
        data=data,
        source=source,
        batch=rollouts.batch_spec(config, terms, source.spec),
        prompts=rollouts.make_prompts(config, data, virtual_ids(config, tokenizer.size)),
        rows=rows,
        changes=changes,
        data_identity=data_identity,
        tasks=tasks,
        frozen_sources=frozen_sources,
        sets=sets,
    )


def _frozen_names(config: Config, terms: Terms) -> dict[str, str]:
    """Role -> the model that it is, of those of which nothing is trained."""
    trained = {role for term in terms.values() for role in term.objective.trainable}
    roles = {role: config_lib.model_section(config, role)[1].init_from for role in ("policy", *config.roles)}
    return {role: name for role, name in roles.items() if name and role not in trained}


def is_finished(config: Config, workdir: str, step: int | None) -> bool:
    """Whether a run of this config has taken its last step in this workdir, so that nothing is left to do.

    Args:
      config, workdir: of the run.
      step: of the checkpoint that it goes on from; None of a new run.

    Raises:
      InputError: it has taken more steps, or these with another config.
    """
    if step is None:
        return False
    before = config_lib.parse(wholeness.read_record(workdir)["config"])
    config = _with_steps_so_far(config, before)
    if _ended_early(workdir, step, before, config):
        before, config = (dataclasses.replace(each, steps=step) for each in (before, config))
    if step < config.steps:
        return False
    resume.check_steps(workdir, step, config)
    return resume.is_finished(workdir, step, before, with_checkpoints(config, workdir)[0])


def _ended_early(workdir: str, step: int, before: Config, now: Config) -> bool:
    """Whether a run was over at its last checkpoint, before its last step, and has no more patience now."""
    waits = [(c.checkpoint.patience, c.checkpoint.best_metric, c.checkpoint.best_mode) for c in (before, now)]
    done = Path(workdir) / "done.json"
    if step >= now.steps or not now.checkpoint.patience or waits[0] != waits[1] or not done.is_file():
        return False
    return files.read_json(done)["step"] == step


def _with_steps_so_far(config: Config, before: Config) -> Config:
    """A config whose length is in epochs, with the steps that these were when the run began, before data is read."""
    same = (config.epochs, config.batch_size) == (before.epochs, before.batch_size)
    return dataclasses.replace(config, steps=before.steps) if config.epochs and same else config


def with_steps(config: Config, data: dataset.Data) -> Config:
    """The config with as many steps as its epochs are.

    Raises:
      InputError: the data has no epochs, or the schedule doesn't go with so few steps.
    """
    if not config.epochs:
        return config
    if config.rewards or data.streams or len(data.train) > 1:
        reason = "answers are trained on, and not rows" if config.rewards else "rows are drawn by weight"
        reason = "how many rows a stream has isn't known (data.streaming)" if data.streams else reason
        raise InputError(f"epochs = {config.epochs}: {reason}, so that there are none. Set steps, and epochs to 0.")
    steps = max(1, math.ceil(config.epochs * len(data.train[0][0]) / config.batch_size - 1e-9))
    optim.make_schedule(config.optimizer, steps)
    return dataclasses.replace(config, steps=steps)


def _check_held_out(config: Config, data: dataset.Data) -> None:
    """Raises InputError where there is nothing to evaluate on, and `eval.every` asks for it."""
    if not config.eval.every or len(data.held_out):
        return
    counts, fraction = data.report["held_out"], config.data.eval_fraction
    lost = counts.get("too_long_dropped", 0) + counts["nothing_supervised"]
    if data.streams and not lost:
        raise InputError(
            f"eval.every = {config.eval.every}: nothing of a stream is held out by chance (data.streaming). Set "
            "data.eval_records to hold out its first records, name data.eval_path, or set eval.every = 0 and "
            "checkpoint.best_metric = ''."
        )
    if lost:
        reason, remedy = f"all {lost:,} records held out are longer than seq_len = {config.seq_len}", "Raise seq_len"
    elif not fraction:
        reason, remedy = "no part is to be", "Raise it"
    else:
        reason, remedy = "all records ask the same", "Give more data"
        if sum(source["records"] for source in data.report["sources"]) == 1:
            reason = "there is one record; a .txt becomes one for each 16 KiB"
    raise InputError(
        f"data.eval_fraction = {fraction}: nothing is held out to evaluate on ({reason}). {remedy}, name "
        "data.eval_path, or set eval.every = 0 and checkpoint.best_metric = ''."
    )


def with_checkpoints(
    config: Config, resumed: str | None, *, described: bool = False
) -> tuple[Config, dict[str, loading.ModelSource]]:
    """The config with the architectures of the checkpoints that it names, and these by role.

    A run that is `resumed` from a workdir no longer needs the checkpoint that its policy began with, but for what isn't
    trained of it. A role may name none where the objective trains it or it is another's (`of`); with `described`, any:
    its section then describes it, which is enough to compile.
    """
    trained = {role for term in objectives.load(config.objective).values() for role in term.objective.trainable}
    bases: dict[str, loading.ModelSource] = {}
    for role in ("policy", *config.roles):
        where, section = config_lib.model_section(config, role)
        name = section.init_from
        if resumed and role == "policy" and name:
            began = config_lib.parse(wholeness.read_record(resumed)["config"])
            if name == began.model.init_from:  # another is refused by resume.check
                architecture = config_lib.model_config(began, vocab_size=began.model.vocab_size)
                config = config_lib.with_architecture(config, architecture, resumed)
        elif name:
            with located(f"{where}.init_from"):
                bases[role] = loading.find(name)
            if (ahead := bases[role].front) is not None:
                raise InputError(
                    f"{where}.init_from = {name!r}: its adapter ({ahead.kind}) puts something in front of documents, "
                    "which can't be merged into a model. Begin with the model that it began with."
                )
            config = config_lib.with_architecture(config, bases[role].config, name, role)
        elif role != "policy" and not (described or role in trained or section.of):
            raise InputError(
                f"{where}.init_from = '': names no model. Give a workdir, a folder, a hub name or a .gguf."
            )
    config = _with_adapter(config, bases.get("policy"))
    _check_new_head(config, bases.get("policy"))
    return config, bases


def _with_adapter(config: Config, base: loading.ModelSource | None) -> Config:
    """The config with the options of the adapter that the policy's begins with."""
    name = config.adapter.get("init_from", "")
    if not name:
        return config
    if not config.model.init_from or not isinstance(name, str):
        raise InputError(
            f"adapter.init_from = {name!r}: is the folder or workdir of an adapter for the model that model.init_from "
            f"= {config.model.init_from!r} names. Name both."
        )
    options = loading.adapter_options(name, base or loading.find(config.model.init_from), config.adapter)
    return dataclasses.replace(config, adapter=options)


def _check_new_head(config: Config, base: loading.ModelSource | None) -> None:
    """Raises InputError where the policy gets a head for classes, and the adapter leaves that as it is drawn."""
    adapter = adapters.load(config.adapter)
    if adapter is None or base is None or not config.model.num_labels or base.config.num_labels:
        return
    try:
        trained = any(re.fullmatch(pattern, "head") for pattern in adapter.trained.values())
    except re.error:
        return  # which params.matching names
    if not trained:
        raise InputError(
            f"model.num_labels = {config.model.num_labels}: the head is new, and the adapter leaves it as it is drawn. "
            "Train it too: adapter.also = 'head'."
        )


def read_data(
    config: Config, bases: Mapping[str, loading.ModelSource], tokenizer: tokenizers.Tokenizer
) -> tuple[dataset.Data, Terms]:
    """A run's data and the terms of its objective.

    Args:
      config: of the run.
      bases: role -> the model that it names.
      tokenizer: of the run.

    Raises:
      InputError: the data, the tokenizer, the objective and the models don't go together.
    """
    progress.say("reading data")
    spec = config_lib.data_spec(config)
    terms = objectives.load(config.objective, tokenizer, assemble.sampler(config, tokenizer.size))
    for term in terms.values():
        term.source_numbers(sorted(spec.sources))
    teacher = _teacher_tokenizer(config, bases, terms)
    virtual = virtual_ids(config, tokenizer.size)
    reads = {name for term in terms.values() for name in term.objective.fields}
    spec = dataclasses.replace(spec, mismatches="mismatched" in reads)
    data = dataset.load(spec, config.tokenizer, tokenizer, seed=config.seed, teacher=teacher, virtual=virtual)
    if config.data.num_classes and data.train[0][0].stores[0].labels is None:
        raise opening.without_labels("num_classes", config.data.num_classes)
    _check_teachers(config, bases, terms, tokenizer)
    _check_prompts(config, terms, data)
    return data, terms


def virtual_ids(config: Config, vocab_size: int) -> range:
    """The ids of the tokens that the policy's adapter puts in front of every document.

    Args:
      config: of the run.
      vocab_size: of the tokenizer.
    """
    adapter = adapters.load(config.adapter)
    first = config_lib.model_config(config, vocab_size).vocab_size
    return range(first, first + (adapter.virtual_tokens if adapter else 0))


def _check_prompts(config: Config, terms: Terms, data: dataset.Data) -> None:
    """Raises InputError where the prefixes of a prefix LM are to come from the data, and all of it is plain text."""
    rows = [each for each, _ in data.train]
    if not config.model.prefix or any(store.mask is not None for each in rows for store in each.stores):
        return
    own = [term.objective for term in terms.values() if "prefix" in term.objective.gives]
    drawn = any("loss_mask" not in objective.fields for objective in own)
    if not drawn and (own or any("prefix" in each.extra for each in rows)):
        raise InputError(
            "model.prefix = True: the data is plain text, which has no prompts, so that nothing would be a prefix. "
            "Train with the objective prefix_lm and its split='random', or give a source a view such as denoise."
        )


def with_tokenizer(
    config: Config, bases: Mapping[str, loading.ModelSource], objective: Mapping[str, Any] | None = None
) -> tuple[Config, tokenizers.Tokenizer]:
    """The tokenizer of a new run, with the special tokens that its views and objectives need; and the config, in which
    the model that the policy begins with has rows for those that were added.

    Args and errors: see `resolve` and `read_data`.
    """
    base = bases.get("policy")
    before = given_tokenizer(config, base)
    before = before or dataset.build_tokenizer(config_lib.data_spec(config), config.tokenizer, config.seed)
    tokenizer = with_special_tokens(config, before, objective)
    return with_added_rows(config, base, before, tokenizer), tokenizer


def with_added_rows(
    config: Config, base: loading.ModelSource | None, before: tokenizers.Tokenizer, tokenizer: tokenizers.Tokenizer
) -> Config:
    """The config in which the model that the policy begins with has rows for added tokens.

    Args:
      config: of the run.
      base: that model; None where the policy begins with random parameters, which are of all tokens.
      before: the tokenizer without the added tokens.
      tokenizer: with them.

    Raises:
      InputError: model.new_rows is set, and no token is added to a model; or the tokenizer isn't the model's.
    """
    if base is not None and tokenizer.size > before.size:
        if before.size > base.config.vocab_size:
            raise InputError(
                f"tokenizer.kind = {config.tokenizer.kind!r}: has {before.size} tokens, and {base.name} has "
                f"{base.config.vocab_size} rows for them. Add tokens to the model's own: tokenizer.kind = 'auto'."
            )
        return config_lib.with_added_rows(config, base.config.vocab_size, before.size, tokenizer.size)
    if config.model.new_rows != config_lib.ModelSection.new_rows:
        why = "no token is added to its tokenizer" if base is not None else "model.init_from = ''"
        raise InputError(f"model.new_rows = {config.model.new_rows!r}: has no effect, since {why}. Leave it out.")
    return config


def with_special_tokens(
    config: Config, tokenizer: tokenizers.Tokenizer, objective: Mapping[str, Any] | None = None
) -> tokenizers.Tokenizer:
    """The tokenizer with what it lacks of config.tokenizer.added_tokens, of what views need and of what objectives
    need, in this order; views and objectives come by name."""
    tokenizer = dataset.with_special_tokens(tokenizer, config.tokenizer, config_lib.data_spec(config))
    return tokenizer.with_tokens(objectives.needed_tokens(objective or config.objective, tokenizer))


def _resumed_tokenizer(config: Config, workdir: str) -> tokenizers.Tokenizer:
    """The tokenizer of a run that goes on. Raises InputError where what the config asks for now needs further tokens.

    Its model has no rows for them.
    """
    tokenizer = tokenizers.load_tokenizer(workdir)
    lacks = with_special_tokens(config, tokenizer).size - tokenizer.size
    if lacks:
        names = with_special_tokens(config, tokenizer).backend
        shown = ", ".join(names.id_to_token(tokenizer.size + i) for i in range(lacks))
        raise InputError(
            f"tokenizer: objective and data need the special tokens {shown}, and the run in {workdir} began without "
            f"them. Start in a new --workdir, with model.init_from={workdir} to take the parameters along."
        )
    return tokenizer


def given_tokenizer(config: Config, base: loading.ModelSource | None) -> tokenizers.Tokenizer | None:
    """What "auto" means; None where the config names a tokenizer."""
    if config.tokenizer.kind != "auto":
        return None
    if base is None:
        return tokenizers.make_tokenizer(tokenizers.TokenizerSpec(kind="byte"), lambda: iter(()))
    tokenizer = base.tokenizer()
    loading.check_vocabulary(base.name, tokenizer, base.config)
    return tokenizer


def _teacher_tokenizer(
    config: Config, bases: Mapping[str, loading.ModelSource], terms: Terms
) -> tokenizers.Tokenizer | None:
    """The tokenizer of the roles that read tokens of their own; None where there are none."""
    roles = [role for term in terms.values() for role in term.objective.own_tokens if role in bases]
    if not roles:
        return None
    if config.rollout.share:
        raise InputError(
            f"rollout.share = {config.rollout.share}: roles.{roles[0]} reads the data in its own tokens, and what the "
            "policy writes has none. Set rollout.share to 0, or use a teacher with the policy's tokenizer."
        )
    tokenizer = bases[roles[0]].tokenizer()
    for role in roles:
        loading.check_vocabulary(bases[role].name, tokenizer, bases[role].config)
        loading.check_reads(f"roles.{role}", bases[role], tokenizer)
    return tokenizer


def _check_teachers(
    config: Config, bases: Mapping[str, loading.ModelSource], terms: Terms, tokenizer: tokenizers.Tokenizer
) -> None:
    """Raises InputError where a teacher would misread the batch, or its annotations aren't what the objective wants."""
    own = {role for term in terms.values() for role in term.objective.own_tokens}
    for role, base in bases.items():
        if role != "policy" and role not in own:
            loading.check_reads(f"roles.{role}", base, tokenizer)
    for name, term in terms.items():
        cached = term.options.get("cached", f"objective.{name}.cached")
        annotations.check(config.data.annotations, cached.removesuffix(".cached"), term.objective.annotations)
        if term.objective.annotations.get("kind") == annotations.REFERENCE:
            _check_cached_reference(config, bases, cached)
        if term.objective.annotations and config.rollout.share:
            raise InputError(
                f"rollout.share = {config.rollout.share}: objective.terms.{name} reads a teacher's annotations, and "
                f"there are none of what the policy writes. Set rollout.share to 0, or {cached} to False."
            )


def _check_cached_reference(config: Config, bases: Mapping[str, loading.ModelSource], field: str) -> None:
    """Raises InputError where the log-probs of a reference are of another model than the policy begins with.

    A run that goes on has begun with the right one, which may be gone by then.
    """
    folder, name = config.data.annotations, config.model.init_from
    if not name:
        raise InputError(
            f"{field} = True: the policy begins with random parameters. Name the reference: model.init_from."
        )
    meta = annotations.read_meta(folder)
    if "policy" in bases and meta["source"] != loading.identity(name):
        raise InputError(
            f"data.annotations = {folder!r}: holds log-probs of {meta['teacher']}, and model.init_from = {name!r} is "
            "another model, or has other parameters by now. Make new ones with understudy annotate --reference, or run "
            "the reference live: roles.reference."
        )
