"""Writes records of generated tasks, some of which are spoiled in known ways: what a selection of data should drop.

DIR gets pool.jsonl, of which the share --noise is spoiled; clean.jsonl, the records of which it was made; rest.jsonl,
those of pool.jsonl that aren't spoiled; and reference.jsonl and test.jsonl, other records, none of them spoiled. No
prompt is in two of pool, reference and test. A record's `noise` says what is wrong with it, a third of them each:

  shuffled   the answer is another prompt's, of the same task
  duplicate  a copy of a record that is there once more
  foreign    a piece of English text, cut in two
"""

import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from research import cli, files
from research.cli import Flag
from research.errors import InputError
from research.sources import stdlib_text, tasks

KINDS = ("shuffled", "duplicate", "foreign")
_COPIES = 10  # of each record that is copied
_TRIES = 50  # records that are generated for each new prompt

Record = dict[str, Any]

COMMAND = cli.Command(
    "planted_noise",
    __doc__,
    flags=(
        Flag("output", "the folder of the files; it may exist", metavar="DIR", parse=cli.path, required=True),
        Flag("tasks", "which tasks, equally often", metavar="NAME,...", parse=cli.words, required=True),
        Flag("pool", "records of the pool", 3000, metavar="N", parse=cli.whole(20)),
        Flag("held_out", "records of the reference", 600, metavar="N", parse=cli.whole(1)),
        Flag("test", "records of the test", 400, metavar="N", parse=cli.whole(1)),
        Flag("noise", "the share of the pool that is spoiled", 0.3, metavar="SHARE", parse=cli.share),
        cli.SEED,
    ),
    examples=("python -m research.studies.planted_noise --tasks=reverse,copy --output=data/noisy",),
)


def main(argv: Sequence[str]) -> int:
    return COMMAND.run(argv, _write)


def _write(args: SimpleNamespace) -> None:
    folder = Path(args.output)
    files.check_folder(args.output, "--output")
    clean = list(distinct(args.tasks, args.pool + args.held_out + args.test, args.seed))
    parts = np.split(np.array(clean, object), np.cumsum([args.pool, args.held_out]))
    pool = spoiled(list(parts[0]), args.noise, args.seed)
    names = ("clean", "reference", "test", "pool", "rest")
    rest = [record for record in pool if not record["noise"]]
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in zip(names, (*parts, pool, rest), strict=True):
        files.write_bytes(folder / f"{name}.jsonl", b"".join(map(files.json_line, part)))
        print(f"{len(part):,} records: {folder / name}.jsonl", file=sys.stderr)


def distinct(names: Sequence[str], count: int, seed: int) -> Iterator[Record]:
    """Records of tasks in turn, each with a prompt of its own.

    Raises:
      InputError: a task is unknown, or has too few prompts.
    """
    generators = [tasks.records(name, _TRIES * count, seed) for name in names]
    seen: set[str] = set()
    for name, generator in itertools.islice(itertools.cycle(zip(names, generators, strict=True)), count):
        record = next((record for record in generator if record["prompt"] not in seen), None)
        if record is None:
            raise InputError(f"--tasks: {name} has too few prompts for {count:,} records. Ask for fewer.")
        seen.add(record["prompt"])
        yield record | {"noise": ""}


def spoiled(clean: Sequence[Record], share: float, seed: int) -> list[Record]:
    """The records, of which a share is replaced by noise of each kind, in an order by chance."""
    rng = np.random.default_rng([seed, 1])
    order = rng.permutation(len(clean)).tolist()
    size = round(share * len(clean) / len(KINDS))
    shuffled, copies, foreign = (order[k * size : (k + 1) * size] for k in range(len(KINDS)))
    good = order[len(KINDS) * size :]
    pool = list(clean)
    for i, response in zip(shuffled, _other_answers([clean[i] for i in shuffled], clean, good), strict=True):
        pool[i] = clean[i] | {"response": response, "noise": "shuffled"}
    originals = good[: max(1, size // _COPIES)]
    for i, original in zip(copies, itertools.cycle(originals), strict=False):
        pool[i] = clean[original] | {"noise": "duplicate"}
    for i, record in zip(foreign, _pieces(rng), strict=False):
        pool[i] = record
    return [pool[i] for i in rng.permutation(len(pool)).tolist()]


def _other_answers(records: Sequence[Record], clean: Sequence[Record], good: Sequence[int]) -> Iterator[str]:
    """For each record the answer of one of the good ones, of the same task and wrong for it. Raises InputError where
    there is none."""
    answers = itertools.cycle([clean[i] for i in good])
    for record in records:
        fits = (each for each in itertools.islice(answers, len(good)) if each["task"] == record["task"])
        other = next(
            (
                each["response"]
                for each in fits
                if not tasks.verify(record["task"], record["prompt"], record["response"], each["response"])
            ),
            None,
        )
        if other is None:
            raise InputError(
                f"--noise: leaves no answer of {record['task']} to put elsewhere. Lower it, or raise --pool."
            )
        yield other


def _pieces(rng: np.random.Generator) -> Iterator[Record]:
    """Pieces of English text of 4 to 7 words, endlessly: what stands first asks for the rest."""
    while True:
        for record in stdlib_text.records():
            words = record["text"].split()
            for start in range(0, len(words) - 8, 8):
                if rng.random() < 0.02:
                    cut, stop = (start + int(n) for n in (rng.integers(2, 4), rng.integers(4, 8)))
                    prompt, response = " ".join(words[start:cut]), " ".join(words[cut:stop])
                    yield {"prompt": prompt, "response": response, "noise": "foreign"}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
