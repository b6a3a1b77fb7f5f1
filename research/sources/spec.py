"""What a config says of its data, and the checks that need no data."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Annotated, Any

from research import ranges
from research.errors import InputError, did_you_mean
from research.options import convert
from research.ranges import Count, Fraction, NotNegative, Range, Size
from research.sources import infilling, mixture, views
from research.sources.formats import TEMPLATES
from research.sources.records import FIELDS, FORMATS, Classes

_CHOICES = {
    "format": ("auto", *FORMATS),
    "template": TEMPLATES,
    "on_bad_record": ("error", "skip"),
}


@dataclasses.dataclass(frozen=True)
class DataSection:
    """What a config says of its data. docs/data.md describes all of it.

    Attributes:
      path: a mixture, its entries parted by commas. `0.7*a.jsonl,0.3*tasks:copy` draws 7 rows of the first
        for 3 of the second; without weights every row comes once an epoch. docs/data.md lists what an entry may
        be.
      sources: the long form of `path`, which is "" then: name -> its fields, as in
        {"code": {"path": "code.jsonl", "weight": 0.5}}. Batches then say which source each token is of.
      eval_path: the same as `path`, without weights, for evaluation; "" holds out a part of the data. What it holds is
        taken out of training; generated records come from another seed.
      eval_fraction: how much of the data to hold out, by a hash of each document or prompt; at least one where
        that is not 0.
      format: "auto" (by the first record's fields), "text", "prompt_response", "messages"; of preferences "preference",
        "ranked" or "unpaired"; or "labelled", which has to be asked for: text with a class, `label`, or the
        probabilities of the classes, `probs`.
      fields: field -> the column that holds it: {"prompt": "question", "response": "answer"}.
      weights: what the weights of a mixture are shares of: "rows" that are drawn, or "tokens" to be trained on, which
        a source with emptier rows then needs more rows for.
      template: how a conversation is written: by the model's own chat template ("model"), "chat", "plain", or "auto",
        the first of these that fits.
      pack: several examples share a row; else each has its own.
      shuffle: a new order each epoch, and chance neighbours within a row; else the order of the data.
      on_bad_record: "error", or "skip" and count.
      on_long: "drop" or "truncate" a conversation longer than seq_len, or answers to one prompt that are longer
        together; what has a label is cut at its beginning, and long texts are always cut into pieces.
      labels: names of the classes in their order, where a label is a name.
      num_classes: C; 0 is as many as the data and `labels` have.
      prompt: what a classifier reads, with {text} where the text goes.
      examples: how many records to generate, for tasks:, preferences:, grammar: and reasoning_gym:.
      max_records: read at most so many records of each entry; 0 reads all.
      select: a file that understudy select has made of the same data: of what is trained on, only the records that it
        keeps are read; "" reads all.
      annotations: a folder that understudy annotate made of the same data; batches then hold what a teacher says.
      cache_dir: where tokens are kept; "" is $UNDERSTUDY_CACHE, else ~/.cache/understudy.
      streaming: the data is read and tokenised while the run trains, and kept nowhere: for what the cache has no room
        for. Entries without weights are read one after the other; docs/data.md says what a stream can't do.
      buffer: with streaming, how many rows are packed together, and come in an order by chance.
      eval_records: with streaming, how many records are held out for evaluation: the first ones of each entry.
    """

    path: str = "builtin:python_docs"
    sources: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    eval_path: str = ""
    eval_fraction: Fraction = 0.05
    format: str = "auto"
    fields: Mapping[str, str] = dataclasses.field(default_factory=dict)
    template: str = "auto"
    weights: str = "rows"
    pack: bool = True
    shuffle: bool = True
    on_bad_record: str = "error"
    on_long: str = "drop"
    labels: tuple[str, ...] = ()
    num_classes: Count = 0
    prompt: str = "{text}"
    examples: Size = 10_000
    max_records: Count = 0
    select: str = ""
    annotations: str = ""
    cache_dir: str = ""
    streaming: bool = False
    buffer: Size = 2048
    eval_records: Count = 0


@dataclasses.dataclass(frozen=True)
class DataSpec(DataSection):
    """What data a run uses, and how long its rows are.

    Attributes:
      seq_len: T, tokens in a row.
      mismatches: behind each answer with a verdict comes its prompt with the answer to another one, since the objective
        reads that.
      keep_records: records are kept beside their tokens, since rewards judge answers by them.
      in_order: examples lie in rows in the order in which they are read, since a selection is a curriculum.
    """

    seq_len: Annotated[int, Range(2)] = 1024
    mismatches: bool = False
    keep_records: bool = False
    in_order: bool = False


@dataclasses.dataclass(frozen=True)
class SourceSpec:
    """One source of data.sources; or an entry of data.path or data.eval_path, read as the data section says.

    Attributes:
      path: one entry, as in data.path; a comma in it is a part of the name.
      weight: rows, or tokens (data.weights), are drawn in proportion to it; 0 where no source has one, and every row
        comes once an epoch.
      eval_path: one entry, for evaluation in place of data.eval_fraction. Where one source has it, all have.
      view: how its documents are seen: {"kind": "truncate", "tokens": 100}; see research/sources/views/. {} leaves
        them as they are.
      format, fields, template, on_bad_record, prompt, examples, max_records, select: as in the data section, which has
        the defaults.
    """

    path: str
    weight: NotNegative = 0.0
    eval_path: str = ""
    view: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    format: str = "auto"
    fields: Mapping[str, str] = dataclasses.field(default_factory=dict)
    template: str = "auto"
    on_bad_record: str = "error"
    prompt: str = "{text}"
    examples: Size = 10_000
    max_records: Count = 0
    select: str = ""


# What a source takes from DataSpec where it doesn't say it itself.
_INHERITED = ("format", "fields", "template", "on_bad_record", "prompt", "examples", "max_records", "select")


@dataclasses.dataclass(frozen=True)
class Entry:
    """One thing to read.

    Attributes:
      name: what the report calls it: the name of the source, or the entry as it was written.
      field: where the config names it, for errors: data.path, data.sources.code.path or the like.
      number: of the source, in the order of `names`; 0 where data.sources names none.
      path: what entries.locate takes.
      options: how to read it.
    """

    name: str
    field: str
    number: int
    path: str
    options: SourceSpec

    def select_field(self, data: DataSpec) -> str:
        """Where the config names the selection of its records."""
        own = "select" in data.sources.get(self.name, {})
        return f"data.sources.{self.name}.select" if own else "data.select"

    def classes(self, data: DataSpec) -> Classes:
        return Classes(tuple(data.labels), self.options.prompt)


def names(data: DataSpec) -> tuple[str, ...]:
    """The names of the sources: those of data.sources in alphabetical order, or the entries of data.path."""
    return tuple(sorted(data.sources)) or tuple(mixture.parse("data.path", data.path)[0])


def entries(data: DataSpec) -> tuple[list[Entry], list[float] | None]:
    """What to train on, and the weights, or None where every row comes once an epoch. See `check` for errors."""
    if not data.sources:
        paths, weights = mixture.parse("data.path", data.path)
        return [Entry(path, "data.path", 0, path, _defaults(data, path)) for path in paths], weights
    specs = source_specs(data)
    read = [
        Entry(name, f"data.sources.{name}.path", i, source.path, source)
        for i, (name, source) in enumerate(specs.items())
    ]
    weights = [source.weight for source in specs.values()]
    return read, weights if any(weights) else None


def eval_entries(data: DataSpec) -> list[Entry]:
    """What to evaluate on; none where a part of the training data is held out. See `check` for errors."""
    if data.eval_path:
        paths, _ = mixture.parse("data.eval_path", data.eval_path)
        return [Entry(path, "data.eval_path", 0, path, _defaults(data, path)) for path in paths]
    specs = source_specs(data)
    return [
        Entry(name, f"data.sources.{name}.eval_path", number, source.eval_path, source)
        for number, (name, source) in enumerate(specs.items())
        if source.eval_path
    ]


def source_specs(data: DataSpec) -> dict[str, SourceSpec]:
    """The sources that data.sources names, in alphabetical order: a ConfigDict doesn't keep another.

    Raises:
      InputError: a field is unknown (the nearest is named) or its value is of another type.
    """
    hints = ranges.hints(SourceSpec)
    specs = {}
    for name, values in sorted(data.sources.items()):
        field = f"data.sources.{name}"
        if not re.fullmatch(r"[\w-]+", name):
            raise InputError(f"data.sources: {name!r} is no name of a source. Use letters, digits, _ and -.")
        if not isinstance(values, Mapping):
            raise InputError(f'{field} = {values!r}: is a mapping, such as {{"path": "a.jsonl", "weight": 0.5}}.')
        for option in values:
            if option not in hints:
                raise InputError(f"{field}.{option}: no such field.{did_you_mean(option, hints)}")
        if not values.get("path"):
            raise InputError(f'{field}.path: is missing. Name a file, or tasks:NAME, as in {{"path": "a.jsonl"}}.')
        inherited = {option: getattr(data, option) for option in _INHERITED}
        default = SourceSpec("", **inherited)
        read = {option: convert(hints[option], value, f"{field}.{option}") for option, value in values.items()}
        specs[name] = dataclasses.replace(default, **read)
    return specs


def needed_tokens(data: DataSpec, tokenizer: Any) -> tuple[str, ...]:
    """The names of the special tokens that the views of the sources need, which the tokenizer may lack."""
    return tuple(
        token
        for name, source in source_specs(data).items()
        if source.view
        for token in views.needed_tokens(source.view, f"data.sources.{name}.view", data.seq_len, tokenizer)
    )


def noted_tokens(data: DataSpec, tokenizer: Any) -> dict[str, str]:
    """The tokens that the views of the sources want to be named in a tokenizer_config.json: field -> token.

    Raises:
      InputError: two views want a field to name different ones.
    """
    noted: dict[str, str] = {}
    for name, source in source_specs(data).items():
        field = f"data.sources.{name}.view"
        for variable, token in views.noted_tokens(source.view, field, tokenizer).items() if source.view else ():
            if noted.setdefault(variable, token) != token:
                raise InputError(
                    f"{field}: makes {token} the {variable}, and another source {noted[variable]}. A model has one: "
                    "give both views the same numbering."
                )
    return noted


def infilling_note(data: DataSpec, tokenizer: Any) -> dict[str, Any]:
    """How the views of the sources teach to fill in; see infilling.make_note."""
    views_of = {name: source.view for name, source in source_specs(data).items() if source.view}
    notes = [views.infilling_note(view, f"data.sources.{name}.view", tokenizer) for name, view in views_of.items()]
    return infilling.merge_notes([note for note in notes if note])


def _defaults(data: DataSpec, path: str) -> SourceSpec:
    return SourceSpec(path, **{option: getattr(data, option) for option in _INHERITED})


def check(data: DataSpec) -> None:
    """Checks values that can't work, whatever the data.

    Raises:
      InputError: naming the field, the value and the remedy.
    """
    _check_values("data", data)
    if data.on_long not in ("drop", "truncate"):
        raise InputError(
            f"data.on_long: {data.on_long!r} is not known.{did_you_mean(data.on_long, ('drop', 'truncate'))}"
        )
    if data.weights not in ("rows", "tokens"):
        raise InputError(
            f"data.weights = {data.weights!r}: is not known.{did_you_mean(data.weights, ('rows', 'tokens'))}"
        )
    if data.num_classes < len(data.labels) and data.num_classes:
        raise InputError(f"data.num_classes: {data.num_classes} is fewer than data.labels names, {len(data.labels)}.")
    for i, label in enumerate(data.labels):
        if label in data.labels[:i]:
            raise InputError(
                f"data.labels = {data.labels}: {label!r} is there twice. Give each class a name of its own."
            )
    if data.sources:
        if data.path:
            raise InputError(
                f"data.path = {data.path!r}, and data.sources names {', '.join(data.sources)}: there can be only one "
                "of them. Set data.path to '', or leave data.sources out."
            )
        _check_sources(data, source_specs(data))
    else:
        mixture.parse("data.path", data.path)
    if data.eval_path and mixture.parse("data.eval_path", data.eval_path)[1]:
        raise InputError(f"data.eval_path: {data.eval_path!r} has weights, but all of it is evaluated. Leave them out.")
    _check_streaming(data)


def _check_streaming(data: DataSpec) -> None:
    """Raises InputError for what a stream can't do, and for what only a stream can."""
    if not data.streaming:
        for name in ("buffer", "eval_records"):
            if (value := getattr(data, name)) != getattr(DataSection, name):
                remedy = "data.eval_fraction" if name == "eval_records" else "data.shuffle"
                raise InputError(
                    f"data.{name} = {value}: is of data.streaming, which is False. Leave it out; see {remedy}."
                )
        return
    if 0 < data.max_records <= data.eval_records:
        raise InputError(
            f"data.eval_records = {data.eval_records}: leaves nothing of data.max_records = {data.max_records} to "
            "train on. Lower it, or raise that."
        )
    labelled = any(entry.options.format == "labelled" for entry in entries(data)[0])
    selected = [entry.select_field(data) for entry in entries(data)[0] if entry.options.select]
    chance = data.eval_fraction not in (0, DataSection.eval_fraction)
    refused = [
        *(
            (field, "it names records by their number. Write those that it keeps into a file of their own")
            for field in selected
        ),
        ("data.annotations" * bool(data.annotations), "they are of tokens that are kept. Run the teacher live"),
        (
            "rewards" * data.keep_records,
            "what they judge by is kept beside the tokens. Give data that the cache has room for",
        ),
        (
            "data.weights = 'tokens'" * (data.weights == "tokens"),
            "how full the rows of a stream are isn't known before. Give weights of rows",
        ),
        (
            "the batch field 'mismatched'" * data.mismatches,
            "answers to other prompts are drawn from all of the data. Choose an objective that doesn't read it",
        ),
        (
            f"data.eval_fraction = {data.eval_fraction}" * chance,
            "no part of a stream is taken by chance. Set data.eval_records, or name data.eval_path",
        ),
        (
            f"data.eval_records = {data.eval_records}" * bool(data.eval_records and eval_entries(data)),
            "what is evaluated has a path of its own. Leave one of them out",
        ),
        (
            "data.format = 'labelled'" * (labelled and not (data.num_classes or data.labels)),
            "how many classes there are isn't known before. Set data.num_classes or data.labels",
        ),
    ]
    for field, why in refused:
        if field:
            raise InputError(f"{field}: doesn't go with data.streaming: {why}, or set data.streaming to False.")


def _check_values(where: str, options: DataSpec | SourceSpec) -> None:
    """Checks the fields that DataSpec and SourceSpec share, and all of their numbers."""
    ranges.check(options, where)
    for name, allowed in _CHOICES.items():
        value = getattr(options, name)
        if value not in allowed:
            raise InputError(f"{where}.{name}: {value!r} is not known.{did_you_mean(str(value), allowed)}")
    for name in options.fields:
        if name not in FIELDS:
            raise InputError(
                f"{where}.fields: there is no field {name!r} to rename a column to.{did_you_mean(name, FIELDS)}"
            )
    if "{text}" not in options.prompt:
        raise InputError(
            f"{where}.prompt: {options.prompt!r} has no {{text}}, which stands for what is to be classified."
        )


def _check_sources(data: DataSpec, specs: Mapping[str, SourceSpec]) -> None:
    for name, source in specs.items():
        _check_values(f"data.sources.{name}", source)
        if "weight" in data.sources[name] and not 0 < source.weight < math.inf:
            raise InputError(f"data.sources.{name}.weight = {source.weight}: must be greater than 0.")
        if source.view:
            views.load(source.view, f"data.sources.{name}.view", data.seq_len)
    _all_or_none("weight", {name: source.weight for name, source in specs.items()})
    _all_or_none("eval_path", {name: source.eval_path for name, source in specs.items()})
    if data.eval_path and (len(specs) > 1 or any(source.eval_path for source in specs.values())):
        raise InputError(
            f"data.eval_path = {data.eval_path!r}: doesn't say of which source it is. Set it to '', and name "
            f"data.sources.{next(iter(specs))}.eval_path and so on."
        )


def _all_or_none(option: str, values: Mapping[str, Any]) -> None:
    has = [name for name, value in values.items() if value]
    lacks = [name for name, value in values.items() if not value]
    if has and lacks:
        raise InputError(
            f"data.sources.{lacks[0]}.{option}: is missing, and data.sources.{has[0]}.{option} = {values[has[0]]!r}. "
            "Give it to all sources or to none."
        )
