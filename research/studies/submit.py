"""Hands the stages of a study to a cluster's queue, each as a job that waits for those whose outputs it needs."""

import dataclasses
import re
import shlex
import subprocess
from collections.abc import Mapping, Sequence

from research.errors import InputError
from research.studies.stages import Stage, finished

PRINT = "print"  # the template that only prints the commands


@dataclasses.dataclass(frozen=True)
class Job:
    """A job of the queue.

    Attributes:
      name: a stage's id, or "report".
      command: what it runs.
      inputs: names of the jobs that it needs.
    """

    name: str
    command: str
    inputs: tuple[str, ...]


def submit(members: Sequence[Stage], template: str, own: Sequence[str], report: bool) -> None:
    """Hands every unfinished stage to a queue, in order, and then the report.

    Args:
      members: the study's stages.
      template: of the submit command, or "print". It is split into words as a shell does, then {command}, {name} and
        {after} are filled in: {after} is the jobs of the stages that it needs, as the submit command printed them,
        joined by ":"; a word with an empty {after} is left out.
      own: the command of this study, to which --only=ID is added.
      report: whether a last job makes the report.

    Raises:
      InputError: the template has no {command} or something unknown, or the submit command failed.
    """
    _check_template(template)
    todo = [stage for stage in members if finished(stage) is None]
    jobs = [Job(stage.id, shlex.join([*own, f"--only={stage.id}"]), stage.inputs) for stage in todo]
    if report:
        jobs.append(Job("report", shlex.join([*own, "--report"]), tuple(stage.id for stage in todo)))
    numbers: dict[str, str] = {}  # name -> what the queue calls the job
    for job in jobs:
        after = [numbers[name] for name in job.inputs if name in numbers]
        if template == PRINT:
            numbers[job.name] = job.name
            print(job.command + (f"  # after {' '.join(after)}" if after else ""), flush=True)
        else:
            line = _fill(template, {"command": job.command, "name": job.name, "after": ":".join(after)})
            numbers[job.name] = _hand_over(line)
            print(f"{numbers[job.name]}  {job.name}" + (f"  after {':'.join(after)}" if after else ""), flush=True)


def _check_template(template: str) -> None:
    unknown = set(re.findall(r"\{(\w*)\}", template)) - {"command", "name", "after"}
    if template != PRINT and (unknown or "{command}" not in template):
        raise InputError(
            f"--submit={template}: must hold {{command}}, and may hold {{name}} and {{after}}"
            + (f"; it has {{{unknown.pop()}}}." if unknown else ".")
        )


def _fill(template: str, values: Mapping[str, str]) -> list[str]:
    words = [word for word in shlex.split(template) if values["after"] or "{after}" not in word]
    return [re.sub(r"\{(\w+)\}", lambda match: values[match[1]], word) for word in words]


def _hand_over(line: Sequence[str]) -> str:
    """Runs the submit command; returns the job's number, the last word that it prints."""
    result = subprocess.run(line, capture_output=True, text=True, check=False)
    words = result.stdout.split()
    if result.returncode or not words:
        raise InputError(
            f"--submit: {shlex.join(line)} ended with status {result.returncode}: "
            f"{(result.stderr or result.stdout or 'it printed no job').strip()[-500:]}"
        )
    return words[-1].split(";")[0]  # sbatch --parsable prints JOB;CLUSTER where there are several
