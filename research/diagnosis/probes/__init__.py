"""Probes: what is measured of a run on demand, on a few of its batches. Each module measures one subject."""

from collections.abc import Sequence
from types import ModuleType

import jax

from research.diagnosis import series
from research.diagnosis.probes import (
    checkpoint,
    data,
    layers,
    loss,
    optimizer,
    order,
    pairs,
    parameters,
    perturb,
    positions,
    range_test,
    rotation,
    setup,
    teachers,
    tokens,
)
from research.diagnosis.subject import Subject
from research.diagnosis.types import Evidence

# Of what a run doesn't change, and of what it does.
STILL = (data, order, pairs, checkpoint, rotation, range_test)
MOVING = (setup, tokens, loss, perturb, positions, layers, parameters, teachers, optimizer)
PROBES = (*STILL, *MOVING)


def measure(subject: Subject, before: Evidence | None = None, skip: Sequence[ModuleType] = ()) -> Evidence:
    """What all probes and the run's metrics say of a subject.

    Args:
      subject: to measure.
      before: what was measured of the same run earlier, where that is known: what no step changes isn't measured again.
      skip: probes that are left out.
    """
    signals = {} if before is None else dict(before.signals)
    rows = {} if before is None else dict(before.rows)
    with jax.set_mesh(subject.mesh):
        for probe in [each for each in (PROBES if before is None else MOVING) if each not in skip]:
            measured = probe.measure(subject)
            signals |= measured.signals
            rows |= measured.rows
    return Evidence(subject.stage, subject.started, signals | series.signals(subject.records), rows)
