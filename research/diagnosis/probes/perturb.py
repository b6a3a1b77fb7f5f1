"""What predictions change with: later tokens, other documents, the prompt."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from research.diagnosis import trial
from research.diagnosis.probes import loss
from research.diagnosis.probes.types import Measured
from research.diagnosis.subject import Batch, Subject
from research.objectives.types import Forward
from research.run.assemble import Parts

_PAIRED = 48  # examples whose answers are put behind other prompts


def measure(subject: Subject) -> Measured:
    """
    probe/future_leak: by how much last hidden states change where only later tokens are others, the largest change over
      the states' root mean square.
    probe/document_leak: the same where only tokens of other documents of the row are others, later ones left out.
    probe/prompt_matters: by how many nats a token the cross-entropy of answers rises where their prompts' tokens are
      others of the batch; probe/base_prompt_matters: that of the parameters as they were before the first step.
    probe/pairing: by how many nats a token answers are likelier after their own prompts than after other examples';
      probe/base_pairing: that of the parameters as they were.
    """
    policy = subject.models["policy"].config
    if not policy.causal:
        return Measured({})
    batch, params = trial.few_rows(subject, subject.batches[0]), subject.params
    signals = {"probe/future_leak": _future(subject, batch)}
    if (leak := _documents(subject, batch)) is not None:
        signals["probe/document_leak"] = leak
    prompted = any(not each.plain and each.label is None for each in subject.examples)
    if prompted and not policy.num_labels and not subject.config.rewards:
        began = loss.whole_initial(subject)
        signals["probe/pairing"] = _pairing(subject, batch, params)
        signals["probe/base_pairing"] = signals["probe/pairing"] if began is None else _pairing(subject, batch, began)
        signals["probe/prompt_matters"] = _prompts(subject, batch, params)
        signals["probe/base_prompt_matters"] = (
            signals["probe/prompt_matters"] if began is None else _prompts(subject, batch, began)
        )
    return Measured({name: value for name, value in signals.items() if np.isfinite(value)})


def _pairing(subject: Subject, batch: Batch, params: dict) -> float:
    """How much likelier the tokens of answers are after their own prompts than after those of the next examples."""
    chosen = [each for each in subject.examples if each.prompt_tokens.size and each.side <= 0 and not each.plain]
    rows = len(batch["tokens"])
    half, gains = rows // 2, []
    for first in range(0, min(len(chosen) - 1, _PAIRED) if half else 0, max(half, 1)):
        own = chosen[first : first + half]
        others = [chosen[(first + i + 1) % len(chosen)] for i in range(len(own))]
        texts = [(e.prompt_tokens, e.response_tokens) for e in own]
        texts += [(o.prompt_tokens, e.response_tokens) for o, e in zip(others, own, strict=True)]
        made, counted = _rows_of(batch, texts)
        nll = np.asarray(subject.programs.read("policy", params, made, jnp.asarray(subject.tokenizer.stop)).nll)
        total = np.where(counted, nll, 0.0).sum(axis=1, dtype=np.float64)
        same = counted.sum(axis=1)
        for i in range(len(own)):
            j = len(own) + i
            if same[i] == same[j] > 0:
                gains.append((total[j] - total[i], same[i]))
    return float(sum(g for g, _ in gains) / sum(n for _, n in gains)) if gains else float("nan")


def _rows_of(batch: Batch, texts: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[Batch, np.ndarray]:
    """A batch of that shape of a prompt and an answer in each row; and which tokens predict one of an answer."""
    shape = batch["tokens"].shape
    tokens, real, counted = np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.zeros(shape, bool)
    for i, (prompt, answer) in enumerate(texts):
        whole = np.concatenate([prompt, answer])[: shape[1]]
        tokens[i, : len(whole)], real[i, : len(whole)] = whole, 1
        counted[i, len(prompt) - 1 : len(whole) - 1] = True
    place = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
    made = {"tokens": tokens, "segment_ids": real, "positions": place}
    return {**batch, **{name: jax.device_put(x, batch[name].sharding) for name, x in made.items()}}, counted


def hidden(subject: Subject, batch: Batch) -> jax.Array:
    """The policy's last hidden states, [B, T, D] float32."""
    return subject.programs.jit(_hidden)(subject.params, batch)


def _hidden(parts: Parts, params: dict, batch: Batch) -> jax.Array:
    return Forward(parts.models, params, batch).hidden("policy").astype(jnp.float32)


@functools.partial(jax.jit, static_argnums=2)
def _others(batch: Batch, where: jax.Array, size: int) -> Batch:
    """The batch with other tokens at some places: those of another row.

    Args:
      batch: to change.
      where: the places, [B, T].
      size: of the vocabulary.
    """
    tokens = jnp.roll(batch["tokens"], 1, axis=0) if batch["tokens"].shape[0] > 1 else batch["tokens"][:, ::-1]
    tokens = jnp.where(tokens == batch["tokens"], (tokens + 1) % size, tokens)
    return {**batch, "tokens": jnp.where(where, tokens, batch["tokens"])}


@jax.jit
def _apart(a: jax.Array, b: jax.Array, where: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The largest change at some places, and the root mean square of the states."""
    return jnp.max(jnp.where(where[..., None], jnp.abs(a - b), 0.0)), jnp.sqrt(jnp.mean(jnp.square(a)))


def _leak(subject: Subject, batch: Batch, changed: np.ndarray, watched: np.ndarray) -> float:
    """By how much states change at the places that are watched where the tokens at others are changed."""
    other = _others(batch, changed, subject.tokenizer.size)
    apart, size = jax.device_get(_apart(hidden(subject, batch), hidden(subject, other), watched))
    return float(apart / size) if size > 0 else 0.0


def _future(subject: Subject, batch: Batch) -> float:
    half = batch["tokens"].shape[1] // 2
    place, real = np.arange(batch["tokens"].shape[1])[None], np.asarray(batch["segment_ids"]) > 0
    return _leak(subject, batch, (place >= half) & real, (place < half) & real)


def _documents(subject: Subject, batch: Batch) -> float | None:
    """The first document of each row is another; the change in those that follow. None where no row has several."""
    segments = np.asarray(batch["segment_ids"])
    return _leak(subject, batch, segments == 1, segments > 1) if (segments > 1).any() else None


def _prompts(subject: Subject, batch: Batch, params: dict) -> float:
    """How much the cross-entropy of answers rises with other prompts."""
    ends = jnp.asarray(subject.tokenizer.stop, jnp.int32)
    real, mask = np.asarray(batch["segment_ids"]) > 0, np.asarray(batch["loss_mask"]) > 0
    answer = mask & real
    shown = real & ~answer & (np.asarray(batch["positions"]) > 0)
    weights = np.pad(answer[:, 1:], ((0, 0), (0, 1))) & real
    if not weights.any():
        return float("nan")
    changed = {**batch, "tokens": letters(batch, shown)}
    own, other = (np.asarray(subject.programs.read("policy", params, each, ends).nll) for each in (batch, changed))
    return float(np.mean((other - own)[weights], dtype=np.float64))


@jax.jit
def letters(batch: Batch, shown: jax.Array) -> jax.Array:
    """The tokens of the batch, those at some places exchanged by chance, the same each time."""
    flat, mask = batch["tokens"].reshape(-1), shown.reshape(-1)
    chance = jax.random.uniform(jax.random.PRNGKey(0), flat.shape)
    source = jnp.argsort(jnp.where(mask, chance, 2.0))  # places of prompts, in an order by chance, come first
    rank = jnp.cumsum(mask.astype(jnp.int32)) - 1
    return jnp.where(mask, flat[source[jnp.maximum(rank, 0)]], flat).reshape(batch["tokens"].shape)
