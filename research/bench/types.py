"""What the parts of the benchmark take and give."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from research.planning.abstract import Described

_SECONDS = 20.0  # that a measurement takes, where --steps doesn't say

Record = dict[str, Any]
Result = tuple[Record, str]  # what is written, and a readable line


@dataclasses.dataclass(frozen=True)
class Bench:
    """What the parts measure.

    Attributes:
      run: the experiment's run, its mesh over all devices.
      steps: how often to measure; 0: for about 20 seconds.
      against: names of peers.
      objectives: of the part `train`; none are the config's own.
      decode: batch sizes.
      profile: a folder, or "".
      mkl: of names.MKL, for peers with torch.
      flags: those that describe the experiment, for processes of their own.
    """

    run: Described
    steps: int = 0
    against: tuple[str, ...] = ()
    objectives: tuple[str, ...] = ()
    decode: tuple[int, ...] = (1, 8)
    profile: str = ""
    mkl: str = "intel"
    flags: tuple[str, ...] = ()

    @property
    def config(self) -> Any:
        return self.run.config

    @property
    def mesh(self) -> Any:
        return self.run.mesh

    @property
    def vocab_size(self) -> int:
        return self.run.vocab_size

    def count(self, seconds: float, most: int = 40) -> int:
        """How often to do what takes so many seconds."""
        return self.steps or max(4, min(most, round(_SECONDS / max(seconds, 1e-9))))

    def few(self, most: int = 3) -> int:
        """How often to do what takes long."""
        return min(self.steps, most) or most


def in_ms(times: Mapping[str, float]) -> str:
    """The spread of some times, readable."""
    return f"{1e3 * times['median']:.4g} ms ({1e3 * times['q1']:.4g} to {1e3 * times['q3']:.4g}, {times['n']} times)"


def peak_memory(memory: Record) -> str:
    """The most memory that was in use: the device's where it is known, else the process's."""
    device = memory["device_peak"]
    return f"{(device or memory['resident_peak'] or 0) / 1e6:,.0f} MB {'of the device' if device else 'resident'}"
