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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils

from research.errors import InputError

LOST = 76  # exit status: another process is gone; the same command goes on from the last checkpoint
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
    env = os.environ
    coordinator = coordinator or env.get("JAX_COORDINATOR_ADDRESS", "")
    options: dict[str, Any] = {}
    if coordinator:
        count = num_processes or _number("JAX_NUM_PROCESSES", 0)
        number = process_id if process_id >= 0 else _number("JAX_PROCESS_ID", -1)
        if not 0 <= number < count:
            raise InputError(
                f"--coordinator={coordinator}: process {number} of {count}. Give --num_processes, and --process_id "
                "from 0 to one less (or JAX_NUM_PROCESSES and JAX_PROCESS_ID)."
            )
        if ":" not in coordinator:
            raise InputError(f"--coordinator={coordinator}: has no port. Give HOST:PORT, the same for all processes.")
        options = {"coordinator_address": coordinator, "num_processes": count, "process_id": number}
        options["cluster_detection_method"] = "deactivate"
    elif num_processes > 1 or process_id > 0:
        raise InputError("--num_processes and --process_id need --coordinator=HOST:PORT, the address of process 0.")
    elif int(env.get("SLURM_NTASKS", 1)) > 1 and "SLURM_STEP_NODELIST" in env:
        # JAX would give each task one GPU, also where a node has only one task.
        alone = env["SLURM_NTASKS"] == env.get("SLURM_STEP_NUM_NODES")
        if alone and (gpus := int(env.get("SLURM_GPUS_ON_NODE", 0))):
            options["local_device_ids"] = list(range(gpus))
    elif int(env.get("OMPI_COMM_WORLD_SIZE", 1)) == 1 and not _on_tpu():
        if "xla_force_host_platform_device_count" in env.get("XLA_FLAGS", "") or _number("JAX_NUM_CPU_DEVICES", 1) > 1:
            _order_collectives()
            env.setdefault("PJRT_NPROC", "64")  # a device that waits holds a thread, and XLA has about one for each
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if not _on_tpu():
        _order_collectives()
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


_ORDER = {
    "xla_cpu_experimental_ynn_fusion_type": "",
    "xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",  # with the default, runs were seen to hang
}


def _order_collectives() -> None:
    """Keeps several CPU devices to one order of a program's collectives.

    While a loop waits for a kernel that runs in other threads, as YNNPACK's do (reductions), XLA goes on with what
    follows the loop. A collective among that comes before those of the loop, on some devices only: they wait for each
    other forever or, between processes, take one message for another (gloo::EnforceNotMet).
    """
    given = os.environ.get("XLA_FLAGS", "")
    options = [f"--{name}={value}" for name, value in _ORDER.items() if name not in given]
    os.environ["XLA_FLAGS"] = " ".join([given, *options]).strip()


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    if text and not text.isdigit():
        raise InputError(f"{name}={text}: is not a number.")
    return int(text) if text else default


def _on_tpu() -> bool:
    return bool(glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*"))


def several() -> bool:
    return jax.process_count() > 1


def main() -> bool:
    """Whether this process writes what only one may write."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits until all processes are here."""
    if several():
        multihost_utils.sync_global_devices(name)


def one_at_a_time(program: Callable[..., Any]) -> Callable[..., Any]:
    """A jitted function that, on several CPU devices, returns when it is done: of two programs under way, devices would
    enter the collectives in different orders, and wait for each other forever."""
    if jax.device_count() == 1 or jax.default_backend() != "cpu":
        return program
    return lambda *args, **kwargs: jax.block_until_ready(program(*args, **kwargs))


def should_stop(step: int) -> bool:
    """Whether all processes are to save and end after this step, since one was told to (SIGTERM). All must ask, at
    every step; all get the same answer."""
    return several() and multihost_utils.reached_preemption_sync_point(step)


class Watch:
    """This process's heartbeat, and its eye on those of the others.

    Args:
      workdir: of the run.
      stall_seconds: end the run when it has made no step for so long; 0: never.
    """

    def __init__(self, workdir: str, stall_seconds: float):
        self.folder, self.stall_seconds = Path(workdir) / _FOLDER, stall_seconds
        self.index, self.count = jax.process_index(), jax.process_count()
        self.step, self.at = 0, time.monotonic()
        self.ended: str | None = None
        self._seen: dict[int, tuple[str, float]] = {}  # process -> its last heartbeat, and when that was new
        self._beats, self._lock = 0, threading.Lock()

    def progress(self, step: int) -> None:
        """The step that was sent to the devices last."""
        self.step, self.at = step, time.monotonic()

    def beat(self) -> None:
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
        now, records = time.monotonic(), {}
        for other in (i for i in range(self.count) if i != self.index):
            with contextlib.suppress(OSError, ValueError):
                text = (self.folder / f"{other}.json").read_text()
                records[other] = json.loads(text)
                if self._seen.get(other, ("", 0.0))[0] != text:
                    self._seen[other] = text, now
        for other, (_, since) in self._seen.items():
            if other not in records:
                continue
            record = records[other]
            name = f"process {other} (pid {record['pid']} on {record['host']}, at step {record['step']})"
            ended = record.get("ended")
            if ended:
                return f"{name} ended: {ended}"
            if ended is None and now - since > DEAD_SECONDS:
                return f"{name} died: it has not been heard of for {now - since:.0f} s"
        if self.stall_seconds and now - self.at > self.stall_seconds:
            behind = sorted(i for i, record in records.items() if record["step"] < self.step)
            who = f", and stalled are those behind it: {', '.join(map(str, behind))}" if behind else ""
            return f"no step for {now - self.at:.0f} s (stall_seconds); this process is at step {self.step}{who}"
        return ""

    def run(self) -> None:
        """Until the run is over; ends this process if another is lost, for the main thread may wait for it forever."""
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


@contextlib.contextmanager
def watch(workdir: str, stall_seconds: float, together: tuple[type[Exception], ...] = ()) -> Iterator[Watch]:
    """Watches the other processes until the block is left; without others, does nothing.

    An error that one process has is told to the others. One that comes of another's death isn't raised: the watch says
    which is gone, and ends this process with status LOST.

    Args:
      workdir, stall_seconds: see Watch.
      together: exceptions that all processes raise at the same step, so that nobody need be told.

    Raises:
      InputError: the processes don't see the same workdir.
    """
    made = Watch(workdir, stall_seconds)
    if made.count == 1:
        yield made
        return
    made.folder.mkdir(parents=True, exist_ok=True)
    (made.folder / f"{made.index}.json").unlink(missing_ok=True)  # of the start before
    barrier("watch")
    made.beat()
    barrier("heartbeats")
    if not (made.folder / "0.json").exists():
        raise InputError(
            f"--workdir={workdir}: process {made.index} doesn't see what process 0 writes there. Give a folder on "
            "storage that all hosts share."
        )
    # JAX aborts at once when process 0 is gone. The abort waits, so that the watch can tell who it was.
    wait = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda _: time.sleep(DEAD_SECONDS + 10))
    libc = ctypes.CDLL(None)
    libc.signal.restype = ctypes.c_void_p
    libc.signal(signal.SIGABRT, wait)
    thread = threading.Thread(target=made.run, daemon=True, name="watch")
    thread.start()
    try:
        yield made
    except together:
        raise
    except BaseException as error:
        if isinstance(error, jax.errors.JaxRuntimeError):
            thread.join(DEAD_SECONDS + 10)
        made.ended = _in_short(error)
        raise
    finally:
        made.ended = made.ended or ""
        made.beat()
        libc.signal(signal.SIGABRT, ctypes.c_void_p(0))


def leave(status: int) -> int:
    """Returns `status`; one of several processes ends with it at once, as a common end would wait for the others, who
    may know of no error."""
    if several():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def _in_short(error: BaseException) -> str:
    text = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {text[:200]}"
