"""What scorers are given: models by name, each loaded once; how these read records; and the files to compare with."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from research import loading, params
from research.errors import InputError
from research.evals import record_scores
from research.evals.record_scores import Item
from research.evals.scorers.types import Chunk, Scorer
from research.evals.scoring import BATCH_TOKENS, Example, encode_records, make_token_scorer
from research.loading import LoadedModel
from research.models.config import ModelConfig
from research.sources import entries
from research.sources.tokenizers import Tokenizer, TokenizerSpec, make_tokenizer

_AT_ONCE = 256  # records of a file to compare with


@dataclasses.dataclass(frozen=True, eq=False)
class Encoder:
    """Makes tokens of records as training does.

    Attributes:
      tokenizer: None will do where all records have tokens.
      template: see sources.formats.
      vocab_size: of the model.
    """

    tokenizer: Tokenizer | None
    template: str
    vocab_size: int

    def encode(self, items: Sequence[Item]) -> list[Example]:
        """The tokens of each record, whole. Raises InputError where one is at fault."""
        return encode_records(
            [(item.where, item.record) for item in items], self.tokenizer, self.template, self.vocab_size
        )

    @functools.cached_property
    def bos(self) -> int | None:
        """The token that begins every text, if there is one."""
        return None if self.tokenizer is None else self.tokenizer.bos


def bytes_encoder() -> Encoder:
    """The encoder of who names no model: a token is a byte."""
    tokenizer = make_tokenizer(TokenizerSpec("byte"), lambda: iter(()))
    return Encoder(tokenizer, "plain", tokenizer.size)


@dataclasses.dataclass(frozen=True, eq=False)
class ScoringModel:
    """A language model that scores.

    Attributes:
      name: of the model.
      loaded: the model.
      encoder: how it reads records.
      on_long: what becomes of a record that is longer than the model; see commands/score.py.
      batch_tokens: see scoring.
    """

    name: str
    loaded: LoadedModel
    encoder: Encoder
    on_long: str = "error"
    batch_tokens: int = BATCH_TOKENS

    @functools.cached_property
    def weights(self) -> str:
        """A checksum of its parameters."""
        return params.checksum(self.loaded.params)

    @property
    def identity(self) -> list[str]:
        return [self.weights, self.on_long]

    def examples(self, chunk: Chunk) -> list[Example]:
        """The records' tokens, as far as the model takes them. Raises InputError where one is too long."""
        longest = self.loaded.model.max_length
        return [
            record_scores.shorten(item.where, example, longest, self.on_long)
            for item, example in zip(chunk.items, chunk.encoded[self.encoder], strict=True)
        ]

    def log_probs(self, chunk: Chunk) -> list[np.ndarray]:
        """The log-probabilities of each record's scored tokens, [count] float32; once for all scorers."""
        if (self, "log_probs") not in chunk.shared:
            chunk.shared[self, "log_probs"] = self.log_probs_of(self.examples(chunk))
        return chunk.shared[self, "log_probs"]

    def log_probs_of(self, examples: Sequence[Example]) -> list[np.ndarray]:
        """The log-probabilities of the scored tokens of sequences, [count] float32 of each."""
        with jax.set_mesh(self.loaded.mesh):
            return self._score(self.loaded.params, examples)

    @functools.cached_property
    def _score(self) -> Callable[..., list[np.ndarray]]:
        return make_token_scorer(self.loaded.model, batch_tokens=self.batch_tokens)


@dataclasses.dataclass(frozen=True, eq=False)
class ModelScorer(Scorer):
    """A scorer by one model, whose tokens it reads.

    Attributes:
      model: that scores.
    """

    model: ScoringModel

    @property
    def encoder(self) -> Encoder:
        return self.model.encoder

    @property
    def identity(self) -> Any:
        return self.model.identity

    def observe(self, chunk: Chunk) -> None:
        self.model.examples(chunk)


def losses(log_probs: Sequence[np.ndarray]) -> np.ndarray:
    """Nats per token of each record, [N] float64: the mean of -log p."""
    return np.array([-np.mean(each, dtype=np.float64) for each in log_probs])


@dataclasses.dataclass(frozen=True, eq=False)
class Inputs:
    """What a command was told, for its scorers.

    Attributes:
      origin: of the records that are scored.
      load: (name, whether it is the command's own --model, check) -> a model, ready to run; see
        loading.load_model for `check`.
      mesh: where they lie.
      model, reference, target, eval_data: the flags of these names; "" where they aren't given.
      template: how records are put to models; None for each one's own.
      on_long, batch_tokens: see ScoringModel.
    """

    origin: entries.Origin
    load: Callable[..., LoadedModel]
    mesh: jax.sharding.Mesh
    model: str = ""
    reference: str = ""
    target: str = ""
    eval_data: str = ""
    template: str | None = None
    on_long: str = "error"
    batch_tokens: int = BATCH_TOKENS
    _models: dict[str, ScoringModel] = dataclasses.field(default_factory=dict)

    def name(self, flag: str, own: str, scorer: str) -> str:
        """What a scorer reads: what its own option says, else what the flag of that name does.

        Raises:
          InputError: neither says it.
        """
        if name := own or getattr(self, flag):
            return name
        raise InputError(f"--{flag}: is missing. The scorer {scorer} needs it.")

    def scoring_model(self, name: str) -> ScoringModel:
        """A language model by name; who asks for it again gets the same."""
        if name not in self._models:
            loaded = self.load(name, name == self.model, ModelConfig.check_language_model).with_adapter()
            self._models[name] = ScoringModel(name, loaded, self._encoder(loaded), self.on_long, self.batch_tokens)
        return self._models[name]

    def _encoder(self, loaded: LoadedModel) -> Encoder:
        return Encoder(loaded.tokenizer, loaded.template_for(self.template), loaded.model.config.vocab_size)

    def counting_encoder(self) -> Encoder:
        """What counts the tokens of records: that of --model, whose parameters need not be read for it; else bytes."""
        if self.model in self._models:
            return self._models[self.model].encoder
        if not self.model:
            return bytes_encoder()
        source = loading.find(self.model)
        tokenizer = source.tokenizer() if source.has_tokenizer else None
        return Encoder(tokenizer, self.template or source.template, source.config.vocab_size)

    def records(self, entry: str, flag: str) -> "Compared":
        """The records of another file. Raises InputError where there is no such file."""
        return Compared(entry, flag, _locate(entry, flag))


def _locate(entry: str, flag: str) -> entries.Origin:
    try:
        origin = entries.locate(entry, count=0, seed=0)
    except InputError as error:
        raise InputError(f"{flag}: {error}") from error
    if origin.generated:
        raise InputError(f"{flag} = {entry}: is generated. Give a file.")
    return origin


@dataclasses.dataclass(frozen=True)
class Compared:
    """Records of another file, with which those that are scored are compared.

    Attributes:
      name: of the file.
      flag: what names it.
      origin: of the records.
    """

    name: str
    flag: str
    origin: entries.Origin

    @property
    def identity(self) -> Any:
        return self.origin.identity

    def chunks(self, encoder: Encoder | None = None) -> Any:
        """The records in order, some at a time, with their tokens where an encoder is given.

        Raises:
          InputError: one is at fault, or there is none.
        """
        first = 0
        for items in record_scores.read_chunks(self.origin, (), _AT_ONCE):
            yield Chunk(first, items, {} if encoder is None else {encoder: encoder.encode(items)})
            first += len(items)
        if not first:
            raise InputError(f"{self.flag} = {self.name}: holds no record. Write one JSON object a line.")
