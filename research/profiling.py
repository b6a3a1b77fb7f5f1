"""What a trace says: which parts of a program take the time.

Operations are named by the scopes that they were traced in (jax.named_scope): "layers/attention", and "layers/attention
(backward)" for what its gradient takes.
"""

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_NAMED = re.compile(r'%?([\w.\-]+) = .*?metadata=\{[^}]*?op_name="([^"]*)"')
_SCOPES = ("embed", "layers", "attention", "mlp", "final_norm", "loss", "optimizer")


def scope(op_name: str) -> str:
    """The part of the model that an operation belongs to.

    Args:
      op_name: of HLO metadata: "jit(step)/transpose(jvp(layers))/while/body/attention/dot_general".

    Returns:
      "layers/attention (backward)"; "other" for what is in no scope.
    """
    words = re.findall(r"[\w.]+", op_name)
    found = list(dict.fromkeys(word for word in words if word in _SCOPES))
    if not found:
        return "other"
    again = "rematted_computation" in words or "checkpoint" in words
    backward = "transpose" in words
    suffix = " (recomputed)" if backward and again and "transpose" not in words[-1:] and _recomputed(op_name) else ""
    return "/".join(found) + (suffix or " (backward)" * backward)


def _recomputed(op_name: str) -> bool:
    return "rematted_computation" in op_name


def names(hlo: str) -> dict[str, str]:
    """Instruction -> op_name, of a compiled program's text."""
    return dict(_NAMED.findall(hlo))


def costliest(folder: str, programs: Sequence[str], most: int = 10) -> list[dict[str, Any]]:
    """Reads the newest trace in a folder: the parts that took the most time.

    Args:
      folder: that was given to jax.profiler.trace.
      programs: texts of the compiled programs (compiled.as_text()), which say what each instruction belongs to.
      most: how many.

    Returns:
      [{"scope", "seconds", "share"}], the costliest first. Seconds are of all devices and threads, without those of
      operations that ran within; the share is of all operations together.
    """
    import jax

    files = sorted(Path(folder).rglob("*.xplane.pb"), key=lambda p: p.stat().st_mtime)
    if not files:
        return []
    known: dict[str, str] = {}
    for text in programs:
        known |= names(text)
    seconds: dict[str, float] = defaultdict(float)
    for plane in jax.profiler.ProfileData.from_file(str(files[-1])).planes:
        for line in plane.lines:
            for name, own in _self_times(line.events):
                if name in known:
                    seconds[scope(known[name])] += own / 1e9
    total = sum(seconds.values())
    ranked = sorted(seconds.items(), key=lambda item: -item[1])[:most]
    return [{"scope": name, "seconds": s, "share": s / total} for name, s in ranked]


def _self_times(events: Any) -> list[tuple[str, float]]:
    """(instruction, nanoseconds without those of events within it) of the events of one line."""
    found: list[list[Any]] = []
    within: list[tuple[float, int]] = []  # of the events that haven't ended: the end, and where it is in `found`
    for event in sorted(events, key=lambda e: (e.start_ns, -e.duration_ns)):
        name = _instruction(event)
        if name is None:
            continue
        while within and within[-1][0] <= event.start_ns:
            within.pop()
        if within:
            found[within[-1][1]][1] -= event.duration_ns
        within.append((event.start_ns + event.duration_ns, len(found)))
        found.append([name, event.duration_ns])
    return [(name, own) for name, own in found]


def _instruction(event: Any) -> str | None:
    stats = {key: value for key, value in event.stats if key in ("hlo_op",)}
    return str(stats["hlo_op"]) if "hlo_op" in stats else None


def describe(found: Sequence[dict[str, Any]]) -> str:
    """A line for each."""
    return "".join(f"\n{'':<10}   {x['share']:6.1%}  {1e3 * x['seconds']:8.4g} ms  {x['scope']}" for x in found)
