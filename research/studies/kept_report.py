"""What a choice of records keeps and drops: counts, histograms and examples, as JSON and as text."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from research.errors import InputError
from research.sources import entries, records, scores
from research.sources.choice import Choice
from research.studies.tables import text_table

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_BINS, _BAR, _SHOWN, _LETTERS = 16, 40, 3, 100
_FARTHEST = 1e300  # scores beyond it are in the outermost bins, so that what lies between is finite
_OTHER = "(another record by now)"


def describe(choice: Choice) -> dict[str, Any]:
    """The report, of JSON types.

    Returns:
      "by", "selection"; "kept" and "dropped" with "records", "tokens", "tokens a record" and quantiles of the score;
      "unscored", how many have no score; "short", the share of the room that nothing was found for; "strata": the same
      counts of each; "histogram": edges of the score and how many records of either kind lie between; "examples": at
      each end of what was kept and dropped.
    """
    request = choice.request
    values = choice.values
    report: dict[str, Any] = {
        "by": request.by[0] if request.by else "",
        "selection": request.about(),
        **{name: _counts(choice, where) for name, where in _sides(choice).items()},
        "unscored": 0 if values is None else int(np.sum(~np.isfinite(values))),
        "short": round(choice.short, 6),
    }
    if len(choice.strata) > 1:
        report["strata"] = {
            name: {side: _counts(choice, where & (choice.stratum == i)) for side, where in _sides(choice).items()}
            for i, name in enumerate(choice.strata)
        }
    if values is not None:
        report["histogram"] = _histogram(choice)
    report["examples"] = _examples(choice)
    return report


def as_text(report: Mapping[str, Any]) -> str:
    """The report for a terminal."""
    header = ["", "records", "tokens", "tokens a record"]
    by = report["by"]
    scored = any("quantiles" in report[side] for side in ("kept", "dropped"))
    if scored:
        header += [f"{by} at {q:.0%}" for q in QUANTILES]
    rows = [_row(side, report[side], scored) for side in ("kept", "dropped")]
    for name, sides in report.get("strata", {}).items():
        rows += [_row(f"{name}: {side}", sides[side], scored) for side in ("kept", "dropped")]
    parts = [text_table([header, *rows])]
    if report["unscored"]:
        parts.append(f"{report['unscored']:,} records have no score.")
    if report["short"] > 0.02:
        parts.append(f"For {report['short']:.1%} of the room there was nothing that may be kept.")
    if "histogram" in report:
        parts.append(_bars(report["histogram"], by))
    parts += [f"{title}:\n" + "\n".join(map(_line, shown)) for title, shown in report["examples"].items() if shown]
    return "\n\n".join(parts)


def _sides(choice: Choice) -> dict[str, np.ndarray]:
    return {"kept": choice.keep, "dropped": ~choice.keep}


def _counts(choice: Choice, where: np.ndarray) -> dict[str, Any]:
    count, tokens = int(where.sum()), int(choice.table.tokens[where].sum())
    counts = {"records": count, "tokens": tokens, "tokens a record": round(tokens / max(count, 1), 2)}
    if choice.values is not None:
        values = choice.values[where & np.isfinite(choice.values)]
        if len(values):
            quantiles = np.quantile(np.clip(values, -_FARTHEST, _FARTHEST), QUANTILES)
            counts["quantiles"] = [float(f"{q:.6g}") for q in quantiles]
    return counts


def _histogram(choice: Choice) -> dict[str, Any]:
    """Between the 1st and the 99th hundredth; what lies beyond is in the outermost bins."""
    scored = np.isfinite(choice.values)
    low, high = np.quantile(np.clip(choice.values[scored], -_FARTHEST, _FARTHEST), (0.01, 0.99))
    edges = np.linspace(low, high if high > low else low + max(1, abs(low)), _BINS + 1)
    inside = np.clip(np.where(scored, choice.values, low), low, edges[-1])
    counts = {side: np.histogram(inside[where & scored], edges)[0].tolist() for side, where in _sides(choice).items()}
    return {"edges": [float(f"{edge:.6g}") for edge in edges], **counts}


def _examples(choice: Choice) -> dict[str, list[dict[str, Any]]]:
    """Records at each end of the score, of what was kept and of what was dropped, by title."""
    values = choice.values
    order = np.arange(len(choice.keep)) if values is None else np.argsort(values, kind="stable")
    groups = {}
    for side, where in _sides(choice).items():
        own = order[where[order]] if values is None else order[(where & np.isfinite(values))[order]]
        if values is None:
            groups[f"{side}, some"] = own[:: max(1, len(own) // _SHOWN)][:_SHOWN]
        else:
            groups[f"{side}, lowest"], groups[f"{side}, highest"] = own[:_SHOWN], own[-_SHOWN:][::-1]
    texts = _texts(choice.table, {int(i) for group in groups.values() for i in group})
    return {title: [_example(choice, int(i), texts) for i in group] for title, group in groups.items()}


def _example(choice: Choice, i: int, texts: Mapping[int, str]) -> dict[str, Any]:
    table = choice.table
    score = None if choice.values is None else float(f"{choice.values[i]:.6g}")
    place = {"file": table.files[table.file[i]], "number": int(table.number[i])}
    return {"score": score, **place, "tokens": int(table.tokens[i]), "text": texts.get(i, "")}


def _texts(table: scores.Table, wanted: set[int]) -> dict[int, str]:
    """The beginnings of some records; of files that can't be read, or are generated, none. What isn't the record that
    was scored is said to be another."""
    places = {(table.files[table.file[i]], int(table.number[i])): i for i in wanted}
    texts: dict[int, str] = {}
    for name in dict.fromkeys(file for file, _ in places):
        try:
            origin = entries.locate(name, count=0, seed=0)
        except InputError:
            continue
        if origin.generated:
            continue
        last = max(number for file, number in places if file == name)
        for number, (_, raw) in enumerate(origin.read()):
            if (name, number) in places:
                i = places[name, number]
                texts[i] = _shown(raw, int(table.digest[i]))
            if number == last:
                break
    return texts


def _shown(raw: records.Raw, digest: int) -> str:
    try:
        record = records.parse(raw)
    except records.BadRecord:
        return _OTHER
    if int(scores.digest(record), 16) != digest:
        return _OTHER
    names = [name for name in ("prompt", "response", "text", "messages", "chosen", "rejected") if name in record]
    return " | ".join(str(record[name])[:_LETTERS].replace("\n", "\\n") for name in names)


def _row(name: str, counts: Mapping[str, Any], scored: bool) -> list[str]:
    cells = [name, f"{counts['records']:,}", f"{counts['tokens']:,}", f"{counts['tokens a record']:.1f}"]
    if scored:
        cells += [f"{q:.4g}" for q in counts["quantiles"]] if "quantiles" in counts else ["-"] * len(QUANTILES)
    return cells


def _bars(histogram: Mapping[str, Any], by: str) -> str:
    most = max(1, *(a + b for a, b in zip(histogram["kept"], histogram["dropped"], strict=True)))
    lines = [[f"{by} from", "kept", "dropped", "# kept, - dropped"]]
    for low, kept, dropped in zip(histogram["edges"], histogram["kept"], histogram["dropped"]):  # noqa: B905
        bar = "#" * round(_BAR * kept / most) + "-" * round(_BAR * dropped / most)
        lines.append([f"{low:.4g}", f"{kept:,}", f"{dropped:,}", bar])
    return text_table(lines)


def _line(example: Mapping[str, Any]) -> str:
    score = "" if example["score"] is None else f"{example['score']:.4g}  "
    return f"  {score}{example['file']}, {example['number']}  {example['text']}".rstrip()
