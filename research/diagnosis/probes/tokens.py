"""Whether tokens mean what the model takes them for."""

import itertools
import json
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research import config as config_lib
from research.diagnosis.probes import loss
from research.diagnosis.probes.types import Measured
from research.diagnosis.subject import Subject
from research.sources import entries
from research.sources import spec as spec_lib

_TEXTS = 64
_FIELDS = ("text", "prompt", "response", "chosen", "rejected")
_FAR = 4.0  # so many times larger or smaller than the others an embedding is that no training has made


def measure(subject: Subject) -> Measured:
    """
    tokens/round_trip: the share of the data's texts that come back from their tokens as they were.
    tokens/unknown: the share of tokens that stand for what the tokenizer doesn't know.
    tokens/double_bos: the share of documents whose first two tokens are both the one that begins a text.
    tokens/end_supervised: the share of answers that end with a token that ends an answer, and have it as a target.
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
    segments, real = batch["segment_ids"], batch["segment_ids"] > 0
    last = real & np.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (0, 1)), constant_values=True)
    fields = {field for term in subject.terms.values() for field in term.objective.fields}
    counted = batch["loss_mask"] > 0 if "loss_mask" in fields or "pair" in fields else real
    answered = last & _of_document(counted, segments)
    if not answered.any():
        return {}
    ends = np.isin(batch["tokens"], list(subject.tokenizer.stop))
    signals = {"tokens/end_supervised": float(np.mean((ends & counted)[answered]))}
    if subject.models["policy"].config.num_labels:
        return signals
    few = loss.few_rows(subject, subject.batches[0])
    stop = jnp.asarray(subject.tokenizer.stop, jnp.int32)
    reading = subject.programs.read("policy", subject.params, few, stop)
    size = len(few["tokens"])
    before = (last & ends)[:size, 1:]
    if before.any():
        values = np.asarray(jax.device_get(reading.end))[:, :-1][before]
        signals["tokens/p_end"] = float(np.exp(np.mean(values)))
    return signals


def _of_document(counted: np.ndarray, segments: np.ndarray) -> np.ndarray:
    """Whether anything of each token's document counts."""
    there = np.zeros(segments.shape, bool)
    for i, (own, numbers) in enumerate(zip(counted, segments, strict=True)):
        there[i] = np.isin(numbers, np.unique(numbers[own]))
    return there


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
