"""Scores of all records of some data, in a file of rows (sources/scores.py): read twice, and computed once."""

import array
import contextlib
import dataclasses
import hashlib
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import tqdm

from research import files
from research.errors import InputError
from research.evals.markers import texts_of
from research.evals.record_scores import Item, read_chunks, read_examples
from research.evals.scorers.inputs import Encoder
from research.evals.scorers.types import Chunk, Scorer
from research.evals.scoring import Example
from research.sources import entries, records, scores
from research.sources.formats import count_markers, describe_markers

_READ_AT_ONCE = 256  # records
BATCHES_AT_ONCE = 16  # of a model: sorted by length together
_MOST_AT_ONCE = 4096  # records that are scored and written together
_SCORES = (int, float, bool, np.integer, np.floating, np.bool_, type(None))
_REASONS = {
    "data": "--data holds other records",
    "tokens": "--template or the tokenizer gives other tokens",
    "scorers": "--with, --options, a model or a file that is compared with was another",
    "together": "--batch_tokens or the mesh was another",
}


class Spool:
    """The tokens of all records under one encoder, in a temporary file; in memory are 8 bytes a record."""

    def __init__(self, file: BinaryIO):
        self._file, self.lengths, self._hash = file, array.array("q"), hashlib.blake2b(digest_size=16)

    def append(self, examples: Sequence[Example]) -> None:
        for example in examples:
            content = example.tokens.tobytes() + example.mask.tobytes()
            self.lengths.append(len(example.tokens))
            self._hash.update(content)
            self._file.write(content)

    def rewind(self) -> None:
        self._file.seek(0)

    def read(self, numbers: range) -> list[Example]:
        """The examples that come next, which are those of these numbers."""
        return read_examples(self._file, self.lengths[numbers.start : numbers.stop])

    @property
    def digest(self) -> str:
        """Of all tokens."""
        return self._hash.hexdigest()


@dataclasses.dataclass(frozen=True)
class Seen:
    """What one look at all records gave.

    Attributes:
      count: how many there are.
      by_file: file -> how many of them are in it.
      data: a hash of them.
      spools: encoder -> the tokens.
    """

    count: int
    by_file: Mapping[str, int]
    data: str
    spools: Mapping[Encoder, Spool]

    def groups(self, at_once: int) -> Iterator[range]:
        """Records in order, each group with `at_once` tokens under every encoder at least, or 4,096 records."""
        lengths = [spool.lengths for spool in self.spools.values()]
        start, tokens = 0, [0] * len(lengths)
        for i in range(self.count):
            tokens = [sum_ + each[i] for sum_, each in zip(tokens, lengths, strict=True)]
            full = i + 1 - start == _MOST_AT_ONCE or (tokens and min(tokens) >= at_once)
            if full or i == self.count - 1:
                yield range(start, i + 1)
                start, tokens = i + 1, [0] * len(lengths)


@dataclasses.dataclass(frozen=True)
class RowScorer:
    """Writes rows of scores.

    Attributes:
      scorers: name -> scorer.
      options: of the scorers, as they were given.
      counting: the encoder whose tokens are counted.
      together: so many tokens at least are scored together, longer records first.
    """

    scorers: Mapping[str, Scorer]
    options: Mapping[str, Any]
    counting: Encoder
    together: int

    def write(self, origin: entries.Origin, output: Path) -> int:
        """Scores all records into `output`, and returns how many there are.

        All is read and checked before anything is computed. A killed run leaves OUTPUT.partial, and the same call goes
        on from there.

        Raises:
          InputError: a record is at fault or there is none, or OUTPUT.partial is the work of another command.
        """
        with contextlib.ExitStack() as stack:
            seen = self._observe(origin, stack, output.parent)
            identity = {
                "data": seen.data,
                "tokens": [spool.digest for spool in seen.spools.values()],
                "scorers": [[name, scorer.identity] for name, scorer in self.scorers.items()] + [dict(self.options)],
                "together": self.together,
            }
            with files.ResumableLines(output, identity, _REASONS) as lines:
                for scorer in self.scorers.values():
                    scorer.prepare()
                self._score(origin, seen, lines)
                lines.finish()
        for scorer in self.scorers.values():
            if line := scorer.summary():
                print(line, file=sys.stderr)
        return seen.count

    def _observe(self, origin: entries.Origin, stack: contextlib.ExitStack, folder: Path) -> Seen:
        """Reads, checks and tokenises all records, and shows them to the scorers."""
        encoders = dict.fromkeys(scorer.encoder for scorer in self.scorers.values() if scorer.encoder is not None)
        open_file = lambda: stack.enter_context(tempfile.TemporaryFile(dir=folder))  # noqa: E731, SIM115
        spools = {encoder: Spool(open_file()) for encoder in encoders}
        data, count, spelled, marker = hashlib.blake2b(digest_size=16), 0, 0, ""
        by_file: Counter[str] = Counter()
        tokenizer = self.counting.tokenizer if spools else None
        for items in read_chunks(origin, (), _READ_AT_ONCE):
            for item in items:
                data.update(_content(item.raw))
                by_file[scores.file_of(item.where)] += 1
            if tokenizer is not None:
                number, first = count_markers((texts_of(item.record) for item in items), tokenizer)
                spelled, marker = spelled + number, marker or first
            chunk = Chunk(count, items, {encoder: encoder.encode(items) for encoder in spools})
            for encoder, spool in spools.items():
                spool.append(chunk.encoded[encoder])
            for scorer in self.scorers.values():
                scorer.observe(chunk)
            count += len(items)
        if not count:
            raise InputError("--data: holds no record. Write one JSON object a line.")
        if spelled:
            print(f"--data: {describe_markers(spelled, count, marker)}", file=sys.stderr)
        for spool in spools.values():
            spool.rewind()
        return Seen(count, by_file, data.hexdigest(), spools)

    def _score(self, origin: entries.Origin, seen: Seen, lines: files.ResumableLines) -> None:
        raw, numbers = origin.read(), scores.Numbers()
        with tqdm.tqdm(total=seen.count, unit=" records", unit_scale=True, disable=None) as bar:
            for group in seen.groups(self.together):
                items = [Item(where, one, records.parse(one)) for where, one in (next(raw) for _ in group)]
                places = [numbers.next(item.where) for item in items]
                encoded = {encoder: spool.read(group) for encoder, spool in seen.spools.items()}
                # A group that was cut off is scored again, whole, so that its values are the same.
                chunk = Chunk(group.start, items, encoded)
                if group.stop > lines.done:
                    lines.append(self._rows(chunk, places, seen.by_file)[max(0, lines.done - group.start) :])
                bar.update(len(group))

    def _rows(self, chunk: Chunk, places: Sequence[tuple[str, int]], by_file: Mapping[str, int]) -> list[bytes]:
        """The lines of some records."""
        columns: dict[str, Sequence[Any]] = {}
        for name, scorer in self.scorers.items():
            values = scorer.score(chunk)
            _check(name, scorer, values, len(chunk))
            columns |= values
        counted = chunk.encoded.get(self.counting) or self.counting.encode(chunk.items)
        rows = []
        for i, (item, place, example) in enumerate(zip(chunk.items, places, counted, strict=True)):
            counts = len(example.tokens), int(np.count_nonzero(example.mask))
            values = {name: column[i] for name, column in columns.items()}
            rows.append(scores.row(place, scores.digest(item.record), counts, values, by_file[place[0]]))
        return rows


def _check(name: str, scorer: Scorer, values: Mapping[str, Sequence[Any]], count: int) -> None:
    """Raises InputError where a scorer gives something else than it says: a fault of the module that it is in."""
    if set(values) != set(scorer.columns):
        raise InputError(
            f"--with = {name}: gives {sorted(values)}, and says that it gives {sorted(scorer.columns)}. Mend it."
        )
    for column, each in values.items():
        if len(each) != count:
            raise InputError(f"--with = {name}: gives {len(each)} values of {column!r} for {count} records. Mend it.")
        if wrong := [value for value in each if not isinstance(value, _SCORES)]:
            raise InputError(f"--with = {name}: {column} = {wrong[0]!r:.40}: must be a number, true, false or None.")


def _content(raw: records.Raw) -> bytes:
    return raw.strip() if isinstance(raw, bytes) else files.json_line(raw, default=str)
