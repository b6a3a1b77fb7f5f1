"""What a trace says: which parts of a program take the time.

Operations are named by the scopes that they were traced in (jax.named_scope): "layers/attention", and "layers/attention
(backward)" for what its gradient takes.

python -m research.bench.profiling FOLDER prints them as JSON. `read` runs that, since some versions of jax abort the
process that reads a profile.
"""

import json
import os
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

PROGRAM = "program.hlo.txt"  # beside a trace: the text of the program that was traced

_SCOPES = ("embed", "layers", "attention", "mlp", "final_norm", "loss", "optimizer")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (.*)$", re.M)
_OP_NAME = re.compile(r'metadata=\{[^}]*?op_name="([^"]*)"')
_WAITS = ("while", "conditional", "call")  # for what runs within, which other threads may do


class Unreadable(Exception):
    """A trace says nothing."""


def scope(op_name: str) -> str:
    """The part of a step that an operation belongs to.

    Args:
      op_name: of HLO metadata: "jit(step)/transpose(jvp(layers))/while/body/attention/dot_general".

    Returns:
      "layers/attention (backward)"; "... (again)" for what rematerialisation repeats; "other" for what is in no scope.
    """
    words = re.findall(r"\w+", op_name)
    scopes = list(dict.fromkeys(word for word in words if word in _SCOPES))
    if not scopes:
        return "other"
    if scopes[0] in ("attention", "mlp"):  # JAX takes what doesn't change out of the scan over layers
        scopes.insert(0, "layers")
    again = "rematted_computation" in words
    return "/".join(scopes) + (" (again)" if again else " (backward)" if "transpose" in words else "")


def names(hlo: str) -> dict[str, str]:
    """Instruction -> op_name of a compiled program's text; "" where it has none, as the compiler's own copies."""
    op_names = {}
    for name, rest in _INSTRUCTION.findall(hlo):
        op_name = _OP_NAME.search(rest)
        op_names[name] = op_name[1] if op_name else ""
    return op_names


def read(folder: Path, most: int = 10) -> list[dict[str, Any]]:
    """The costliest parts of the program in FOLDER/program.hlo.txt, by `costliest`, which a child process calls.

    Raises:
      Unreadable: the trace can't be read, or holds no operation of the program.
    """
    command = [sys.executable, "-m", "research.bench.profiling", str(folder), str(most)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if ended.returncode:
        reason = (ended.stderr.strip().splitlines() or [""])[-1][:300]
        how = f"by signal {-ended.returncode}" if ended.returncode < 0 else f"with status {ended.returncode}"
        raise Unreadable(f"the trace in {folder} can't be read: the process that read it ended {how}. {reason}".strip())
    parts = json.loads(ended.stdout)
    if not parts:
        raise Unreadable(f"the trace in {folder} holds no operation of the step")
    return parts


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
    files = sorted(Path(folder).rglob("*.xplane.pb"), key=lambda p: p.stat().st_mtime)
    known: dict[str, str] = {}
    for text in programs:
        known |= names(text)
    planes = jax.profiler.ProfileData.from_file(str(files[-1])).planes if files else []
    seconds = seconds_of({plane.name: _scopes(plane, known) for plane in planes})
    total = sum(seconds.values())
    ranked = sorted(seconds.items(), key=lambda item: -item[1])[:most]
    return [{"scope": name, "seconds": s, "share": s / total} for name, s in ranked]


def seconds_of(planes: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Adds up the seconds of scopes over planes of a trace.

    A CPU's operations are in the host's plane; where other devices have some, it holds what waits for them and is left
    out. A device's plane without operations (libtpu's "/device:CUSTOM:Megascale Trace") stands for no device.

    Args:
      planes: name -> scope -> seconds.
    """
    busy = {name: scopes for name, scopes in planes.items() if scopes}
    devices = {name: scopes for name, scopes in busy.items() if name.startswith("/device:")}
    seconds: dict[str, float] = defaultdict(float)
    for scopes in (devices or busy).values():
        for name, own in scopes.items():
            seconds[name] += own
    return dict(seconds)


def _scopes(plane: Any, known: Mapping[str, str]) -> dict[str, float]:
    """Scope -> seconds of a plane of a trace."""
    seconds: dict[str, float] = defaultdict(float)
    for line in plane.lines:
        for name, own in _own_times(line.events, known):
            if not name.startswith(_WAITS):
                seconds[scope(known[name])] += own / 1e9
    return dict(seconds)


def _own_times(events: Any, known: Mapping[str, str]) -> Iterator[tuple[str, float]]:
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


def describe(profile: Mapping[str, Any]) -> str:
    """A line for each of a profile's "costliest", or its "profile_error"; none without a profile."""
    lines = [f"{x['share']:6.1%}  {1e3 * x['seconds']:8.4g} ms  {x['scope']}" for x in profile.get("costliest", [])]
    if "profile_error" in profile:
        lines = [profile["profile_error"]]
    return "".join(f"\n{'':<10}   {line}" for line in lines)


def main(argv: Sequence[str]) -> int:
    """Prints the costliest parts of a folder's trace and program."""
    folder, most = argv
    print(json.dumps(costliest(folder, [(Path(folder) / PROGRAM).read_text()], int(most))))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
