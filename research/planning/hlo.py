"""Reads what compilers say: the communication in a program's text, and how much memory a program lacks."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

_KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute|collective-broadcast|ragged-all-to-all"
_COLLECTIVE = re.compile(rf"\s*(?:ROOT )?%?([\w.-]+) = (.*?) ({_KINDS})(-start)?\(")
_CALLEES = re.compile(r"(?:body|to_apply|calls|\w+_computations)=\{?%?([\w.-]+)")
_ITEM_BYTES = {"pred": 1, "s4": 1, "u4": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2}
_ITEM_BYTES |= {"f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8, "u64": 8}


class Collective(NamedTuple):
    """One kind of communication in a step: its calls, and the bytes that each chip receives by them."""

    kind: str
    calls: int
    bytes: int


def find_collectives(hlo: str) -> list[Collective]:
    """The collectives of a compiled program's text, those in loops as often as these run; most bytes first.

    The bytes of one are those of its result on a chip; where it scatters, those of its operand. The TPU compiler writes
    an asynchronous one into several computations, which share its channel, or its operation where it is of shard_map,
    whose collectives all have one channel. It tells an all-reduce that scatters by the name of its computation alone.
    """
    calls: dict[str, Collective] = {}  # channel, or place in the text -> the collective
    computations = _computations(hlo)
    entry = next((name for name in computations if name.startswith("ENTRY ")), None)
    if entry:
        _walk(computations, entry, 1, calls)
    kinds: dict[str, Collective] = {}
    for kind, count, size in calls.values():
        before = kinds.get(kind, Collective(kind, 0, 0))
        kinds[kind] = Collective(kind, before.calls + count, before.bytes + count * size)
    return sorted(kinds.values(), key=lambda collective: -collective.bytes)


def out_of_memory(text: str) -> str:
    """What a compiler's error says of a program that needs too much memory; "" where it is another error."""
    if match := re.search(r"Used ([\d.]+\w) of ([\d.]+\w) hbm.*?Exceeded hbm capacity by ([\d.]+\w)", text, re.S):
        return f"needs {match[1]} of {match[2]}: {match[3]} too much"
    if match := re.search(r"HLO temporaries \(([\d.]+)G\) exceeds available HBM \(([\d.]+)G\)", text):
        over = float(match[1]) - float(match[2])
        return f"needs {match[1]}G of {match[2]}G for temporaries alone: {over:.2f}G too much"
    return text.splitlines()[0][:200] if "RESOURCE_EXHAUSTED" in text or "Ran out of memory" in text else ""


def _computations(hlo: str) -> dict[str, list[str]]:
    """Name -> lines; the entry's name begins with "ENTRY "."""
    computations: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in hlo.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.-]+) .*\{$", line) if not line.startswith(" ") else None
        if head:
            lines = computations.setdefault((head[1] or "") + head[2], [])
        elif line.startswith(" "):
            lines.append(line)
    return computations


def _walk(computations: Mapping[str, Sequence[str]], name: str, times: int, calls: dict[str, Collective]) -> None:
    """Adds to `calls` the collectives of a computation that runs so many times, and of those that it calls."""
    for line in computations.get(name, ()):
        instruction = _COLLECTIVE.match(line)
        if instruction:  # what it applies is arithmetic
            key, kind, size = _collective(instruction, line, name)
            before = calls.get(key)
            calls[key] = Collective(kind, max(times, before.calls if before else 0), size)
            continue
        trips = _trips(computations, line)
        for callee in _CALLEES.findall(line):
            _walk(computations, callee, times * trips, calls)


def _collective(instruction: re.Match, line: str, computation: str) -> tuple[str, str, int]:
    """(what tells it from others, kind, bytes of one call) of a line that is a collective."""
    name, shapes, kind, start = instruction.groups()
    sizes = _sizes(shapes)
    size = sum(sizes)
    if start and kind in ("all-gather", "collective-permute"):  # (operand, result, ...)
        size = max(sizes, default=0)
    elif kind == "reduce-scatter":
        size *= _group_size(line)
    elif computation.startswith("all-reduce-scatter"):
        kind = "reduce-scatter"
    channel = re.search(r"channel_id=(\d+)", line)
    if channel and channel[1] != "1":
        return channel[1], kind, size
    source = re.search(r'op_name="([^"]*)"', line) if channel else None  # all of shard_map's have channel 1
    return f"{source[1]}/{shapes}" if source else f"{computation}/{name}", kind, size


def _trips(computations: Mapping[str, Sequence[str]], line: str) -> int:
    """How often the loop of a line runs: as it says, or else the largest number of its condition; 1 for other lines."""
    loop = re.search(r" while\(.*condition=%?([\w.-]+)", line)
    if not loop:
        return 1
    if known := re.search(r'known_trip_count\D*?"n"\D*?(\d+)', line):
        return int(known[1])
    limits = re.findall(r"s32\[\]\S* constant\((\d+)\)", "\n".join(computations.get(loop[1], ())))
    return max((int(n) for n in limits), default=1)


def _sizes(shapes: str) -> list[int]:
    """Bytes of each array in a type such as (bf16[8,128]{1,0:T(8,128)}, f32[])."""
    return [
        _ITEM_BYTES.get(dtype, 4) * math.prod(int(n) for n in dims.split(",") if n)
        for dtype, dims in re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", shapes)
    ]


def _group_size(line: str) -> int:
    """Members of a collective's group: {{0,1},{2,3}}, [2,2]<=[4] or mesh['x'=2,'y'=2] {'y'}."""
    named = re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", line)
    if named:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", named[2]))
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]", line)
    if iota:
        return int(iota[2])
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", line)
    return len(listed[1].split(",")) if listed else 1
