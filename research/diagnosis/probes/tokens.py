"""Whether tokens mean what the model takes them for."""

import itertools
import json
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research import config as config_lib
from research.diagnosis import trial
from research.diagnosis.probes.types import Measured
from research.diagnosis.subject import Subject
from research.sources import entries
from research.sources import spec as spec_lib
from research.sources.tokenizers import Tokenizer

_TEXTS = 64
_FIELDS = ("text", "prompt", "response", "chosen", "rejected")
_FAR = 4.0  # so many times larger or smaller than the others an embedding is that no training has made


def measure(subject: Subject) -> Measured:
    """
    tokens/round_trip: the share of the data's texts that come back from their tokens as they were.
    tokens/unknown: the share of tokens that stand for what the tokenizer doesn't know.
    tokens/double_bos: the share of documents whose first two tokens are both the one that begins a text.
    tokens/end_supervised: the share of answers that end with a token that ends an answer, and have it as a target;
      white space may follow, as a template writes it between turns.
    tokens/p_end: the probability of these tokens where an answer ends, the geometric mean.
    tokens/untrained: the share of the batches' tokens whose embedding is far larger or smaller than others.
    """
    signals: dict[str, float] = {}
    texts = list(itertools.islice(_texts(subject), _TEXTS))
    rows: dict[str, tuple[str, ...]] = {}
    if texts:
        back = [subject.tokenizer.decode(subject.tokenizer.encode(text), skip_special=False) for text in texts]
        lost = [(a, b) for a, b in zip(texts, back, strict=True) if a != b]
        signals["tokens/round_trip"] = 1 - len(lost) / len(texts)
        rows["tokens/round_trip"] = tuple(f"{a[:60]!r} comes back as {b[:60]!r}" for a, b in lost[:3])
    names = ("tokens", "segment_ids", "positions", "loss_mask")
    batches = jax.device_get([{name: batch[name] for name in names} for batch in subject.batches])
    whole = {name: np.concatenate([batch[name] for batch in batches]) for name in names}
    signals |= _of_batches(subject, whole) | _ends(subject, whole) | _untrained(subject, whole)
    return Measured(signals, rows)


def _texts(subject: Subject) -> Iterator[str]:
    """Texts of the data as they are written in its records."""
    config = subject.config
    for entry in spec_lib.entries(config_lib.data_spec(config))[0]:
        origin = entries.locate(entry.path, count=min(entry.options.examples, _TEXTS), seed=config.seed)
        for _, raw in itertools.islice(origin.read(), _TEXTS):
            record = raw if isinstance(raw, dict) else _record(raw)
            for name in _FIELDS:
                if isinstance(text := record.get(name), str) and text:
                    yield text[:2000]


def _record(raw: bytes) -> dict[str, Any]:
    """What a line holds; nothing where it is at fault, which a run says or skips."""
    try:
        value = json.loads(raw)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _of_batches(subject: Subject, batch: dict[str, np.ndarray]) -> dict[str, float]:
    tokenizer, real = subject.tokenizer, batch["segment_ids"] > 0
    signals = {}
    unknown = tokenizer.variables.get("unk_token")
    number = None if unknown is None else tokenizer.backend.token_to_id(unknown)
    if number is not None and real.any() and number not in (tokenizer.eos, tokenizer.bos):
        signals["tokens/unknown"] = float(np.mean(batch["tokens"][real] == number))
    first = (
        real[:, :-1] & (batch["positions"][:, :-1] == 0) & (batch["segment_ids"][:, 1:] == batch["segment_ids"][:, :-1])
    )
    if tokenizer.bos is not None and first.any():
        begins = batch["tokens"] == tokenizer.bos
        signals["tokens/double_bos"] = float(np.mean((begins[:, :-1] & begins[:, 1:])[first]))
    return signals


def _ends(subject: Subject, batch: dict[str, np.ndarray]) -> dict[str, float]:
    """What is told of the ends of answers; nothing where the data is plain text, or answers have yet to be drawn."""
    if subject.config.rewards or not any(not e.plain and e.label is None for e in subject.examples):
        return {}
    real = batch["segment_ids"] > 0
    fields = {field for term in subject.terms.values() for field in term.objective.fields}
    counted = real & (batch["loss_mask"] > 0) if "loss_mask" in fields or "pair" in fields else real
    answers = list(_answers(subject.tokenizer, batch, counted))
    if not answers:
        return {}
    signals = {"tokens/end_supervised": float(np.mean([supervised for _, _, supervised in answers]))}
    if subject.models["policy"].config.num_labels:
        return signals
    few = trial.few_rows(subject, subject.batches[0])
    stop = jnp.asarray(subject.tokenizer.stop, jnp.int32)
    before = [(row, place - 1) for row, place, _ in answers if row < len(few["tokens"]) and place > 0]
    if before:
        reading = subject.programs.read("policy", subject.params, few, stop)
        values = np.asarray(jax.device_get(reading.end))[tuple(np.transpose(before))]
        signals["tokens/p_end"] = float(np.exp(np.mean(values)))
    return signals


def _answers(
    tokenizer: Tokenizer, batch: dict[str, np.ndarray], counted: np.ndarray
) -> Iterator[tuple[int, int, bool]]:
    """(row, place, whether it is a target) of the token that ends the last answer of each document in which something
    counts. The place is -1 where no such token follows what counts."""
    ends = np.isin(batch["tokens"], list(tokenizer.stop))
    for row, segments in enumerate(batch["segment_ids"]):
        for number in np.unique(segments[counted[row]]):
            places = np.flatnonzero(segments == number)
            last = places[counted[row, places]][-1]
            within = places[(places <= last) & ends[row, places] & counted[row, places]]
            if len(within) and not tokenizer.decode(batch["tokens"][row, within[-1] + 1 : last + 1].tolist()).strip():
                yield row, int(within[-1]), True
            else:
                after = places[(places > last) & ends[row, places]]
                yield row, int(after[0]) if len(after) else -1, False


def _untrained(subject: Subject, batch: dict[str, np.ndarray]) -> dict[str, float]:
    if "embed" not in subject.params["policy"]:
        return {}
    norms = np.asarray(jax.device_get(jnp.linalg.norm(subject.params["policy"]["embed"].astype(jnp.float32), axis=1)))
    tokens = batch["tokens"][batch["segment_ids"] > 0]
    tokens = tokens[tokens < len(norms)]
    if not tokens.size:
        return {}
    own = norms[tokens]
    usual = float(np.median(own))
    far = (own > _FAR * usual) | (own < usual / _FAR)
    return {"tokens/untrained": float(np.mean(far))} if usual > 0 else {}
