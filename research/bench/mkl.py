"""Has MKL inside torch choose its fast kernels on processors that aren't Intel's.

MKL asks `mkl_serv_intel_cpu_true` whether the processor is Intel's, and else takes slow kernels: on an AMD EPYC with
AVX-512 half the speed of a matrix product. A library with that one function, loaded before torch, answers for it. A
user on an Intel processor has the fast ones, so that they are what to compare with.
"""

import functools
import os
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

from research.files import cache_root

_SOURCE = "int mkl_serv_intel_cpu_true(void) { return 1; }\n"


class Mkl(NamedTuple):
    """How MKL runs in a process.

    Attributes:
      kernels: "intel": those of Intel's processors, "own": those that it takes by itself.
      environment: variables that have it so.
      reason: why it is "own".
    """

    kernels: str
    environment: dict[str, str]
    reason: str = ""


def choose(kernels: str) -> Mkl:
    """How MKL is to run: "intel" where a library for it can be built."""
    if kernels == "own":
        return Mkl("own", {}, "as asked for")
    if _is_intel():
        return Mkl("intel", {})
    library, reason = _build()
    if reason:
        return Mkl("own", {}, reason)
    before = os.environ.get("LD_PRELOAD", "")
    return Mkl("intel", {"LD_PRELOAD": f"{library}:{before}".strip(":")})


def _is_intel() -> bool:
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


@functools.cache
def _build() -> tuple[str, str]:
    """(the library, "") or ("", why there is none)."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        return "", "no C compiler"
    folder = cache_root() / "mkl"
    source, library = folder / "intel.c", folder / "intel.so"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        source.write_text(_SOURCE)
        command = [compiler, "-shared", "-fPIC", str(source), "-o", str(library)]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        return "", str(error)
    return (str(library), "") if ended.returncode == 0 else ("", ended.stderr.strip()[:200])
