"""What a probe gives."""

from typing import NamedTuple


class Measured(NamedTuple):
    """What a probe measured of a subject.

    Attributes:
      signals: name -> number.
      rows: name -> rows of data that show the signal, decoded and short.
    """

    signals: dict[str, float]
    rows: dict[str, tuple[str, ...]] = {}
