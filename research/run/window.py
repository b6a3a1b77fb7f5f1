"""The steps since the last line of the log: their metrics, and the time that went into training alone."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AxisType

from research.config import Config
from research.diagnosis import settings
from research.diagnosis.stage import stage_of
from research.diagnosis.watch import Watch
from research.objectives.terms import Terms, of_term
from research.rollouts import notices
from research.run import checks, metrics
from research.run.assemble import Parts
from research.train import Metrics, means

_SILENCE = 30.0  # seconds after which a step is shown, whatever log.every says
_MOVED = 10  # by this step an adapter is to have moved from its start


class Diverged(Exception):
    """Loss or gradient were not finite too many times in a row."""


class Window:
    """Adds up metrics and time over the steps of one line of the log.

    Args:
      config: of the run.
      writer: where the lines go.
      flops_per_token: of a training step.
      find_peak: () -> FLOP/s that the devices can do; None where it isn't known.
      terms: of the objective, which may have something to say of their metrics.
      rewards: of the config, of which there may be something to say too.
      watch: step -> lines to print once its metrics are written (log.diagnose).
      epoch_rows: how many rows of data an epoch has; 0 where there are none, since rows are drawn.
    """

    def __init__(
        self,
        config: Config,
        writer: metrics.Writer,
        flops_per_token: float,
        find_peak: Callable[[], float | None] = lambda: None,
        terms: Terms | None = None,
        rewards: Mapping[str, Any] | None = None,
        watch: Callable[[int], Sequence[str]] = lambda _: (),
        epoch_rows: int = 0,
    ):
        self.config, self.writer, self.flops_per_token = config, writer, flops_per_token
        self.terms: Terms = terms or {}
        self._said: set[tuple[str, str]] = set()
        self._hashes: set[int] = set()
        self._new = 0  # batches of this window that no step before had
        self._of_rewards = notices.Constant(rewards or {})
        self._find_peak, self.peak, self._watch = find_peak, None, watch
        self._epoch_rows, self._rows, self._passed = epoch_rows, 0, {}
        self._shown = time.perf_counter()
        self.steps: list[Metrics] = []
        self._skipped, self._made = 0, 0  # updates
        self.start_clock(afresh=True)

    @classmethod
    def of(
        cls, config: Config, parts: Parts, writer: metrics.Writer, mesh: jax.sharding.Mesh, epoch_rows: int = 0
    ) -> "Window":
        """The window of a run."""
        flops, watch = flops_per_token(config, parts), lambda _: ()
        if config.log.diagnose and writer.active:
            stage, known = stage_of(config, parts.terms), settings.of_config(config)
            watch = Watch(writer.metrics_file, stage, config.log.diagnose, known)
        peak = lambda: _peak_flops(mesh)  # noqa: E731
        return cls(config, writer, flops, peak, parts.terms, config.rewards, watch, epoch_rows)

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

    def begin_at(self, rows: int) -> None:
        """Says how many rows of data were drawn before the next step."""
        self._rows = rows

    def note(self, passed: Mapping[str, float]) -> None:
        """Says how far streams were read (sources.streaming.passed)."""
        self._passed = passed

    def show_first(self, step: int, out: Metrics, seconds: float) -> None:
        """Shows the first step; `seconds` went by since the process started."""
        if self.config.log.every > 1:
            values = {f"train/{name}": value for name, value in means([jax.device_get(out)]).items()}
            self.writer.show(step, values, also=f"{metrics.duration(seconds)} to the first step")
        self._shown = time.perf_counter()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time inside as time spent waiting for data."""
        began = time.perf_counter()
        yield
        self.waited += time.perf_counter() - began

    def add(self, step: int, out: Metrics) -> None:
        """Takes in one step; writes a line where one is due.

        Raises:
          Diverged: `max_bad_steps` updates in a row were not finite; or this is the last, and all of them were skipped.
        """
        out = jax.device_get(out)
        now = time.perf_counter()
        if self.timed:
            self.seconds += now - self.since
            self.tokens += float(out["tokens"][0])
        self.since, self.timed = now, True
        self.steps.append(out)
        self._count(int(out["batch_hash"][0]))
        self._rows += self.config.batch_size
        values = means([out])
        if step == _MOVED and values.get("adapter_zero"):
            self.writer.print(
                f"warning  the adapters of {values['adapter_zero']:.0f} maps are 0 still after {step} steps: they "
                "learn nothing. Look at optimizer.learning_rate and its groups, and whether the loss reaches them."
            )
        if step == 1:
            self._notice(values, first=True)
        for line in self._of_rewards(values):
            self.writer.print(f"warning  {line}")
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
        elif now - self._shown > _SILENCE:
            self.writer.show(step, {f"train/{name}": value for name, value in values.items()})
            self._shown = now
        skipped = bool(values["empty_batch"] or values["nonfinite"])
        self._skipped, self._made = self._skipped + skipped, self._made + (not skipped)
        if step == self.config.steps and not self._made:
            raise Diverged(
                f"step {step}: all {self._skipped} updates were skipped, so that nothing was learned. Look at what the "
                "log says of each: a loss that isn't finite, or batches in which no token is supervised."
            )

    def _count(self, batch_hash: int) -> None:
        """Counts a batch that is new to this process."""
        self._new += batch_hash not in self._hashes
        self._hashes.add(batch_hash)

    def _write(self, step: int) -> None:
        values = means(self.steps)
        del values["batch_hash"]
        values["unique_batches"], self._new = self._new / len(self.steps), 0
        for name in ("nonfinite", "empty_batch"):
            values[name] = float(sum(out[name][0] for out in self.steps))
        if self.seconds:
            values["tokens_per_second"] = self.tokens / self.seconds
            values["data_wait_fraction"] = self.waited / self.seconds
            if self.peak:
                values["mfu"] = values["tokens_per_second"] * self.flops_per_token / self.peak
        if self._epoch_rows:
            values["epoch"] = self._rows / self._epoch_rows
        values |= self._passed
        self._notice(values)
        self._shown = time.perf_counter()
        self.writer.write(step, {f"train/{name}": value for name, value in values.items()})
        self.steps, self.seconds, self.waited, self.tokens = [], 0.0, 0.0, 0.0
        for line in self._watch(step):
            self.writer.print(line)

    def _notice(self, values: Mapping[str, float], first: bool = False) -> None:
        """Prints what terms have to say of their metrics, each line once."""
        for name, term in self.terms.items():
            if term.objective.notices is None:
                continue
            for about, line in term.objective.notices(of_term(self.terms, name, values), first).items():
                if (name, about) not in self._said:
                    self.writer.print(f"warning  objective.terms.{name}: {line}")
                self._said.add((name, about))


def flops_per_token(config: Config, parts: Parts) -> float:
    """The model FLOPs of a token in an update. What models besides the policy compute once a rollout is shared by its
    epochs; generation isn't counted.

    Args:
      config: of the run.
      parts: of the run.
    """
    in_updates = checks.roles_of_updates(parts.terms, parts.models)
    return sum(
        each.total / (1 if role in in_updates else config.rollout.epochs)
        for role, each in parts.roles.flops(config.seq_len).items()
    )


def _peak_flops(mesh: jax.sharding.Mesh) -> float | None:
    """Of all devices; the simulated CPU devices of a process share its machine's peak."""
    device = jax.local_devices()[0]
    peak = metrics.peak_flops(device)
    if peak is None:
        return None
    return peak * jax.process_count() if device.platform == "cpu" else peak * mesh.size
