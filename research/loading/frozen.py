"""Marks of what a run doesn't train, noted in its workdir: they show whether what it began with is still the same."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from research import params
from research.errors import InputError
from research.files import read_json, write_json
from research.loading.start import Start

FILE = "frozen.json"  # in a workdir: role -> params.fingerprint of what isn't trained of it


def note_frozen(workdir: str, frozen: Mapping[str, Any], write: bool) -> None:
    """Notes in the workdir what isn't trained of a run's trained roles. All processes call it; one is to write."""
    marks = {role: params.fingerprint(values) for role, values in frozen.items()}
    if marks and write:
        Path(workdir).mkdir(parents=True, exist_ok=True)
        write_json(Path(workdir) / FILE, marks)


def marks_of(workdir: str, role: str) -> dict[str, Any] | None:
    """What a run has noted of a role; None where its checkpoints hold all of it."""
    file = Path(workdir) / FILE
    return read_json(file).get(role) if file.is_file() else None


def check_unchanged(workdir: str, start: Start, marks: Mapping[str, Any], values: Any) -> None:
    """Raises InputError where parameters that aren't trained aren't those that the run began with.

    Args:
      workdir: of the run.
      start: of the role.
      marks: params.fingerprint of them when the run began.
      values: the parameters that are read now.
    """
    name = params.first_difference(marks, start.fingerprint(values), 1e-4)
    if name is not None:
        source = start.base.name if start.base else f"the seed {start.seed}"
        raise InputError(
            f"{workdir}: {name} of the role {start.role!r} isn't trained, hence not in the checkpoints but in "
            f"{source}, and has other values there than when the run began. Restore what it began with, or start in a "
            "new --workdir."
        )
