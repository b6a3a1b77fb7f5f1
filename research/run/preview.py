"""The first rows that a run would train on, as people read them."""

import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from research import files, progress
from research.config import Config
from research.objectives.terms import Terms
from research.run import resolve
from research.sources import dataset, shown
from research.sources.types import Source

FILE = "preview.json"
_WRITTEN = 2  # rows that a run leaves of its first batch
_LONGEST = 200_000  # letters of these


@dataclasses.dataclass(frozen=True)
class Preview:
    """What there is to see of a run's data.

    Attributes:
      title: which rows they are.
      rows: of them.
      facts: lines about the whole: what is learned, how long an epoch is.
      lengths: see sources.shown.lengths.
    """

    title: str
    rows: Sequence[shown.Row]
    facts: Sequence[str]
    lengths: Sequence[Mapping[str, Any]]


def preview(config: Config, *, rows: int, step: int = 1, held_out: bool = False) -> Preview:
    """Reads a run's data and makes a batch of it.

    Args:
      config: of the run.
      rows: at most so many of the batch are shown.
      step: the batch of which step, from 1.
      held_out: rows of the held-out data instead.

    Raises:
      InputError: what the config names can't be used, as for the run.
    """
    with tempfile.TemporaryDirectory() as folder:
        inputs = resolve.resolve(config, f"{folder}/run")
    return of(inputs, rows=rows, step=step, held_out=held_out)


def write(inputs: resolve.Inputs, workdir: str) -> None:
    """Leaves the first rows in WORKDIR/preview.json, for the report. Where a term hides tokens, rows are as they were
    before: to hide them takes a program that isn't worth compiling here."""
    seen = of(inputs, rows=_WRITTEN, hiding=False)
    if seen.rows and sum(len(span.text) for row in seen.rows for d in row.documents for span in d.spans) < _LONGEST:
        files.write_json(Path(workdir) / FILE, dataclasses.asdict(seen), indent=None)


def of(inputs: resolve.Inputs, *, rows: int, step: int = 1, held_out: bool = False, hiding: bool = True) -> Preview:
    """The preview of a run whose data was read; see `preview`. `hiding`: what terms hide is hidden."""
    config, data = inputs.config, inputs.data
    if held_out:
        count = min(rows, len(data.held_out))
        numbers, title = np.arange(count), f"rows 1 to {count} of {len(data.held_out):,} held out"
        batch = data.held_out.batch(numbers)
    else:
        source = dataset.source_of(data, batch_size=config.batch_size, seed=config.seed, shuffle=config.data.shuffle)
        count = min(rows, config.batch_size)
        batch = _batch(source, step, config.batch_size, bool(data.streams))
        batch = {name: value[:count] for name, value in batch.items()}
        title = f"step {step}: {count} of {config.batch_size} rows of {config.seq_len:,} tokens"
    progress.say("reading rows")
    learned, read = what_is_learned(config, inputs.terms, batch, sorted(config.data.sources), hiding)
    seen = shown.rows(batch, learned, data.tokenizer, data.source_names, read)
    stores = [store for each, _ in data.train for store in each.stores]
    names = [source["name"] for source in data.report["sources"][: len(stores)]]
    room = config.seq_len - len(data.train[0][0].virtual)
    return Preview(title, seen, facts(inputs), shown.lengths(names, stores, room, config.data.on_long))


def _batch(source: Source, step: int, batch_size: int, streamed: bool) -> dict[str, np.ndarray]:
    """The batch of a step, from 1. What is streamed is read up to there."""
    if not streamed:
        return source.next({"row": (step - 1) * batch_size})[0]
    state = source.init()
    for _ in range(step):
        batch, state = source.next(state)
    return batch


def what_is_learned(
    config: Config, terms: Terms, batch: Mapping[str, np.ndarray], sources: Sequence[str], hiding: bool = True
) -> tuple[np.ndarray, np.ndarray | None]:
    """[B, T] bool, the tokens of a batch that any term predicts; and what the model reads in their place, where a term
    hides some. With rewards nothing of the data is learned."""
    learned, read = np.zeros(batch["tokens"].shape, bool), None
    if config.rewards:
        return learned, read
    fields = {name: jax.numpy.asarray(value) for name, value in batch.items()}
    for term in terms.values():
        own = {name: np.asarray(value) for name, value in term.view(fields, sources).items()}
        real = own["segment_ids"] > 0
        if "label_probs" in term.objective.fields:
            learned |= real & (own["label_probs"].sum(-1) > 0)
        elif term.objective.hides is not None and hiding:
            keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.PRNGKey(config.seed), np.arange(len(learned)))
            tokens, chosen = term.objective.hides({name: jax.numpy.asarray(x) for name, x in own.items()}, keys)
            learned |= np.asarray(chosen) > 0
            read = np.where(np.asarray(chosen) > 0, np.asarray(tokens), batch["tokens"] if read is None else read)
        elif {"loss_mask", "pair", "desirable", "score"} & set(term.objective.fields):
            learned |= real & (own["loss_mask"] > 0)
        else:
            learned |= real & (own["positions"] > 0)
    return learned & (batch["positions"] > 0) if read is None else learned, read


def facts(inputs: resolve.Inputs) -> list[str]:
    """Lines about the whole of the data."""
    config, counts = inputs.config, inputs.data.report["train"]
    learned = counts["supervised_tokens"] / max(counts["tokens"], 1)
    streamed = "streamed; the first blocks: " if inputs.data.streams else ""
    lines = [
        f"{streamed}{counts['examples']:,} examples in {counts['rows']:,} rows, of which "
        f"{counts['packing_efficiency']:.1%} is text; {learned:.1%} of the tokens can be learned"
    ]
    if config.rewards:
        lines.append("with rewards the policy answers the prompts of the data itself: nothing of these rows is learned")
    elif len(inputs.data.train) == 1 and not inputs.data.streams:
        steps = counts["rows"] / config.batch_size
        epochs = config.steps / steps if steps else 0.0
        lines.append(
            f"an epoch is {steps:,.1f} steps of {config.batch_size} rows; {config.steps:,} steps are {epochs:.2f}"
        )
    return lines
