"""The parts of the benchmark, and how they are run: one after the other, each failing alone."""

import contextlib
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import jax

from research import config as config_lib
from research.bench import data, decoding, peers, prepared, starting, steps, storage
from research.bench.types import Bench, Record, Result
from research.errors import InputError
from research.planning import abstract

PARTS: dict[str, Callable[[Bench], Iterator[Result]]] = {
    "train": steps.train,
    "loop": steps.loop,
    "decode": decoding.decode,
    "data": data.data,
    "loading": storage.loading,
    "checkpoint": storage.save,
    "startup": starting.startup,
}


def make(experiment: dict[str, Any], **values: Any) -> Bench:
    """What to measure.

    Args:
      experiment: a config, as a dict.
      values: of the other fields of Bench.

    Raises:
      InputError: the config is at fault, or a peer or an objective isn't there.
    """
    bench = Bench(abstract.describe(config_lib.parse(experiment)), **values)
    peers.check(bench.against)
    for name in bench.objectives:
        prepared.with_objective(bench.config, name)  # raises where there is none
    return bench


def run(bench: Bench, names: Sequence[str], output: str = "") -> int:
    """Runs parts.

    Args:
      bench: what they measure.
      names: of PARTS.
      output: a file that the JSON lines are appended to as well; "": none.

    Returns:
      0, or 1 where a part failed.
    """
    with contextlib.ExitStack() as stack:
        files = [sys.stdout]
        if output:
            Path(output).parent.mkdir(parents=True, exist_ok=True)
            files.append(stack.enter_context(open(output, "a")))
        status = 0
        for name in names:
            for record, text in _results(bench, PARTS[name](bench)):
                _write(bench, files, name, record, text)
                status = 1 if "error" in record else status
    return status


def _results(bench: Bench, results: Iterator[Result]) -> Iterator[Result]:
    """What a part says; its failure is the last."""
    while True:
        try:
            with contextlib.redirect_stdout(sys.stderr), jax.set_mesh(bench.mesh):
                result = next(results)
        except StopIteration:
            return
        except Exception as error:
            if not isinstance(error, InputError):
                traceback.print_exc()
            text = f"{type(error).__name__}: {error}"
            yield {"error": text}, text
            return
        yield result


def _write(bench: Bench, files: Sequence[IO[str]], part: str, record: Record, text: str) -> None:
    experiment = next(flag for flag in bench.flags if flag.startswith("--config")).partition("=")[2]
    common: dict[str, Any] = {
        "config": experiment,
        "device": bench.mesh.devices.flat[0].device_kind,
        "devices": bench.mesh.size,
        "jax": jax.__version__,
        "time": round(time.time(), 3),
    }
    line = json.dumps({"part": part, **record, **common})
    for file in files:
        print(line, file=file, flush=True)
    print(f"{part:<10} {text}", file=sys.stderr, flush=True)
