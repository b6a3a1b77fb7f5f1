"""What a probe gives."""

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Measured:
    """What a probe measured of a subject.

    Attributes:
      signals: name -> number.
      rows: name -> rows of data that show the signal, decoded and short.
    """

    signals: Mapping[str, float]
    rows: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
