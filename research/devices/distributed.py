"""Several processes as one run: how they find each other, and how each learns that another has died or stalls.

JAX's own service ends every process when one is gone, but seldom says which. So each writes a heartbeat to
WORKDIR/processes, on the storage that all share for the checkpoints, and reads the others'.
"""

import contextlib
import ctypes
import glob
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils

from research.errors import Exit, InputError

LOST = Exit.LOST  # another process is gone; the same command goes on from the last checkpoint
BEAT_SECONDS = 2.0
DEAD_SECONDS = 20.0  # without a heartbeat
_SERVICE_SECONDS = 45  # the same of JAX's own service, which alone watches before the run has a workdir
_FOLDER = "processes"


class Unreachable(Exception):
    """Not all processes are there."""


def start(coordinator: str = "", num_processes: int = 0, process_id: int = -1) -> None:
    """Joins the processes of this run, if there are several; to be called before anything touches a device.

    Without arguments they are found by the environment: JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID;
    Slurm (srun with several tasks); Open MPI; TPU pods.

    Args:
      coordinator: HOST:PORT, where process 0 listens.
      num_processes: of the run.
      process_id: this one's number, from 0.

    Raises:
      InputError: some of the three are missing or make no sense.
      Unreachable: not all processes came within five minutes.
    """
    coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS", "")
    if coordinator:
        options = _coordinated(coordinator, num_processes, process_id)
    elif num_processes > 1 or process_id > 0:
        raise InputError("--num_processes and --process_id need --coordinator=HOST:PORT, the address of process 0.")
    elif _in_slurm():
        options = _slurm()
    elif _on_tpu() or int(os.environ.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        options = {}
    else:
        _start_alone()
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if not _on_tpu():
        _order_collectives()
    _join(coordinator, options)


def _coordinated(coordinator: str, num_processes: int, process_id: int) -> dict[str, Any]:
    """What jax.distributed.initialize is to know where the user names the coordinator."""
    count = num_processes or _number("JAX_NUM_PROCESSES", 0)
    number = process_id if process_id >= 0 else _number("JAX_PROCESS_ID", -1)
    if not 0 <= number < count:
        raise InputError(
            f"--coordinator={coordinator}: process {number} of {count}. Give --num_processes, and --process_id "
            "from 0 to one less (or JAX_NUM_PROCESSES and JAX_PROCESS_ID)."
        )
    if ":" not in coordinator:
        raise InputError(f"--coordinator={coordinator}: has no port. Give HOST:PORT, the same for all processes.")
    return {
        "coordinator_address": coordinator,
        "num_processes": count,
        "process_id": number,
        "cluster_detection_method": "deactivate",
    }


def _in_slurm() -> bool:
    return int(os.environ.get("SLURM_NTASKS", 1)) > 1 and "SLURM_STEP_NODELIST" in os.environ


def _slurm() -> dict[str, Any]:
    """The same under Slurm: JAX would give each task one GPU, also where a node has only one task."""
    one_task_a_node = os.environ["SLURM_NTASKS"] == os.environ.get("SLURM_STEP_NUM_NODES")
    gpus = int(os.environ.get("SLURM_GPUS_ON_NODE", 0))
    return {"local_device_ids": list(range(gpus))} if one_task_a_node and gpus else {}


def _start_alone() -> None:
    """Prepares a process that has no others, but may simulate several devices."""
    forced = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if forced or _number("JAX_NUM_CPU_DEVICES", 1) > 1:
        _order_collectives()
        os.environ.setdefault("PJRT_NPROC", "64")  # a device that waits holds a thread; XLA has about one for each


def _join(coordinator: str, options: Mapping[str, Any]) -> None:
    try:
        jax.distributed.initialize(**options, heartbeat_timeout_seconds=_SERVICE_SECONDS)
    except ValueError as error:
        if _on_tpu() and not coordinator:  # a TPU that isn't part of a pod, as in a notebook
            return
        raise InputError(f"the other processes of this run can't be found: {error}") from error
    except RuntimeError as error:
        raise Unreachable(
            f"the other processes of this run can't be reached at {coordinator or 'the address found'}: "
            f"{str(error).splitlines()[0]}\nStart all of them, with the same --coordinator, within five minutes."
        ) from error


# XLA options of _order_collectives.
_ORDER = {
    "xla_cpu_experimental_ynn_fusion_type": "",
    "xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",  # with the default, runs were seen to hang
}


def _order_collectives() -> None:
    """Keeps several CPU devices to one order of a program's collectives.

    While a loop waits for a kernel that runs in other threads, as YNNPACK's do (reductions), XLA goes on with what
    follows the loop. If that holds a collective, some devices enter it before those of the loop, and others after them:
    they wait for each other forever or, between processes, take one message for another (gloo::EnforceNotMet).
    Options that XLA_FLAGS has already stand.
    """
    before = os.environ.get("XLA_FLAGS", "")
    options = [f"--{name}={value}" for name, value in _ORDER.items() if name not in before]
    os.environ["XLA_FLAGS"] = " ".join([before, *options]).strip()


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    if text and not text.isdigit():
        raise InputError(f"{name}={text}: is not a number.")
    return int(text) if text else default


def _on_tpu() -> bool:
    """Whether this host has TPU chips; jax can't be asked before the processes have joined."""
    return bool(glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*"))


def several() -> bool:
    """Whether this run has more than one process."""
    return jax.process_count() > 1


def main() -> bool:
    """Whether this process writes what only one may write."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits until all processes are here."""
    if several():
        multihost_utils.sync_global_devices(name)


def one_at_a_time(program: Callable[..., Any]) -> Callable[..., Any]:
    """Keeps programs on several CPU devices from running at the same time.

    Devices would enter the collectives of two programs in different orders, and wait for each other forever.

    Args:
      program: a jitted function.

    Returns:
      A function that does the same, and on several CPU devices returns only when its results are there.
    """
    if jax.device_count() == 1 or jax.default_backend() != "cpu":
        return program
    return lambda *args, **kwargs: jax.block_until_ready(program(*args, **kwargs))


def should_stop(step: int) -> bool:
    """Whether one of several processes got SIGTERM, so that all are to save and end after this step.

    Every process must call it at every step, and all get the same answer.
    """
    return several() and multihost_utils.reached_preemption_sync_point(step)


class Watch:
    """Writes this process's heartbeat, a small file in WORKDIR/processes, and reads those of the others.

    Args:
      workdir: of the run.
      stall_seconds: end the run when it has made no step for so long; 0: never.

    Attributes:
      index, count: this process's number, and how many there are.
      ended: None while the run is under way; then why it ended, "" if it ended well. The others read it.
    """

    def __init__(self, workdir: str, stall_seconds: float):
        self.folder, self.stall_seconds = Path(workdir) / _FOLDER, stall_seconds
        self.index, self.count = jax.process_index(), jax.process_count()
        self.step, self.at = 0, time.monotonic()
        self.ended: str | None = None
        self._seen: dict[int, tuple[str, float]] = {}  # process -> its last heartbeat, and when that was new
        self._beats, self._lock = 0, threading.Lock()

    def progress(self, step: int) -> None:
        """Notes the step that was sent to the devices last."""
        self.step, self.at = step, time.monotonic()

    def beat(self) -> None:
        """Writes a heartbeat."""
        with self._lock, contextlib.suppress(OSError):  # storage may fail for a moment
            self._beats += 1
            record = {"host": os.uname().nodename, "pid": os.getpid(), "step": self.step, "beat": self._beats}
            record |= {"ended": self.ended} if self.ended is not None else {}
            path = self.folder / f"{self.index}.json"
            temporary = path.with_suffix(".tmp")
            temporary.write_text(json.dumps(record))
            temporary.replace(path)

    def look(self) -> str:
        """What is wrong with the others; "" if nothing."""
        now, records = time.monotonic(), self._read()
        for other, record in records.items():
            name = f"process {other} (pid {record['pid']} on {record['host']}, at step {record['step']})"
            silent, ended = now - self._seen[other][1], record.get("ended")
            if ended:
                return f"{name} ended: {ended}"
            if ended is None and silent > DEAD_SECONDS:
                return f"{name} died: it has not been heard of for {silent:.0f} s"
        if self.stall_seconds and now - self.at > self.stall_seconds:
            behind = sorted(i for i, record in records.items() if record["step"] < self.step)
            who = f", and stalled are those behind it: {', '.join(map(str, behind))}" if behind else ""
            return f"no step for {now - self.at:.0f} s (stall_seconds); this process is at step {self.step}{who}"
        return ""

    def _read(self) -> dict[int, dict[str, Any]]:
        """Other process -> its last heartbeat. Notes when each was new."""
        now, records = time.monotonic(), {}
        for other in (i for i in range(self.count) if i != self.index):
            with contextlib.suppress(OSError, ValueError):
                text = (self.folder / f"{other}.json").read_text()
                records[other] = json.loads(text)
                if self._seen.get(other, ("", 0.0))[0] != text:
                    self._seen[other] = text, now
        return records

    def run(self) -> None:
        """Beats and looks until the run is over. If another process is lost, ends this one with status LOST: the main
        thread may be waiting for the other forever."""
        while self.ended is None:
            self.beat()
            lost = self.look()
            if lost:
                time.sleep(BEAT_SECONDS)  # this process may be about to end for the same reason
            if lost and self.ended is None:
                remedy = "Start all again: the same command goes on from the last checkpoint."
                print(f"error: process {self.index}: {lost}. {remedy}", file=sys.stderr, flush=True)
                os._exit(LOST)
            time.sleep(BEAT_SECONDS)

    def meet(self) -> None:
        """Waits until all processes have a heartbeat in the workdir.

        Raises:
          InputError: the processes don't see the same workdir.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / f"{self.index}.json").unlink(missing_ok=True)  # of the start before
        barrier("watch")
        self.beat()
        barrier("heartbeats")
        if not (self.folder / "0.json").exists():
            raise InputError(
                f"--workdir={self.folder.parent}: process {self.index} doesn't see what process 0 writes there. Give a "
                "folder on storage that all hosts share."
            )


@contextlib.contextmanager
def watch(workdir: str, stall_seconds: float, together: tuple[type[Exception], ...] = ()) -> Iterator[Watch]:
    """Watches the other processes until the block is left; without others, does nothing.

    An error that leaves the block is written to the heartbeat, so that the others end too. An error that comes of
    another process's death isn't raised: the watch says who died, and ends this process with status LOST.

    Args:
      workdir, stall_seconds: see Watch.
      together: exceptions that all processes raise at the same step; nobody need learn of them.

    Raises:
      InputError: the processes don't see the same workdir.
    """
    watch = Watch(workdir, stall_seconds)
    if watch.count == 1:
        yield watch
        return
    watch.meet()
    with _abort_delayed(DEAD_SECONDS + 10):
        thread = threading.Thread(target=watch.run, daemon=True, name="watch")
        thread.start()
        try:
            yield watch
        except together:
            raise
        except BaseException as error:
            if between_processes(error):
                thread.join(DEAD_SECONDS + 10)
            watch.ended = _in_short(error)
            raise
        finally:
            watch.ended = watch.ended or ""
            watch.beat()


def between_processes(error: BaseException) -> bool:
    """Whether an error may come of another process's death: of a transfer jax raises its own, or ValueError where it
    was about to start the program."""
    return isinstance(error, jax.errors.JaxRuntimeError) or (isinstance(error, ValueError) and "Gloo" in str(error))


@contextlib.contextmanager
def _abort_delayed(seconds: float) -> Iterator[None]:
    """Delays an abort of this process. JAX aborts at once when process 0 is gone, before the watch can say so."""
    wait = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda _: time.sleep(seconds))
    libc = ctypes.CDLL(None)
    libc.signal.restype = ctypes.c_void_p
    libc.signal(signal.SIGABRT, wait)
    try:
        yield
    finally:
        libc.signal(signal.SIGABRT, ctypes.c_void_p(0))


def leave(status: int) -> int:
    """Returns `status`. One of several processes instead ends with it at once: an ordinary exit would wait for the
    others, which may know of no error."""
    if several():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def _in_short(error: BaseException) -> str:
    text = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {text[:200]}"
