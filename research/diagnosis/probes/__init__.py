"""Probes: what is measured of a run on demand, on a few of its batches. Each module measures one subject."""

import jax

from research.diagnosis import series
from research.diagnosis.probes import (
    data,
    layers,
    loss,
    optimizer,
    order,
    pairs,
    parameters,
    perturb,
    positions,
    setup,
    teachers,
    tokens,
)
from research.diagnosis.subject import Subject
from research.diagnosis.types import Evidence

PROBES = (setup, data, order, tokens, pairs, loss, perturb, positions, layers, parameters, teachers, optimizer)


def measure(subject: Subject) -> Evidence:
    """What all probes and the run's metrics say of a subject."""
    signals: dict[str, float] = {}
    rows: dict[str, tuple[str, ...]] = {}
    with jax.set_mesh(subject.mesh):
        for probe in PROBES:
            measured = probe.measure(subject)
            signals |= measured.signals
            rows |= measured.rows
    return Evidence(subject.stage, subject.started, signals | series.signals(subject.records), rows)
