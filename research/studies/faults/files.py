"""Writes the data of a study of planted faults: what healthy runs learn from, and data with a fault each.

DIR gets files of records; those of tasks and preferences are generated, texts are of Python's library. The two parts of
the study, dev and test, have other tasks, texts and seeds.

  text.jsonl, before.jsonl       texts to learn from, and others that models have learned from before
  sorted.jsonl, other.jsonl      the texts of text.jsonl in an order, and texts of another kind
  tasks.jsonl, eval.jsonl        prompts with answers, and held-out ones
  known.jsonl                    prompts that models have learned to answer before
  conflicts, duplicates, shuffled, constant, empty, long, few, tiny_eval, near_eval
                                 tasks.jsonl or eval.jsonl with a fault
  pairs.jsonl, pairs_eval.jsonl  preferences
  same, longer, shorter, chance  pairs.jsonl with a fault
  never.jsonl                    tasks.jsonl with answers that no model gives
  permuted/, lower/              tokenizers: bytes with other ids, and without capitals
"""

import itertools
import json
import pathlib
import random
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from research import cli, files
from research.cli import Flag
from research.sources import preferences, stdlib_text, tasks
from research.sources.tokenizers import TokenizerSpec
from research.sources.tokenizers.making import make_tokenizer
from research.sources.tokenizers.tokenizer import byte_chars

PARTS = ("dev", "test")
# Tasks that models know before, and those that the runs learn; other words and longer ones.
KNOWN = {"dev": ("copy/1", "upper/1", "reverse/1"), "test": ("copy/1", "upper/1", "sort_letters/1")}
LEARNED = {"dev": ("copy/2", "upper/2", "reverse/2"), "test": ("copy/2", "upper/2", "sort_letters/2")}
_SEEDS = {"dev": 1, "test": 2}
_RECORDS, _HELD_OUT, _TEXTS = 1500, 200, 300

Record = dict[str, Any]

COMMAND = cli.Command(
    "faults.files",
    __doc__,
    flags=(
        Flag("output", "the folder of the files; it may exist", metavar="DIR", parse=cli.path, required=True),
        Flag("part", "of the study: dev or test", metavar="PART", parse=cli.one_of(*PARTS), required=True),
    ),
    examples=("python -m research.studies.faults.files --part=dev --output=data/dev",),
)


def main(argv: Sequence[str]) -> int:
    return COMMAND.run(argv, _write)


def _write(args: SimpleNamespace) -> None:
    folder, part = Path(args.output), args.part
    files.check_folder(args.output, "--output")
    folder.mkdir(parents=True, exist_ok=True)
    for name, records in contents(part).items():
        files.write_bytes(folder / f"{name}.jsonl", b"".join(map(files.json_line, records)))
    write_tokenizers(folder, _SEEDS[part])


def contents(part: str) -> dict[str, list[Record]]:
    """File -> its records."""
    seed = _SEEDS[part]
    docs, sources = texts(stdlib_text.records()), texts(source_files())
    before, text = (sources, docs) if part == "dev" else (docs, sources)
    learned = answers(LEARNED[part], _RECORDS + _HELD_OUT, seed)
    train, held_out = learned[:_RECORDS], learned[_RECORDS:]
    rng = random.Random(f"faults/{part}")
    pairs = list(itertools.islice(preferences.records("reverse/1", _RECORDS + _HELD_OUT, seed), _RECORDS + _HELD_OUT))
    return {
        "text": text,
        "before": before,
        "other": list(figures(rng, 60)),
        "sorted": sorted(text, key=lambda record: _letters(record["text"])),
        "tasks": train,
        "eval": held_out,
        "known": answers(KNOWN[part], 3000, seed + 10),
        "conflicts": list(conflicts(train, rng)),
        "duplicates": [record for record in train[:40] for _ in range(40)],
        "shuffled": list(shuffled(train, rng)),
        "constant": [{**record, "response": "yes"} if rng.random() < 0.95 else record for record in train],
        "empty": [{**record, "response": "\u200b"} if rng.random() < 0.6 else record for record in train],
        "long": [{**record, "response": " ".join([record["response"]] * rng.randint(2, 30))} for record in train],
        "few": train[:100],
        "tiny_eval": held_out[:3],
        "near_eval": [{**record, "prompt": record["prompt"].replace(" ", "  ")} for record in train[:_HELD_OUT]],
        "pairs": pairs[:_RECORDS],
        "pairs_eval": pairs[_RECORDS:],
        "same": [{**pair, "rejected": pair["chosen"]} for pair in pairs[:_RECORDS]],
        "longer": [_by_length(pair, longest=True) for pair in pairs[:_RECORDS]],
        "shorter": [_by_length(pair, longest=False) for pair in pairs[:_RECORDS]],
        "chance": [_exchanged(pair) if rng.random() < 0.5 else pair for pair in pairs[:_RECORDS]],
        "never": [{**record, "task": "", "response": "@" * 9} for record in train],
    }


def answers(names: Sequence[str], count: int, seed: int) -> list[Record]:
    """Records of tasks in turn, each prompt once."""
    generators = itertools.cycle([tasks.records(name, 20 * count, seed) for name in names])
    seen: set[str] = set()
    records: list[Record] = []
    while len(records) < count:
        record = next(next(generators))
        if record["prompt"] not in seen:
            seen.add(record["prompt"])
            records.append(record)
    return records


def conflicts(records: Sequence[Record], rng: random.Random) -> Iterator[Record]:
    """Few prompts, each with answers of many others."""
    prompts = [record["prompt"] for record in records[:30]]
    for record in records:
        yield {"prompt": rng.choice(prompts), "response": record["response"]}


def shuffled(records: Sequence[Record], rng: random.Random) -> Iterator[Record]:
    """Each prompt with the answer of another one."""
    responses = [record["response"] for record in records]
    rng.shuffle(responses)
    for record, response in zip(records, responses, strict=True):
        yield {"prompt": record["prompt"], "response": response}


def figures(rng: random.Random, count: int) -> Iterator[Record]:
    """Texts of figures alone."""
    for _ in range(count):
        yield {"text": " ".join(str(rng.randrange(10**6)) for _ in range(120))}


def texts(records: Iterable[Record], count: int = _TEXTS, most: int = 3000) -> list[Record]:
    """The beginnings of the first texts."""
    return [{"text": record["text"][:most]} for record in itertools.islice(records, count)]


def source_files() -> Iterator[Record]:
    """The library's modules, as they are written, in a fixed order."""
    library = pathlib.Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.glob("*.py")) + sorted(library.glob("[a-z]*/*.py")):
        text = path.read_text(encoding="utf-8", errors="ignore")
        if len(text) >= stdlib_text.MIN_CHARACTERS:
            yield {"text": text}


def write_tokenizers(folder: Path, seed: int) -> None:
    """Bytes with their ids exchanged, and bytes without capitals, each in a folder of its own."""
    plain = make_tokenizer(TokenizerSpec(kind="byte"), lambda: iter(()))
    for name, change in (("permuted", permuted(seed)), ("lower", lower)):
        (folder / name).mkdir(parents=True, exist_ok=True)
        plain.save(folder / name)
        path = folder / name / "tokenizer.json"
        files.write_json(path, change(json.loads(path.read_text(encoding="utf-8"))))


def permuted(seed: int) -> Callable[[Record], Record]:
    """Exchanges the ids of a tokenizer.json."""

    def change(values: Record) -> Record:
        ids = list(range(256))
        random.Random(seed).shuffle(ids)
        vocabulary = {token: ids[i] if i < 256 else i for token, i in values["model"]["vocab"].items()}
        return {**values, "model": {**values["model"], "vocab": vocabulary}}

    return change


def lower(values: Record) -> Record:
    """Has a tokenizer.json put all letters into lower case. Two ids that no text has are exchanged too, since ids
    that are the bytes are read without the normalizer."""
    vocabulary = dict(values["model"]["vocab"])
    first, second = byte_chars()[:2]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    return {**values, "normalizer": {"type": "Lowercase"}, "model": {**values["model"], "vocab": vocabulary}}


def _by_length(pair: Record, longest: bool) -> Record:
    """The pair with its longer or shorter answer as the preferred one."""
    return _exchanged(pair) if (len(pair["chosen"]) > len(pair["rejected"])) != longest else pair


def _exchanged(pair: Record) -> Record:
    return {**pair, "chosen": pair["rejected"], "rejected": pair["chosen"]}


def _letters(text: str) -> float:
    """The share of letters in lower case."""
    return sum(letter.islower() for letter in text) / max(len(text), 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
