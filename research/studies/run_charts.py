"""Charts of metrics: of one run, of several, and of groups of runs."""

from collections.abc import Sequence

import numpy as np

from research.studies import charts
from research.studies.charts import Chart, Curve
from research.studies.groups import Group
from research.studies.history import Run, title_of


def _labels(title: str, metrics: Sequence[str]) -> dict[str, str]:
    """metric -> what tells it apart from the others of a plot."""
    own = title.split("/")
    parts = {metric: [part for part in metric.split("/") if part not in own] for metric in metrics}
    if len({rest[0] for rest in parts.values() if rest}) == 1:  # all are of training, or of an evaluation
        parts = {metric: rest[1:] for metric, rest in parts.items()}
    return {metric: "/".join(rest) or ("all" if len(metrics) > 1 else metric) for metric, rest in parts.items()}


def of_runs(title: str, metrics: Sequence[str], runs: Sequence[Run]) -> Chart:
    """With one run, colours tell metrics apart; with several, colours tell runs and dashes metrics."""
    metrics = metrics if len(runs) == 1 else _wholes(metrics)
    labels, curves = _labels(title, metrics), []
    for place, run in enumerate(runs):
        for number, metric in enumerate(metric for metric in metrics if metric in run.series):
            steps, values = run.series[metric]
            name = labels[metric] if len(runs) == 1 else run.name
            name += f" {labels[metric]}" if len(runs) > 1 and len(metrics) > 1 else ""
            color, dash = (number, 0) if len(runs) == 1 else (place, metrics.index(metric))
            curves.append(Curve(name, steps, values, color, dash))
    return _with_scale(title, curves, runs[0].resumes if len(runs) == 1 else ())


def of_groups(title: str, metrics: Sequence[str], groups: Sequence[Group]) -> Chart:
    """A curve for each group: the mean over its seeds, between the least and the greatest."""
    metrics = _wholes(metrics)
    labels, curves = _labels(title, metrics), []
    for place, group in enumerate(groups):
        for number, metric in enumerate(metrics):
            own = [run.series[metric] for run in group.runs if metric in run.series]
            if not own:
                continue
            steps = own[0][0]
            for other, _ in own[1:]:
                steps = np.intersect1d(steps, other)
            if not steps.size:
                continue
            values = np.stack([y[np.isin(x, steps)] for x, y in own])
            name = f"{group.name} {labels[metric]}" if len(metrics) > 1 else group.name
            band = (values.min(axis=0), values.max(axis=0)) if len(own) > 1 else (None, None)
            curves.append(Curve(name, steps, values.mean(axis=0), place, number, *band))
    return _with_scale(title, curves)


def _wholes(metrics: Sequence[str]) -> list[str]:
    """The metrics that are no part of another, as grad_norm/mlp is of grad_norm, since side by side they would be too
    many."""
    return [metric for metric in metrics if not any(metric.startswith(f"{other}/") for other in metrics)]


def _with_scale(title: str, curves: Sequence[Curve], resumes: Sequence[int] = ()) -> Chart:
    log = charts.suits_log(title, [curve.values for curve in curves])
    return Chart(title_of(title), curves, log, title == "mfu", resumes)
