"""Machines that aren't here: devices to compile for, and what their chips have."""

import contextlib
import dataclasses
import math
import os
import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import topologies

from research.devices import chips, startup
from research.devices.chips import Chip
from research.errors import InputError, did_you_mean

# libtpu reads these when it is loaded. Without them it asks a server of Google's cloud what it runs on, and lets in one
# process at a time.
_TPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Where a run is to be.

    Attributes:
      name: as the user wrote it.
      kind: a name of chips.planned(), or "cpu".
      count: devices in all slices.
      slices: joined by a data-centre network.
      devices: to make a mesh of; they can only be compiled for.
      chip: what each device has.
    """

    name: str
    kind: str
    count: int
    slices: int
    devices: Sequence[Any]
    chip: Chip

    @property
    def exact(self) -> bool:
        """Whether the programs are those that would run: the compiler is the machine's own."""
        return self.kind in chips.TPUS


def find(name: str) -> Topology:
    """The machine of a name such as v5e:16x16, 2*v5p:4x4x4, gpu:8xH100 or cpu:8.

    Nothing may have used a device of jax before: it sets how many there are. To import jax is no use.

    Raises:
      InputError: there is no such machine, or the compiler for it isn't installed.
    """
    match = re.fullmatch(r"(?:(\d+)\*)?(\w+):([\w]+)", name)
    if not match:
        raise InputError(f"--topology={name}: isn't of the form KIND:SHAPE, such as v5e:16x16, gpu:8xH100 or cpu:8.")
    slices, kind, shape = int(match[1] or 1), match[2], match[3]
    if not slices or not all(int(size) for size in re.findall(r"\d+", shape)):
        raise InputError(f"--topology={name}: has no device. Name sizes of at least 1.")
    if kind in ("cpu", "gpu"):
        return _simulated(name, kind, slices, shape)
    kinds = [kind for kind in chips.planned() if kind in chips.TPUS]
    if kind not in kinds:
        raise InputError(f"--topology={name}: {kind!r} isn't known.{did_you_mean(kind, [*kinds, 'gpu', 'cpu'])}")
    return _tpu(name, kind, slices, shape)


def _simulated(name: str, kind: str, slices: int, shape: str) -> Topology:
    """CPU devices in place of GPUs or CPUs."""
    match = re.fullmatch(r"(\d+)x(\w+)", shape) if kind == "gpu" else re.fullmatch(r"(\d+)()", shape)
    gpus = {kind: chip for kind, chip in chips.planned().items() if kind in chips.GPUS}
    if not match or (match[2] and match[2] not in gpus):
        raise InputError(f"--topology={name}: give cpu:COUNT or gpu:COUNTxKIND.{did_you_mean(shape, gpus)}")
    count = int(match[1]) * slices
    jax.config.update("jax_platforms", "cpu")
    with contextlib.suppress(RuntimeError):  # jax has its devices already, as in tests
        jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices()
    if len(devices) < count:
        raise InputError(f"--topology: {count} devices can't be simulated, as jax has begun with {len(devices)}.")
    return Topology(name, match[2] or "cpu", count, slices, devices[:count], gpus.get(match[2], chips.CPU))


def _tpu(name: str, kind: str, slices: int, shape: str) -> Topology:
    """Devices of libtpu's compiler."""
    os.environ.pop(startup.TPU_SWITCH, None)  # commands leave libtpu out on a machine without a TPU
    for variable, value in _TPU_ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    if not jax.config.jax_platforms:  # what is computed here meanwhile, such as a random key, is for the CPU
        jax.config.update("jax_platforms", "cpu")
    options = {"num_slices": slices} if slices > 1 else {}
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=f"{kind}:{shape}", **options).devices
    except Exception as error:
        text = str(error).splitlines()[0]
        if "not installed" in text or "libtpu" in text.lower():
            raise InputError(
                f"--topology={name}: the TPU compiler isn't here ({text}). pip install -e '.[tpu]'"
            ) from error
        raise InputError(f"--topology={name}: {text}. Give a shape that {kind} comes in, such as 4x4.") from error
    chip, count = chips.TPUS[kind], len(devices)
    per_chip = count // (slices * math.prod(int(n) for n in shape.split("x")))
    if per_chip > 1:  # a device is one of the chip's cores
        chip = chip.share(chip.cores // per_chip)
    return Topology(name, kind, count, slices, devices, chip)
