"""What is diagnosed: a run's parts, its state, and some of its batches."""

import contextlib
import dataclasses
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from research import config as config_lib
from research import params as params_lib
from research.config import Config, MeshConfig
from research.diagnosis import examples
from research.diagnosis.examples import Example
from research.diagnosis.programs import Programs
from research.diagnosis.stage import stage_of
from research.errors import InputError
from research.objectives.terms import Terms
from research.pretrained import wholeness
from research.rollouts import experience as experience_lib
from research.rollouts.experience import Place
from research.run import assemble, metrics, resolve
from research.run import run as run_lib
from research.run.assemble import Parts
from research.run.checkpoint import choose, make_checkpointer
from research.run.resolve import Inputs
from research.sources import dataset
from research.sources.tokenizers import Tokenizer
from research.train import TrainState

Batch = dict[str, jax.Array]
Params = Any
BATCHES = 4  # that a subject has, of training and of held-out rows
EXAMPLES = 256  # that it has decoded, of either part


@dataclasses.dataclass(frozen=True, eq=False)
class Subject:
    """What probes read.

    Attributes:
      config: of the run, with metrics at every step.
      inputs: what it reads; see run.resolve.
      parts: models, terms and programs, changed by `change_parts`.
      state: of the newest checkpoint; before a run, the first one.
      frozen: role -> what isn't trained of it.
      place: how far the data has been read.
      batches: the next of training, changed by `change_batch`.
      eval_batches: held-out ones.
      examples: of the data to train on, decoded.
      held_out: the same of the held-out data.
      stage: one of types.STAGES.
      records: the run's metrics so far, as in metrics.jsonl.
      workdir: of the run; "" before there is one.
      programs: the compiled functions that probes share.
      change_parts, change_batch: see `of`.
      first_params: () -> the trained parameters as they were before the first step; see `initial`.
    """

    config: Config
    inputs: Inputs
    parts: Parts
    state: TrainState
    frozen: dict[str, Params]
    place: Place
    batches: tuple[Batch, ...]
    eval_batches: tuple[Batch, ...]
    examples: tuple[Example, ...]
    held_out: tuple[Example, ...]
    stage: str
    records: tuple[Mapping[str, float], ...]
    workdir: str
    programs: Programs
    change_parts: Callable[[Parts], Parts] | None = None
    change_batch: Callable[[Batch], Batch] | None = None
    first_params: Callable[[], Params] | None = None

    @classmethod
    def of(
        cls,
        config: Config,
        workdir: str = "",
        *,
        change_parts: Callable[[Parts], Parts] | None = None,
        change_batch: Callable[[Batch], Batch] | None = None,
        devices: Sequence[Any] | None = None,
    ) -> "Subject":
        """A run, or what would be one.

        Args:
          config: of the run.
          workdir: of the run; "" before there is one.
          change_parts: puts a fault into the programs, for studies of this diagnosis.
          change_batch: the same of the batches to train on.
          devices: to compute on; by default those that the run's mesh wants, or one where there are fewer.

        Raises:
          InputError: something in the config can't work, or the workdir's checkpoint can't be read.
        """
        if config.data.streaming:
            raise InputError(
                "data.streaming = True: a diagnosis draws from all of the data. Set it to False, and data.max_records "
                "to what the cache has room for."
            )
        config, devices = _fitted(config, jax.devices() if devices is None else devices)
        nowhere = os.path.join(tempfile.gettempdir(), "no-run", str(os.getpid()))
        inputs = resolve.resolve(config, workdir or nowhere, devices, step=choose(workdir or nowhere))
        log = dataclasses.replace(inputs.config.log, every=1)
        inputs = dataclasses.replace(inputs, config=dataclasses.replace(inputs.config, log=log))
        config, tokenizer = inputs.config, inputs.data.tokenizer
        parts = assemble.assemble(config, inputs.terms, inputs.mesh, inputs.batch, tokenizer.size, tokenizer=tokenizer)
        if change_parts is not None:
            parts = change_parts(parts)

        def first_params() -> Params:
            before, bases = resolve.with_checkpoints(config, None)
            return assemble.initial(before, parts, bases, inputs.mesh)[0].params

        with jax.set_mesh(inputs.mesh), contextlib.ExitStack() as stack:
            experience = run_lib.experience_of(inputs, parts, stack)
            state, frozen, place = _begin(inputs, parts, experience)
            batches = _next(experience, state, frozen, place, change_batch)
            held_out = dataset.eval_batches(inputs.data.held_out, config.batch_size, BATCHES, mine=inputs.rows)
            eval_batches = tuple(inputs.put(batch) for batch in held_out)
        return cls(
            config=config,
            inputs=inputs,
            parts=parts,
            state=state,
            frozen=frozen,
            place=place,
            batches=batches,
            eval_batches=eval_batches,
            examples=_sampled([rows for rows, _ in inputs.data.train], tokenizer),
            held_out=_sampled([inputs.data.held_out], tokenizer),
            stage=stage_of(config, inputs.terms),
            records=tuple(_records(workdir)),
            workdir=workdir,
            programs=Programs(parts),
            change_parts=change_parts,
            change_batch=change_batch,
            first_params=first_params,
        )

    @classmethod
    def of_workdir(cls, workdir: str, **options: Any) -> "Subject":
        """The run in a workdir. Args and errors: see `of`."""
        return cls.of(config_lib.parse(wholeness.read_record(workdir)["config"]), workdir, **options)

    @property
    def started(self) -> bool:
        """Whether a step has been taken."""
        return int(self.state.step) > 0

    @property
    def mesh(self) -> jax.sharding.Mesh:
        return self.inputs.mesh

    @property
    def tokenizer(self) -> Tokenizer:
        return self.inputs.data.tokenizer

    @property
    def models(self) -> Mapping[str, Any]:
        return self.parts.models

    @property
    def terms(self) -> Terms:
        return self.parts.terms

    @property
    def params(self) -> Params:
        """Role -> all its parameters, what is trained and what isn't."""
        return params_lib.join(self.state.params, {**self.frozen, **self.state.synced})

    def initial(self) -> Params:
        """The trained parameters as they were before the first step: read or drawn again.

        Raises:
          InputError: what they were read from is gone.
        """
        return self.first_params() if self.started and self.first_params else self.state.params

    @contextlib.contextmanager
    def experience(self) -> Iterator[experience_lib.Experience]:
        """Where further batches come from, changed by `change_batch`. What it began is ended with the context."""
        with contextlib.ExitStack() as stack:
            made = run_lib.experience_of(self.inputs, self.parts, stack)
            yield made if self.change_batch is None else _changed(made, self.change_batch)


def _fitted(config: Config, devices: Sequence[Any]) -> tuple[Config, Sequence[Any]]:
    """The config and the devices of a diagnosis: the run's own mesh, or one device where there are fewer than that."""
    sizes = dataclasses.asdict(config.mesh).values()
    wanted = 1
    for size in sizes:
        wanted *= max(size, 1)
    fits = len(devices) % wanted == 0 if -1 in sizes else len(devices) == wanted
    if fits and config.batch_size % (len(devices) * config.microbatches) == 0:
        return config, devices
    return dataclasses.replace(config, mesh=MeshConfig(data=1)), devices[:1]


def _begin(
    inputs: Inputs, parts: Parts, experience: experience_lib.Experience
) -> tuple[TrainState, dict[str, Params], Place]:
    """The newest checkpoint's state, read without touching anything else of the workdir, or the first one."""
    with contextlib.closing(make_checkpointer(inputs.config, inputs.workdir, read_only=True)) as saver:
        return run_lib.begin(inputs, parts, experience, saver)


def _next(
    experience: experience_lib.Experience,
    state: TrainState,
    frozen: Any,
    place: Place,
    change: Callable[[Batch], Batch] | None,
) -> tuple[Batch, ...]:
    batches = []
    for _ in range(BATCHES):
        batch, place, _ = experience.next(state, frozen, place)
        batches.append(batch if change is None else change(batch))
    return tuple(batches)


def _changed(experience: experience_lib.Experience, change: Callable[[Batch], Batch]) -> experience_lib.Experience:
    """The same experience, whose batches are changed."""

    def step(state: Any, frozen: Any, place: Place) -> tuple[Batch, Place, Any]:
        batch, place, gathered = experience.next(state, frozen, place)
        return change(batch), place, gathered

    return experience._replace(next=step)


def _sampled(rows: Sequence[Any], tokenizer: Tokenizer) -> tuple[Example, ...]:
    """At most EXAMPLES of several parts together."""
    most = max(EXAMPLES // max(len(rows), 1), 1)
    return tuple(example for each in rows for example in examples.read(each, tokenizer, most))


def _records(workdir: str) -> list[dict[str, float]]:
    """The metrics of a run; none before it has some."""
    there = workdir and os.path.exists(os.path.join(workdir, metrics.METRICS_FILE))
    return metrics.read_metrics(workdir) if there else []
