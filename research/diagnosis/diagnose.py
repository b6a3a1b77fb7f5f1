"""From a run, or a config of one, to a diagnosis."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from research.config import Config
from research.diagnosis import confirm as confirming
from research.diagnosis import probes, ranking
from research.diagnosis.subject import Subject
from research.diagnosis.types import Diagnosis


def of_subject(subject: Subject, *, confirm: bool = False) -> Diagnosis:
    """Measures a subject, ranks the causes, and with `confirm` tries those that can be tried."""
    evidence = probes.measure(subject)
    signals = {**evidence.signals, "state/step": float(int(subject.state.step))}
    diagnosis = ranking.diagnose(dataclasses.replace(evidence, signals=signals))
    return confirming.confirm(subject, diagnosis) if confirm else diagnosis


def of_run(workdir: str, devices: Sequence[Any] | None = None, *, confirm: bool = False) -> Diagnosis:
    """The diagnosis of the run in a workdir.

    Raises:
      InputError: it can't be read: it holds no run, or what the run reads is gone.
    """
    return of_subject(Subject.of_workdir(workdir, devices=devices), confirm=confirm)


def of_config(config: Config, devices: Sequence[Any] | None = None, *, confirm: bool = False) -> Diagnosis:
    """The diagnosis of a run that hasn't begun.

    Raises:
      InputError: something in the config can't work.
    """
    return of_subject(Subject.of(config, devices=devices), confirm=confirm)
