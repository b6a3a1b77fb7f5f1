"""Which section of a report a metric belongs to."""

import re
from collections.abc import Mapping, Sequence

from research.studies.history import FIRST, Run, group_metrics

SECTIONS = ("Learning", "Quality", "Preferences", "Rewards", "Teacher", "Selection", "Machine", "Data")
ABOUT = {
    "Learning": "What is minimised, and how the optimizer moves.",
    "Quality": "What the model does on held-out data, and on the tasks of eval.tasks.",
    "Preferences": "Answers that are compared: which is put first, by what margin, and how likely either is.",
    "Rewards": "The policy's own answers: their rewards, groups and lengths, and how far it has gone from its start.",
    "Teacher": "How far the model is from what it learns from.",
    "Selection": "Which part of the data is learned from, and what weights its sources have.",
    "Machine": "Speed, time and memory.",
    "Data": "What batches hold.",
}

_MACHINE = {"tokens_per_second", "mfu", "data_wait_fraction", "servers", "behind"}
_REWARDS = {"kl", "old_kl", "ratio", "clip_high", "clip_low", "explained_variance", "value", "returns", "advantage"}
_PREFERENCES = {"margin", "preference_loss", "start_loss", "sft_nll", "identical", "unused", "shift", "centering"}
_OF_PAIRS = {"accuracy", "chosen", "rejected", "log_loss", "spread", "squared_error", "absolute_error"}
_SIDES = re.compile(r".+_(chosen|rejected|desirable|undesirable)(_.*)?|accuracy_where_.*|calibration_error|desirable")
_TEACHER = re.compile(r"(.*_)?(divergence|teacher_entropy|agreement)(_.*)?|hidden_.*|attention_\d.*")
_SELECTION = {"selected", "selected_nll", "excess", "selected_excess", "documents"}
_DATA = {"tokens", "supervised_fraction", "supervised_rows", "unique_batches", "empty_batch", "epoch"}
_DATA |= {"passes", "records", "records_skipped"}
_DATA |= {"skipped_too_long", "prefix_share", "chosen"}
_LOSSES = {"loss", "nll", "perplexity", "bits_per_byte", "entropy"}
_SHOWN = {"loss", "accuracy", "grad_norm", "learning_rate", "update_ratio", "entropy"}  # of learning


def of_runs(runs: Sequence[Run]) -> dict[str, dict[str, list[str]]]:
    """Section -> title of a plot -> its metrics, in the order of a report: that of SECTIONS, but for rewards, which
    come first where there are some. Empty sections are left out."""
    groups = group_metrics(runs)
    compared = any(title in _PREFERENCES for title in groups)
    sections: dict[str, dict[str, list[str]]] = {name: {} for name in SECTIONS}
    for title, metrics in groups.items():
        sections[section_of(title, metrics, compared)][title] = metrics
    order = sorted(sections, key=lambda name: name != "Rewards" or "reward" not in sections[name])
    return {name: sections[name] for name in order if sections[name]}


def section_of(title: str, metrics: Sequence[str], compared: bool) -> str:
    """The section of a plot.

    Args:
      title: of it.
      metrics: in it.
      compared: whether the run learns from answers that are compared: what is right of these is no quality then.
    """
    names = "/".join(metrics)
    if title in _MACHINE or title == "rollout/seconds" or names.startswith("startup/"):
        return "Machine"
    if (title in _DATA and not (compared and title in _OF_PAIRS)) or "/tokens/" in names:
        return "Data"
    if compared and title in _OF_PAIRS:
        return "Preferences"
    if title in _PREFERENCES or _SIDES.fullmatch(title):
        return "Preferences"
    if title in _REWARDS or names.startswith(("train/reward", "train/rollout/")):
        return "Rewards"
    if title in _SELECTION or "/weight/" in names or "/average/" in names:
        return "Selection"
    if _TEACHER.fullmatch(title):
        return "Teacher"
    evaluated = any(metric.startswith("eval/") for metric in metrics)
    return "Quality" if evaluated and title not in _LOSSES else "Learning"


def is_detail(section: str, title: str) -> bool:
    """Whether a plot is folded away, since what is beside it says the same, or more."""
    return section == "Learning" and title not in _SHOWN


def measures(runs: Sequence[Run], most: int) -> list[str]:
    """The metrics that a table of runs is about: of evaluations, the most telling first, and the reward; else the
    loss.

    Args:
      runs: of the table.
      most: metrics.
    """
    counts: Mapping[str, int] = {m: sum(m in run.series for run in runs) for run in runs for m in run.series}
    half = [m for m, n in counts.items() if 2 * n >= len(runs) and (m.startswith("eval/") or m == "train/reward")]
    dull = {"skipped_too_long", "nll", "perplexity", "bits_per_byte"}
    whole = [m for m in half if m.rpartition("/")[2] not in dull and not _is_part(m, half)]

    def order(metric: str) -> tuple[int, str]:
        name = metric.rpartition("/")[2]
        return (FIRST.index(name) if name in FIRST else len(FIRST), metric)

    return sorted(whole, key=order)[:most] or [m for m in ("train/loss",) if m in counts]


def _is_part(metric: str, others: Sequence[str]) -> bool:
    """Whether a metric is one of the parts of another: eval/exact_match/copy of eval/exact_match."""
    return any(metric.startswith(f"{other}/") for other in others)
