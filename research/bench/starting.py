"""The start of a run: processes of research.main, from their start to the end of the first step."""

import dataclasses
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

from research.bench import measure
from research.bench.types import Bench, Result
from research.run import metrics

_FIELDS = {
    "steps": 2,
    "optimizer.warmup_steps": 0,
    "eval.every": 0,
    "checkpoint.every": 0,
    "checkpoint.best_metric": "",
    "compilation_cache": True,
}
_SECONDS = "startup/seconds_to_first_step"


@dataclasses.dataclass(frozen=True)
class Starter:
    """Starts runs of an experiment whose caches and workdirs are in a folder."""

    flags: tuple[str, ...]
    folder: str

    def start(self) -> float:
        """Seconds to the end of a run's first step."""
        fields = _FIELDS | {"data.cache_dir": f"{self.folder}/cache"}
        with tempfile.TemporaryDirectory(dir=self.folder) as workdir:
            overrides = [f"--config.{name}={value}" for name, value in fields.items()]
            self.child("-m", "research.main", *self.flags, *overrides, f"--workdir={workdir}/run")
            lines = [line for line in metrics.read_metrics(f"{workdir}/run") if _SECONDS in line]
        return lines[0][_SECONDS]

    def forget_programs(self) -> None:
        """The next run compiles anew."""
        shutil.rmtree(f"{self.folder}/cache/xla", ignore_errors=True)

    def child(self, *argv: str) -> float:
        """Seconds of a Python process.

        Raises:
          RuntimeError: it ended with another status than 0.
        """
        environment = {**os.environ, "UNDERSTUDY_CACHE": f"{self.folder}/cache"}
        began = time.perf_counter()
        ended = subprocess.run([sys.executable, *argv], env=environment, capture_output=True, text=True, check=False)
        if ended.returncode:
            raise RuntimeError(f"{' '.join(argv)} ended with status {ended.returncode}: {ended.stderr[-500:]}")
        return time.perf_counter() - began


def startup(bench: Bench) -> Iterator[Result]:
    """Processes of research.main: seconds to the end of the first step, by what an earlier one left in the cache; and
    what importing takes."""
    seconds: dict[str, list[float]] = {"nothing": [], "tokens": [], "tokens_and_programs": []}
    with tempfile.TemporaryDirectory() as folder:
        starter = Starter(bench.flags, folder)
        seconds["nothing"].append(starter.start())
        for _ in range(bench.few()):
            starter.forget_programs()
            seconds["tokens"].append(starter.start())
            seconds["tokens_and_programs"].append(starter.start())
        imports = [starter.child("-c", "import research.run.run") for _ in range(bench.few())]
    times = {cached: measure.spread(each) for cached, each in seconds.items()}
    record = {"seconds_to_first_step": times, "import": measure.spread(imports)}
    medians = {cached: each["median"] for cached, each in times.items()}
    text = (
        f"first step after {medians['tokens_and_programs']:.3g} s, without compiled programs {medians['tokens']:.3g} "
        f"s, without tokens either {medians['nothing']:.3g} s; importing takes {record['import']['median']:.3g} s"
    )
    yield record, text
