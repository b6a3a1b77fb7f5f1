"""Why a run may not learn: a table of causes, one module for each part of a run.

A cause is data. To add one, write an entry into the module of its part: what it predicts of the signals, how sure that
makes it, and what mends it.
"""

from research.diagnosis.causes import (
    before,
    data,
    distillation,
    evaluation,
    frozen,
    initialisation,
    masks,
    optimizer,
    precision,
    preferences,
    rewards,
    tokens,
)
from research.diagnosis.types import Cause

GROUPS = (
    data,
    masks,
    tokens,
    optimizer,
    frozen,
    precision,
    initialisation,
    distillation,
    preferences,
    rewards,
    evaluation,
    before,
)
CAUSES: tuple[Cause, ...] = tuple(cause for group in GROUPS for cause in group.CAUSES)
