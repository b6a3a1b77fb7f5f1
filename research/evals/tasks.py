"""Evaluations by name, for the command line and for training.

A task is written KIND[,OPTION=VALUE...]:DATA, where DATA is an entry as in data.path (a .jsonl file, ...):

  perplexity:x.jsonl                           text, prompt + response, messages or tokens; see perplexity.py
  pseudo_perplexity:x.jsonl                    the same, of a model that reads both ways; see pseudo_perplexity.py
  choice:x.jsonl                               question, choices, answer; see multiple_choice.py
  exact_match,verifier=number:x.jsonl          prompt + response or question + answer, or messages; see generation.py
  exact_match,max_new_tokens=16:tasks:reverse  generated, with its verifier
  exact_match,samples=8:tasks:reverse          avg@8 and pass@k of 8 answers to each prompt; see repeated.py
  infill,span=1:x.jsonl                        prefix, middle and suffix, or text; see infill.py
  best_of:x.jsonl                              prompt, right and wrong answers, to a reward model; see best_of.py

Options of all: name (in results; default: that of the file), limit (the first so many records). Of all but infill:
template (default: the model's). Of both perplexities: split=paragraph, with which a blank line ends a record (else a
.txt is cut into documents of 16 KiB). Of exact_match: verifier (see VERIFIERS in sources/verification.py),
max_new_tokens (default: 256, or half of the model's max_length if that is less), batch_size (default: 64), samples (how
many answers each prompt gets; default: 1), temperature (default: 0, and 1 with samples above 1). Of infill: form (see
infill.py), max_new_tokens (default: 8 more than the longest middle has), batch_size (default: 64), and of records with
text: span (how many words are missing: N, or MIN-MAX; default: 1-8) and context (the most words that are shown on
either side; default: 64).
"""

import functools
import itertools
import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from research.errors import InputError, did_you_mean, located
from research.evals import infill
from research.evals.best_of import make_best_of
from research.evals.generation import make_generation
from research.evals.markers import say_markers
from research.evals.multiple_choice import make_multiple_choice, read_question
from research.evals.perplexity import make_record_perplexity
from research.evals.pseudo_perplexity import make_pseudo_perplexity
from research.evals.record_rewards import check_reward_model
from research.evals.scoring import BATCH_TOKENS, ratio_of_sums
from research.models.config import ModelConfig
from research.models.generation import MakeGenerate, make_generate
from research.models.sampling import SamplingConfig
from research.models.transformer import Model
from research.sources import entries, verification
from research.sources import records as records_lib
from research.sources.cache import digest
from research.sources.formats import TEMPLATES
from research.sources.tokenizers import Tokenizer

Record = Mapping[str, Any]
Metrics = dict[str, float]
Answer = Callable[[Any, jax.Array], tuple[Metrics, list[Any]]]  # (params, key) -> (metrics, samples)

SERVED = ("exact_match",)  # kinds of which servers may write the answers

_GENERATED_RECORDS = 1000
_GENERATED_SEED = 0x5EED  # none that training is likely to draw from
_SPLITS = ("paragraph",)
_COMMON = ("name", "template", "limit")
_OPTIONS = {
    "perplexity": (*_COMMON, "split"),
    "pseudo_perplexity": (*_COMMON, "split"),
    "choice": _COMMON,
    "exact_match": (*_COMMON, "verifier", "max_new_tokens", "batch_size", "samples", "temperature"),
    "best_of": _COMMON,
    "infill": ("name", "limit", "form", "max_new_tokens", "batch_size", "span", "context"),
}


class Evaluation(NamedTuple):
    """A task, loaded.

    Attributes:
      name: for its metrics.
      evaluate: (params, key) -> (metrics, samples), under the mesh of the parameters. NAME_stderr among the metrics is
        the standard error of NAME. Samples are NamedTuples, one a record, which str() makes a line of.
    """

    name: str
    evaluate: Answer


def load(
    spec: str,
    model: Model,
    tokenizer: Tokenizer | None,
    template: str,
    *,
    limit: int = 0,
    batch_tokens: int = BATCH_TOKENS,
    make: MakeGenerate = make_generate,
) -> Evaluation:
    """Reads a task's records and makes its evaluation.

    Args:
      spec: see above.
      model: to evaluate.
      tokenizer: of the model; None will do for perplexity of records with tokens.
      template: how prompts are put to the model, where the task doesn't say.
      limit: the first so many records, where the task doesn't say; 0 for all.
      batch_tokens: see scoring.
      make: of what answers prompts, where a task of SERVED asks for that.

    Raises:
      InputError: the task, its file or a record is at fault.
    """
    kind, options, entry = parse(spec)
    template = options.get("template", template)
    check_kind(spec, model.config, f"task {spec}: the model")
    try:
        if tokenizer is None and kind != "perplexity":
            raise InputError("needs text, and the model has no tokenizer.")
        items = _read(spec, entry, _whole(options, "limit", limit, 0), "split" in options)
        say_markers(f"task {spec}", (record for _, record in items), tokenizer)
        name = options.get("name") or _name(entry)
        if kind in ("perplexity", "pseudo_perplexity"):
            make = make_record_perplexity if kind == "perplexity" else make_pseudo_perplexity
            measure = make(model, tokenizer, items, template=template, batch_tokens=batch_tokens)
            return Evaluation(name, lambda params, key: measure(params))
        if kind == "choice":
            records, where = (
                _each(items, lambda record: read_question(record) and record),
                [place for place, _ in items],
            )
            measure = make_multiple_choice(
                model, tokenizer, records, template=template, batch_tokens=batch_tokens, where=where
            )
            return Evaluation(name, lambda params, key: measure(params))
        if kind == "best_of":
            measure = make_best_of(model, tokenizer, items, template=template, batch_tokens=batch_tokens)
            return Evaluation(name, lambda params, key: measure(params))
        if kind == "infill":
            return Evaluation(name, _infill(items, options, model, tokenizer))
        return Evaluation(name, _exact_match(items, options, model, tokenizer, template, make))
    except InputError as error:
        raise InputError(f"task {spec}: {error}") from error


def check_kind(spec: str, config: ModelConfig, name: str) -> None:
    """Raises InputError, calling the model `name`, where a task is of another kind of models."""
    kind = parse(spec)[0]
    if kind == "pseudo_perplexity":
        config.check_masked_language_model(name)
    elif kind == "best_of":
        check_reward_model(config, name)
    elif kind != "infill":  # which asks each kind in its own form
        config.check_language_model(name)


def identity(spec: str) -> dict[str, Any]:
    """What the records of a task are, in a few words: {"records": how many, "content": a hash}.

    Raises:
      InputError: the task, its file or a record is at fault.
    """
    _, options, entry = parse(spec)
    try:
        items = _read(spec, entry, _whole(options, "limit", 0, 0), "split" in options)
    except InputError as error:
        raise InputError(f"task {spec}: {error}") from error
    content = digest(json.dumps(record, sort_keys=True, default=str) for _, record in items)
    return {"records": len(items), "content": content}


def parse(spec: str) -> tuple[str, dict[str, str], str]:
    """Returns (kind, options, data entry) of a task as written. Raises InputError where it can't be understood."""
    head, colon, entry = spec.partition(":")
    kind, *texts = head.split(",")
    if kind not in _OPTIONS:
        raise InputError(f"task {spec}: there is no kind {kind!r}.{did_you_mean(kind, _OPTIONS)}")
    if not colon or not entry:
        raise InputError(f"task {spec}: names no data. Write {head}:x.jsonl.")
    options = {}
    for option in texts:
        name, equals, value = option.partition("=")
        if name not in _OPTIONS[kind]:
            raise InputError(f"task {spec}: {kind} has no option {name!r}.{did_you_mean(name, _OPTIONS[kind])}")
        if not equals or not value:
            raise InputError(f"task {spec}: option {name!r} has no value. Write {name}=VALUE.")
        if name in options:
            raise InputError(f"task {spec}: option {name!r} is there twice. Leave one out.")
        options[name] = value
    choices = {"template": TEMPLATES, "verifier": verification.VERIFIERS, "form": infill.FORMS, "split": _SPLITS}
    for name, known in choices.items():
        if name in options and options[name] not in known:
            raise InputError(f"task {spec}: {name}={options[name]} isn't known.{did_you_mean(options[name], known)}")
    return kind, options, entry


def _whole(options: Mapping[str, str], name: str, default: int, least: int = 1) -> int:
    value = options.get(name, str(default))
    if not value.isdecimal() or int(value) < least:
        raise InputError(f"{name}={value}: must be a whole number, at least {least}.")
    return int(value)


def _temperature(options: Mapping[str, str], samples: int) -> float:
    text = options.get("temperature", "1" if samples > 1 else "0")
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < math.inf:
        raise InputError(f"temperature={text}: must be a number, at least 0.")
    if samples > 1 and not value:
        raise InputError(f"temperature={text}: all {samples} samples of a prompt would be the same. Raise it.")
    return value


def _read(spec: str, entry: str, limit: int, paragraphs: bool = False) -> list[tuple[str, dict[str, Any]]]:
    origin = entries.locate(entry, count=limit or _GENERATED_RECORDS, seed=_GENERATED_SEED)
    entries.say_files(f"task {spec}", origin)
    items = []
    for where, raw in itertools.islice(_paragraphs(origin.read()) if paragraphs else origin.read(), limit or None):
        with located(where):
            items.append((where, records_lib.parse(raw)))
    if not items:
        raise InputError("holds no record. Write one JSON object a line.")
    return items


def _paragraphs(raw_records: Iterator[tuple[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The paragraphs of texts, which blank lines part, a record each. Raises InputError for a record without text."""
    for where, raw in raw_records:
        with located(where):
            text = records_lib.parse(raw).get("text")
            if not isinstance(text, str | bytes):
                raise InputError("has no 'text', and split=paragraph cuts texts. Leave it out.")
            try:
                text = text.decode() if isinstance(text, bytes) else text
            except UnicodeDecodeError as error:
                raise InputError(f"not valid UTF-8 at byte {error.start}. Save the file as UTF-8.") from None
        for number, part in enumerate(filter(None, map(str.strip, re.split(r"\n[ \t\r]*\n", text))), 1):
            yield f"{where}, paragraph {number}", {"text": part}


def _name(entry: str) -> str:
    """x for dir/x.jsonl.gz, reverse_2 for tasks:reverse/2."""
    scheme, colon, rest = entry.partition(":")
    base = (
        rest
        if colon and scheme.isidentifier()
        else re.sub(r"(\.jsonl?|\.txt|\.parquet|\.gz)+$", "", entry.split("/")[-1])
    )
    return re.sub(r"[^\w.-]+", "_", base).strip("_") or "task"


def _each(items: list[tuple[str, Record]], read: Callable[[Record], Record]) -> list[Record]:
    records = []
    for where, record in items:
        with located(where):
            records.append(read(record))
    return records


def _exact_match(items, options, model, tokenizer, template, make) -> Answer:
    verifier = options.get("verifier", "task")

    def read(record: Record) -> Record:
        fields = _renamed(record)
        record = _with_text(record, fields.get("response", "response"))
        turns = records_lib.check(record, records_lib.detect_format(record, fields), fields)
        if turns[-1][0] == records_lib.SHOWN:
            raise InputError(
                "has a last turn of weight 0, and that is the answer to expect. Drop the one or the other."
            )
        if records_lib.calls(turns[-1]):
            raise InputError("has a last turn that calls tools, and no text is right there. Drop the record.")
        if verifier == "number" and verification.last_number(turns[-1][1]) is None:
            raise InputError(f"has no number in its answer {turns[-1][1][:40]!r}. Mend it, or use another verifier.")
        return records_lib.canonical(record, fields)

    default, n = min(256, model.max_length // 2), _whole(options, "samples", 1)
    sampling = SamplingConfig(
        max_new_tokens=_whole(options, "max_new_tokens", default),
        temperature=_temperature(options, n),
        stop_tokens=tokenizer.stop,
    )
    records = _each(items, read)
    answer = make_generation(
        model,
        sampling,
        tokenizer,
        records,
        verify=verification.VERIFIERS[verifier],
        template=template,
        batch_size=min(n * len(records), _whole(options, "batch_size", 64)),
        where=[place for place, _ in items],
        n=n,
        make=make,
    )
    if n > 1:
        return answer
    return functools.partial(_with_errors, answer)


def _with_errors(answer: Answer, params: Any, key: jax.Array) -> tuple[Metrics, list[Any]]:
    """What `answer` gives, with the standard errors of the shares of right samples."""
    metrics, samples = answer(params, key)
    judged = defaultdict(list)
    for sample in samples:
        judged["exact_match"].append(sample.correct)
        judged[f"exact_match/{getattr(sample, 'task', '')}"].append(sample.correct)
    for name, values in judged.items():
        _, error = ratio_of_sums(np.array(values, np.float64), np.ones(len(values)))
        if name in metrics and error is not None:
            metrics[f"{name}_stderr"] = error
    return metrics, samples


def _infill(items: list[tuple[str, Record]], options: Mapping[str, str], model: Model, tokenizer: Tokenizer) -> Answer:
    for name in ("span", "context"):
        if name in options and not any(infill.is_text(record) for _, record in items):
            raise InputError(f"{name}={options[name]}: is of records with text, and these have a middle. Leave it out.")
    drawn = _span(options.get("span")), _whole(options, "context", infill.CONTEXT)
    answer = infill.make_infill(
        model,
        tokenizer,
        *infill.read_gaps(items, *drawn),
        form=options.get("form", "auto"),
        max_new_tokens=_whole(options, "max_new_tokens", 0) if "max_new_tokens" in options else None,
        batch_size=_whole(options, "batch_size", 64),
    )
    return functools.partial(_with_errors, answer)


def _span(text: str | None) -> tuple[int, int]:
    """The fewest and the most words of "N" or "MIN-MAX"."""
    if text is None:
        return infill.SPAN
    least, dash, most = text.partition("-")
    most = most if dash else least
    if not (least.isdecimal() and most.isdecimal() and 1 <= int(least) <= int(most)):
        raise InputError(f"span={text}: must be a number of words, at least 1, or two of them, as in 1-8.")
    return int(least), int(most)


def _renamed(record: Record) -> dict[str, str]:
    """prompt and response -> `question` and `answer`, where the record has these instead."""
    fields = {}
    if "messages" not in record:
        for name, other in (("prompt", "question"), ("response", "answer")):
            if name not in record:
                if other not in record:
                    raise InputError(f"has neither {name!r} nor {other!r}, nor 'messages'. Add one.")
                fields[name] = other
    return fields


def _with_text(record: Record, field: str) -> dict[str, Any]:
    """The record with `field` as text, where it is a number."""
    value = record.get(field)
    return {**record, field: str(value)} if type(value) in (int, float) else dict(record)
