"""Probes by name: each module here that has a function `measure(subject) -> Measured` is one. Nothing is registered."""

import importlib
import pkgutil
from collections.abc import Collection

import jax

from research.diagnosis import series
from research.diagnosis.subject import Subject
from research.diagnosis.types import Evidence


def names() -> tuple[str, ...]:
    """The probes that there are."""
    modules = (module.name for module in pkgutil.iter_modules(__path__))
    return tuple(sorted(name for name in modules if hasattr(_module(name), "measure")))


def measure(subject: Subject, only: Collection[str] | None = None) -> Evidence:
    """All that can be measured of a subject: its series of metrics, and what the probes say.

    Args:
      subject: what is diagnosed; it stays as it is.
      only: the names of the probes to run; by default all.
    """
    signals, rows = dict(series.signals(subject.records)), {}
    with jax.set_mesh(subject.mesh):
        for name in names() if only is None else only:
            measured = _module(name).measure(subject)
            signals |= measured.signals
            rows |= measured.rows
    return Evidence(subject.stage, subject.started, signals, rows)


def _module(name: str):
    return importlib.import_module(f"{__name__}.{name}")
