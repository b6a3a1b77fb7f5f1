"""Metrics go to the console, JSON lines, TensorBoard and Weights & Biases."""

import contextlib
import functools
import inspect
import json
import math
import os
import statistics
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from absl import logging
from tqdm import tqdm

from research.devices import chips
from research.errors import InputError, did_you_mean
from research.files import SteadyFile, json_line, write_text
from research.run import console
from research.run.console import describe, duration

METRICS_FILE = "metrics.jsonl"
SAMPLES_FILE = "samples.jsonl"
LOG_FILE = "log.txt"
_STEADY = "understudy"  # what TensorBoard's writer calls our files
_HPARAM_METRICS = ("train/loss", "eval/loss", "train/reward", "eval/exact_match")  # beside the hyperparameters
_QUIET = ("startup/",)  # metrics that lines of their own speak of


class Writer:
    """Writes metrics and samples under a workdir; shows progress on stderr: a bar on a terminal, else lines.

    A context manager. Only process 0 writes: on the others every method does nothing, so that the loop
    needs no `if`. On a restart, what was written for steps after `start_step` is dropped, because those
    steps will be done again.

    Of the "train/..." values the console shows loss, grad_norm, learning_rate, epoch, tokens_per_second and mfu
    (a fraction), in the bar; all others ("eval/...") stay as a line above it. WORKDIR/log.txt has all lines, of the
    starts before too.
    """

    def __init__(
        self,
        workdir: str,
        *,
        total_steps: int,
        start_step: int,
        tensorboard: bool = True,
        wandb: Mapping[str, Any] | None = None,
        run_config: Mapping[str, Any],
    ):
        """Touches no file: those are opened on entering.

        Args:
          workdir: a local folder; made where it is missing.
          total_steps: the step at which the run ends.
          start_step: the last step done, 0 for a fresh run.
          tensorboard: whether to write event files to WORKDIR/tensorboard.
          wandb: arguments of wandb.init (project, name, mode, ...), or None for no W&B.
          run_config: the resolved config, shown by TensorBoard and W&B.

        Raises:
          InputError: wandb isn't installed, or has no such argument.
        """
        self._active = jax.process_index() == 0
        if self._active and wandb is not None:
            check_wandb(wandb)
        self._workdir, self._total_steps, self._start_step = workdir, total_steps, start_step
        self._use_tensorboard, self._wandb_options, self._config = tensorboard, wandb, run_config
        self._bar = self._tensorboard = self._wandb = None
        self._log, self._early = None, []  # what was printed before there was a file; None afterwards
        self._described = ""  # what the bar says of the last steps
        self._clock: tuple[int, float] | None = None  # the first step done here, and when

    @property
    def active(self) -> bool:
        """Whether this process writes."""
        return self._active

    @property
    def metrics_file(self) -> str:
        """Where metrics go."""
        return os.path.join(self._workdir, METRICS_FILE)

    def __enter__(self) -> "Writer":
        if not self._active:
            return self
        os.makedirs(self._workdir, exist_ok=True)
        self._metrics = self._reopen(METRICS_FILE)
        self._samples = self._reopen(SAMPLES_FILE)
        log = os.path.join(self._workdir, LOG_FILE)
        self._log = None if _is_stderr(log) else SteadyFile(log, console.line)
        early, self._early = self._early, None
        if self._log is not None and early:
            self._log.write("".join(early).encode())
        if self._wandb_options is not None:
            self._wandb = _start_wandb(self._workdir, self._wandb_options, self._config)
        if console.on_terminal(sys.stderr):
            self._bar = tqdm(
                total=self._total_steps,
                initial=self._start_step,
                file=sys.stderr,
                dynamic_ncols=True,
                bar_format="step {n_fmt}/{total_fmt} {bar:16}  {desc}",
            )
            console.use_bar(self._bar)
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        if not self._active:
            return
        if self._bar is not None:
            console.use_bar(None)
            self._close("the bar", self._bar.close)
        self._close(METRICS_FILE, self._metrics.close)
        self._close(SAMPLES_FILE, self._samples.close)
        if self._tensorboard is not None:
            self._close("TensorBoard's writer", self._tensorboard.close)
        if self._wandb is not None:
            self._close("Weights & Biases", lambda: self._wandb.finish(exit_code=0 if kind is None else 1))
        log, self._log = self._log, None  # last, since it has what the others say
        if log is not None:
            self._close(LOG_FILE, log.close)

    def _close(self, name: str, close: Callable[[], object]) -> None:
        """Closes one of the places that are written to. What fails is said: the others are to be closed too, and it is
        not why the run ends."""
        try:
            close()
        except Exception as error:
            self.print(f"{name}: couldn't be closed ({type(error).__name__}: {error!s:.200})")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Records values ("train/loss": 1.2, ...) of a step; those of one step may come in several calls."""
        if not self._active:
            return
        values = {name: float(value) for name, value in values.items()}
        record = {"step": step, "time": round(time.time(), 3)}
        record |= {name: value if math.isfinite(value) else str(value) for name, value in values.items()}
        self._metrics.write(json_line(record))
        if self._use_tensorboard:
            events = self._events()
            for name, value in values.items():
                events.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(values, step=step)
        self.show(step, {name: value for name, value in values.items() if not name.startswith(_QUIET)})

    def text(self, step: int, name: str, text: str, parts: Mapping[str, Any] | None = None) -> None:
        """Records a sample of generated text. It isn't printed.

        Args:
          step: of it.
          name: what it is of.
          text: the whole.
          parts: the same for a report: "prompt", "answers" ({"text", "right", "reward"} each, the last two where they
            are known) and "expected".
        """
        if not self._active:
            return
        record = {"step": step, "time": round(time.time(), 3), "name": name, "text": text} | dict(parts or {})
        self._samples.write(json_line(record))
        if self._use_tensorboard:
            self._events().add_text(name, _verbatim(text), step)
        if self._wandb is not None:
            import html

            import wandb

            self._wandb.log({name: wandb.Html(f"<pre>{html.escape(text)}</pre>")}, step=step)

    def advance(self, step: int) -> None:
        """Says that `step` is done, for the bar and the time left; costs next to nothing."""
        self._mark(step)
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def print(self, message: str) -> None:
        """Prints to stderr, above the bar where there is one, and to log.txt."""
        if self._active:
            console.line(message)
            self._note(message)

    def _note(self, message: str) -> None:
        line = f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {message}\n"
        if self._log is not None:
            self._log.write(line.encode())
        elif self._early is not None:
            self._early.append(line)

    def _reopen(self, name: str) -> SteadyFile:
        """Opens JSON lines to append, without those after the start; a start at 0 redoes step 0 as well."""
        path, start = os.path.join(self._workdir, name), self._start_step
        there = _read_lines(path) if start and os.path.exists(path) else []
        write_text(path, "".join(line for _, line, record in there if record["step"] <= start))
        return SteadyFile(path, self.print)

    def _events(self) -> Any:
        """TensorBoard's writer, made for the first value: its import takes a while, which a first step needn't wait."""
        if self._tensorboard is None:
            from tensorboardX import SummaryWriter, record_writer, summary

            folder = os.path.join(self._workdir, "tensorboard")
            os.makedirs(folder, exist_ok=True)
            record_writer.register_writer_factory(_STEADY, _Factory(console.line))  # else a full disk ends its thread
            self._tensorboard = SummaryWriter(
                f"{_STEADY}:{folder}",
                purge_step=self._start_step + 1 if self._start_step else 0,
                flush_secs=1,
            )
            config = json.dumps(self._config, indent=2, default=str)
            self._tensorboard.add_text("config", _verbatim(config), self._start_step)
            for record in summary.hparams(_hparams(self._config), dict.fromkeys(_HPARAM_METRICS, 0)):
                self._tensorboard.file_writer.add_summary(record)
        return self._tensorboard

    def show(self, step: int, values: Mapping[str, float], also: str = "") -> None:
        """Shows values of a step, and what there is to say `also`; records nothing."""
        if not self._active:
            return
        train = describe({k: v for k, v in values.items() if k.startswith("train/")})
        rest = describe({k: v for k, v in values.items() if not k.startswith("train/")})
        if not train and not rest:  # an evaluation of nothing
            return
        eta = self._eta(step) if train else ""
        at = f"step {step}/{self._total_steps}"
        if self._bar is None:
            self.print("  ".join(filter(None, (at, train, rest, also, eta))))
            return
        if rest:
            self.print(f"{at}  {rest}")
        if not train:  # what was done for these values is no longer being done
            self._bar.set_description_str(self._described, refresh=False)
        else:  # what is left over is cut off at the terminal's right edge, so the ETA goes first
            self._note("  ".join(filter(None, (at, train, also, eta))))
            self._described = "  ".join(filter(None, (eta, train)))
            self._bar.set_description_str(self._described, refresh=False)
        self.advance(step)
        self._bar.refresh()

    def _eta(self, step: int) -> str:
        """The time left, at the speed since the first step: that one has compilation in it."""
        self._mark(step)
        if self._clock is None or not self._clock[0] < step < self._total_steps:
            return ""
        first, started = self._clock
        left = (time.monotonic() - started) / (step - first) * (self._total_steps - step)
        return f"ETA {duration(left)}"

    def _mark(self, step: int) -> None:
        if self._clock is None and step > self._start_step:
            self._clock = step, time.monotonic()


def _hparams(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted field -> value of a config, as TensorBoard's page of hyperparameters takes it: numbers, bools, texts."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            flat |= _hparams(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = (
                value if isinstance(value, bool | int | float | str) else json.dumps(value, default=str)
            )
    return flat


def read_metrics(workdir: str) -> list[dict[str, float]]:
    """Returns the records of a run in the order they were written; nan and inf are floats again.

    A last line that a killed run left half-written is ignored.

    Raises:
      InputError: there are no metrics, or a line isn't a record.
    """
    path = os.path.join(workdir, METRICS_FILE)
    if not os.path.exists(path):
        raise InputError(f"{workdir}: there is no {METRICS_FILE} in it. Name the --workdir of a run.")
    return [{k: _metric(where, k, v) for k, v in record.items()} for where, _, record in _read_lines(path)]


def read_samples(workdir: str) -> list[dict[str, Any]]:
    """Returns the sampled texts of a run in order, {"step", "time", "name", "text"} each; [] if none."""
    path = os.path.join(workdir, SAMPLES_FILE)
    found = _read_lines(path) if os.path.exists(path) else []
    for where, _, record in found:
        if not all(isinstance(record.get(name), str) for name in ("name", "text")):
            raise InputError(f"{where}: has no texts 'name' and 'text'. Delete the line.")
        if "answers" in record and not _is_conversation(record):
            raise InputError(f"{where}: prompt or answers aren't texts as a run writes them. Delete the line.")
    return [record for _, _, record in found]


def _is_conversation(record: Mapping[str, Any]) -> bool:
    """Whether a sample has a prompt and answers with texts; see Writer.text."""
    answers = record["answers"]
    return (
        isinstance(record.get("prompt"), str)
        and isinstance(answers, list)
        and all(isinstance(each, dict) and isinstance(each.get("text"), str) for each in answers)
        and all(type(each.get("reward")) in (int, float, type(None)) for each in answers)
    )


def check_wandb(options: Mapping[str, Any]) -> None:
    """Raises InputError where W&B can't be used with these arguments of wandb.init. Nothing is started."""
    try:
        import wandb
    except ImportError as error:
        raise InputError(
            f"log.wandb: Weights & Biases is asked for but can't be imported ({error})."
            " pip install -e '.[wandb]', or leave log.wandb empty."
        ) from None
    known = set(inspect.signature(wandb.init).parameters) - {"id", "resume", "dir", "config"}
    for name in options:
        if name not in known:
            hint = did_you_mean(name, known)
            raise InputError(f"wandb.{name}: not an argument of wandb.init that can be set.{hint}")


def peak_flops(device: jax.Device) -> float | None:
    """Returns the peak FLOP/s of one device, the denominator of model-FLOPs utilisation.

    TPUs and GPUs: that of chips.TPUS and chips.GPUS. A JAX device is one TensorCore of two on TPU v2, v3 and 7x, and
    has that share of the chip's peak.
    CPU: measured by a float32 matrix multiplication; simulated devices of one process share it.
    Others: None, with a warning in the log: utilisation can't be reported.
    """
    if device.platform == "cpu":
        return _measure_flops(device)
    chip = chips.find(device.device_kind, device.platform)
    if chip is None:
        logging.warning(
            "The peak FLOP/s of %r isn't known, so model-FLOPs utilisation isn't reported.", device.device_kind
        )
        return None
    return chip.share(device.num_cores).flops if device.platform == "tpu" else chip.flops


@functools.cache
def _measure_flops(device: jax.Device, size: int = 1024) -> float:
    """FLOP/s of a square float32 matrix multiplication: the median over about 0.2 s, measured once in a process."""
    x = jax.device_put(np.ones((size, size), np.float32), device)
    matmul = jax.jit(lambda a, b: a @ b)
    matmul(x, x).block_until_ready()
    seconds: list[float] = []
    while len(seconds) < 3 or (sum(seconds) < 0.2 and len(seconds) < 25):
        start = time.perf_counter()
        matmul(x, x).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(seconds) / len(device.client.local_devices())


def _read_lines(path: str) -> list[tuple[str, str, dict[str, Any]]]:
    """(file:line, line, record) of each line; a half-written last line is left out."""
    found = []
    with open(path, "rb") as f:
        for number, line in enumerate(f, 1):
            where = f"{path}:{number}"
            try:
                record = json.loads(line)
                step = record["step"]
                if type(step) is not int or not 0 <= step < 2**63:
                    raise ValueError(f"step = {step!r:.40}: must be a whole number")
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                if not line.endswith(b"\n"):
                    break
                raise InputError(f"{where}: isn't a record with a step ({error!s:.200}). Delete the line.") from error
            found.append((where, line.decode().rstrip("\n") + "\n", record))
    return found


def _metric(where: str, name: str, value: Any) -> float:
    """A value of a record; nan and inf are written as texts. Raises InputError where it is no number."""
    if type(value) in (int, float) or value in ("nan", "inf", "-inf"):
        with contextlib.suppress(OverflowError):
            return value if type(value) in (int, float) and float(value) == value else float(value)
    raise InputError(f"{where}: {name} = {value!r:.40}: must be a number. Delete the line.")


class _Factory:
    """Opens the files of TensorBoard's writer, whose names begin with _STEADY and a colon."""

    def __init__(self, say: Callable[[str], None]):
        self._say = say

    def open(self, path: str) -> SteadyFile:
        return SteadyFile(path.partition(":")[2], self._say)

    def directory_check(self, path: str) -> None:
        """The folder is there."""


def _is_stderr(path: str) -> bool:
    """Whether what is printed goes to this file already, as that of a study's stage does."""
    try:
        return os.path.exists(path) and os.path.samestat(os.fstat(sys.stderr.fileno()), os.stat(path))
    except (OSError, ValueError):  # a stream without a file
        return False


def _start_wandb(workdir: str, options: Mapping[str, Any], config: Mapping[str, Any]) -> Any:
    """Starts the W&B run of this workdir, or goes on with it."""
    import wandb

    path = os.path.join(workdir, "wandb_id")
    if not os.path.exists(path):
        with open(path, "w", encoding="utf-8") as f:
            f.write(uuid.uuid4().hex[:8])
    with open(path, encoding="utf-8") as f:
        run_id = f.read().strip()
    # W&B ignores steps it already has: those done again after a restart, whose values are the same.
    return wandb.init(id=run_id, resume="allow", dir=workdir, config=dict(config), **options)


def _verbatim(text: str) -> str:
    """Markdown that shows `text` as it is."""
    return "\n".join("    " + line for line in text.splitlines())
