"""Runs one experiment in several processes on this machine, and again after a preemption or a crash.

    python launch/local.py --processes=2 --devices=2 -- --config=experiments/sft.py --workdir=runs/sft

Settings are those of settings.env: PLATFORM=gpu gives each process its own DEVICES of the GPUs, cpu simulates them.
With SERVERS it starts vLLM servers first, which write the answers of a run with rewards; see servers.py.
"""

import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence

import servers as servers_lib
import settings as settings_lib

PREEMPTED, PEER_LOST = 75, 76  # Exit statuses of research.main, told in launch/README.md.


def main(argv: Sequence[str]) -> int:
    try:
        settings, dry_run = settings_lib.read(argv)
        if settings["PLATFORM"] == "tpu":
            raise settings_lib.SettingError(
                "PLATFORM = 'tpu': one process has all of a machine's TPUs; run research.main."
            )
        if settings["NODES"] != "1":
            raise settings_lib.SettingError(f"NODES = {settings['NODES']!r}: this launcher knows this machine alone.")
    except settings_lib.SettingError as error:
        print(f"error: {error}", file=sys.stderr)
        return settings_lib.BAD_INPUT
    first_device = int(settings["PROCESSES"]) * int(settings["DEVICES"])
    if settings["SERVERS"] != "0":
        settings["RUN"] = servers_lib.run_with(settings["RUN"], servers_lib.urls(settings))
    if dry_run:
        for command, environment in [
            *servers_lib.commands(settings, first_device),
            *commands(settings, free_port()),
        ]:
            print(shlex.join(["env", *(f"{k}={v}" for k, v in environment.items()), *command]))
        return 0
    signals = Signals()
    with servers_lib.Servers(settings, first_device) as servers:
        if not servers.wait(signals):
            return PREEMPTED if signals() else 1
        return run(settings, signals)


class Signals:
    """SIGINT and SIGTERM, which are forwarded to the processes of the run. Calling it says whether one came."""

    def __init__(self) -> None:
        self.processes: list[subprocess.Popen] = []
        self._came: list[int] = []
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._forward)

    def __call__(self) -> bool:
        return bool(self._came)

    def forward_again(self) -> None:
        """Forwards what came between two starts."""
        if self._came:
            self._forward(self._came[-1], None)

    def _forward(self, number: int, frame: object) -> None:
        self._came.append(number)
        for process in self.processes:
            process.send_signal(number)


def run(settings: Mapping[str, str], signals: Signals) -> int:
    """Runs the processes, and again as long as that helps; returns the status of the last run."""
    processes = signals.processes
    for restarts in range(int(settings["MAX_RESTARTS"]) + 1):
        try:
            outputs = start(commands(settings, free_port()), processes)
            signals.forward_again()
            status = wait(processes, float(settings["GRACE"]))
        finally:
            for process in processes:
                process.kill()
        for output in outputs:
            output.join(timeout=5)
        if signals() or not goes_on(status):
            break
        left = int(settings["MAX_RESTARTS"]) - restarts
        then = f"starts again, {left} times at most" if left else "no restart left"
        say(f"the run ended with {describe(status)}: {then}")
    return status if status >= 0 else 128 - status


def commands(settings: Mapping[str, str], port: int) -> list[tuple[list[str], dict[str, str]]]:
    """Each process's command, and what is added to its environment."""
    count, devices = int(settings["PROCESSES"]), int(settings["DEVICES"])
    command = [sys.executable, "-m", "research.main", *shlex.split(settings["RUN"])]
    made = []
    for i in range(count):
        environment = {"PYTHONUNBUFFERED": "1"}
        if settings["PLATFORM"] == "gpu":
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(str(i * devices + j) for j in range(devices))
        else:
            environment |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
        peers = [f"--coordinator=localhost:{port}", f"--num_processes={count}", f"--process_id={i}"]
        made.append(([*command, *(peers if count > 1 else [])], environment))
    return made


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def start(
    made: Sequence[tuple[list[str], dict[str, str]]], processes: list[subprocess.Popen]
) -> list[threading.Thread]:
    """Replaces `processes` by new ones, and returns the threads that copy their output."""
    processes.clear()
    threads = []
    for i, (command, environment) in enumerate(made):
        # A session of its own: Ctrl-C reaches it once, forwarded, and not from the terminal as well.
        process = subprocess.Popen(
            command,
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        processes.append(process)
        threads.append(threading.Thread(target=copy_output, args=(process, f"[{i}] "), daemon=True))
        threads[-1].start()
    return threads


def copy_output(process: subprocess.Popen, prefix: str) -> None:
    for line in process.stdout:
        print(f"{prefix}{line}", end="", flush=True)


def wait(processes: Sequence[subprocess.Popen], grace: float) -> int:
    """Waits for all; once one has failed, the others have `grace` seconds. Returns the status of the run."""
    deadline = None
    while any(process.poll() is None for process in processes):
        failed = [i for i, process in enumerate(processes) if process.poll() not in (None, 0)]
        if failed and deadline is None:
            deadline = time.monotonic() + grace
            say(f"process {failed[0]} ended with {describe(processes[failed[0]].returncode)}")
        if deadline is not None and time.monotonic() > deadline:
            for i, process in enumerate(processes):
                if process.poll() is None:
                    say(f"process {i} still runs {grace:g} s later: killed")
                    process.kill()
            deadline = float("inf")
        time.sleep(0.1)
    return run_status([process.returncode for process in processes])


def run_status(statuses: Sequence[int]) -> int:
    """What caused the others: an error before a lost process before a preemption, which follow from it."""
    failed = [status for status in statuses if status != 0]
    final = [status for status in failed if not goes_on(status)]
    signals = [status for status in failed if status < 0]
    return next(iter([*final, *signals, *sorted(failed, reverse=True)]), 0)


def goes_on(status: int) -> bool:
    """Whether the same command goes on from the last checkpoint."""
    return status in (PREEMPTED, PEER_LOST) or status < 0


def describe(status: int) -> str:
    return signal.Signals(-status).name if status < 0 else f"status {status}"


def say(text: str) -> None:
    print(f"local.py: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
