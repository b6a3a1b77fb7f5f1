"""What has to happen before anything else in a process: its start, how it takes memory, how XLA compiles for CPUs, and
that libtpu is left alone where there is no TPU."""

import contextlib
import ctypes
import gc
import glob
import os
import sys
import time
from collections.abc import Iterator, Mapping

_SWITCH, _TUNABLES, _VALUE = "UNDERSTUDY_HUGE_PAGES", "GLIBC_TUNABLES", "glibc.malloc.hugetlb=1"
TPU_SWITCH, _GOOGLE = "TPU_LOAD_LIBRARY", "0x1ae0"  # the vendor of TPUs on the PCI bus, also of virtual network cards
# What importing jax sets of TPU_*, the first where no chip is seen.
_BY_IMPORT = {"TPU_SKIP_MDS_QUERY", "TPU_LIBRARY_PATH", "TPU_ML_PLATFORM", "TPU_ML_PLATFORM_VERSION"}
_ARENA_MAX = -8  # of mallopt(3)
_EXTRA, _NO_UNROLLING = "--xla_backend_extra_options", "xla_cpu_disable_loop_unrolling"


def without_huge_pages(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of other programs: what `use_huge_pages` set is for ours."""
    kept = {k: v for k, v in environment.items() if k != _SWITCH}
    if environment.get(_SWITCH) == "set":
        settings = [setting for setting in kept.pop(_TUNABLES, "").split(":") if setting and setting != _VALUE]
        kept |= {_TUNABLES: ":".join(settings)} if settings else {}
    return kept


def start_time() -> float:
    """Unix seconds of this process's start, as Linux knows it; elsewhere the time now."""
    try:
        with open("/proc/self/stat") as file:
            ticks = int(file.read().rpartition(")")[2].split()[19])  # field 22 of proc(5), in ticks since the boot
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError, IndexError):
        age = 0.0
    return time.time() - age


def use_huge_pages() -> None:
    """Begins the process anew, once, with huge pages for large allocations (glibc's malloc, from 2.35 on).

    XLA's CPU client maps its temporaries at every step and gives them back after it; a page of 4 KiB at a time that
    costs a tenth of a small model's step. glibc reads this when a process starts. Does nothing where the system has
    none to give or gives them anyway, where GLIBC_TUNABLES says something about it already, where JAX_PLATFORMS leaves
    the CPU out, or where UNDERSTUDY_HUGE_PAGES is 0.
    """
    settings = os.environ.get(_TUNABLES, "")
    if os.environ.get(_SWITCH) == "set":
        mallopt(_ARENA_MAX, 1)  # for devices.temporaries: arenas of other threads map what is large, whatever is said
    if os.environ.get(_SWITCH) == "0" or "hugetlb" in settings or not _offered():
        return
    if not _for_cpus():
        return
    os.environ |= {_TUNABLES: ":".join(filter(None, [settings, _VALUE])), _SWITCH: "set"}
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def leave_loops() -> None:
    """Keeps LLVM from unrolling loops in programs for CPUs: they compile in nine tenths of the time, and are as fast.

    Does nothing where XLA_FLAGS has extra options already, or JAX_PLATFORMS leaves the CPU out. No option of a single
    compilation says this.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if _EXTRA not in flags and _for_cpus():
        os.environ["XLA_FLAGS"] = f"{flags} {_EXTRA}={_NO_UNROLLING}".strip()


def leave_tpus() -> None:
    """Keeps libtpu from being loaded on a machine without a TPU, where it prints an error about worker hostnames.

    libtpu reads TPU_LOAD_LIBRARY as jax begins; planning.topology, which needs its compiler, takes it back. Does
    nothing where a chip is seen, or where the environment speaks of TPUs: JAX_PLATFORMS, or any variable TPU_*.
    """
    spoken = {name for name in os.environ if name.startswith("TPU_")} - _BY_IMPORT
    if not spoken and "tpu" not in os.environ.get("JAX_PLATFORMS", "").split(",") and not _has_tpu():
        os.environ[TPU_SWITCH] = "0"


def _has_tpu() -> bool:
    """Whether this machine has a TPU, or another device of Google's on its PCI bus."""
    if glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*"):
        return True
    for path in glob.glob("/sys/bus/pci/devices/*/vendor"):
        with contextlib.suppress(OSError), open(path, encoding="ascii") as file:
            if file.read().strip() == _GOOGLE:
                return True
    return False


@contextlib.contextmanager
def quick_imports() -> Iterator[None]:
    """Leaves out the search for garbage, which is a quarter of imports' time: what they make stays."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def release_memory() -> None:
    """Gives the system back what was freed and glibc's malloc still holds: after a compilation, some 0.2 GB."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def has_huge_pages() -> bool:
    """Whether `use_huge_pages` did something."""
    return os.environ.get(_SWITCH) == "set"


def mallopt(option: int, value: int) -> None:
    """Sets an option of glibc's malloc, see mallopt(3); nothing in another C library."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(option, value)


def describe() -> list[str]:
    """A line about each of `use_huge_pages` and `leave_loops` that did something."""
    lines = []
    if has_huge_pages():
        lines.append(f"memory   huge pages for large allocations, by {_TUNABLES}={_VALUE}; {_SWITCH}=0 turns them off")
    if f"{_EXTRA}={_NO_UNROLLING}" in os.environ.get("XLA_FLAGS", ""):
        lines.append(f"compiler {_EXTRA}={_NO_UNROLLING} in XLA_FLAGS, for CPUs; extra options there replace it")
    return lines


def _for_cpus() -> bool:
    return "cpu" in os.environ.get("JAX_PLATFORMS", "cpu").split(",")


def _offered() -> bool:
    try:
        library, version = os.confstr("CS_GNU_LIBC_VERSION").split()
        with open("/sys/kernel/mm/transparent_hugepage/enabled") as file:
            mode = file.read()
        return library == "glibc" and tuple(map(int, version.split("."))) >= (2, 35) and "[madvise]" in mode
    except (OSError, AttributeError, ValueError):
        return False
