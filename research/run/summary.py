"""The last lines of a run: what it took, how its measure went, and what to do next."""

import shlex
from collections.abc import Mapping, Sequence

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
    if tokens := _tokens(records, first):
        parts.append(f"{size(tokens)} tokens")
    course = _course(config, records)
    workdir = shlex.quote(workdir)
    use = f"understudy generate --model={workdir}"
    if config.model.num_labels or not config.model.causal:
        use = f"understudy export --model={workdir} --output=DIR"
    return [
        "done     " + ", ".join(parts) + (f"; {course}" if course else ""),
        f"next     understudy report --workdir={workdir}",
        f"next     {use}",
    ]


def _tokens(records: Sequence[Mapping[str, float]], first: int) -> float:
    """How many tokens the steps after `first` had: a record has the mean over the steps since the last one."""
    total, before = 0.0, first
    for record in records:
        if "train/tokens" in record and record["step"] > before:
            total += record["train/tokens"] * (record["step"] - before)
            before = record["step"]
    return total


def _course(config: Config, records: Sequence[Mapping[str, float]]) -> str:
    """How the measure of the run went: "eval/loss 5.91 -> 0.0028 (best, step 350) -> 0.0029"."""
    named = config.checkpoint.best_metric
    wanted = (named, *_MEASURES) if named else _MEASURES
    name = next((name for name in wanted if any(name in record for record in records)), None)
    if name is None:
        return ""
    values = [(record["step"], record[name]) for record in records if name in record]
    lowest = config.checkpoint.best_mode == "min" if name == named else name != "train/reward"
    numbers = [(step, value) for step, value in values if value == value]
    if len(numbers) < 2:
        return f"{name} {values[-1][1]:.4g}"
    step, best = (min if lowest else max)(numbers, key=lambda one: one[1])
    middle = "" if step in (values[0][0], values[-1][0]) else f" -> {best:.4g} (best, step {step})"
    ends = " (the best is the first)" if step == values[0][0] else ""
    return f"{name} {values[0][1]:.4g}{middle} -> {values[-1][1]:.4g}{ends}"
