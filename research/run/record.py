"""What a run leaves in its workdir beside metrics and checkpoints, and what it says of itself at the start."""

import importlib.metadata
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from research import config as config_lib
from research import digests, loading, params
from research.config import Config
from research.devices import distributed, sharding, startup
from research.evals import markers
from research.files import write_json
from research.pretrained import wholeness
from research.run import console, metrics, summary
from research.run.assemble import Parts
from research.run.resolve import Inputs
from research.sources.dataset import has_plain_texts

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "understudy")
_OF_A_START = ("command", "started", "versions")  # what the history says of each start of a run
_SHOWN = 4  # a line lists at most so many tokens
_WARNED = 0.05  # of a part of the data: what is lost of it beyond this gets a line of its own


def begin(inputs: Inputs, command: str, step: int) -> dict[str, Any]:
    """Writes config.json and, of a new run, the tokenizer and where the policy comes from; removes an old done.json.

    Args:
      inputs: of the run.
      command: that it was started with.
      step: at which it begins, or goes on.

    Returns:
      what config.json holds, for checkpoints.
    """
    if not distributed.main():
        return {"config": config_lib.to_dict(inputs.config)}
    folder = Path(inputs.workdir)
    folder.mkdir(parents=True, exist_ok=True)
    about = _about(inputs, command)
    before = wholeness.read_record(inputs.workdir) if inputs.resumed else {}
    history = _history(before) if inputs.resumed else []
    began = {"step": step, "changed": [str(change) for change in inputs.changes]} | {k: about[k] for k in _OF_A_START}
    kept = {"data": inputs.data_identity, "tasks": inputs.tasks, "frozen": inputs.frozen_sources}
    kept["plain_texts"] = has_plain_texts(inputs.data)
    if not inputs.resumed:
        inputs.data.tokenizer.save(inputs.workdir)
        base = inputs.bases.get("policy")
        if base is not None and base.origin:
            write_json(folder / loading.ORIGIN, base.origin)
        there = (loading.ORIGIN, loading.FROZEN, "tokenizer.json", *inputs.data.tokenizer.files)
        before = {wholeness.FILES: digests.of_files(folder, [name for name in there if (folder / name).is_file()])}
    kept[wholeness.FILES] = before.get(wholeness.FILES, {})
    record = digests.seal(about | kept | {"history": [*history, began]})
    write_json(folder / wholeness.RECORD, record)
    (folder / "done.json").unlink(missing_ok=True)
    return record


def _history(before: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The starts of a run so far. One from before they were kept is known by its last one, taken for the first."""
    return before.get("history") or [{"step": 0, "changed": []} | {name: before.get(name) for name in _OF_A_START}]


def _about(inputs: Inputs, command: str) -> dict[str, Any]:
    """The resolved config, and what it runs with."""
    mesh = inputs.mesh
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=40"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "config": config_lib.to_dict(inputs.config),
        "command": command,
        "git": git.stdout.strip() or None,
        "versions": {"python": sys.version.split()[0]} | {p: importlib.metadata.version(p) for p in _PACKAGES},
        "devices": {"count": mesh.size, "kind": mesh.devices.flat[0].device_kind, "mesh": dict(mesh.shape)},
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def make_writer(config: Config, workdir: str, start_step: int) -> metrics.Writer:
    """The writer of a run that goes on after `start_step`; it can print before its files are opened."""
    return metrics.Writer(
        workdir,
        total_steps=config.steps,
        start_step=start_step,
        tensorboard=config.log.tensorboard,
        wandb={"project": config.log.wandb} if config.log.wandb else None,
        run_config=config_lib.to_dict(config),
    )


def _precision(precision: str) -> str:
    """How the layers' linear maps multiply, where that isn't in the compute dtype."""
    if precision == "dtype":
        return ""
    return f", linear maps in {precision}{' (emulated on a CPU)' if sharding.platform() == 'cpu' else ''}"


def describe(writer: metrics.Writer, inputs: Inputs, parts: Parts, step: int) -> None:
    """Says what is about to happen."""
    model, mesh = parts.models["policy"].config, inputs.mesh
    writer.print(f"workdir  {inputs.workdir}")
    writer.print(
        f"model    {params.count(parts.models['policy'].specs) / 1e6:.2f} M parameters, vocabulary {model.vocab_size}, "
        f"{model.dtype}{_precision(model.precision)}"
    )
    shape = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    writer.print(f"devices  {mesh.size} x {mesh.devices.flat[0].device_kind}, mesh {shape}")
    if model.added_rows:
        writer.print(f"added    {_added_tokens(inputs, parts)}")
    for line in startup.describe():
        writer.print(line)
    describe_data(
        writer.print, inputs.data.report, 0 if inputs.prompts else inputs.config.steps * inputs.config.batch_size
    )
    for line in data_warnings(inputs.data.report, inputs.config.seq_len):
        writer.print(f"warning  {line}")
    if inputs.resumed:
        writer.print(f"resumed  at step {step} of {inputs.config.steps}")
        for change in inputs.changes:
            writer.print(f"changed  {change}")


def measure(writer: metrics.Writer, parts: Parts, compiled: Any, step: int) -> None:
    """Records how many parameters are trained, and the bytes of memory that a device needs for a step: what is trained,
    its moments, what is frozen, a batch and the temporaries, by the compiler's analysis.

    Args:
      writer: of the run.
      parts: of the run.
      compiled: the step.
      step: at which the run begins, or goes on.
    """
    values: dict[str, float] = {"startup/trained_parameters": params.count(parts.roles.trained)}
    values["startup/parameters"] = params.count(parts.models["policy"].specs)
    if (memory := compiled.memory_analysis()) is not None:
        outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
        values["startup/step_bytes"] = memory.argument_size_in_bytes + memory.temp_size_in_bytes + outputs
    writer.write(step, values)
    trained = f"{console.size(values['startup/trained_parameters'])} parameters are trained"
    if "startup/step_bytes" in values:
        trained += f", and a step takes {console.size(values['startup/step_bytes'])}B on each device"
    writer.print(f"step     {trained}")


def _added_tokens(inputs: Inputs, parts: Parts) -> str:
    """Says which tokens have rows of their own, where these lie, and whether they are trained."""
    c, backend = parts.models["policy"].config, inputs.data.tokenizer.backend
    tokens = [str(backend.id_to_token(c.added_from + i)) for i in range(c.added_rows)]
    shown = " ".join(tokens[:_SHOWN]) + (f" and {len(tokens) - _SHOWN} more" if len(tokens) > _SHOWN else "")
    trained = set(parts.state.params["policy"])
    rows = {name: name in trained for name in parts.models["policy"].specs if name.endswith("_added")}
    fate = ", ".join(f"{name} {'is' if is_trained else 'is not'} trained" for name, is_trained in rows.items())
    return f"{c.added_rows} token{'s' * (c.added_rows > 1)} from {c.added_from} on: {shown}; {fate}"


def describe_data(say: Callable[[str], None], report: dict[str, Any], drawn: int = 0) -> None:
    """Says what was read, and from which files, what was left out, and how many examples there are; of several sources
    in a table.

    Args:
      say: prints a line.
      report: of sources.dataset.Data.
      drawn: how many rows the run draws; 0 where they aren't what is trained on.
    """
    for source in report["sources"]:
        bad = "".join(f", {n:,} skipped: {reason}" for reason, n in source["bad"].items())
        twice = f", {source['duplicates']:,} duplicates dropped" if source["duplicates"] else ""
        files = f" in {source['files']}" if source["files"] else ""
        compared = "".join(
            f", {source[name]:,} {what}"
            for name, what in (
                ("comparisons", "comparisons"),
                ("identical", "with one answer twice"),
                ("ties", "with equal scores"),
            )
            if source.get(name)
        )
        streamed = "streamed, of which the first " if source.get("streamed") else ""
        if source.get("streamed") and not source["records"]:
            say(f"data     {source['name']}: streamed{files} after what is in front of it")
            continue
        say(f"data     {source['name']}: {streamed}{source['records']:,} records{files}{compared}{twice}{bad}")
    for line in source_table(report, drawn):
        say(f"data     {line}")
    for line in markers.source_lines(report):
        say(f"data     {line}")
    for part in ("train", "held_out"):
        counts = report[part]
        faults = {k: n for k, n in counts.items() if k.startswith(("too_long", "nothing_supervised")) and n}
        say(
            f"data     {part.replace('_', '-')}: {'the first ' if counts.get('streamed') else ''}"
            f"{counts['examples']:,} examples, {counts['tokens']:,} tokens "
            f"({counts['supervised_tokens']:,} supervised) in {counts['rows']:,} rows, packing efficiency "
            f"{counts['packing_efficiency']:.1%}" + "".join(f", {n:,} {k.replace('_', ' ')}" for k, n in faults.items())
        )


def source_table(report: dict[str, Any], drawn: int = 0) -> list[str]:
    """What each of several sources has to train on, and how often the run reads it; no line where there is one source.

    Args: see `describe_data`.
    """
    sources = [source for source in report["sources"] if "share" in source]
    if len(sources) < 2:
        return []
    weighted = sources[0]["row_share"] is not None
    rows = [
        ["source", "examples", "tokens", "learned", *["of rows"] * weighted, "of tokens", *["epochs"] * bool(drawn)]
    ]
    for source in sources:
        row = [source["name"], *_counts_of(source)]
        row += [f"{source['row_share']:.1%}"] if weighted else []
        row += ["-" if source["share"] is None else f"{source['share']:.1%}"]
        passes = "-" if source["passes"] is None else f"{drawn * source['passes']:.2f}"
        rows.append([*row, *[passes] * bool(drawn)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]


def _counts_of(source: dict[str, Any]) -> list[str]:
    """Examples, tokens and which part of them is learned, of a source in a table. A stream's are known of its first
    block alone."""
    if source.get("streamed"):
        return ["streamed", "streamed", "-" if source["learned"] is None else f"{source['learned']:.1%}"]
    learned = source["supervised_tokens"] / max(source["tokens"], 1)
    return [f"{source['examples']:,}", f"{source['tokens']:,}", f"{learned:.1%}"]


def data_warnings(report: dict[str, Any], seq_len: int) -> list[str]:
    """What a run says of its data where more than a part of 5 % is lost: too long, bad, or without anything to learn.

    Args:
      report: of sources.dataset.Data.
      seq_len: data.seq_len.
    """
    lines = []
    for source in report["sources"]:
        for reason, n in source["bad"].items():
            if n > _WARNED * source["records"]:
                share = n / source["records"]
                lines.append(
                    f"{source['name']}: {n:,} of {source['records']:,} records ({share:.1%}) skipped: {reason}"
                )
    for part in ("train", "held_out"):
        counts, name = report[part], part.replace("_", "-")
        dropped = counts.get("too_long_dropped", 0)
        total = counts["examples"] + dropped + counts["nothing_supervised"]
        for fault, verb in (("too_long_dropped", "dropped"), ("too_long_truncated", "truncated")):
            if (n := counts.get(fault, 0)) > _WARNED * total:
                remedy = "Raise seq_len." if verb == "truncated" else "Raise seq_len, or set data.on_long='truncate'."
                lines.append(
                    f"{name}: {n:,} of {total:,} examples ({n / total:.1%}) are longer than seq_len = {seq_len:,} and "
                    f"{verb}; 99 % have at most {counts['length_99']:,} tokens. {remedy}"
                )
        if (n := counts["nothing_supervised"]) > _WARNED * total:
            lines.append(
                f"{name}: {n:,} of {total:,} examples ({n / total:.1%}) are dropped, since nothing of them is to be "
                "learned within seq_len. Raise seq_len, or shorten the prompts."
            )
    return lines


def scored(config: Config, workdir: str, step: int) -> dict[int, float]:
    """Step -> checkpoint.best_metric, of the evaluations up to a step at which a run goes on, where it has patience."""
    name = config.checkpoint.best_metric
    if not (config.checkpoint.patience and step):
        return {}
    there = metrics.read_metrics(workdir)
    return {int(record["step"]): record[name] for record in there if name in record and record["step"] <= step}


def sum_up(writer: metrics.Writer, config: Config, workdir: str, steps: tuple[int, int], seconds: float) -> None:
    """Says what the run took and gave; see `summary.lines`."""
    if distributed.main():
        for line in summary.lines(config, workdir, metrics.read_metrics(workdir), steps, seconds):
            writer.print(line)


def finish(workdir: str, step: int) -> dict[str, float]:
    """Writes done.json: this run is over, after so many steps; returns the last value of every metric."""
    final: dict[str, float] = {}
    for record in metrics.read_metrics(workdir):
        final |= {name: value for name, value in record.items() if "/" in name}
    if distributed.main():
        write_json(Path(workdir) / "done.json", {"step": step, "metrics": final})
    return final


def stay_finished(workdir: str, step: int) -> dict[str, float]:
    """Says that a run has nothing left to do; returns the last value of every metric."""
    if distributed.main():
        print(f"finished at step {step} already: {workdir} stays as it is", file=sys.stderr)
    return finish(workdir, step)
