"""The table of batch fields: all that is known of a field without any data.

A batch is a dict of arrays. Each field has a row in TABLE, and everything that writes fields down reads it: sources,
a run's abstract trace and plan, the shardings of a batch, and the benchmark's made-up batches. A new kind of data adds
a row here, and something that gives its values: a reader, or a view (research/sources/views/).
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from research.devices import sharding
from research.errors import InputError, did_you_mean

CANDIDATES = 32  # K, where no data says it: what understudy annotate writes by default

Spec = dict[str, jax.ShapeDtypeStruct]


class FakeText:
    """Documents of random tokens in rows. A third of each is its prompt. All draws come from `rng`, in turn.

    Attributes:
      sizes: axis -> size, of the axes that a batch has beside "time".
      vocab_size: tokens are below it.
      rng: what to draw from.
      segment_ids, positions: [B, T] int32, as in a batch; no row has padding.
      loss_mask: [B, T] float32, 0 in prompts.
      last: [B, T] bool, True at the last token of each document.
      tokens, other_tokens: [B, T] int32.
      answers: [B, T] float32, 1 at the tokens of any answer, be it an answer to another prompt.
      unit: [B, T] int32, from 0, the document or the pair of them that a token is of.
      side: [B, T] int32, which of a pair; 0 where documents aren't paired.
    """

    def __init__(
        self, shape: tuple[int, int], sizes: Mapping[str, int], vocab_size: int, seed: int, layout: "FakeLayout"
    ):
        """Args: (B, T); the attributes; a seed; how documents lie in rows."""
        self.sizes, self.vocab_size, self.rng = sizes, vocab_size, np.random.default_rng(seed)
        self.segment_ids, self.positions = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        self.answers, self.last = np.zeros(shape, np.float32), np.zeros(shape, bool)
        for row in range(shape[0]):
            for number, (start, stop) in enumerate(self._documents(shape[1], layout), start=1):
                self.segment_ids[row, start:stop] = number
                self.positions[row, start:stop] = np.arange(stop - start)
                self.answers[row, start + (stop - start) // 3 : stop] = 1
                self.last[row, stop - 1] = True
        self.unit, self.side = np.divmod(self.segment_ids - 1, 2 if layout.paired else 1)
        self.loss_mask = np.where(self.side == 1, 0, self.answers) if layout.mismatched else self.answers
        self.tokens, self.other_tokens = self.rng.integers(0, vocab_size, (2, *shape)).astype(np.int32)

    def _documents(self, seq_len: int, layout: "FakeLayout") -> Iterable[tuple[int, int]]:
        start, least = 0, 4 if layout.paired else 2
        while start < seq_len:
            shortest = max(least, seq_len // 8)
            length = int(self.rng.integers(shortest, max(shortest + 1, seq_len // 2))) if layout.packed else seq_len
            stop = seq_len if seq_len - (start + length) < least else start + length
            if layout.paired:
                yield start, (start + stop) // 2
            yield ((start + stop) // 2 if layout.paired else start), stop
            start = stop

    def drawn(self, number: np.ndarray, draw: Callable[[int], np.ndarray]) -> np.ndarray:
        """[B, T]: for each value of `number` [B, T] in a row one of those that draw(how many) gives."""
        values = draw(number.shape[0] * (int(number.max()) + 1)).reshape(number.shape[0], -1)
        return np.take_along_axis(values, number, axis=1)

    def verdicts(self) -> np.ndarray:
        """[B, T] int32: whether a document is a desirable one, 1 or 0; -1 where it is a mismatched one."""
        values = self.drawn(self.unit, lambda count: self.rng.integers(0, 2, count))
        return np.where(self.side == 1, -1, values)

    def normal(self, number: np.ndarray) -> np.ndarray:
        """[B, T]: for each value of `number` [B, T] in a row a draw from the normal distribution."""
        return self.drawn(number, self.rng.standard_normal)

    def predicted(self, values: np.ndarray) -> np.ndarray:
        """[B, T]: `values` where the next token is one of an answer, else 0."""
        return np.where(np.roll(self.loss_mask, -1, axis=1) * (1 - self.last) > 0, values, 0)

    def labels(self) -> np.ndarray:
        """[B, T, C] float32: one random class at the end of each document."""
        count = self.sizes["labels"]
        classes = self.rng.integers(0, count, self.tokens.shape)
        return np.eye(count, dtype=np.float32)[classes] * self.last[:, :, None]

    def candidates(self) -> np.ndarray:
        """[B, T, K] int32: different tokens at each position."""
        ids = self.other_tokens[:, :, None] + np.arange(self.sizes["candidates"], dtype=np.int32)
        return ids % self.vocab_size

    @functools.cached_property
    def log_probs(self) -> np.ndarray:
        """[B, T, K + 1] float32: of K candidates in falling order, and of all others; together 1."""
        count = self.sizes.get("candidates", CANDIDATES) + 1
        probs = -np.sort(-self.rng.dirichlet(np.ones(count), self.tokens.shape), axis=2)
        return np.log(np.maximum(probs, 1e-9)).astype(np.float32)


class FakeLayout(NamedTuple):
    """How made-up documents lie in rows.

    Attributes:
      packed: rows hold several documents, or pairs; and not one each.
      paired: documents come by twos.
      mismatched: the second of two answers another prompt, and isn't learned.
    """

    packed: bool
    paired: bool = False
    mismatched: bool = False


@dataclasses.dataclass(frozen=True)
class Field:
    """One field of a batch.

    Attributes:
      dtype: of its values.
      axes: names of its axes after the batch axis. "time" is T, and sharded by the rule of that name; the others are
        replicated, and a source says their sizes.
      fill: what stands at padding, and where there is nothing to say.
      fake: FakeText -> plausible values.
      group: the fields of a group come together.
    """

    dtype: Any
    axes: tuple[str, ...]
    fill: float
    fake: Callable[[FakeText], np.ndarray]
    group: str


# "text" is in every batch. "labels": C classes. "annotations": what a teacher said, of its K likeliest tokens.
# "reference": what a reference says of the token that follows, where it is one to be predicted.
# "rollout": of answers that the policy sampled: the advantage of the token that follows, and the log of the probability
# that it was drawn with. "old": the same by the policy as it was before the rollout's first update. "critic": what a
# critic said of the tokens up to here then, and the return that it is to predict. All of "reference", "rollout", "old"
# and "critic" stand where an answer's token is predicted, one before it, and are 0 elsewhere.
# "parallel": the same documents in the tokens of a teacher's own tokenizer. "source": which of data.sources. "virtual":
# 1 at the virtual tokens that the policy's adapter puts in front of each document (models.virtual). "prefix":
# 1 at the first tokens of a document that a prefix LM (ModelConfig.prefix) shows to each other whole.
# "comparisons": answers to one prompt, each a document with the prompt before it, lie side by side in one row, the best
# first: `pair` is the number of the comparison in its row, from 1; `side` the rank of the answer, 0 the best (chosen).
# "margins": by how much the chosen answer of a pair is better, 0 where nobody says it. "preferences": how probably it
# is the better one, 1 where nobody says it. "scores": how good a document is, NaN where nobody says it. "verdicts":
# whether an answer is desirable, 1 or 0; -1 where nobody says it.
# "mismatches": 1 at the tokens of an answer that stands behind another's prompt, where loss_mask is 0.
TABLE: dict[str, Field] = {
    "tokens": Field(np.int32, ("time",), 0, lambda text: text.tokens, "text"),
    "segment_ids": Field(np.int32, ("time",), 0, lambda text: text.segment_ids, "text"),
    "positions": Field(np.int32, ("time",), 0, lambda text: text.positions, "text"),
    "loss_mask": Field(np.float32, ("time",), 0, lambda text: text.loss_mask, "text"),
    "label_probs": Field(np.float32, ("time", "labels"), 0, FakeText.labels, "labels"),
    "teacher_ids": Field(np.int32, ("time", "candidates"), 0, FakeText.candidates, "annotations"),
    "teacher_log_probs": Field(
        np.float32, ("time", "candidates"), -np.inf, lambda text: text.log_probs[:, :, :-1], "annotations"
    ),
    "teacher_rest": Field(np.float32, ("time",), 0, lambda text: text.log_probs[:, :, -1], "annotations"),
    "teacher_tokens": Field(np.int32, ("time",), 0, lambda text: text.other_tokens, "parallel"),
    "teacher_segment_ids": Field(np.int32, ("time",), 0, lambda text: text.segment_ids, "parallel"),
    "teacher_positions": Field(np.int32, ("time",), 0, lambda text: text.positions, "parallel"),
    "teacher_at": Field(
        np.int32, ("time",), -1, lambda text: np.where(text.last, -1, np.arange(text.last.shape[1])), "parallel"
    ),
    "reference_log_prob": Field(
        np.float32, ("time",), 0, lambda text: text.log_probs[:, :, 0] * text.loss_mask, "reference"
    ),
    "advantage": Field(np.float32, ("time",), 0, lambda text: text.predicted(text.normal(text.segment_ids)), "rollout"),
    "sampler_log_prob": Field(
        np.float32, ("time",), 0, lambda text: text.predicted(text.log_probs[:, :, 0]), "rollout"
    ),
    "old_log_prob": Field(np.float32, ("time",), 0, lambda text: text.predicted(text.log_probs[:, :, 0]), "old"),
    "value": Field(np.float32, ("time",), 0, lambda text: text.predicted(text.normal(text.segment_ids)), "critic"),
    "returns": Field(np.float32, ("time",), 0, lambda text: text.predicted(text.normal(text.segment_ids)), "critic"),
    "source": Field(np.int32, ("time",), 0, lambda text: (text.segment_ids - 1) % 2, "source"),
    "virtual": Field(np.int32, ("time",), 0, lambda text: np.zeros_like(text.tokens), "virtual"),
    "prefix": Field(np.int32, ("time",), 0, lambda text: 1 - text.loss_mask, "prefix"),
    "pair": Field(np.int32, ("time",), 0, lambda text: text.unit + 1, "comparisons"),
    "side": Field(np.int32, ("time",), -1, lambda text: text.side, "comparisons"),
    "margin": Field(np.float32, ("time",), 0, lambda text: text.drawn(text.unit, text.rng.random), "margins"),
    "score": Field(
        np.float32, ("time",), np.nan, lambda text: text.drawn(text.segment_ids - 1, text.rng.standard_normal), "scores"
    ),
    "preference": Field(
        np.float32,
        ("time",),
        1,
        lambda text: text.drawn(text.unit, lambda n: text.rng.uniform(0.5, 1, n)),
        "preferences",
    ),
    "desirable": Field(np.int32, ("time",), -1, FakeText.verdicts, "verdicts"),
    "mismatched": Field(np.int32, ("time",), 0, lambda text: text.answers - text.loss_mask, "mismatches"),
}


def find(name: str) -> Field:
    """The row of a field. Raises InputError where there is none; the message names the nearest."""
    if name not in TABLE:
        raise InputError(f"batch field {name!r}: research/sources/fields.py has none.{did_you_mean(name, TABLE)}")
    return TABLE[name]


def group(name: str) -> tuple[str, ...]:
    """The fields of a group, in the table's order."""
    return tuple(field for field, row in TABLE.items() if row.group == name)


def read_with(names: Iterable[str]) -> tuple[str, ...]:
    """The fields of any text, and those that come with any of `names`; in the table's order. Others are left out."""
    groups = {"text"} | {TABLE[name].group for name in names if name in TABLE}
    return tuple(field for field, row in TABLE.items() if row.group in groups)


def spec(names: Iterable[str], batch_size: int, sizes: Mapping[str, int]) -> Spec:
    """Shapes and dtypes of a batch.

    Args:
      names: of its fields.
      batch_size: B.
      sizes: axis -> size: {"time": T, "labels": C, "candidates": K}, as far as the fields have them.

    Raises:
      InputError: the table has no such field, or the size of an axis isn't known.
    """
    shapes = {}
    for name in names:
        axes = find(name).axes
        for axis in axes:
            if not sizes.get(axis):
                raise InputError(f"batch field {name!r}: the size of its axis {axis!r} isn't known without the data.")
        shapes[name] = (batch_size, *(sizes[axis] for axis in axes))
    return {name: jax.ShapeDtypeStruct(shape, TABLE[name].dtype) for name, shape in shapes.items()}


def empty(names: Iterable[str], batch_size: int, sizes: Mapping[str, int]) -> dict[str, np.ndarray]:
    """A batch of padding alone. Args and errors: see `spec`."""
    shapes = spec(names, batch_size, sizes)
    return {name: np.full(x.shape, TABLE[name].fill, x.dtype) for name, x in shapes.items()}


def sizes(spec: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, int]:
    """Axis -> size, as the fields of a batch have them."""
    named = ((axis, n) for name, x in spec.items() for axis, n in zip(find(name).axes, x.shape[1:], strict=True))
    return dict(named)


def fake(
    spec: Mapping[str, jax.ShapeDtypeStruct], vocab_size: int, *, packed: bool = True, seed: int = 0
) -> dict[str, np.ndarray]:
    """A batch without data: random tokens, and everything else as plausible as the table makes it.

    Args:
      spec: name -> shape and dtype; `tokens` is one of them.
      vocab_size: tokens are below it.
      packed: rows hold several documents, or pairs where documents are compared; else each holds one.
      seed: of all that is random.

    Returns:
      name -> array of the spec's shape and dtype.

    Raises:
      InputError: a field isn't in the table.
    """
    layout = FakeLayout(packed, "pair" in spec or "mismatched" in spec, "mismatched" in spec)
    text = FakeText(spec["tokens"].shape, sizes(spec), vocab_size, seed, layout)
    values = {name: np.asarray(row.fake(text), row.dtype) for name, row in TABLE.items() if name in spec}
    return {name: values[name] for name in spec}


def shardings(
    mesh: Mesh | AbstractMesh, spec: Mapping[str, jax.ShapeDtypeStruct], rules: Mapping[str, Any] = sharding.RULES
) -> dict[str, NamedSharding]:
    """Where each field of a batch lies. Raises InputError where the table has no such field."""
    logical = {name: ("batch", *(axis if axis == "time" else None for axis in find(name).axes)) for name in spec}
    return {name: sharding.named(mesh, axes, rules) for name, axes in logical.items()}
