"""One run, from config to result: the order of assembly, and the loop."""

import concurrent.futures
import contextlib
import dataclasses
import functools
import importlib.metadata
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType

from research import config as config_lib
from research import loading, objectives, optim, params, train
from research.config import Config
from research.devices import distributed, sharding, startup
from research.errors import InputError, did_you_mean
from research.evals import generation, perplexity
from research.evals import tasks as eval_tasks
from research.models import transformer
from research.models.sampling import SamplingConfig
from research.rollouts.answers import make_rollout
from research.run import checkpoint, metrics
from research.sources import annotations, cache, dataset, fields, tasks, tokenizers
from research.sources.types import Source

_EMITTERS = "xla_cpu_use_fusion_emitters"


class Preempted(Exception):
    """The run was asked to stop by a signal, has saved, and can be started again."""


class Diverged(Exception):
    """Loss or gradient were not finite too many times in a row."""


class Parts(NamedTuple):
    """What a run is made of, before anything is computed: functions and abstract arrays."""

    models: dict[str, transformer.Model]
    terms: dict[str, tuple[objectives.Objective, objectives.Coefficient]]
    begin: Callable[[Any], train.TrainState]  # uint32 seed -> the state before the first step
    init_objectives: Callable[[jax.Array], dict[str, Any]]  # key -> parameters of objectives
    init_state: Callable[[dict[str, Any], jax.Array], train.TrainState]
    step: Callable[..., tuple[train.TrainState, train.Metrics]]
    evaluate: Callable[..., train.Metrics]
    rollout: Callable[..., dict[str, jax.Array]] | None  # (state, batch) -> batch with answers of the policy
    state: train.TrainState  # ShapeDtypeStructs with shardings
    frozen: dict[str, Any]  # the same, of the parameters of the other roles
    batch: dict[str, jax.ShapeDtypeStruct]


def assemble(
    config: Config,
    mesh: Any,
    batch: Mapping[str, jax.ShapeDtypeStruct],
    vocab_size: int,
    tokenizer: tokenizers.Tokenizer | None = None,
) -> Parts:
    """Models, objective, optimizer and step for a mesh, which may be abstract: nothing touches a device.

    Args:
      config: checked.
      mesh: a Mesh or AbstractMesh with the axes of `sharding`.
      batch: the source's spec: the fields of a global batch.
      vocab_size: of the tokenizer.
      tokenizer: where something is to be computed, and not only traced.
    """
    rules = {**sharding.RULES, **config.rules}
    terms = objectives.load(config.objective, tokenizer)
    reads_own = {role for objective, _ in terms.values() for role in objective.own_tokens}
    models = {
        role: transformer.make_model(
            config_lib.model_config(config, 1 if role in reads_own else vocab_size, role=role), rules
        )
        for role in ("policy", *config.roles)
    }
    for name, (objective, _) in terms.items():
        for role in objective.trainable + objective.frozen:
            if role not in models:
                raise InputError(
                    f"objective.terms.{name}: needs a model in the role {role!r}, and there are {', '.join(models)}. "
                    f'Name one: roles = {{"{role}": {{"init_from": ...}}}}.'
                )
        for field in objective.fields:
            if field not in batch:
                raise InputError(
                    f"objective.terms.{name}: reads the batch field {field!r}, which data.path = "
                    f"{config.data['path']!r} doesn't give.{did_you_mean(field, batch)}"
                )
    read = {role for objective, _ in terms.values() for role in objective.trainable + objective.frozen}
    if unread := [role for role in config.roles if role not in read]:
        raise InputError(f"roles.{unread[0]}: no term of the objective reads it. Leave it out, or add the term.")
    specs = {"policy": models["policy"].specs}
    own = {name: term.params(models) for name, (term, _) in terms.items() if term.params is not None}
    own = {name: made for name, made in own.items() if made}
    if own:
        specs["objectives"] = own
    frozen = {role: transformer.in_compute_dtype(models[role]) for role in config.roles}
    schedule = optim.make_schedule(config.optimizer, config.steps)
    trains = {"policy": params.matching(models["policy"].specs, config.trainable)} if config.trainable else None
    if trains and own:
        trains["objectives"] = params.matching(own, "")
    optimizer = optim.make_optimizer(
        config.optimizer, config.steps, params.decay_mask(specs), params.muon_dimensions(specs), trains
    )

    def init_state(values: dict[str, Any], key: jax.Array) -> train.TrainState:
        return train.init_state(values, optimizer, key, config.ema_decay > 0, train.init_carry(terms, batch))

    def begin(seed: jax.Array) -> train.TrainState:
        keys = jax.random.split(jax.random.PRNGKey(seed), 2)
        return init_state(params.init(specs, keys[0]), keys[1])

    placed = params.shardings(specs, mesh, rules)
    state = _place_state(init_state, optimizer, params.abstract(specs, placed), placed, mesh)
    rows = fields.shardings(mesh, batch, rules)
    answers = None
    if config.rollout.share:
        sample = make_rollout(
            models["policy"],
            config.rollout,
            seq_len=config.seq_len,
            stop_tokens=tokenizer.stop if tokenizer else (),
            vocab_size=vocab_size,
        )

        def answer(state: train.TrainState, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
            key = jax.random.fold_in(jax.random.fold_in(state.key, state.step), 1)
            return sample(state.params["policy"], batch, key)

        answers = jax.jit(answer, out_shardings=rows)
    where = jax.tree.map(lambda x: x.sharding, state)
    compiler_options = _compiler_options(mesh)
    return Parts(
        models=models,
        terms=terms,
        begin=jax.jit(begin, out_shardings=where, compiler_options=compiler_options),
        init_objectives=jax.jit(
            lambda key: params.init({"objectives": own} if own else {}, key),
            out_shardings={"objectives": placed["objectives"]} if own else {},
        ),
        init_state=jax.jit(init_state, out_shardings=where, donate_argnums=0),
        step=jax.jit(
            train.make_train_step(
                terms,
                models,
                optimizer,
                schedule=schedule,
                microbatches=config.microbatches,
                ema_decay=config.ema_decay,
                trains=trains,
            ),
            donate_argnums=0,
            out_shardings=(where, None),
            compiler_options=compiler_options,
        ),
        evaluate=jax.jit(train.make_eval_step(terms, models)),
        rollout=answers,
        state=state,
        frozen=params.abstract(frozen, params.shardings(frozen, mesh, rules)),
        batch={k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=rows[k]) for k, v in batch.items()},
    )


def _compiler_options(mesh: Any) -> dict[str, Any] | None:
    """What makes programs for CPUs compile faster. What XLA_FLAGS says stands.

    LLVM's highest level makes no step faster, but its compilation 1.15 times as long, and 2.5 times that of initial
    values; the results are the same. XLA's newer emitters of kernels take more than twice the time of the older ones,
    whose steps take about 4 % longer.
    """
    if not isinstance(mesh, jax.sharding.Mesh) or mesh.devices.flat[0].platform != "cpu":
        return None
    options = {"xla_backend_optimization_level": 2} | ({_EMITTERS: False} if _has_older_emitters() else {})
    return {name: value for name, value in options.items() if name not in os.environ.get("XLA_FLAGS", "")}


@functools.cache
def _has_older_emitters() -> bool:
    """Whether this XLA has them: later ones refuse the option."""
    try:
        jax.jit(lambda: 0, compiler_options={_EMITTERS: False}).lower().compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True


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


def run(
    config: Config,
    workdir: str,
    *,
    started: float | None = None,
    command: str = "",
    devices: Sequence[Any] | None = None,
    stop: threading.Event | None = None,
) -> dict[str, float]:
    """Trains, and returns the last metrics. A run of the same workdir goes on where it stopped.

    Args:
      config: of the run.
      workdir: where everything that it writes goes; made once all checks have passed.
      started: unix seconds of the process's start, for the time to the first step.
      command: for the record.
      devices: to make the mesh of; by default all.
      stop: is set where SIGTERM or SIGINT comes, so that the caller knows of one that comes at the run's end.

    Raises:
      InputError: something in the config can't work. Nothing has been written.
      Preempted: SIGTERM or SIGINT came; a checkpoint is written.
      Diverged: too many updates in a row were skipped; a checkpoint is written.
    """
    started = started or time.time()
    devices = jax.devices() if devices is None else devices
    resumed = bool(checkpoint.steps(workdir))
    config, bases = with_checkpoints(config, workdir if resumed else None)
    config_lib.check(config, num_devices=len(devices))
    wandb = {"project": config.log.wandb} if config.log.wandb else None
    if wandb:
        metrics.check_wandb(wandb)
    if config.compilation_cache:
        use_compilation_cache(config.data["cache_dir"])
    mesh = sharding.make_mesh(dataclasses.asdict(config.mesh), devices)

    tokenizer = tokenizers.load_tokenizer(workdir) if resumed else given_tokenizer(config, bases.get("policy"))
    teacher = _teacher_tokenizer(config, bases)
    data = dataset.load(config_lib.data_spec(config), config.tokenizer, tokenizer, seed=config.seed, teacher=teacher)
    _check_teachers(config, bases, data.tokenizer)
    mine = sharding.local_rows(mesh, config.batch_size, {**sharding.RULES, **config.rules})
    source = dataset.make_source(
        data.train,
        batch_size=config.batch_size,
        seed=config.seed,
        shuffle=config.data["shuffle"],
        mine=mine,
    )
    parts = assemble(config, mesh, source.spec, data.tokenizer.size, data.tokenizer)
    _check_classes(config, parts)
    listed = _listed_evals(config, parts.models["policy"], data.tokenizer)

    with jax.set_mesh(mesh), contextlib.ExitStack() as stack:
        # What the model or objective can't do shows here.
        traced = parts.step.trace(parts.state, parts.frozen, parts.batch)
        compiling = _compile(traced.lower(), stack)
        if not resumed:
            source_state = source.init()
            batches = stack.enter_context(_prefetch(source, source_state, parts.batch, mine))
        frozen = {role: _read(bases[role], like) for role, like in parts.frozen.items()}
        if not resumed and "policy" in bases:
            keys = jax.random.split(jax.random.PRNGKey(config.seed), 2)
            initial = {"policy": _begin(bases["policy"], parts, mesh, keys[0]), **parts.init_objectives(keys[0])}
            state = parts.init_state(initial, keys[1])
        elif not resumed:
            state = parts.begin(np.uint32(config.seed & 0xFFFFFFFF))
        saver = stack.enter_context(
            contextlib.closing(
                checkpoint.Checkpointer(
                    workdir,
                    keep_last=config.checkpoint.keep_last,
                    best_metric=config.checkpoint.best_metric,
                    best_mode=config.checkpoint.best_mode,
                )
            )
        )
        if resumed:
            state, source_state = saver.restore(parts.state)
            batches = stack.enter_context(_prefetch(source, source_state, parts.batch, mine))
        first = int(state.step) if resumed else 0
        changed = _changes(workdir, config) if resumed else []
        watch = stack.enter_context(distributed.watch(workdir, config.stall_seconds, (Preempted, Diverged)))
        if distributed.main():
            _write_record(workdir, config, command, mesh)
            (Path(workdir) / "done.json").unlink(missing_ok=True)
            if not resumed:
                data.tokenizer.save(workdir)
                if "policy" in bases and bases["policy"].origin:
                    checkpoint.write_json(Path(workdir) / loading.ORIGIN, bases["policy"].origin)
        writer = stack.enter_context(
            metrics.Writer(
                workdir,
                total_steps=config.steps,
                start_step=first,
                tensorboard=config.log.tensorboard,
                wandb=wandb,
                run_config=config_lib.to_dict(config),
            )
        )
        _describe(writer, config, parts, data, mesh, workdir)
        if resumed:
            writer.print(f"resumed  at step {first} of {config.steps}" + "".join(f"\nchanged  {x}" for x in changed))
        evals = _make_evals(config, parts, data, listed, writer, mine) if config.eval.every else None
        window = _Window(config, parts, writer, lambda: _peak_flops(mesh))
        compiled = distributed.one_at_a_time(compiling())
        startup.release_memory()
        train_step = compiled
        if parts.rollout:
            answer = distributed.one_at_a_time(parts.rollout)

            def train_step(state, frozen, batch):
                return compiled(state, frozen, answer(state, batch))

        stop = stack.enter_context(_stop_on_signals(stop or threading.Event()))
        due = lambda step: _should_stop(stop, step)  # noqa: E731
        start = state, frozen, source_state
        _loop(config, train_step, start, batches, evals, saver, window, due, watch.progress, workdir, started)
    return _finish(config, workdir)


def _loop(config, train_step, start, batches, evals, saver, window, due, tell, workdir, started) -> None:
    """Every step: a batch, an update. At intervals: metrics, evaluation, checkpoint. `due(step)`: whether to stop."""
    state, frozen, source_state = start
    first = int(state.step)
    if config.eval.every and first == 0:
        evals(state, frozen, 0)
    pending = None  # metrics are read one step late, so that the host doesn't wait for the step it has just sent off
    window.start_clock()
    try:
        for step in range(first + 1, config.steps + 1):
            with window.waiting():
                batch, source_state = next(batches)
            tell(step)
            state, out = train_step(state, frozen, batch)
            if pending is not None:
                window.add(*pending)
            pending = step, out
            if step == first + 1:
                jax.block_until_ready(out)
                window.writer.write(step, {"startup/seconds_to_first_step": time.time() - started})
                saver.prepare()
                window.measure_peak()
                window.start_clock(afresh=True)
            stopping, last = due(step), step == config.steps
            if stopping:
                window.writer.print("asked to stop: saving first")
            evaluating = config.eval.every and (last or (step % config.eval.every == 0 and not stopping))
            saving = last or stopping or (config.checkpoint.every and step % config.checkpoint.every == 0)
            if not (evaluating or saving):
                continue
            window.add(*pending)
            pending = None
            fresh = evals(state, frozen, step) if evaluating else {}
            if saving:
                saver.save(state, source_state, config_lib.to_dict(config), fresh)
            if stopping and not last:
                raise Preempted(
                    f"saved step {step} of {config.steps} in {workdir}. The same command goes on from there."
                )
            window.start_clock()
    except Diverged:
        saver.save(state, source_state, config_lib.to_dict(config), {})
        raise
    finally:
        saver.wait()


def _finish(config: Config, workdir: str) -> dict[str, float]:
    """WORKDIR/done.json: this run is over; with the last value of every metric."""
    final: dict[str, float] = {}
    for record in metrics.read_metrics(workdir):
        final |= {name: value for name, value in record.items() if "/" in name}
    if distributed.main():
        checkpoint.write_json(Path(workdir) / "done.json", {"step": config.steps, "metrics": final})
    return final


class _Window:
    """The steps since the last line of the log: their metrics, and the time that went into training alone."""

    def __init__(
        self, config: Config, parts: Parts, writer: metrics.Writer, peak: Callable[[], float | None] = lambda: None
    ):
        self.config, self.writer = config, writer
        self._find_peak, self.peak = peak, None
        flops = {role: transformer.flops_per_token(m.config, config.seq_len) for role, m in parts.models.items()}
        # A frozen model's forward pass is a third of it.
        self.flops_per_token = sum(n if role == "policy" else n / 3 for role, n in flops.items())
        self.steps: list[train.Metrics] = []
        self.start_clock(afresh=True)

    def start_clock(self, afresh: bool = False) -> None:
        """Leaves out the time since the last step, which went into evaluating or saving; `afresh`: and all before it,
        the step that compiled included."""
        self.since = time.perf_counter()
        if afresh:
            self.seconds = self.waited = self.tokens = 0.0
            self.timed = False

    def measure_peak(self) -> None:
        """Finds the peak that utilisation is a fraction of; on CPU by a matrix product, so nothing else should run."""
        with jax.set_mesh(jax.make_mesh((1,), ("data",), (AxisType.Auto,), devices=jax.local_devices()[:1])):
            self.peak = self._find_peak()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.waited += time.perf_counter() - began

    def add(self, step: int, out: train.Metrics) -> None:
        """Takes in one step; writes a line where one is due.

        Raises:
          Diverged: `max_bad_steps` updates in a row were not finite.
        """
        out = jax.device_get(out)
        now = time.perf_counter()
        if self.timed:
            self.seconds += now - self.since
            self.tokens += float(out["tokens"][0])
        self.since, self.timed = now, True
        self.steps.append(out)
        values = metrics.means([out])
        self.writer.advance(step)
        if values["empty_batch"]:
            self.writer.print(f"step {step}: no token of this batch is supervised: update skipped")
        if values["nonfinite"]:
            in_a_row = int(values["nonfinite_in_a_row"])
            self.writer.print(
                f"step {step}: loss {values.get('loss')}, gradient norm {values['grad_norm']}: update skipped, "
                f"{in_a_row} in a row"
            )
            if in_a_row >= self.config.max_bad_steps:
                raise Diverged(
                    f"step {step}: loss or gradient were not finite {in_a_row} times in a row (max_bad_steps). Lower "
                    "optimizer.learning_rate, lengthen optimizer.warmup_steps, or look at the data of these steps."
                )
        if step % self.config.log.every == 0 or step == self.config.steps:
            self._write(step)

    def _write(self, step: int) -> None:
        values = metrics.means(self.steps)
        for name in ("nonfinite", "empty_batch"):
            values[name] = float(sum(out[name][0] for out in self.steps))
        if self.seconds:
            values["tokens_per_second"] = self.tokens / self.seconds
            values["data_wait_fraction"] = self.waited / self.seconds
            if self.peak:
                values["mfu"] = values["tokens_per_second"] * self.flops_per_token / self.peak
        self.writer.write(step, {f"train/{name}": value for name, value in values.items()})
        self.steps, self.seconds, self.waited, self.tokens = [], 0.0, 0.0, 0.0


def _compile(lowered: Any, stack: contextlib.ExitStack) -> Callable[[], Any]:
    """Compiles in a thread, while the rest is made ready; returns what waits for the program. So does leaving `stack`.

    Several processes compile at once where they are: programs that are made side by side might differ in order.
    """
    if distributed.several():
        compiled = lowered.compile()
        return lambda: compiled
    pool = stack.enter_context(concurrent.futures.ThreadPoolExecutor(1, "compile"))
    return pool.submit(lowered.compile).result


def _listed_evals(
    config: Config, model: transformer.Model, tokenizer: tokenizers.Tokenizer
) -> list[eval_tasks.Evaluation]:
    """Those of `eval.tasks`."""
    listed = [eval_tasks.load(spec, model, tokenizer, config.data["template"]) for spec in config.eval.tasks]
    twice = [name for name, n in Counter(name for name, _ in listed).items() if n > 1]
    if twice:
        raise InputError(f"eval.tasks: {twice[0]!r} is there twice. Give one of them another name: KIND,name=...:DATA.")
    return listed


def _make_evals(
    config: Config,
    parts: Parts,
    data: dataset.Data,
    listed: Sequence[eval_tasks.Evaluation],
    writer: metrics.Writer,
    mine: Sequence[int],
) -> Callable[..., dict[str, float]]:
    """Returns evaluate(state, frozen, step) -> {"eval/loss": ...}, which also writes them and shows some answers."""
    tokenizer, model = data.tokenizer, parts.models["policy"]
    batches = list(
        dataset.eval_batches(
            data.held_out,
            config.batch_size,
            config.eval.batches or None,
            mine=mine,
        )
    )
    masked = any("loss_mask" in objective.fields for objective, _ in parts.terms.values())
    loss = perplexity.make_perplexity(
        distributed.one_at_a_time(parts.evaluate),
        batches,
        tokenizer.token_bytes(),
        use_loss_mask=masked,
        put=lambda b: _put(b, parts.batch, mine),
    )
    answer = None
    records = data.held_out_records[: config.eval.generate]
    if records:
        answer = generation.make_generation(
            model,
            SamplingConfig(max_new_tokens=config.eval.max_new_tokens, stop_tokens=tokenizer.stop),
            tokenizer,
            records,
            verify=tasks.verify_record,
            template=config.data["template"],
            batch_size=min(len(records), 64),
        )

    def evaluate(state: train.TrainState, frozen: dict[str, Any], step: int) -> dict[str, float]:
        key = jax.random.PRNGKey(config.seed)
        values = state.params if state.ema is None else state.ema
        scores = loss(values, frozen, state.carry)
        if answer is not None:
            judged, samples = answer(values["policy"], key)
            scores |= judged
            for sample in samples[: config.eval.show]:
                writer.print(f"  {sample}")
                writer.text(step, "eval/sample", str(sample))
        for name, measure in listed:
            found, samples = measure(values["policy"], key)
            scores |= {f"{name}/{k}": value for k, value in found.items() if not k.endswith("_stderr")}
            for sample in samples[: config.eval.show]:
                writer.print(f"  {name}: {sample}")
        scores = {f"eval/{name}": value for name, value in scores.items()}
        writer.write(step, scores)
        return scores

    return evaluate


def _peak_flops(mesh: jax.sharding.Mesh) -> float | None:
    """Of all devices; the simulated CPU devices of a process share its machine's peak."""
    device = jax.local_devices()[0]
    peak = metrics.peak_flops(device)
    if peak is None:
        return None
    return peak * jax.process_count() if device.platform == "cpu" else peak * mesh.size


def given_tokenizer(config: Config, base: loading.Found | None) -> tokenizers.Tokenizer | None:
    """What "auto" means; None where the config names a tokenizer."""
    if config.tokenizer.kind != "auto":
        return None
    if base is None:
        return tokenizers.make_tokenizer(tokenizers.TokenizerSpec(kind="byte"), lambda: iter(()))
    tokenizer = base.tokenizer()
    loading.check_vocabulary(base.name, tokenizer, base.config)
    return tokenizer


def with_checkpoints(
    config: Config, resumed: str | None, *, described: bool = False
) -> tuple[Config, dict[str, loading.Found]]:
    """The config with the architectures of the checkpoints that it names, and these by role.

    A run that is `resumed` from a workdir no longer needs the checkpoint that its policy began with. With `described`,
    roles may name none: their section then describes them, which is enough to compile.
    """
    bases: dict[str, loading.Found] = {}
    for role in ("policy", *config.roles):
        where, section = config_lib.model_section(config, role)
        name = section["init_from"]
        if resumed and role == "policy" and name:
            began = config_lib.parse(json.loads((Path(resumed) / "config.json").read_text())["config"])
            architecture = config_lib.model_config(began, vocab_size=began.model["vocab_size"])
            config = config_lib.with_architecture(config, architecture, resumed)
        elif name:
            bases[role] = loading.find(name)
            config = config_lib.with_architecture(config, bases[role].config, name, role)
        elif role != "policy" and not described:
            raise InputError(
                f"{where}.init_from = '': names no model. Give a workdir, a folder, a hub name or a .gguf."
            )
    return config, bases


def _teacher_tokenizer(config: Config, bases: Mapping[str, loading.Found]) -> tokenizers.Tokenizer | None:
    """The tokenizer of the roles that read tokens of their own; None where there are none."""
    terms = objectives.load(config.objective)
    roles = [role for objective, _ in terms.values() for role in objective.own_tokens if role in bases]
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


def _check_teachers(config: Config, bases: Mapping[str, loading.Found], tokenizer: tokenizers.Tokenizer) -> None:
    """Raises InputError where a teacher would misread the batch, or its annotations aren't what the objective wants."""
    terms = objectives.load(config.objective)
    own = {role for objective, _ in terms.values() for role in objective.own_tokens}
    for role, base in bases.items():
        if role != "policy" and role not in own:
            loading.check_reads(f"roles.{role}", base, tokenizer)
    for name, (objective, _) in terms.items():
        annotations.check(config.data["annotations"], name, objective.annotations)
        if objective.annotations and config.rollout.share:
            raise InputError(
                f"rollout.share = {config.rollout.share}: objective.{name} reads a teacher's annotations, and there "
                f"are none of what the policy writes. Set rollout.share to 0, or objective.{name}.cached to False."
            )


def _read(base: loading.Found, like: Any) -> Any:
    """The parameters of a checkpoint: `like` has their shapes, dtypes and shardings."""
    return base.read(like, jax.tree.map(lambda x: x.sharding, like))


def _check_classes(config: Config, parts: Parts) -> None:
    """Raises InputError where the head's classes aren't those of the data."""
    labels, model = parts.batch.get("label_probs"), parts.models["policy"].config
    if labels is not None and model.num_labels and model.num_labels != labels.shape[-1]:
        raise InputError(
            f"model.num_labels = {model.num_labels}, and the labels of data.path = {config.data['path']!r} have "
            f"{labels.shape[-1]} classes. Set model.num_labels to that."
        )


def _begin(base: loading.Found, parts: Parts, mesh: jax.sharding.Mesh, key: jax.Array) -> Any:
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


def _put(
    batch: Mapping[str, np.ndarray], like: Mapping[str, jax.ShapeDtypeStruct], mine: Sequence[int]
) -> dict[str, jax.Array]:
    """This process's rows, whose numbers are `mine`, -> global arrays."""

    def put(x: np.ndarray, like: jax.ShapeDtypeStruct) -> jax.Array:
        def of_device(index: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = index[0].indices(like.shape[0])
            first = int(np.searchsorted(mine, start))
            return x[(slice(first, first + stop - start), *index[1:])]

        return jax.make_array_from_callback(like.shape, like.sharding, of_device)

    return {k: put(x, like[k]) for k, x in batch.items()}


@contextlib.contextmanager
def _prefetch(
    source: Source, state: dict[str, Any], like: Mapping[str, jax.ShapeDtypeStruct], mine: Sequence[int], depth: int = 2
) -> Iterator[Iterator[tuple[dict[str, jax.Array], dict[str, Any]]]]:
    """An iterator of (batch on the devices, source state after it), read ahead by a thread from now on. An error there
    is raised by the iterator."""
    ready: queue.Queue = queue.Queue(maxsize=depth)
    closed = threading.Event()

    def work(state: dict[str, Any]) -> None:
        try:
            while not closed.is_set():
                batch, state = source.next(state)
                ready.put((_put(batch, like, mine), state, None))
        except BaseException as error:
            ready.put((None, None, error))

    def batches() -> Iterator[tuple[dict[str, jax.Array], dict[str, Any]]]:
        while True:
            batch, state, error = ready.get()
            if error is not None:
                raise error
            yield batch, state

    thread = threading.Thread(target=work, args=(state,), daemon=True, name="prefetch")
    thread.start()
    try:
        yield batches()
    finally:
        closed.set()
        while thread.is_alive():  # the thread may be waiting for room
            with contextlib.suppress(queue.Empty):
                ready.get(timeout=0.05)


@contextlib.contextmanager
def _stop_on_signals(stop: threading.Event) -> Iterator[threading.Event]:
    """An event that SIGTERM and SIGINT set, so that the loop can save first. A second SIGINT interrupts at once.

    Of several processes each must stop at the same step: SIGTERM goes to JAX, see distributed.should_stop, and SIGINT
    interrupts at once.
    """
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    several = distributed.several()

    def handle(number: int, _: Any) -> None:
        again = stop.is_set()
        stop.set()
        if number == signal.SIGINT and (several or again):
            raise KeyboardInterrupt

    numbers = (signal.SIGINT,) if several else (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _should_stop(stop: threading.Event, step: int) -> bool:
    """Whether to save and end after this step. Of several processes, one that was interrupted ends here at the latest:
    a library may have swallowed the KeyboardInterrupt."""
    if distributed.several() and stop.is_set():
        raise KeyboardInterrupt
    return stop.is_set() or distributed.should_stop(step)


def _write_record(workdir: str, config: Config, command: str, mesh: jax.sharding.Mesh) -> None:
    """WORKDIR/config.json: the resolved config, and what it ran with."""
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "understudy")
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=40"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    Path(workdir).mkdir(parents=True, exist_ok=True)
    checkpoint.write_json(
        Path(workdir) / "config.json",
        {
            "config": config_lib.to_dict(config),
            "command": command,
            "git": git.stdout.strip() or None,
            "versions": {"python": sys.version.split()[0]} | {p: importlib.metadata.version(p) for p in packages},
            "devices": {"count": mesh.size, "kind": mesh.devices.flat[0].device_kind, "mesh": dict(mesh.shape)},
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        },
    )


def _changes(workdir: str, config: Config) -> list[str]:
    """What differs from the config that this workdir last ran with: "optimizer.learning_rate: 0.001 -> 0.002"."""
    before = json.loads((Path(workdir) / "config.json").read_text())["config"]
    now = json.loads(json.dumps(config_lib.to_dict(config)))

    def differ(a: Any, b: Any, name: str) -> Iterator[str]:
        if isinstance(a, dict) and isinstance(b, dict):
            for key in sorted(a.keys() | b.keys()):
                yield from differ(a.get(key), b.get(key), f"{name}.{key}")
        elif a != b:
            yield f"{name[1:]}: {a!r} -> {b!r}"

    return list(differ(before, now, ""))


def _describe(
    writer: metrics.Writer, config: Config, parts: Parts, data: dataset.Data, mesh: Any, workdir: str
) -> None:
    """Says what is about to happen."""
    model = parts.models["policy"].config
    writer.print(f"workdir  {workdir}")
    writer.print(
        f"model    {params.count(parts.models['policy'].specs) / 1e6:.2f} M parameters, vocabulary {model.vocab_size}, "
        f"{model.dtype}"
    )
    shape = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    writer.print(f"devices  {mesh.size} x {mesh.devices.flat[0].device_kind}, mesh {shape}")
    for line in startup.describe():
        writer.print(line)
    for source in data.report["sources"]:
        bad = "".join(f", {n:,} skipped: {reason}" for reason, n in source["bad"].items())
        twice = f", {source['duplicates']:,} duplicates dropped" if source["duplicates"] else ""
        writer.print(f"data     {source['name']}: {source['records']:,} records{twice}{bad}")
    for part in ("train", "held_out"):
        counts = data.report[part]
        faults = {k: n for k, n in counts.items() if k.startswith(("too_long", "nothing_supervised")) and n}
        writer.print(
            f"data     {part.replace('_', '-')}: {counts['examples']:,} examples, {counts['tokens']:,} tokens "
            f"({counts['supervised_tokens']:,} supervised) in {counts['rows']:,} rows, packing efficiency "
            f"{counts['packing_efficiency']:.1%}" + "".join(f", {n:,} {k.replace('_', ' ')}" for k, n in faults.items())
        )


def use_compilation_cache(cache_dir: str = "") -> None:
    """Keeps compiled programs in the cache folder, for the next start.

    Not where several processes have CPUs: only the first writes, the others look under other keys, and while they
    compiled what it finds it would give up waiting for them (Gloo's 30 s).
    """
    if distributed.several() and jax.default_backend() == "cpu":
        return
    jax.config.update("jax_compilation_cache_dir", str(cache.cache_root(cache_dir) / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
