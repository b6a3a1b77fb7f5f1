"""One run, from its config to its last metrics."""

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from research import loading, ownership, progress
from research.config import Config
from research.devices import compilation, distributed, startup, temporaries
from research.errors import Unavailable
from research.objectives.terms import Terms
from research.pretrained import wholeness
from research.rollouts import experience as experience_lib
from research.run import assemble, checkpoint, checks, engines, evaluation, preview, record, resolve, resume, rollouts
from research.run.checkpoint import Checkpointer, make_checkpointer
from research.run.loop import Loop, Preempted, best_score, check_best, stop_on_signals
from research.run.window import Diverged, Window
from research.sources.prefetch import OnDemand, Prefetch
from research.train import TrainState


def run(
    config: Config,
    workdir: str,
    *,
    started: float | None = None,
    command: str = "",
    step: int | str | None = None,
    devices: Sequence[Any] | None = None,
    stop: threading.Event | None = None,
    make_experience: Callable[..., experience_lib.Experience] = experience_lib.make,
) -> dict[str, float]:
    """Trains, and returns the last metrics. A run of the same workdir goes on where it stopped.

    Args:
      config: of the run.
      workdir: where everything that it writes goes; this process has it for the time, and nothing is written there
        before all checks have passed.
      started: unix seconds of the process's start, for the time to the first step.
      command: for the record.
      step: the checkpoint to go on from, or "whole" for the newest that is whole; later ones are moved aside. By
        default the newest.
      devices: to make the mesh of; by default all.
      stop: is set where SIGTERM or SIGINT comes, so that the caller knows of one that comes at the run's end.
      make_experience: (source, batch, rollout) -> where the batches of a run without rewards come from; see
        rollouts.experience.

    Raises:
      InputError: something in the config can't work. Nothing has been written.
      Preempted: SIGTERM or SIGINT came; a checkpoint is written.
      Diverged: too many updates in a row were skipped; a checkpoint is written.
      Unavailable: no server answers (rollout.servers); a checkpoint is written.
    """
    checkpoint.check_name(workdir)
    with _owned(workdir):
        step = checkpoint.choose(workdir, step)
        return _run(config, workdir, step, started or time.time(), command, devices, stop, make_experience)


def _run(
    config: Config,
    workdir: str,
    step: int | None,
    started: float,
    command: str,
    devices: Sequence[Any] | None,
    stop: threading.Event | None,
    make_experience: Callable[..., experience_lib.Experience],
) -> dict[str, float]:
    """`run`, in a workdir that this process has, from the checkpoint of a step, or anew."""
    if resolve.is_finished(config, workdir, step):
        return record.stay_finished(workdir, step)
    inputs = resolve.resolve(config, workdir, devices, step=step)
    config, tokenizer = inputs.config, inputs.data.tokenizer
    parts = assemble.assemble(config, inputs.terms, inputs.mesh, inputs.batch, tokenizer.size, tokenizer=tokenizer)
    assemble.check_memory(config, parts, inputs.mesh)
    tasks = evaluation.load_tasks(config, parts.models["policy"], inputs.data)

    with jax.set_mesh(inputs.mesh), contextlib.ExitStack() as stack:
        program = assemble.compile_step(parts, stack)
        stop = stop or threading.Event()
        experience = experience_of(inputs, parts, stack, make_experience, stop)
        saver = stack.enter_context(contextlib.closing(make_checkpointer(config, workdir)))
        state, frozen, place = begin(inputs, parts, experience, saver)
        watch = stack.enter_context(
            distributed.watch(workdir, config.stall_seconds, (Preempted, Diverged, Unavailable))
        )
        writer = record.make_writer(config, workdir, int(state.step))
        record.describe(writer, inputs, parts, int(state.step))
        evaluate = evaluation.make_evaluation(inputs, parts, tasks, writer, experience.samples)
        progress.say("compiling the train step")
        compiled = program()
        measured = measure_first(inputs, evaluate, state, frozen)
        # All checks have passed: from here on, something is written.
        if inputs.resumed and distributed.main():
            wholeness.set_aside(workdir, inputs.step)
        distributed.barrier("set aside")
        if not inputs.resumed:
            loading.note_frozen(workdir, {role: frozen[role] for role in parts.roles.divided}, distributed.main())
        began = record.begin(inputs, command, int(state.step))
        if not inputs.resumed and distributed.main():
            preview.write(inputs, workdir)
        stack.enter_context(writer)
        record.measure(writer, parts, compiled, int(state.step))
        scored = record.scored(config, workdir, int(state.step))
        if measured is not None:
            evaluate.note(int(state.step), measured)
            scored |= best_score(config.checkpoint, int(state.step), measured.scores)
        startup.release_memory()
        loop = Loop(
            config=config,
            workdir=workdir,
            record=began,
            step=temporaries.keep(distributed.one_at_a_time(compiled), compilation.temporaries(compiled)),
            rates=assemble.learning_rates(config, parts),
            experience=experience,
            evaluate=evaluate,
            saver=saver,
            window=Window.of(config, parts, writer, inputs.mesh, epoch_rows(inputs)),
            progress=watch.progress,
            stop=stack.enter_context(stop_on_signals(stop)),
            started=started,
            scored=scored,
        )
        first = int(state.step)
        last = loop.run(state, frozen, place)
        record.sum_up(writer, config, workdir, (first, last), time.time() - started)
    return record.finish(workdir, last)


def measure_first(
    inputs: resolve.Inputs, evaluate: evaluation.Evaluation | None, state: TrainState, frozen: dict[str, Any]
) -> evaluation.Measured | None:
    """The evaluation before the first step of a run, or of one that goes on with other evaluations; else None.

    Raises:
      InputError: checkpoint.best_metric is none of its scores.
    """
    if evaluate is None or (inputs.resumed and not resume.measures_anew(inputs.changes)):
        return None
    measured = evaluate.measure(state, frozen)
    check_best(inputs.config.checkpoint.best_metric, measured.scores)
    return measured


def epoch_rows(inputs: resolve.Inputs) -> int:
    """How many rows of data an epoch has; 0 where there are no epochs: rows are drawn by weight, or answers are."""
    train = inputs.data.train
    known = len(train) == 1 and not inputs.data.streams and inputs.prompts is None
    return len(train[0][0]) if known else 0


def _owned(workdir: str) -> contextlib.AbstractContextManager[None]:
    """Has the workdir for this run. Of several processes the first takes it; where it can't, it ends, and so do the
    others, whom JAX tells."""
    return ownership.own_folder(workdir, "--workdir") if distributed.main() else contextlib.nullcontext()


def chances(terms: Terms, name: str, state: TrainState) -> Any:
    """How probable each source is to be drawn next, by the term of that name."""
    return terms[name].objective.chances(state.carry[name])


def experience_of(
    inputs: resolve.Inputs,
    parts: assemble.Parts,
    stack: contextlib.ExitStack,
    make: Callable[..., experience_lib.Experience] = experience_lib.make,
    stop: threading.Event | None = None,
) -> experience_lib.Experience:
    """Where the run's batches come from; `make` is of a run without rewards, `stack` ends what was begun, and at `stop`
    servers are no longer waited for."""
    if inputs.prompts is not None:
        return _of_rewards(inputs, parts, stack, stop or threading.Event())
    rollout = parts.rollout and distributed.one_at_a_time(parts.rollout)
    if drawing := checks.drawing_term(inputs.config, inputs.terms):
        experience = make(OnDemand(inputs.source, inputs.put), parts.batch, rollout)
        return experience_lib.drawn(experience, functools.partial(chances, inputs.terms, drawing))
    return make(stack.enter_context(Prefetch(inputs.source, inputs.put)), parts.batch, rollout)


def _of_rewards(
    inputs: resolve.Inputs, parts: assemble.Parts, stack: contextlib.ExitStack, stop: threading.Event
) -> experience_lib.Experience:
    """The experience of a run with rewards; `stack` ends its processes and its thread."""
    config = inputs.config
    judge = rollouts.make_judge(config, stack)
    engine = engines.make_engine(inputs, parts.models["policy"], stop.is_set)
    collector = rollouts.make_collector(config, inputs.prompts, judge, engine)
    virtual, pool = resolve.virtual_ids(config, inputs.data.tokenizer.size), rollouts.make_pool(config, parts, stack)
    return rollouts.make_experience(config, parts, collector, virtual, pool)


def begin(
    inputs: resolve.Inputs,
    parts: assemble.Parts,
    experience: experience_lib.Experience,
    saver: Checkpointer,
) -> tuple[TrainState, dict[str, Any], experience_lib.Place]:
    """The state, the frozen parameters and the place in the data: those of the newest checkpoint, or the first ones."""
    config = inputs.config
    if inputs.resumed:
        state, place = saver.restore(parts.state, experience.buffer, inputs.step)
        return state, assemble.resumed_frozen(config, parts, inputs.bases, inputs.mesh, inputs.workdir), place
    if inputs.bases:
        progress.say("reading parameters")
    place = experience.init()  # the first batches are read while parameters are read or drawn
    state, frozen = assemble.initial(config, parts, inputs.bases, inputs.mesh)
    return state, frozen, place


__all__ = ["Diverged", "Preempted", "run"]
