"""Other libraries, measured in turn with ours: each does the same work in a process of its own."""

import contextlib
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from research.bench import measure, mkl
from research.bench.names import PEERS
from research.bench.types import Record, in_ms, peak_memory
from research.devices import startup
from research.errors import InputError

_PRODUCT = " matmul"  # after a peer's name: its runner of products
_SLOW = 0.8  # a peak below this part of ours isn't what the processor can do


def check(names: Sequence[str]) -> None:
    """Raises InputError where a peer, of PEERS, isn't installed."""
    for name in names:
        missing = [package for package in PEERS[name] if importlib.util.find_spec(package) is None]
        if missing:
            raise InputError(f"--against={name}: needs {' and '.join(missing)}. pip install {' '.join(missing)}")


class Peer:
    """A child process. Use it as a context manager.

    Args:
      name: one of PEERS.
      environment: variables that it has besides.
    """

    def __init__(self, name: str, environment: Mapping[str, str] = {}):
        environment = startup.without_huge_pages(os.environ) | {
            "TOKENIZERS_PARALLELISM": "false",
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
            **environment,
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "research.bench.libraries", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def __enter__(self) -> "Peer":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Ends it, and waits for that."""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def call(self, name: str, **values: Any) -> Any:
        """Asks for a method of libraries.Library, and waits for what it returns. Raises Failed where it raises."""
        try:
            self._process.stdin.write(json.dumps({"call": name, **values}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass
        line = self._process.stdout.readline()
        if not line:
            raise measure.Failed(f"it ended with status {self._process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise measure.Failed(answer["error"])
        return answer["result"]


@dataclasses.dataclass
class Others:
    """The peers of one measurement. Leaving it as a context manager ends them.

    Attributes:
      mkl: of names.MKL, for torch on a CPU.
      processes: name -> those that run.
      answers: name -> what a peer said when it was started.
      errors: name -> why a peer couldn't start.
    """

    mkl: str = "intel"
    processes: dict[str, Peer] = dataclasses.field(default_factory=dict)
    answers: dict[str, Record] = dataclasses.field(default_factory=dict)
    errors: dict[str, str] = dataclasses.field(default_factory=dict)

    def __enter__(self) -> "Others":
        return self

    def __exit__(self, *_: Any) -> None:
        for process in self.processes.values():
            process.close()

    def start(self, name: str, work: str, values: Mapping[str, Any], warm: int = 0) -> None:
        """Starts a peer and prepares its work, a method of libraries.Library; does it `warm` times more. A failure is
        noted."""
        library = mkl.choose(self.mkl) if "torch" in PEERS[name] else mkl.Mkl("", {})
        process = self.processes[name] = Peer(name, library.environment)
        said = {"mkl": library.kernels + (f" ({library.reason})" if library.reason else "")} if library.kernels else {}
        try:
            self.answers[name] = process.call(work, **values) | said
            if warm:
                process.call("run", n=warm)
        except measure.Failed as error:
            self.fail(name, str(error))

    def fail(self, name: str, error: str) -> None:
        """Notes that a peer can't be measured."""
        self.errors[name] = error

    def runners(self) -> dict[str, Callable[[int], list[float]]]:
        """Name -> runner for `in_turn`, of those that have started well."""
        return {
            name: (lambda n, process=process: process.call("run", n=n))
            for name, process in self.processes.items()
            if name not in self.errors
        }

    def products(self, dtype: str) -> dict[str, Callable[[int], list[float]]]:
        """The same of the product that says each one's peak of arithmetic; three of them, for they are short."""
        return {
            name + _PRODUCT: (lambda n, name=name: self.processes[name].call("matmul", n=3 * n, dtype=dtype))
            for name in self.runners()
        }

    def compare(
        self, seconds: Mapping[str, list[float] | str], figures: Callable[[Mapping[str, float]], Record]
    ) -> dict[str, dict[str, Record]]:
        """{"against": name -> what a peer took, or its error}; nothing where there are no peers.

        Args:
          seconds: of `in_turn`, of `runners` and maybe of `products`.
          figures: spread of a peer's seconds -> what else is said of them.
        """
        records: dict[str, Record] = {}
        for name in dict.fromkeys([*self.processes, *self.errors]):
            error = self.errors.get(name, seconds.get(name))
            if isinstance(error, str):
                records[name] = {"error": error}
                continue
            times = measure.spread(seconds[name])
            memory = self.processes[name].call("memory")
            records[name] = {"seconds": times, **figures(times), **self.answers[name], "memory": memory}
            products = seconds.get(name + _PRODUCT)
            if isinstance(products, list):
                records[name]["product_seconds"] = measure.spread(products)["median"]
        return {"against": records} if records else {}


def with_peaks(record: Record, product_flops: float, peak: float) -> None:
    """Adds to each peer of a record its own peak of arithmetic, "matmul_flops_per_second"; that as a part of ours,
    "peak_ratio"; and "own_mfu", the part of it that the work's model FLOPs take, as "mfu" is of ours.

    Args:
      record: with the model FLOPs.
      product_flops: of the product that a device of ours and a peer make.
      peak: our device's, in FLOPs per second.
    """
    for figures in record.get("against", {}).values():
        if "product_seconds" in figures:
            own = product_flops / figures.pop("product_seconds")
            figures |= {
                "matmul_flops_per_second": own,
                "peak_ratio": own / peak,
                "own_mfu": record["model_flops"] / figures["seconds"]["median"] / own,
            }


def describe(record: Record) -> str:
    """A line for each peer of a record."""
    lines = ""
    for name, figures in record.get("against", {}).items():
        text = f"failed: {figures['error']}" if "error" in figures else _in_short(figures) + _of_peak(record, figures)
        lines += f"\n{'':<10}   {name}: {text}"
    return lines


def _in_short(figures: Record) -> str:
    kernels = f", MKL's kernels: {figures['mkl']}" if "mkl" in figures else ""
    time = f"{in_ms(figures['seconds'])}, {figures['ratio']:.2f} times ours"
    return f"{time}, {peak_memory(figures['memory'])}{kernels}"


def _of_peak(record: Record, figures: Record) -> str:
    """What a peer's matmul peak is beside ours; and where it is far below, what that says of the comparison."""
    if "peak_ratio" not in figures:
        return ""
    text = f", MFU {figures['own_mfu']:.1%} of its own {figures['matmul_flops_per_second'] / 1e12:.3g} TFLOP/s"
    if figures["peak_ratio"] >= _SLOW:
        return text
    used = record["mfu"] / figures["own_mfu"]
    return (
        f"{text}; its products run at {figures['peak_ratio']:.2f} of the speed of ours: this build is slow on this "
        f"processor. Of its own peak each uses a part: ours is {used:.2f} of its"
    )
