"""A run without its data: what is known of its batches, vocabulary and programs before anything is read.

Plans and benchmarks begin with it.
"""

import dataclasses
from typing import Any

import jax

from research import config as config_lib
from research import loading, objectives
from research.config import Config
from research.devices import sharding
from research.errors import InputError
from research.run import assemble, resolve, rollouts
from research.sources import fields, tokenizers, views
from research.sources import spec as spec_lib
from research.sources.tokenizers import TokenizerSpec


@dataclasses.dataclass(frozen=True)
class Described:
    """A run as its config describes it.

    Attributes:
      config: checked, with the architectures of the checkpoints that it names.
      mesh: of its devices, or of some that are only compiled for.
      vocab_size: of the tokenizer.
    """

    config: Config
    mesh: jax.sharding.Mesh
    vocab_size: int

    def assemble(self) -> Any:
        """The run's models and programs: research.run's Parts, with abstract arrays."""
        terms = objectives.load(self.config.objective, sampler=assemble.sampler(self.config, self.vocab_size))
        return assemble.assemble(self.config, terms, self.mesh, batch_spec(self.config), self.vocab_size)


def describe(config: Config, devices: Any = None) -> Described:
    """Finds what the config names, without its data.

    Args:
      config: of any run; roles without init_from have the shape that their section describes.
      devices: to make the mesh of; by default all.

    Raises:
      InputError: the config can't work there.
    """
    devices = jax.devices() if devices is None else devices
    config, bases = resolve.with_checkpoints(config, None, described=True)
    config_lib.check(config, num_devices=len(devices))
    mesh = sharding.make_mesh(dataclasses.asdict(config.mesh), devices)
    config, vocab_size = _with_vocabulary(config, bases.get("policy"))
    return Described(config, mesh, vocab_size)


def _with_vocabulary(config: Config, base: loading.ModelSource | None) -> tuple[Config, int]:
    """The config with rows for what the run adds to a model's tokens; and V of a model that is there, or else the size
    of the tokenizer with its added tokens. No data is read.

    Args:
      config: of the run.
      base: the checkpoint that model.init_from names; None where it names none.
    """
    trained = config.tokenizer.kind == "bpe"
    bytes_only = tokenizers.make_tokenizer(TokenizerSpec("byte"), lambda: iter(()))
    needed = resolve.with_special_tokens(config, bytes_only).size - bytes_only.size
    if config.model.vocab_size and not (base and needed):
        return config, config.model.vocab_size
    if trained:  # it isn't there yet, and has the same special tokens as bytes have
        return config, config.tokenizer.vocab_size + needed
    before = resolve.given_tokenizer(config, base) or tokenizers.make_tokenizer(config.tokenizer, lambda: iter(()))
    tokenizer = resolve.with_special_tokens(config, before)
    config = resolve.with_added_rows(config, base, before, tokenizer)
    return config, config.model.vocab_size or tokenizer.size


def batch_spec(config: Config) -> dict[str, jax.ShapeDtypeStruct]:
    """The fields of a global batch: those of any text, what the objective's terms read, what views give, and of several
    sources which; with rewards those of answers.

    Raises:
      InputError: it depends on the data, which isn't read: of labels, how many classes there are.
    """
    terms = objectives.load(config.objective)
    read = {name for term in terms.values() for name in term.objective.fields}
    spec = config_lib.data_spec(config)
    for entry in (*spec_lib.entries(spec)[0], *spec_lib.eval_entries(spec)):
        if entry.options.view:
            read |= set(views.load(entry.options.view, f"data.sources.{entry.name}.view", config.seq_len).fields)
    if len(config.data.sources) > 1:
        read |= set(fields.group("source"))
    if resolve.virtual_ids(config, config.model.vocab_size or 1):
        read |= set(fields.group("virtual"))
    names = fields.read_with(read)
    classes = config.data.num_classes or config.model.num_labels or len(config.data.labels)
    if "label_probs" in names and not classes:
        raise InputError(
            "data.num_classes = 0: the data isn't read, so how many classes there are isn't known. Set it."
        )
    sizes = {"time": config.seq_len, "labels": classes, "candidates": fields.CANDIDATES}
    return rollouts.batch_spec(config, terms, fields.spec(names, config.batch_size, sizes))
