"""Records with the probabilities that classifiers give their classes, in a file of JSON lines."""

import dataclasses
import functools
import hashlib
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from research import config as config_lib
from research import files, loading, params
from research.errors import InputError
from research.evals.served import Servers
from research.models import transformer
from research.models.adapters import prompt
from research.models.config import ModelConfig
from research.objectives import classes
from research.objectives import types as objective_types
from research.sources import entries, packing, records
from research.sources.formats import describe_markers
from research.sources.rows import Rows
from research.sources.store import Store, open_store

_TOGETHER = 1024  # records: packed into rows together, and written together
_ROWS = 8  # of a batch


class Classifier(NamedTuple):
    """A model and how it reads.

    Attributes:
      name: of the model.
      weights: a checksum of them.
      probs: a batch -> [B, T, C] float32, the probabilities of the classes after each token.
      served: texts -> [N, C], the probabilities after each, by servers in the place of `probs`; None without.
      store: the records, tokenised for it.
      seq_len: of its rows.
      names: of the classes; empty where they have none.
      fields: field -> the column that it has in the records.
      virtual: ids of the tokens that it has in front of every text.
    """

    name: str
    weights: str
    probs: Callable[[dict[str, np.ndarray]], jax.Array]
    store: Store
    seq_len: int
    names: tuple[str, ...]
    fields: Mapping[str, str]
    virtual: range = range(0)
    served: Callable[[Sequence[np.ndarray]], np.ndarray] | None = None


@dataclasses.dataclass(frozen=True)
class Reading:
    """How classifiers are asked for labels. What is None is as in the run that trained the model.

    Attributes:
      step: which checkpoint: a number, or "best"; None is the newest.
      ema: take the moving average of the parameters.
      fields: field -> the column that it has in the records.
      prompt: what the model reads, with {text} in it.
      words: what a language model would go on with, one for each class.
      servers: that have the language model, in the place of the devices here; None without.
    """

    step: int | str | None = None
    ema: bool = False
    fields: Mapping[str, str] | None = None
    prompt: str | None = None
    words: tuple[str, ...] | None = None
    servers: Servers | None = None


def find_records(data: str) -> entries.Origin:
    """Finds the records to label. Raises InputError where there are none."""
    return entries.locate_flag(data, count=10_000)


def open_classifiers(names: Sequence[str], origin: entries.Origin, reading: Reading) -> list[Classifier]:
    """Loads models and tokenises the records for each; all read the columns that the first one reads.

    Raises:
      InputError: a model can't be read or is no classifier, or a record is at fault.
    """
    records.check_columns(reading.fields or {})
    if reading.prompt is not None and "{text}" not in reading.prompt:
        raise InputError(f"--prompt = {reading.prompt}: has no {{text}}, which stands for what is to be classified.")
    places = [os.path.realpath(name) for name in names]
    if reading.servers and len(names) > 1:
        raise InputError(f"--model = {','.join(names)}: servers have one model. Name it alone, or leave --servers out.")
    for i, name in enumerate(names):
        if places[i] in places[:i]:
            raise InputError(f"--model = {','.join(names)}: {name} is there twice, which wouldn't change its labels.")
    classifiers: list[Classifier] = []
    for name in names:
        classifiers.append(_open_classifier(name, origin, reading))
        reading = dataclasses.replace(reading, fields=classifiers[0].fields)
    return classifiers


def _open_classifier(name: str, origin: entries.Origin, reading: Reading) -> Classifier:
    record = files.read_json(Path(name) / "config.json", {}).get("config", {})
    is_run = "objective" in record
    run = config_lib.parse(record) if is_run else config_lib.Config()
    words = reading.words or _trained_words(run)
    check = ModelConfig.check_language_model if words else _check_classifier
    if _trained_words(run):  # it labels by words, whatever it reads
        check = None
    loaded = loading.load_model(name, step=reading.step, ema=reading.ema, check=check)
    if reading.servers and not words:
        raise InputError(
            f"--servers: {name} labels by a head for classes, which servers haven't. Leave --servers out, or name a "
            "language model, and a word for each class in --words."
        )
    ahead = loaded.model.virtual_tokens
    label_tokens = classes.label_tokens(words, loaded.tokenizer, "--words") if words else None
    fields = dict(run.data.fields) if reading.fields is None else dict(reading.fields)
    names = tuple(run.data.labels) or tuple(word.strip() for word in words)
    try:
        store = open_store(
            origin,
            loaded.tokenizer,
            format="labelled",
            fields=fields,
            template=loaded.template,
            on_bad_record="error",
            classes=records.Classes((), reading.prompt or run.data.prompt, known=False),
            cache_dir=run.data.cache_dir,
        )
    except records.BadRecord as error:
        raise error.at("", fields="--fields") from error
    if store.counts["markers"]:
        line = describe_markers(store.counts["markers"], store.counts["records"], store.counts["marker"])
        print(f"--data, read by {name}: {line}", file=sys.stderr)
    served = None
    if reading.servers:
        by_servers = reading.servers.make_classes(loaded.model, label_tokens, loaded.tokenizer.size)
        served = functools.partial(by_servers, loaded.params)
    return Classifier(
        name=name,
        weights=params.checksum(loaded.params),
        probs=functools.partial(_make_probs(loaded.model.config, label_tokens, ahead), loaded.params),
        store=store,
        seq_len=run.seq_len if is_run else min(512, loaded.model.max_length),
        names=names,
        fields=fields,
        virtual=range(loaded.model.config.vocab_size, loaded.model.config.vocab_size + ahead),
        served=served,
    )


def _check_classifier(config: ModelConfig, name: str) -> None:
    """Raises InputError, calling the model `name`, where it has no head for classes."""
    if not config.num_labels:
        raise InputError(
            f"{name}: is {config.kind}, and no classifier. Name a classifier, or of a language model a word for each "
            "class in --words."
        )


def _trained_words(run: config_lib.Config) -> tuple[str, ...]:
    """The words that a run trained a language model to label with."""
    terms = run.objective["terms"].items()
    options = [
        {**(value if isinstance(value, Mapping) else {}), **run.objective.get(name, {})} for name, value in terms
    ]
    return next((tuple(o["words"]) for o in options if o.get("head") == "words"), ())


@functools.lru_cache(maxsize=16)
def _make_probs(config: ModelConfig, label_tokens: tuple[int, ...] | None, ahead: int = 0) -> Callable[..., jax.Array]:
    """One program for all models of a shape, so that labelling with many compiles once. `ahead` counts the virtual
    tokens, whose rows are parameters; prefixes show in the parameters themselves."""
    model = transformer.make_model(config, adapter=prompt.merged(ahead) if ahead else None)

    @jax.jit
    def probs(weights: Any, batch: dict[str, jax.Array]) -> jax.Array:
        forward = objective_types.Forward({"policy": model}, {"policy": weights}, batch)
        return jax.nn.softmax(classes.class_logits(forward, label_tokens))

    return probs


def write_labels(
    classifiers: Sequence[Classifier],
    origin: entries.Origin,
    output: Path,
    *,
    words: tuple[str, ...] | None = None,
    keep: float = 1.0,
    max_records: int = 0,
) -> int:
    """Labels records into `output`, and returns how many: their fields, `probs`, and `gold`, the true class's number.

    A killed run leaves OUTPUT.partial, and the same call goes on from there.

    Args:
      classifiers: their probabilities are averaged.
      origin: of the records.
      output: the file; it is replaced.
      words: those that the classifiers were asked for.
      keep: the share of each predicted class to keep, the most confident ones.
      max_records: label only so many; 0 labels all.

    Raises:
      InputError: probabilities are no numbers, or OUTPUT.partial is the work of another command.
    """
    total = min(len(classifiers[0].store.length), max_records or sys.maxsize)
    _check_true_classes(classifiers[0], origin, total)
    decides = {
        "weights": [classifier.weights for classifier in classifiers],
        "tokens": [hashlib.blake2b(c.store.tokens.tobytes(), digest_size=16).hexdigest() for c in classifiers],
        "words": words,
        "keep": keep,
        "max_records": max_records,
        **({"servers": True} if classifiers[0].served else {}),
    }
    reasons = {"tokens": "--data, --fields or --prompt gives other tokens", "weights": "--model has other weights"}
    reasons |= {name: f"--{name} was {{}}" for name in ("words", "keep", "max_records")}
    with files.ResumableLines(output, decides, reasons) as lines:
        for chunk in _label(classifiers, origin, total, lines.done):
            lines.append(chunk)
        lines.finish(functools.partial(_most_confident, keep) if keep < 1 else None)
    return total


def _label(classifiers: Sequence[Classifier], origin: entries.Origin, total: int, done: int) -> Iterator[list[bytes]]:
    """Lines of labelled records from number `done` on, those that are packed together at a time."""
    raw_records = (records.parse(raw) for _, raw in origin.read())
    names, fields = classifiers[0].names, classifiers[0].fields
    with tqdm.tqdm(total=total, unit=" records", disable=None) as bar:
        for start in range(0, total, _TOGETHER):
            numbers = range(start, min(start + _TOGETHER, total))
            raw = [next(raw_records) for _ in numbers]
            if numbers.stop > done:
                probs = np.mean([probabilities(c, numbers) for c in classifiers], axis=0)
                skip = max(0, done - start)
                yield [_line(*pair, fields, names) for pair in zip(raw[skip:], probs[skip:], strict=True)]
            bar.update(len(numbers))


def probabilities(classifier: Classifier, numbers: range) -> np.ndarray:
    """The probabilities of records by number, [len(numbers), C] float64."""
    store, T, ahead = classifier.store, classifier.seq_len, len(classifier.virtual)
    ends = np.cumsum(store.length)[numbers.start : numbers.stop]
    length = np.minimum(store.length[numbers.start : numbers.stop], T - ahead)
    if classifier.served:
        starts = ends - length
        return classifier.served([store.tokens[a:b] for a, b in zip(starts, ends, strict=True)])
    order, splits = packing.rows_of(length + ahead, T)
    rows = Rows((store,), (ends - length)[order], length[order], splits, T, virtual=classifier.virtual)
    row = np.repeat(np.arange(len(rows)), np.diff(splits))
    taken = length[order] + ahead
    stop = np.cumsum(taken)
    last = stop - (stop - taken)[splits[row]] - 1  # the place in its row of each record's last token
    result = None
    for first in range(0, len(rows), _ROWS):
        number = np.arange(first, first + _ROWS)
        batch = rows.batch(np.where(number < len(rows), number, -1))
        probs = np.asarray(classifier.probs({k: jnp.asarray(v) for k, v in batch.items()}))
        if result is None:
            result = np.zeros((len(numbers), probs.shape[-1]))
        here = range(splits[first], splits[min(first + _ROWS, len(rows))])
        result[order[here]] = probs[row[here] - first, last[here]]
    if not np.isfinite(result).all():
        raise InputError(f"{classifier.name}: gives probabilities that are no numbers. Look at the model's weights.")
    return result


def _label_column(fields: Mapping[str, str]) -> str:
    return fields.get("label", "label")


def _check_true_classes(classifier: Classifier, origin: entries.Origin, total: int) -> None:
    """Raises InputError where a record names its true class, and there is no such one."""
    column = _label_column(classifier.fields)
    for where, raw in itertools.islice(origin.read(), total):
        record = records.parse(raw)
        try:
            if record.get(column) is not None:
                records.label(record, {"label": column}, classifier.names)
        except records.BadRecord as error:
            raise error.at(where) from error


def _line(record: dict[str, Any], probs: np.ndarray, fields: Mapping[str, str], names: Sequence[str]) -> bytes:
    """The record with its probabilities, and its true class where it is known."""
    column = _label_column(fields)
    labelled = {k: v for k, v in record.items() if k not in (column, "probs")}
    if record.get(column) is not None:
        labelled["gold"] = records.label(record, {"label": column}, names)
    labelled["probs"] = [round(float(p), 6) for p in probs / probs.sum()]
    return files.json_line(labelled)


def _most_confident(share: float, lines: list[bytes]) -> list[bytes]:
    """The most confident records of each predicted class, in their order."""
    probs = np.array([json.loads(line)["probs"] for line in lines])
    kept = np.zeros(len(lines), bool)
    for label in range(probs.shape[1]):
        (here,) = np.nonzero(probs.argmax(axis=1) == label)
        best = here[np.argsort(-probs[here].max(axis=1), kind="stable")]
        kept[best[: int(np.ceil(share * len(here)))]] = True
    return [line for line, keep in zip(lines, kept, strict=True) if keep]
