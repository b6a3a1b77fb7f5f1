"""The last lines of a run: what it took, how its measure went, and what to do next."""

import shlex
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from research.config import Config
from research.run.console import duration, size

_MEASURES = ("eval/loss", "train/reward", "train/loss")  # the first that a run has, where it names none


def lines(
    config: Config, workdir: str, records: Sequence[Mapping[str, float]], steps: tuple[int, int], seconds: float
) -> list[str]:
    """What a run that is over says.

    Args:
      config: of the run.
      workdir: of the run.
      records: its metrics, as metrics.read_metrics gives them.
      steps: the one at which this process went on, 0 of a new run, and the last.
      seconds: that this process took.
    """
    first, last = steps
    went_on = f", from step {first} on" if first else ""
    parts = [f"{last - first:,} steps in {duration(seconds)}{went_on}"]
    if count := tokens(records, first):
        parts.append(f"{size(count)} tokens")
    measure = course(records, config.checkpoint.best_metric, config.checkpoint.best_mode)
    workdir = shlex.quote(workdir)
    use = f"understudy generate --model={workdir}"
    if config.model.num_labels or not config.model.causal:
        use = f"understudy export --model={workdir} --output=DIR"
    return [
        "done     " + ", ".join(parts) + (f"; {measure}" if measure else ""),
        f"next     understudy report --workdir={workdir}",
        f"next     {use}",
    ]


def tokens(records: Sequence[Mapping[str, float]], first: int) -> float:
    """How many tokens the steps after `first` had: a record has the mean over the steps since the last one."""
    total, before = 0.0, first
    for record in records:
        if "train/tokens" in record and record["step"] > before:
            total += record["train/tokens"] * (record["step"] - before)
            before = record["step"]
    return total


class Course(NamedTuple):
    """How a run's measure went. `first`, `best` and `last` are (step, value) each."""

    name: str
    first: tuple[int, float]
    best: tuple[int, float]
    last: tuple[int, float]

    def __str__(self) -> str:
        """Such as "eval/loss 5.91 -> 0.0028 (best, step 350) -> 0.0029"."""
        if self.first[0] == self.last[0]:
            return f"{self.name} {self.last[1]:.4g}"
        step, best = self.best
        middle = "" if step in (self.first[0], self.last[0]) else f" -> {best:.4g} (best, step {step})"
        ends = " (the best is the first)" if step == self.first[0] else ""
        return f"{self.name} {self.first[1]:.4g}{middle} -> {self.last[1]:.4g}{ends}"


def course(records: Sequence[Mapping[str, float]], named: str = "", mode: str = "min") -> Course | None:
    """How the measure of a run went; None where it has none.

    Args:
      records: its metrics.
      named: checkpoint.best_metric; without it, or where the run has none of that name, the first of eval/loss,
        train/reward and train/loss.
      mode: checkpoint.best_mode, of `named`.
    """
    wanted = (named, *_MEASURES) if named else _MEASURES
    name = next((name for name in wanted if any(name in record for record in records)), None)
    if name is None:
        return None
    values = [(int(record["step"]), record[name]) for record in records if name in record]
    numbers = [(step, value) for step, value in values if value == value] or values
    lowest = mode == "min" if name == named else name != "train/reward"
    best = (min if lowest else max)(numbers, key=lambda one: one[1])
    return Course(name, values[0] if len(numbers) > 1 else values[-1], best, values[-1])
