"""Starts vLLM servers that answer for a run with rewards, looks after them, and starts again those that end.

    python launch/servers.py --servers=2 --server_model=exported --vllm=ENVIRONMENT/bin/vllm

local.py does the same beside a run. Settings are those of settings.env. Ctrl-C or SIGTERM ends the servers.
"""

import contextlib
import http.client
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence

import settings as settings_lib

NAME = "policy"  # what a run asks for
START_SECONDS = 1800.0  # from its start until a server answers
SILENT_SECONDS = 120.0  # without an answer, of one that has answered
LOOK_SECONDS = 1.0
_END_SECONDS = 20.0
_MOST_PAUSE = 60.0  # seconds before a server is started again


def main(argv: Sequence[str]) -> int:
    try:
        settings, dry_run = settings_lib.read(argv, require=("SERVER_MODEL",), run=False)
        if settings["SERVERS"] == "0":
            raise settings_lib.SettingError("SERVERS = '0': is no number of servers to start. Give --servers=1.")
    except settings_lib.SettingError as error:
        print(f"error: {error}", file=sys.stderr)
        return settings_lib.BAD_INPUT
    if dry_run:
        for server_command, environment in commands(settings, first_device=0):
            print(shlex.join(["env", *(f"{k}={v}" for k, v in environment.items()), *server_command]))
        return 0
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    with Servers(settings, first_device=0) as servers:
        while not stop.wait(0.2):
            if servers.hopeless:
                return 1
    return 0


def commands(settings: Mapping[str, str], first_device: int) -> list[tuple[list[str], dict[str, str]]]:
    """Each server's command, and what is added to its environment.

    Args:
      settings: see settings.env.
      first_device: the first GPU that isn't the run's.
    """
    return [command(settings, number, first_device) for number in range(int(settings["SERVERS"]))]


def command(settings: Mapping[str, str], number: int, first_device: int) -> tuple[list[str], dict[str, str]]:
    """The command of one server and what is added to its environment; see `commands`."""
    devices = int(settings["SERVER_DEVICES"])
    host, port = settings["SERVER_HOST"], int(settings["SERVER_PORT"]) + number
    words = [settings["VLLM"], "serve", settings["SERVER_MODEL"], "--served-model-name", NAME]
    words += ["--host", host, "--port", str(port), *flags(settings)]
    environment = dict(ENVIRONMENT)
    if settings["PLATFORM"] == "gpu":
        first = first_device + number * devices
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(str(first + i) for i in range(devices))
    else:
        environment.setdefault("VLLM_CPU_KVCACHE_SPACE", os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1"))
    return words, environment


# The routes by which weights come, adapters among them, and no report of usage to vLLM's makers.
ENVIRONMENT = {
    "VLLM_SERVER_DEV_MODE": "1",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
    "VLLM_NO_USAGE_STATS": "1",
}


def flags(settings: Mapping[str, str]) -> list[str]:
    """What a run needs of `vllm serve`: log-probabilities of what was drawn from, nothing of the model's own settings
    for sampling, token ids in and out, and weights by the plugin."""
    words = ["--logprobs-mode", "processed_logprobs", "--generation-config", "vllm", "--enable-scale-out"]
    words.append("--disable-uvicorn-access-log")
    if "--weight-transfer-config" not in settings["SERVER_OPTIONS"]:
        words += ["--weight-transfer-config", '{"backend": "understudy"}']
    if settings["SERVER_LORA_RANK"] != "0":
        words += ["--enable-lora", "--max-lora-rank", settings["SERVER_LORA_RANK"]]
    if settings["PLATFORM"] == "cpu":
        words += ["--dtype", "float32", "--enforce-eager"]
    elif settings["SERVER_DEVICES"] != "1":
        words += ["--tensor-parallel-size", settings["SERVER_DEVICES"]]
    return words + shlex.split(settings["SERVER_OPTIONS"])


def urls(settings: Mapping[str, str], hosts: Sequence[str] = ()) -> list[str]:
    """Where servers are: on this machine, or one on each of `hosts`."""
    port = int(settings["SERVER_PORT"])
    if hosts:
        return [f"http://{host}:{port}" for host in hosts]
    return [f"http://127.0.0.1:{port + number}" for number in range(int(settings["SERVERS"]))]


def run_with(run: str, servers: Sequence[str]) -> str:
    """The arguments of a run that is to ask servers, as a shell quotes them. What the user says there counts."""
    words = shlex.split(run)
    own = {"--config.rollout.engine": "vllm", "--config.rollout.servers": str(tuple(servers))}
    given = {word.partition("=")[0] for word in words}
    return shlex.join([*words, *(f"{name}={value}" for name, value in own.items() if name not in given)])


class Servers:
    """All servers of this machine, which a thread looks after from the beginning of a `with` block to its end.

    Args:
      settings: see settings.env.
      first_device: the first GPU that isn't the run's.
    """

    def __init__(self, settings: Mapping[str, str], first_device: int):
        places = zip(commands(settings, first_device), urls(settings), strict=True)
        self._all = [
            Server(i, words, environment, url, int(settings["MAX_RESTARTS"]))
            for i, ((words, environment), url) in enumerate(places)
        ]
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> "Servers":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._end.set()
        self._thread.join()
        for server in self._all:
            server.signal(signal.SIGTERM)
        until = time.monotonic() + _END_SECONDS
        for server in self._all:
            server.end(until)

    def wait(self, stopped: Callable[[], object]) -> bool:
        """Waits until all answer; False where one can't, or `stopped` says so."""
        while not all(server.up for server in self._all):
            if stopped() or self.hopeless:
                return False
            time.sleep(0.2)
        return True

    @property
    def hopeless(self) -> bool:
        """Whether a server has ended before it ever answered: its command is wrong."""
        return any(server.gone and not server.ever for server in self._all)

    def _look(self) -> None:
        while True:
            for server in self._all:
                server.look()
            if self._end.wait(LOOK_SECONDS):
                return


class Server:
    """One server: a group of processes, since vLLM starts some of its own.

    Attributes:
      up: whether it answered when it was looked at last.
      ever: whether it has answered.
      gone: whether it has ended and isn't started again.
    """

    def __init__(self, number: int, words: list[str], environment: dict[str, str], url: str, restarts: int):
        self.url, self.up, self.ever, self.gone = url, False, False, False
        self._number, self._words, self._environment, self._left = number, words, environment, restarts
        self._process: subprocess.Popen | None = None
        self._since = self._again = 0.0  # when it answered last, or was started; when it is started again
        self._pause = LOOK_SECONDS

    def start(self) -> None:
        try:
            self._process = subprocess.Popen(
                self._words,
                env=os.environ | self._environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,
            )
        except OSError as error:
            self._say(f"{self._words[0]} can't be started ({error.strerror}). VLLM says which program.")
            self.gone = True
            return
        self._since, self.up = time.monotonic(), False
        threading.Thread(target=self._copy, args=(self._process,), daemon=True).start()

    def look(self) -> None:
        """Starts it again where it has ended, and ends it where it has been silent for too long."""
        now = time.monotonic()
        if self.gone:
            return
        if self._process is None:
            if now >= self._again:
                self.start()
            return
        status = self._process.poll()
        if status is not None:
            self._ended(now, f"ended with status {status}")
        elif _answers(f"{self.url}/health"):
            if not self.up:
                self._say(f"answers at {self.url}")
            self.up = self.ever = True
            self._since, self._pause = now, LOOK_SECONDS
        elif now - self._since > (SILENT_SECONDS if self.up else START_SECONDS):
            self._ended(now, f"didn't answer for {now - self._since:.0f} s")

    def _ended(self, now: float, why: str) -> None:
        self.signal(signal.SIGKILL)  # what is left of its group
        self._process, self.up = None, False
        if not self.ever or not self._left:
            self.gone = True
            self._say(f"{why}: not started again")
            return
        self._left -= 1
        self._again, self._pause = now + self._pause, min(2 * self._pause, _MOST_PAUSE)
        self._say(f"{why}: starts again in {self._again - now:.0f} s, {self._left} times more at most")

    def signal(self, number: int) -> None:
        """Sends a signal to all of its processes."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)

    def end(self, until: float) -> None:
        """Waits for its end, and kills it at `until`."""
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(max(until - time.monotonic(), 0))
            self.signal(signal.SIGKILL)
            self._process.wait()

    def _copy(self, process: subprocess.Popen) -> None:
        for line in process.stdout:
            print(f"[server {self._number}] {line}", end="", flush=True)

    def _say(self, text: str) -> None:
        print(f"servers.py: server {self._number} {text}", file=sys.stderr, flush=True)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=10):
            return True
    except (OSError, http.client.HTTPException):
        return False


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
