"""Records with the log-probabilities that a model gives them, in a file of JSON lines."""

import array
import dataclasses
import hashlib
import json
import math
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import jax
import numpy as np
import tqdm

from research import files, params
from research.errors import InputError, located
from research.evals.markers import texts_of
from research.evals.scoring import Example, encode_records, make_token_scorer
from research.loading import LoadedModel
from research.sources import entries, records
from research.sources.formats import count_markers, describe_markers

ADDED = ("count", "loss", "perplexity", "logprobs")
ON_LONG = ("error", "truncate", "split")
_ENCODED_AT_ONCE = 256  # records
_BATCHES_AT_ONCE = 16  # sorted by length together, and written together
_REASONS = {
    "data": "--data holds other records",
    "tokens": "--template, --on_long or the tokenizer gives other tokens",
    "weights": "--model has other weights",
    "per_token": "--per_token was {}",
}


def find_records(data: str) -> entries.Origin:
    """Finds the records to score.

    Raises:
      InputError: there are no such records, or they are generated.
    """
    origin = entries.locate_flag(data)
    if origin.generated:
        raise InputError(f"--data = {data}: is generated. Give a file.")
    return origin


class Item(NamedTuple):
    """A record: where it stands, as it came, and parsed."""

    where: str
    raw: records.Raw
    record: dict[str, Any]


def read_chunks(origin: entries.Origin, added: Sequence[str], size: int) -> Iterator[list[Item]]:
    """Records, `size` at a time.

    Raises:
      InputError: one can't be read, or has a field of `added` already.
    """
    items = []
    for where, raw in origin.read():
        with located(where):
            record = records.parse(raw)
            for name in added:
                if name in record:
                    raise InputError(f"has a field {name!r} already, which is to be added. Rename or drop it.")
        items.append(Item(where, raw, record))
        if len(items) == size:
            yield items
            items = []
    if items:
        yield items


@dataclasses.dataclass(frozen=True)
class RecordScorer:
    """A model and how it scores records.

    Attributes:
      loaded: the model, under its mesh.
      template: how records are put to it.
      on_long: one of ON_LONG: what to do with a record that is longer than the model's max_length.
      per_token: whether each token's log-probability is written too.
      batch_tokens: see scoring.
    """

    loaded: LoadedModel
    template: str
    on_long: str
    per_token: bool
    batch_tokens: int

    def write(self, origin: entries.Origin, output: Path) -> int:
        """Scores all records into `output`, and returns how many there are.

        All is read and checked before anything is computed. A killed run leaves OUTPUT.partial, and the same call goes
        on from there.

        Raises:
          InputError: a record is at fault or there is none, a loss is no number, or OUTPUT.partial is the work of
            another command.
        """
        with jax.set_mesh(self.loaded.mesh), tempfile.TemporaryFile(dir=output.parent) as spool:
            lengths, adapters, identity = self._encode(origin, spool)
            weights = " ".join(params.checksum(each.params) for each in self.loaded.each)
            identity |= {"weights": weights, "per_token": self.per_token}
            with files.ResumableLines(output, identity, _REASONS) as lines:
                self._score(origin, spool, lengths, adapters, lines)
                lines.finish()
        return len(lengths)

    def _score(
        self,
        origin: entries.Origin,
        spool: BinaryIO,
        lengths: Sequence[int],
        adapters: Sequence[str],
        lines: files.ResumableLines,
    ) -> None:
        models = {id(each.model): each.model for each in self.loaded.each}  # adapters share one, but for those in front
        scorers = {i: make_token_scorer(model, batch_tokens=self.batch_tokens) for i, model in models.items()}
        shards = math.prod(self.loaded.mesh.shape[axis] for axis in ("data", "fsdp"))
        raw_records, tokens = origin.read(), 0
        with tqdm.tqdm(total=sum(lengths) - len(lengths), unit=" tokens", unit_scale=True, disable=None) as bar:
            for group in _groups(lengths, _BATCHES_AT_ONCE * self.batch_tokens * shards):
                raw = [next(raw_records) for _ in group]
                examples = read_examples(spool, lengths[group.start : group.stop])
                # A group that was cut off is scored again, whole, so that its values are the same.
                if group.stop > lines.done:
                    scored: dict[int, np.ndarray] = {}
                    for adapter in dict.fromkeys(adapters[group.start : group.stop]):  # a batch has one
                        own = [i for i, n in enumerate(group) if adapters[n] == adapter]
                        model, values, *_ = self.loaded.beside(adapter)
                        answers = scorers[id(model)](values, [examples[i] for i in own], bar.update)
                        scored |= zip(own, answers, strict=True)
                    skip = max(0, lines.done - group.start)
                    rows = [(raw[i], scored[i]) for i in range(skip, len(group))]
                    lines.append([_line(where, record, values, self.per_token) for (where, record), values in rows])
                tokens += sum(lengths[group.start : group.stop]) - len(group)
                bar.n = tokens
                bar.refresh()

    def _encode(self, origin: entries.Origin, spool: BinaryIO) -> tuple[array.array, list[str], dict[str, Any]]:
        """Checks and tokenises all records; writes their examples to `spool`.

        Returns:
          the number of tokens of each example.
          the adapter that each is for.
          hashes of what decides the result: the data, and the tokens.
        """
        lengths, adapters = array.array("q"), []
        hashes = {name: hashlib.blake2b(digest_size=16) for name in ("data", "tokens")}
        spelled, first = 0, ""
        for items in read_chunks(origin, ADDED, _ENCODED_AT_ONCE):
            for item in items:
                hashes["data"].update(_json(item.raw))
            if self.loaded.tokenizer is not None:
                count, marker = count_markers((texts_of(item.record) for item in items), self.loaded.tokenizer)
                spelled, first = spelled + count, first or marker
            adapters += [self.loaded.adapter_of(item.record, item.where) for item in items]
            for example in self._examples([(item.where, item.record) for item in items]):
                lengths.append(len(example.tokens))
                content = example.tokens.tobytes() + example.mask.tobytes()
                hashes["tokens"].update(content)
                spool.write(content)
        if not lengths:
            raise InputError("--data: holds no record. Write one JSON object a line.")
        if spelled:
            print(f"--data: {describe_markers(spelled, len(lengths), first)}", file=sys.stderr)
        spool.seek(0)
        return lengths, adapters, {name: value.hexdigest() for name, value in hashes.items()}

    def _examples(self, items: list[tuple[str, dict[str, Any]]]) -> Iterator[Example]:
        vocab_size, longest = self.loaded.model.config.vocab_size, self.loaded.max_length
        examples = encode_records(items, self.loaded.tokenizer, self.template, vocab_size)
        for (where, _), example in zip(items, examples, strict=True):
            yield shorten(where, example, longest, self.on_long)


def shorten(where: str, example: Example, max_length: int, on_long: str) -> Example:
    """A record's tokens as far as a model takes them: its beginning where it is longer and `on_long` is "truncate".

    Raises:
      InputError: it is longer, and `on_long` is "error"; or nothing of its beginning is to be scored.
    """
    if len(example.tokens) <= max_length + 1 or on_long == "split":
        return example
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


def read_examples(spool: BinaryIO, lengths: Sequence[int]) -> list[Example]:
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
    return files.json_line(raw, default=lambda x: x.decode() if isinstance(x, bytes) else str(x)).rstrip()
