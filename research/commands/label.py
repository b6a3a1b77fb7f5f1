"""Labels text with a classifier: understudy label --model=WORKDIR --data=x.jsonl --output=labelled.jsonl

Each record keeps its fields and gets `probs`, the probability of each class: what `data.format=labelled` trains on. A
`label` that it had, its true class, is renamed to `gold` and becomes a number. Several models, parted by commas, label
together: their probabilities are averaged. A language model labels without training where `--words` names a word for
each class: "--words= no, yes".

A killed run leaves OUTPUT.partial, and the same command goes on from there.
"""

import argparse
import functools
import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from research import cli, files
from research.errors import InputError
from research.models import transformer
from research.models.config import ModelConfig
from research.objectives import classes
from research.objectives import types as objective_types
from research.sources import packing, records
from research.sources.dataset import Rows
from research.sources.store import Store, open_store

_TOGETHER = 1024  # records: packed into rows together, and written together
_ROWS = 8  # of a batch


class Classifier(NamedTuple):
    """A model and how it reads. `probs`: (rows of the batch) -> [B, T, C] float32."""

    name: str
    probs: Callable[[dict[str, np.ndarray]], jax.Array]
    store: Store
    seq_len: int
    names: tuple[str, ...]


def main(argv: Sequence[str]) -> int:
    return cli.run(lambda: _run(_parse(argv)), resumable=True)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = cli.make_parser("label", __doc__)
    add = parser.add_argument
    add("--model", metavar="M[,M]", help="workdirs of runs, or with --words a language model from anywhere")
    add("--data", metavar="FILE", help=".jsonl, .jsonl.gz, .json, .parquet or .txt; a folder or glob of them")
    add("--output", metavar="FILE", help="where the records go, as JSON lines")
    add("--step", help="of a workdir: which checkpoint, or 'best' by the run's checkpoint.best_metric; default: newest")
    add("--fields", type=json.loads, help='columns of other names: \'{"text": "headline"}\'; default: the run\'s')
    add("--prompt", help="what the model reads, with {text} in it; default: the run's")
    add("--words", help="of each class, parted by commas, as the language model would go on; default: the run's")
    add("--keep", type=float, default=1.0, help="keep this share of each predicted class, the most confident ones")
    add("--overwrite", action="store_true", help="replace the output where it is there")
    add("--max_records", type=int, default=0, help="label only so many; 0: all")
    args = cli.parse(parser, argv, ("model", "data", "output"), "Give --model=M --data=x.jsonl --output=y.jsonl.")
    if not 0 < args.keep <= 1:
        raise InputError(f"--keep = {args.keep}: must be in (0, 1].")
    return args


def _run(args: argparse.Namespace) -> None:
    output = Path(args.output)
    if output.exists() and not args.overwrite:
        raise InputError(f"--output = {output}: is there already. Remove it, name another file, or use --overwrite.")
    if not output.parent.is_dir():
        raise InputError(f"--output = {output}: there is no folder {str(output.parent)!r}. Make it first.")
    try:
        origin = records.locate(args.data, count=10_000, seed=0)
    except InputError as error:
        raise InputError(f"--data: {error}") from error

    from research.run import run

    run.use_compilation_cache()
    classifiers = [_open(name, origin, args) for name in args.model.split(",")]
    names, fields = classifiers[0].names, args.fields or {}
    total = min(len(classifiers[0].store.length), args.max_records or sys.maxsize)
    partial = output.with_name(output.name + ".partial")
    done = _resume(partial, _identity(args, classifiers))
    lines = (records.parse(raw) for _, raw in origin.read())
    with open(partial, "ab") as file, tqdm.tqdm(total=total, unit=" records", disable=None) as bar:
        for start in range(0, total, _TOGETHER):
            chosen = range(start, min(start + _TOGETHER, total))
            raw = [next(lines) for _ in chosen]
            if chosen.stop > done:
                probs = np.mean([_label(c, chosen) for c in classifiers], axis=0)
                skip = max(0, done - start)
                rows = zip(raw[skip:], probs[skip:], strict=True)
                file.writelines(_line(record, row, fields, names) for record, row in rows)
                file.flush()
            bar.update(len(chosen))
    finished = _most_confident(partial, args.keep) if args.keep < 1 else partial
    finished.replace(output)
    partial.unlink(missing_ok=True)
    _sidecar(partial).unlink()
    print(f"{total:,} records labelled: {output}", file=sys.stderr)


def _open(name: str, origin: records.Origin, args: argparse.Namespace) -> Classifier:
    """Loads a model and tokenises the records for it."""
    from research import config as config_lib
    from research import loading
    from research.run import checkpoint

    step = checkpoint.best_step(name) if args.step == "best" else args.step and int(args.step)
    loaded = loading.load_model(name, step=step)
    record = Path(name) / "config.json"
    run = config_lib.parse(json.loads(record.read_text())["config"]) if checkpoint.steps(name) else config_lib.Config()
    options = [run.objective.get(term, {}) for term in run.objective["terms"]]
    words = next((tuple(o["words"]) for o in options if o.get("head") == "words"), ())
    words = tuple(args.words.split(",")) if args.words else words
    if not words and not loaded.model.config.num_labels:
        raise InputError(
            f"--model = {name}: is a language model, and no classifier. Name a word for each class in --words."
        )
    label_tokens = classes.label_tokens(words, loaded.tokenizer, "--words") if words else None
    data = run.data
    if args.fields is None:
        args.fields = dict(data["fields"])
    length = loaded.model.config.max_length
    seq_len = run.seq_len if checkpoint.steps(name) else min(512, length)
    store = open_store(
        origin,
        loaded.tokenizer,
        format="labelled",
        fields=args.fields,
        template=loaded.template,
        on_bad_record="error",
        classes=records.Classes((), args.prompt or data["prompt"], known=False),
        cache_dir=data["cache_dir"],
    )
    forward = _make_probs(loaded.model.config, label_tokens)
    return Classifier(
        name=f"{name}@{step}",
        probs=functools.partial(forward, loaded.params),
        store=store,
        seq_len=seq_len,
        names=tuple(data["labels"]) or tuple(word.strip() for word in words),
    )


@functools.lru_cache(maxsize=16)
def _make_probs(config: ModelConfig, label_tokens: tuple[int, ...] | None) -> Callable[..., jax.Array]:
    """One program for all models of a shape, so that labelling with many compiles once."""
    model = transformer.make_model(config)

    @jax.jit
    def probs(params: Any, batch: dict[str, jax.Array]) -> jax.Array:
        forward = objective_types.Forward({"policy": model}, {"policy": params}, batch)
        return jax.nn.softmax(classes.class_logits(forward, label_tokens))

    return probs


def _label(classifier: Classifier, chosen: range) -> np.ndarray:
    """The probabilities of records by number, [len(chosen), C]."""
    store, T = classifier.store, classifier.seq_len
    ends = np.cumsum(store.length)[chosen.start : chosen.stop]
    length = np.minimum(store.length[chosen.start : chosen.stop], T)
    row = packing.best_fit_decreasing(length, T)
    order = np.argsort(row, kind="stable")
    splits = np.concatenate([[0], np.cumsum(np.bincount(row))])
    rows = Rows((store,), (ends - length)[order], length[order], splits, T)
    last = np.cumsum(length[order]) - np.repeat(
        np.concatenate([[0], np.cumsum(np.bincount(row, length))[:-1]]).astype(np.int64), np.bincount(row)
    )
    out = None
    for first in range(0, len(rows), _ROWS):
        number = np.arange(first, first + _ROWS)
        batch = rows.batch(np.where(number < len(rows), number, -1))
        got = np.asarray(classifier.probs({k: jnp.asarray(v) for k, v in batch.items()}))
        if out is None:
            out = np.zeros((len(chosen), got.shape[-1]))
        here = range(splits[first], splits[min(first + _ROWS, len(rows))])
        out[order[here]] = got[row[order[here]] - first, last[here] - 1]
    if not np.isfinite(out).all():
        raise InputError(f"{classifier.name}: gives probabilities that are no numbers. Look at the model's weights.")
    return out


def _line(record: dict[str, Any], probs: np.ndarray, fields: dict[str, str], names: Sequence[str]) -> bytes:
    """The record with its probabilities, and its true class where it is known."""
    column = fields.get("label", "label")
    made = {k: v for k, v in record.items() if k not in (column, "probs")}
    if record.get(column) is not None:
        made["gold"] = records.label(record, {"label": column}, names)
    made["probs"] = [round(float(p), 6) for p in probs / probs.sum()]
    return json.dumps(made, ensure_ascii=False).encode() + b"\n"


def _identity(args: argparse.Namespace, classifiers: Sequence[Classifier]) -> dict[str, Any]:
    """What decides the result."""
    tokens = [hashlib.blake2b(c.store.tokens.tobytes(), digest_size=16).hexdigest() for c in classifiers]
    return {"models": [c.name for c in classifiers], "tokens": tokens, "words": args.words, "keep": args.keep}


def _sidecar(partial: Path) -> Path:
    return partial.with_name(partial.name + ".json")


def _resume(partial: Path, identity: dict[str, Any]) -> int:
    """Drops a torn line at the end of what an earlier run left, and returns how many lines there are.

    Raises:
      InputError: it is the work of another command.
    """
    sidecar = _sidecar(partial)
    if not partial.exists():
        sidecar.write_text(json.dumps(identity))
        partial.touch()
        return 0
    before = json.loads(sidecar.read_text()) if sidecar.exists() else {}
    if before != identity:
        differing = next(name for name in identity if before.get(name) != identity[name])
        raise InputError(
            f"{partial}: was begun with other {differing}. Give that command again, or remove this file to begin anew."
        )
    return files.whole_lines(partial)


def _most_confident(partial: Path, share: float) -> Path:
    """A file of the most confident records of each predicted class, in their order."""
    lines = partial.read_bytes().splitlines(keepends=True)
    probs = np.array([json.loads(line)["probs"] for line in lines])
    kept = np.zeros(len(lines), bool)
    for label in range(probs.shape[1]):
        (here,) = np.nonzero(probs.argmax(axis=1) == label)
        best = here[np.argsort(-probs[here].max(axis=1), kind="stable")]
        kept[best[: int(np.ceil(share * len(here)))]] = True
    chosen = partial.with_name(partial.name + ".kept")
    chosen.write_bytes(b"".join(line for line, keep in zip(lines, kept, strict=True) if keep))
    return chosen


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
