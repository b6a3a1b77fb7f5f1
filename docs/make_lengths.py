"""Measures a training step at several lengths of its rows and draws what it costs: python docs/make_lengths.py FOLDER.

Writes lengths.jsonl to FOLDER, a line of `understudy benchmark` for each length, and docs/lengths.svg: tokens a second
and resident memory, beside transformers compiled by torch. Lengths that lengths.jsonl has aren't measured again.
Needs torch and transformers, an otherwise idle machine, and ten minutes on 2 cores.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

DOCS = Path(__file__).parent
LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
TOKENS = 2048  # of a step, at least a row
PEER = "hf_compile"
COLORS = {"Understudy": "#4a7de0", "transformers, compiled": "#e07b39"}


def main(argv: Sequence[str]) -> None:
    lines = Path(argv[0], "lengths.jsonl")
    lines.parent.mkdir(parents=True, exist_ok=True)
    have = {line["batch"][1] for line in read(lines)}
    for length in LENGTHS:
        if length not in have:
            measure(length, lines)
    found = sorted(read(lines), key=lambda line: line["batch"][1])
    print(table(found))
    with rc_context({"svg.hashsalt": "understudy", "svg.fonttype": "none"}):
        plot(found).savefig(DOCS / "lengths.svg", metadata={"Date": None})


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def measure(length: int, lines: Path) -> None:
    """Adds a line for a length; rows that are longer take fewer steps."""
    steps = {4096: 4, 8192: 2}.get(length, 8)
    rows = max(TOKENS // length, 1)
    config = [f"--config.seq_len={length}", f"--config.model.max_length={max(length, 2048)}"]
    command = [sys.executable, "-m", "research", "benchmark", "--config=experiments/benchmark.py:small", *config]
    command += [f"--config.batch_size={rows}", "--only=train", "--objectives=next_token", f"--against={PEER}"]
    subprocess.run([*command, f"--steps={steps}", f"--output={lines}"], check=True)


def table(lines: Sequence[dict[str, Any]]) -> str:
    """The rows of a table in Markdown."""
    rows = []
    for line in lines:
        peer = line["against"][PEER]
        both = [
            f"{1e3 * x['seconds']['median']:.0f} ms, {x[part]:.0%}, {x['memory']['resident_peak'] / 1e6:,.0f} MB"
            for x, part in ((line, "mfu"), (peer, "own_mfu"))
        ]
        compiled = f"{line['memory']['temporaries'] / 2**20:.0f} MiB | {line['compile_seconds']:.1f} s"
        rows.append(
            f"| {' x '.join(map(str, line['batch']))} | {' | '.join(both)} | {peer['ratio']:.2f} | {compiled} |"
        )
    return "\n".join(rows)


def plot(lines: Sequence[dict[str, Any]]) -> Figure:
    """Tokens a second, and memory, over the length of a row."""
    figure = Figure(figsize=(8.6, 3.4), layout="constrained", facecolor="white")
    speed, memory = figure.subplots(1, 2)
    lengths = [line["batch"][1] for line in lines]
    for (name, color), each in zip(COLORS.items(), (lines, [line["against"][PEER] for line in lines]), strict=True):
        speed.plot(lengths, [x["tokens_per_second"] for x in each], "o-", color=color, label=name)
        memory.plot(lengths, [x["memory"]["resident_peak"] / 1e9 for x in each], "o-", color=color, label=name)
    for axes, title in ((speed, "tokens a second"), (memory, "GB resident at the peak")):
        axes.set_title(title, loc="left", fontsize=11)
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [str(length) for length in lengths])
        axes.set_xlabel("tokens in a row")
        axes.set_ylim(bottom=0)
        axes.grid(True, color="#e6e8ec")
        axes.spines[["top", "right", "left"]].set_visible(False)
    speed.legend(frameon=False)
    return figure


if __name__ == "__main__":
    main(sys.argv[1:])
