"""What a trace says: which parts of a program take the time.

Operations are named by the scopes that they were traced in (jax.named_scope): "layers/attention", and "layers/attention
(backward)" for what its gradient takes.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

_SCOPES = ("embed", "layers", "attention", "mlp", "final_norm", "loss", "optimizer")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (.*)$", re.M)
_OP_NAME = re.compile(r'metadata=\{[^}]*?op_name="([^"]*)"')
_WAITS = ("while", "conditional", "call")  # for what runs within, which other threads may do


def scope(op_name: str) -> str:
    """The part of a step that an operation belongs to.

    Args:
      op_name: of HLO metadata: "jit(step)/transpose(jvp(layers))/while/body/attention/dot_general".

    Returns:
      "layers/attention (backward)"; "... (again)" for what rematerialisation repeats; "other" for what is in no scope.
    """
    words = re.findall(r"\w+", op_name)
    found = list(dict.fromkeys(word for word in words if word in _SCOPES))
    if not found:
        return "other"
    if found[0] in ("attention", "mlp"):  # JAX takes what doesn't change out of the scan over layers
        found.insert(0, "layers")
    again = "rematted_computation" in words
    return "/".join(found) + (" (again)" if again else " (backward)" if "transpose" in words else "")


def names(hlo: str) -> dict[str, str]:
    """Instruction -> op_name of a compiled program's text; "" where it has none, as the compiler's own copies."""
    found = {}
    for name, rest in _INSTRUCTION.findall(hlo):
        op_name = _OP_NAME.search(rest)
        found[name] = op_name[1] if op_name else ""
    return found


def costliest(folder: str, programs: Sequence[str], most: int = 10) -> list[dict[str, Any]]:
    """Reads the newest trace in a folder: the parts that took the most time.

    Args:
      folder: that was given to jax.profiler.trace.
      programs: texts of the compiled programs (compiled.as_text()), which say what each instruction belongs to.
      most: how many.

    Returns:
      [{"scope", "seconds", "share"}], the costliest first; none where the trace holds no operation of the programs.
      Seconds are those of all devices and threads together, without those of operations that ran within.
    """
    import jax

    files = sorted(Path(folder).rglob("*.xplane.pb"), key=lambda p: p.stat().st_mtime)
    known: dict[str, str] = {}
    for text in programs:
        known |= names(text)
    planes = list(jax.profiler.ProfileData.from_file(str(files[-1])).planes) if files else []
    # A CPU's operations are in the host's plane; where there are other devices, it holds what waits for them.
    planes = [plane for plane in planes if plane.name.startswith("/device:")] or planes
    seconds: dict[str, float] = defaultdict(float)
    for plane in planes:
        for line in plane.lines:
            for name, own in _own_times(line.events, known):
                if not name.startswith(_WAITS):
                    seconds[scope(known[name])] += own / 1e9
    total = sum(seconds.values())
    ranked = sorted(seconds.items(), key=lambda item: -item[1])[:most]
    return [{"scope": name, "seconds": s, "share": s / total} for name, s in ranked]


def _own_times(events: Any, known: dict[str, str]) -> Iterator[tuple[str, float]]:
    """(instruction, nanoseconds without those of instructions within it) of the events of one line."""
    timed = []
    for event in events:
        name = next((str(value) for key, value in event.stats if key == "hlo_op"), event.name)
        name = name.partition(" = ")[0].removeprefix("%")
        if name in known:
            timed.append((event.start_ns, -event.duration_ns, name))
    own: list[float] = []
    within: list[tuple[float, int]] = []  # of those that haven't ended: the end, and the place in `own`
    timed.sort()
    for start, minus, _ in timed:
        while within and within[-1][0] <= start:
            within.pop()
        if within:
            own[within[-1][1]] += minus
        within.append((start - minus, len(own)))
        own.append(-minus)
    yield from ((name, time) for (_, _, name), time in zip(timed, own, strict=True))


def describe(found: Sequence[dict[str, Any]]) -> str:
    """A line for each."""
    return "".join(f"\n{'':<10}   {x['share']:6.1%}  {1e3 * x['seconds']:8.4g} ms  {x['scope']}" for x in found)
