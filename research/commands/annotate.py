"""Writes what a teacher says of a run's data, for distillation without the teacher in memory.

understudy annotate --config=experiments/x.py --output=DIR [--k=32] [--temperature=1] [--config.a.b=value ...]

For each token that the run learns from, train and held-out, the log-probabilities of the teacher's k likeliest next
tokens and the mass of the others. The teacher is config.roles.teacher, or --teacher=MODEL. Then, with the same data,

  --config.data.annotations=DIR --config.objective.distill.cached=True

The size on disk is stated and reserved before anything is computed. A killed run goes on where it was.
"""

import dataclasses
import functools
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import tqdm
from absl import flags

from research import cli
from research.errors import InputError, did_you_mean
from research.sources import annotations, packing
from research.sources.annotations import META, PROGRESS, Pieces
from research.sources.dataset import Data, Rows, settings
from research.sources.store import Store

_GROUP_TOKENS = 2**18  # written, and packed into rows, together
_SCOPES = ("supervised", "all")


class Job(NamedTuple):
    """What is to be annotated of one store, and where it goes."""

    store: Store
    pieces: Pieces
    folder: Path


def main(argv: Sequence[str]) -> int:
    values = cli.experiment_flags(argv)
    flags.DEFINE_string("output", None, "The folder of the annotations.", flag_values=values)
    flags.DEFINE_string("teacher", None, "A model, in place of config.roles.teacher.", flag_values=values)
    flags.DEFINE_integer("k", 32, "How many of the likeliest tokens.", flag_values=values)
    flags.DEFINE_float("temperature", 1.0, "Divides the teacher's logits.", flag_values=values)
    flags.DEFINE_string("on", "supervised", "Which tokens: what 'objective.distill.on' says.", flag_values=values)
    if {"--help", "-h"} & set(argv):
        print(f"{__doc__}{values.get_help()}")
        return 0

    def work() -> None:
        told = cli.parse_experiment(values, argv, "output", "--config=experiments/x.py --output=DIR")

        from research import config  # late, because it takes long to import

        if values.teacher:
            told["roles"] = {**told["roles"], "teacher": {"init_from": values.teacher}}
        annotate(config.parse(told), values.output, k=values.k, temperature=values.temperature, on=values.on)

    return cli.run(work, resumable=True)


def annotate(config: Any, output: str, *, k: int = 32, temperature: float = 1.0, on: str = "supervised") -> None:
    """Annotates the data of a run; see sources/annotations.py for what is written.

    Args:
      config: a research.config.Config with roles["teacher"]; what its objective says isn't looked at.
      output: a folder: a new one, or what an earlier call with the same arguments has left.
      k: how many tokens.
      temperature: divides the teacher's logits.
      on: "supervised" or "all"; see objectives/distill.py.

    Raises:
      InputError: an argument or the config is at fault, the disk has no room, or `output` holds something else.
    """
    from research import config as config_lib
    from research import loading, params
    from research.devices import compilation, sharding
    from research.models import transformer
    from research.ops import divergences
    from research.run import resolve
    from research.sources import dataset, tokenizers

    if on not in _SCOPES:
        raise InputError(f"--on={on}: no such choice.{did_you_mean(on, _SCOPES)}")
    if not temperature > 0:
        raise InputError(f"--temperature={temperature}: must be above 0.")
    if "teacher" not in config.roles:
        raise InputError('--teacher: names no model, and the config has no roles = {"teacher": {"init_from": ...}}.')
    config = dataclasses.replace(
        config, data={**config.data, "annotations": ""}, roles={"teacher": config.roles["teacher"]}
    )
    config, bases = resolve.with_checkpoints(config, None)
    config_lib.check(config, num_devices=len(jax.devices()))
    if config.compilation_cache:
        compilation.use_compilation_cache(config.data["cache_dir"])
    mesh = sharding.make_mesh(dataclasses.asdict(config.mesh))
    spec = config_lib.data_spec(config)
    data = dataset.load(spec, config.tokenizer, resolve.given_tokenizer(config, bases.get("policy")), seed=config.seed)
    tokenizer: tokenizers.Tokenizer = data.tokenizer
    loading.check_reads("roles.teacher", bases["teacher"], tokenizer)
    rules = {**sharding.RULES, **config.rules}
    model = transformer.make_model(config_lib.model_config(config, tokenizer.size, role="teacher"), rules)
    if not 0 < k <= tokenizer.size:
        raise InputError(f"--k={k}: must be in 1..{tokenizer.size}, the size of the tokenizer.")
    if model.config.num_labels or not model.config.causal:
        raise InputError(f"roles.teacher = {bases['teacher'].name}: is no causal language model.")

    jobs = plan(data, Path(output), on)
    _check_room(Path(output), jobs, k, tokenizer.size)
    with jax.set_mesh(mesh):
        specs = transformer.in_compute_dtype(model)
        weights = bases["teacher"].read(specs, params.shardings(specs, mesh, rules))
        meta = {
            "teacher": bases["teacher"].name,
            "weights": params.checksum(weights),
            "k": k,
            "temperature": temperature,
            "on": on,
            "vocab_size": tokenizer.size,
            "dtype": model.config.dtype,
            "rows": config.batch_size // config.microbatches,
            "settings": settings(spec, tokenizer, config.seed),
            "stores": [
                {
                    "name": f"part {i + 1} of {len(jobs)}",
                    "folder": job.folder.name,
                    "content": annotations.content(job.store),
                    "annotated": len(job.pieces.at),
                }
                for i, job in enumerate(jobs)
            ],
        }
        _begin(Path(output), meta, jobs)

        @functools.partial(jax.jit, out_shardings=sharding.named(mesh, ("batch", "time"), rules))
        def predict(weights: Any, batch: Mapping[str, jax.Array]) -> divergences.TopK:
            hidden, head = model.hidden(weights, batch), model.unembed(weights)
            return divergences.top_k(hidden, head, k, temperature=temperature, vocab_size=tokenizer.size)

        rows = sharding.named(mesh, ("batch", "time"), rules)

        def top_k(batch: Mapping[str, np.ndarray]) -> divergences.TopK:
            fields = {name: jax.device_put(batch[name], rows) for name in ("tokens", "segment_ids", "positions")}
            return predict(weights, fields)

        total = sum(len(job.pieces.at) for job in jobs)
        with tqdm.tqdm(total=total, unit=" tokens", unit_scale=True, disable=None) as bar:
            for job in jobs:
                for done in _write(job, meta, config.seq_len, top_k):
                    bar.update(done)
    print(f"{total:,} tokens annotated: --config.data.annotations={output}", file=sys.stderr)


def plan(data: Data, output: Path, on: str) -> list[Job]:
    """What is to be annotated of each store of a run's data."""
    found: dict[int, tuple[Store, list[np.ndarray]]] = {}
    for rows in (*(rows for rows, _ in data.train), data.held_out):
        parts = annotations.split(rows.stores, rows.start, rows.length)
        for store, segments in zip(rows.stores, parts, strict=True):
            found.setdefault(id(store), (store, []))[1].append(np.stack(segments, axis=1))
    jobs, seen = [], set()
    for store, segments in found.values():
        name = annotations.content(store)[:16]
        start, length = np.concatenate(segments).T
        if len(start) and name not in seen:  # an entry may be there twice
            seen.add(name)
            jobs.append(Job(store, annotations.pieces(store, start, length, on), output / name))
    return jobs


def _files(job: Job, k: int, vocab_size: int) -> dict[str, int]:
    """Bytes of each file that grows."""
    made = annotations.layout(len(job.pieces.at), k, vocab_size)
    return {name: dtype.itemsize * int(np.prod(shape, dtype=np.int64)) for name, (dtype, shape) in made.items()}


def _check_room(output: Path, jobs: Sequence[Job], k: int, vocab_size: int) -> None:
    """Says how much will be written; raises InputError where it doesn't fit."""
    sizes = [sum(_files(job, k, vocab_size).values()) + sum(x.nbytes for x in job.pieces) for job in jobs]
    there = sum(f.stat().st_blocks * 512 for f in output.rglob("*") if f.is_file()) if output.is_dir() else 0
    place = next(p for p in (output.resolve(), *output.resolve().parents) if p.is_dir())
    free = shutil.disk_usage(place).free
    tokens = sum(len(job.pieces.at) for job in jobs)
    print(
        f"{output}: {tokens:,} tokens x {sum(sizes) / max(tokens, 1):.0f} bytes = {sum(sizes):,} bytes on disk, "
        f"{there:,} of them there already; {free:,} are free",
        file=sys.stderr,
    )
    if sum(sizes) - there > free:
        raise InputError(
            f"--output={output}: needs {sum(sizes) - there:,} more bytes, and {free:,} are free. Lower --k={k}, give "
            "less data, or name another disk."
        )


def _begin(output: Path, meta: Mapping[str, Any], jobs: Sequence[Job]) -> None:
    """Makes the files at their full size; or checks that those that are there were begun with the same arguments."""
    path = output / META
    if path.is_file():
        before, now = json.loads(path.read_text()), json.loads(json.dumps(meta))
        flat = lambda d: {**{n: v for n, v in d.items() if n != "settings"}, **d["settings"]}  # noqa: E731
        before, now = flat(before), flat(now)
        for name, value in now.items():
            if before.get(name) != value:
                raise InputError(
                    f"--output={output}: was begun with {name} = {before.get(name)!r}, and this is {value!r}. Give the "
                    "same again, or name another folder."
                )
        return
    if output.exists() and (
        not output.is_dir() or any(p.name not in {j.folder.name for j in jobs} for p in output.iterdir())
    ):
        raise InputError(f"--output={output}: is there, and holds no annotations. Name a new folder.")
    for job in jobs:
        job.folder.mkdir(parents=True, exist_ok=True)
        np.save(job.folder / "segments.npy", job.pieces.segments)
        np.save(job.folder / "at.npy", job.pieces.at)
        for name, size in _files(job, meta["k"], meta["vocab_size"]).items():
            with open(job.folder / f"{name}.bin", "wb") as file:
                try:
                    file.truncate(size)
                    if size and hasattr(os, "posix_fallocate"):
                        os.posix_fallocate(file.fileno(), 0, size)
                except OSError as error:
                    raise InputError(f"{file.name}: {size:,} bytes can't be reserved ({error.strerror}).") from error
        _mark(job.folder, 0, 0)
    output.mkdir(parents=True, exist_ok=True)
    _write_json(path, meta)


def _write(job: Job, meta: Mapping[str, Any], seq_len: int, top_k: Any) -> Iterator[int]:
    """Fills a store's files from where they are. Yields how many more tokens are done."""
    pieces, progress = job.pieces, json.loads((job.folder / PROGRESS).read_text())
    if progress["done"]:
        yield progress["done"]
    files = annotations.layout(len(pieces.at), meta["k"], meta["vocab_size"])
    for first, stop in _groups(pieces.segments[:, 1], max(_GROUP_TOKENS, meta["rows"] * seq_len)):
        if stop <= progress["segments"]:
            continue
        segments = pieces.segments[first:stop]
        low, high = np.searchsorted(pieces.at, [segments[0, 0], segments[-1].sum()])
        at = pieces.at[low:high]
        if not len(at):
            continue
        made = {name: np.zeros((len(at), *shape[1:]), dtype) for name, (dtype, shape) in files.items()}
        for address, where, batch in _batches(job.store, segments, seq_len, meta["rows"]):
            row = np.minimum(np.searchsorted(at, address), len(at) - 1)
            wanted = at[row] == address
            for name, values in zip(files, jax.device_get(top_k(batch)), strict=True):
                values = values.reshape(-1, *values.shape[2:])
                made[name][row[wanted]] = values[where[wanted]]
        for name, values in made.items():
            with open(job.folder / f"{name}.bin", "r+b") as file:
                file.seek(low * values[:1].nbytes)
                file.write(values.tobytes())
                file.flush()
                os.fsync(file.fileno())
        _mark(job.folder, int(high), int(stop))
        yield int(high - low)


def _groups(lengths: np.ndarray, tokens: int) -> Iterator[tuple[int, int]]:
    """Ranges of segments, in order, of about `tokens` tokens each."""
    ends = np.cumsum(lengths)
    bounds = np.unique(np.concatenate([np.searchsorted(ends, np.arange(0, ends[-1], tokens)), [len(lengths)]]))
    return zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)


def _batches(
    store: Store, segments: np.ndarray, seq_len: int, batch_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]]:
    """Yields (addresses of the tokens, their places in the flat batch, the batch) of packed rows."""
    row = packing.best_fit_decreasing(segments[:, 1], seq_len)
    start, length = segments[np.argsort(row, kind="stable")].T
    splits = np.concatenate([[0], np.cumsum(np.bincount(row))]).astype(np.int64)
    rows = Rows((store,), start, length, splits, seq_len)
    for first in range(0, len(rows), batch_size):
        index = np.arange(first, first + batch_size)
        batch = rows.batch(np.where(index < len(rows), index, -1))
        here = slice(splits[first], splits[min(first + batch_size, len(rows))])
        before = np.cumsum(length[here]) - length[here]
        address = np.repeat(start[here] - before, length[here]) + np.arange(length[here].sum())
        yield address, np.flatnonzero(batch["segment_ids"]), batch


def _mark(folder: Path, done: int, segments: int) -> None:
    _write_json(folder / PROGRESS, {"done": done, "segments": segments})


def _write_json(path: Path, value: Any) -> None:
    part = path.with_name(path.name + ".part")
    with open(part, "w") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
