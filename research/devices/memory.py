"""What a device, or the machine that CPU devices share, can hold at most."""

import math
import os
from pathlib import Path
from typing import Any

import jax

_CGROUP = Path("/sys/fs/cgroup")


def bytes_on_a_device(tree: Any) -> int:
    """Of abstract arrays with shardings, what one device holds."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


def most_on_a_device(device: Any, devices: int) -> int | None:
    """Bytes that a device can hold at most, or None where that isn't known.

    Args:
      device: a jax.Device of this process. CPU devices share the machine's memory, swap space included.
      devices: how many of them this process uses.
    """
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats is not None:
        return stats.get("bytes_limit")
    return machine_bytes() // devices if device.platform == "cpu" else None


def machine_bytes() -> int:
    """Memory and swap space that the processes of this machine, or container, can have together."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") + _swap()
    limits = [_limit(_CGROUP / name) for name in ("memory.max", "memory.swap.max")]
    return min(total, sum(limits)) if None not in limits else total


def _swap() -> int:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("SwapTotal:"))


def _limit(path: Path) -> int | None:
    """A limit of a container; None where there is none."""
    try:
        text = path.read_text(encoding="utf-8").strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None
