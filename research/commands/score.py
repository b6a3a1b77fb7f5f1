"""Scores text under a model: understudy score --model=WORKDIR --input=x.jsonl --output=y.jsonl

Each record keeps its fields, in order, and gets
  count       how many of its tokens are scored
  loss        nats per scored token: the mean of -log p(token | those before it)
  perplexity  exp(loss)
  logprobs    log p of each scored token, with --per_token

What is scored is what training learns: all of a `text`, its end token included; the answers of `prompt` and
`response`, or of `messages`, with their end tokens; of `tokens` (ids; no tokenizer is needed) all. The first token of
a sequence is never scored, since nothing comes before it; where the tokenizer begins a text with a token of its own,
that is the first.

Everything is read and checked before anything is computed. A killed run leaves OUTPUT.partial with whole lines, and the
same command goes on from there.
"""

import argparse
import array
import hashlib
import json
import math
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import jax
import numpy as np
import tqdm

from research import cli, files, params
from research.devices import sharding
from research.errors import InputError
from research.evals.scoring import BATCH_TOKENS, Example, encode_records, make_token_scorer
from research.sources import records
from research.sources.formats import TEMPLATES

ADDED = ("count", "loss", "perplexity", "logprobs")
_ENCODED_AT_ONCE = 256  # records
_BATCHES_AT_ONCE = 16  # sorted by length together, and written together


def main(argv: Sequence[str]) -> int:
    return cli.run(lambda: _run(_parse(argv)), resumable=True)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = cli.make_parser("score", __doc__)
    add = parser.add_argument
    add_model_flags(parser)
    add("--input", metavar="FILE", help=".jsonl, .jsonl.gz, .json, .parquet or .txt; a folder or glob of them")
    add("--output", metavar="FILE", help="where the records go, as JSON lines")
    add("--per_token", action="store_true", help="also write the log-probability of each scored token")
    add(
        "--on_long",
        choices=("error", "truncate", "split"),
        default="error",
        help="a record longer than the model's max_length: name it and end (default); score its beginning; or score "
        "all of it, piece by piece, each token from at most max_length before it",
    )
    args = parse_flags(parser, argv)
    for name in ("model", "input", "output"):
        if not getattr(args, name):
            raise InputError(f"--{name}: is missing. Give --model=M --input=x.jsonl --output=y.jsonl.")
    return args


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that say which model is measured, and how it is laid out and fed."""
    add = parser.add_argument
    add("--model", metavar="M", help="a model, as config.model.init_from takes it: the workdir of a run, ...")
    add("--step", type=int, help="of a workdir: which checkpoint; default: the newest")
    add("--ema", action="store_true", help="of a workdir: take the moving average of the parameters")
    add("--template", choices=TEMPLATES, help="how records are put to the model; default: as in training")
    add("--mesh", default="data=-1", help="as in data=4,tensor=2; default: all devices share the batch")
    add(
        "--batch_tokens",
        type=int,
        default=BATCH_TOKENS,
        help=f"tokens of a batch, padding included, on each device that shares in it; default: {BATCH_TOKENS}",
    )


def parse_flags(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """Raises InputError for a flag that isn't known, or a value that can't work. `mesh` becomes a dict."""
    args = cli.parse(parser, argv)
    if args.batch_tokens < 1:
        raise InputError(f"--batch_tokens = {args.batch_tokens}: must be at least 1.")
    sizes = {}
    for part in args.mesh.split(","):
        axis, _, size = part.partition("=")
        if not size.removeprefix("-").isdecimal():
            raise InputError(f"--mesh = {args.mesh}: {part!r} is not of the form AXIS=SIZE. Write data=4,tensor=2.")
        sizes[axis] = int(size)
    args.mesh = sizes
    return args


def _run(args: argparse.Namespace) -> None:
    output = Path(args.output)
    if output.exists():
        raise InputError(f"--output = {output}: is there already. Remove it, or name another file.")
    if not output.parent.is_dir():
        raise InputError(f"--output = {output}: there is no folder {str(output.parent)!r}. Make it first.")
    try:
        origin = records.locate(args.input, count=0, seed=0)
    except InputError as error:
        raise InputError(f"--input: {error}") from error
    if origin.generated:
        raise InputError(f"--input = {args.input}: is generated. Give a file.")

    from research import loading
    from research.run import run  # last, because it takes long to import

    run.use_compilation_cache()
    loaded = loading.load_model(
        args.model, step=args.step, ema=args.ema, mesh=sharding.make_mesh(args.mesh), needs_tokenizer=False
    )
    with jax.set_mesh(loaded.mesh), tempfile.TemporaryFile(dir=output.parent) as spool:
        lengths, identity = _encode(origin, loaded, args, spool)
        identity |= {"weights": params.checksum(loaded.params), "per_token": args.per_token}
        done = _open_partial(output, identity)
        score = make_token_scorer(loaded.model, batch_tokens=args.batch_tokens)
        at_once = _BATCHES_AT_ONCE * args.batch_tokens * math.prod(loaded.mesh.shape[a] for a in ("data", "fsdp"))
        lines = origin.read()
        with (
            open(_partial(output), "ab") as file,
            tqdm.tqdm(total=sum(lengths) - len(lengths), unit=" tokens", unit_scale=True, disable=None) as bar,
        ):
            tokens = 0
            for group in _groups(lengths, at_once):
                raw = [next(lines) for _ in group]
                examples = _read_examples(spool, lengths[group.start : group.stop])
                if (
                    group.stop > done
                ):  # a group that was cut off is scored again, whole, so that its values are the same
                    scored = score(loaded.params, examples, bar.update)
                    skip = max(0, done - group.start)
                    rows = zip(raw[skip:], scored[skip:], strict=True)
                    file.writelines([_line(where, record, values, args.per_token) for (where, record), values in rows])
                    file.flush()
                tokens += sum(lengths[group.start : group.stop]) - len(group)
                bar.n = tokens
                bar.refresh()
            os.fsync(file.fileno())
    _partial(output).replace(output)
    _sidecar(output).unlink()
    print(f"{len(lengths):,} records scored: {output}", file=sys.stderr)


def _encode(
    origin: records.Origin, loaded: Any, args: argparse.Namespace, spool: BinaryIO
) -> tuple[array.array, dict[str, str]]:
    """Checks and tokenises all records; writes their examples to `spool`.

    Returns:
      the number of tokens of each example.
      hashes of what decides the result: the input, and the tokens.
    """
    lengths = array.array("q")
    hashes = {name: hashlib.blake2b(digest_size=16) for name in ("input", "tokens")}
    template, config = args.template or loaded.template, loaded.model.config

    def flush(items: list[tuple[str, dict[str, Any]]]) -> None:
        examples = encode_records(items, loaded.tokenizer, template, config.vocab_size)
        for (where, _), example in zip(items, examples, strict=True):
            if len(example.tokens) > config.max_length + 1 and args.on_long != "split":
                example = _shorten(where, example, config.max_length, args.on_long)
            lengths.append(len(example.tokens))
            made = example.tokens.tobytes() + example.mask.tobytes()
            hashes["tokens"].update(made)
            spool.write(made)

    items = []
    for where, raw in origin.read():
        try:
            record = records.parse(raw)
            for name in ADDED:
                if name in record:
                    raise InputError(f"has a field {name!r} already, which is to be added. Rename or drop it.")
        except InputError as error:
            raise InputError(f"{where}: {error}") from error
        hashes["input"].update(_json(raw))
        items.append((where, record))
        if len(items) == _ENCODED_AT_ONCE:
            flush(items)
            items = []
    flush(items)
    if not lengths:
        raise InputError(f"--input = {args.input}: holds no record. Write one JSON object a line.")
    spool.seek(0)
    return lengths, {name: made.hexdigest() for name, made in hashes.items()}


def _shorten(where: str, example: Example, max_length: int, on_long: str) -> Example:
    if on_long == "error":
        raise InputError(
            f"{where}: has {len(example.tokens)} tokens, and the model takes {max_length} and predicts one more. "
            "Shorten it, or use --on_long=truncate or --on_long=split."
        )
    example = Example(example.tokens[: max_length + 1], example.mask[: max_length + 1])
    if not example.count:
        raise InputError(
            f"{where}: nothing of its first {max_length + 1} tokens is to be scored, so that --on_long=truncate leaves "
            "nothing. Shorten the prompt, or use --on_long=split."
        )
    return example


def _read_examples(spool: BinaryIO, lengths: Sequence[int]) -> list[Example]:
    return [Example(np.frombuffer(spool.read(4 * n), np.int32), np.frombuffer(spool.read(n), bool)) for n in lengths]


def _groups(lengths: Sequence[int], at_once: int) -> Iterator[range]:
    """Records in order, each group with `at_once` tokens at least."""
    start = tokens = 0
    for i, length in enumerate(lengths):
        tokens += length
        if tokens >= at_once or i == len(lengths) - 1:
            yield range(start, i + 1)
            start, tokens = i + 1, 0


def _line(where: str, raw: records.Raw, logprobs: np.ndarray, per_token: bool) -> bytes:
    """The record as it came, with its scores after its last field."""
    loss = -float(np.mean(logprobs, dtype=np.float64))
    if not loss < math.log(sys.float_info.max):
        raise InputError(f"{where}: has loss {loss}: its perplexity is no number. Look at the model's weights.")
    added: dict[str, Any] = {"count": len(logprobs), "loss": loss, "perplexity": math.exp(loss)}
    if per_token:
        added["logprobs"] = [round(x, 6) for x in logprobs.tolist()]
    record = _json(raw).removesuffix(b"}").rstrip()
    return record + (b", " if record != b"{" else b"") + json.dumps(added).removeprefix("{").encode() + b"\n"


def _json(raw: records.Raw) -> bytes:
    if isinstance(raw, bytes):
        return raw.strip()
    return json.dumps(
        raw, ensure_ascii=False, default=lambda x: x.decode() if isinstance(x, bytes) else str(x)
    ).encode()


def _partial(output: Path) -> Path:
    return output.with_name(output.name + ".partial")


def _sidecar(output: Path) -> Path:
    return output.with_name(output.name + ".partial.json")


def _open_partial(output: Path, identity: dict[str, Any]) -> int:
    """Makes OUTPUT.partial, or drops a torn line at the end of the one that is there. Returns how many lines it has.

    Raises:
      InputError: it is the work of another command.
    """
    partial, sidecar = _partial(output), _sidecar(output)
    if not partial.exists():
        part = sidecar.with_name(sidecar.name + ".part")
        part.write_text(json.dumps(identity))
        part.replace(sidecar)
        partial.touch()
        return 0
    before = json.loads(sidecar.read_text()) if sidecar.exists() else {}
    said = {
        "input": "--input holds other records",
        "tokens": "--template, --on_long or the tokenizer gives other tokens",
        "weights": "--model has other weights",
        "per_token": f"--per_token was {before.get('per_token')}",
    }
    for name, value in identity.items():
        if before.get(name) != value:
            raise InputError(
                f"{partial}: was begun by another command: {said[name]}. Give that command again, or remove this file "
                "to begin anew."
            )
    return files.whole_lines(partial)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
