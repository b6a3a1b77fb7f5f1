"""Models ready to run, with their tokenizers and adapters."""

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from research import params
from research.devices import sharding
from research.errors import InputError
from research.loading import names
from research.loading.names import BASE
from research.loading.start import Start
from research.loading.types import Base, ModelSource
from research.models import adapters, transformer, virtual
from research.models.config import ModelConfig
from research.sources import formats, tokenizers

_SHOWN = 4  # a message lists at most so many tokens


class LoadedModel(NamedTuple):
    """A model, ready to run. `template` is how prompts are put to it (sources.formats). `tokenizer` is None only where
    `load_model` was told that none is needed, and the model comes with none. `adapters` holds the model with each
    of its adapters, by their names; what these leave as it is they share with `params`."""

    model: transformer.Model
    params: Any
    tokenizer: tokenizers.Tokenizer | None
    template: str
    mesh: jax.sharding.Mesh
    adapters: Mapping[str, "LoadedModel"] = {}

    @property
    def each(self) -> list["LoadedModel"]:
        """The model by itself, and with each of its adapters."""
        return [self, *self.adapters.values()]

    @property
    def max_length(self) -> int:
        """The longest document that it may be given, whatever the adapter."""
        return min(loaded.model.max_length for loaded in self.each)

    def adapter_of(self, request: Any, where: str) -> str:
        """The adapter that a request is for: what its field `adapter` names; of one that names none the only one.

        Args:
          request: a record, or a text, which names none.
          where: the request, for errors.

        Raises:
          InputError: there is no such adapter, or there are several and it names none.
        """
        if not self.adapters:
            return BASE
        name = request.get("adapter") if isinstance(request, Mapping) else None
        known = ", ".join(map(repr, self.adapters))
        if name is None:
            if len(self.adapters) == 1:
                return next(iter(self.adapters))
            raise InputError(
                f'{where}: is for which of the adapters {known}? Name one in a field "adapter", or {BASE!r} for the '
                "model without."
            )
        if name != BASE and name not in self.adapters:
            raise InputError(
                f"{where}: adapter = {name!r}: no such adapter. There are {known}, and {BASE!r} for the model without."
            )
        return name

    def template_for(self, given: str | None) -> str:
        """How prompts are put to the model: as the user says, else as in training. A line on stderr says where that is
        plain though its tokenizer has the marks of a conversation."""
        if given:
            return given
        if self.template == "plain" and self.tokenizer and formats.resolve_template("auto", self.tokenizer) != "plain":
            print("template plain, as in training (--template names another)", file=sys.stderr)
        return self.template

    def beside(self, adapter: str) -> "LoadedModel":
        """The model with an adapter, or by itself for BASE."""
        return self if adapter == BASE else self.adapters[adapter]

    def with_adapter(self) -> "LoadedModel":
        """The model with its only adapter, if it has one.

        Raises:
          InputError: it has several.
        """
        if len(self.adapters) > 1:
            raise InputError("--adapter: came several times, and here the model has one at a time. Give one.")
        return next(iter(self.adapters.values())) if self.adapters else self


def load_model(
    name: str,
    *,
    step: int | str | None = None,
    ema: bool = False,
    mesh: jax.sharding.Mesh | None = None,
    needs_tokenizer: bool = True,
    adapter: Sequence[str] = (),
    check: Callable[[ModelConfig, str], None] | None = ModelConfig.check_language_model,
) -> LoadedModel:
    """Reads a model to run it; kernels are held in the compute dtype.

    Args:
      name, step, ema: see names.find.
      mesh: to lay the parameters out on; by default one device.
      needs_tokenizer: else the model may come without one.
      adapter: adapters for it, see names.name_adapters.
      check: (config, name) -> raises InputError where it is of a kind that won't do, before its parameters are read;
        by default where it doesn't predict the next token. None takes any.

    Raises:
      InputError: there is no such model, it can't be read, it is of another kind, or its tokenizer doesn't fit it.
    """
    source = names.find(name, step=step, ema=ema)
    if check is not None:
        check(source.config, name)
    mesh = mesh or sharding.make_mesh({}, jax.devices()[:1])
    model = transformer.make_model(source.config, source.rules, source.front)
    tokenizer = source.tokenizer() if needs_tokenizer or source.has_tokenizer else None
    if tokenizer is not None:
        check_vocabulary(name, tokenizer, source.config)
    specs = transformer.in_compute_dtype(model)
    values = source.read(specs, params.shardings(specs, mesh, source.rules))
    loaded = LoadedModel(model, values, tokenizer, source.template, mesh)
    folders = names.name_adapters(adapter)
    return loaded._replace(adapters={own: _with_adapter(folder, source, loaded) for own, folder in folders.items()})


def _with_adapter(name: str, source: ModelSource, loaded: LoadedModel) -> LoadedModel:
    """A model with an adapter; what the adapter leaves as it is are the model's own arrays.

    Raises:
      InputError: there is no such adapter, or it is for another model.
    """
    if loaded.model.adapter:
        raise InputError(
            f"--adapter = {name}: {source.name} puts something in front of every document already. Name the model that "
            "it began with."
        )
    saved, values = names.open_adapter(name, source), loaded.params
    with adapters.naming_fields(f"--adapter = {name}"):
        model = transformer.make_model(source.config, source.rules, adapters.load(saved.options))
    specs = transformer.in_compute_dtype(model)
    start = Start("policy", model, 0, Base(source.name, lambda: source), open_adapter=lambda _: saved)
    placements = params.shardings(specs, loaded.mesh, source.rules)
    if model.adapter.init is None or model.adapter.merged:
        values = saved.fill(params.join(values, start.draw_adapter(placements, specs)))
    else:
        values = _sharing(values, start.read(specs, placements))
    if model.adapter.merged is None:
        return loaded._replace(params=values)
    front = transformer.make_model(source.config, source.rules, model.adapter.merged)
    return loaded._replace(model=front, params=virtual.realized(values))


def _sharing(values: Any, own: Any) -> Any:
    """`own` with the arrays of `values` where they are the same."""
    there = dict(params.named_leaves(values))

    def shared(path: tuple, x: jax.Array) -> jax.Array:
        other = there.get(params.path_name(path))
        return x if other is None or not bool(jnp.array_equal(x, other)) else other

    return jax.tree_util.tree_map_with_path(shared, own)


def check_vocabulary(name: str, tokenizer: tokenizers.Tokenizer, c: ModelConfig) -> None:
    """Raises InputError where the tokenizer gives ids that the model has no embedding for."""
    if tokenizer.size > c.vocab_size:
        raise InputError(
            f"{name}: its tokenizer has {tokenizer.size} tokens, and its embedding {c.vocab_size} rows. They don't "
            "belong together: take both from one copy of the model."
        )


def check_reads(field: str, model: ModelSource, tokenizer: tokenizers.Tokenizer) -> None:
    """Raises InputError where a model that is given the ids of `tokenizer` would take them for other tokens.

    A model without a tokenizer is taken at its word if it has an embedding for every id.
    """
    if not model.has_tokenizer:
        return check_vocabulary(f"{field} = {model.name}", tokenizer, model.config)
    own, policy = model.tokenizer().backend.get_vocab(), tokenizer.backend.get_vocab()
    if own == policy:
        return None
    if own.items() < policy.items() and min(i for token, i in policy.items() if token not in own) >= len(own):
        added = sorted(policy.keys() - own.keys(), key=policy.get)
        some = ", ".join(added[:_SHOWN]) + (f" and {len(added) - _SHOWN} more" if len(added) > _SHOWN else "")
        raise InputError(
            f"{field}.init_from = {model.name}: doesn't know {some}, which the policy's tokenizer has beyond its own: "
            "they would be noise to it. Name a model that was trained with them, such as a run that added them."
        )
    token, _ = min(policy.items() - own.items() or own.items() - policy.items(), key=lambda item: item[1])
    known = f"{token!r} is {policy.get(token, 'unknown')} to the policy and {own.get(token, 'unknown')} to it"
    raise InputError(
        f"{field}.init_from = {model.name}: has another tokenizer than the policy, with {len(own)} tokens for "
        f"{len(policy)}: {known}. Give the policy its tokenizer (tokenizer.kind), distil across tokenizers "
        "(objective.distill.kind='uld'), or train on what it writes (understudy generate, then sft)."
    )
