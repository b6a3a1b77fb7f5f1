"""The policy as servers take it: its adapter alone where vLLM can put it beside the model, else the whole model."""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils

from research import files
from research import params as params_lib
from research.errors import InputError
from research.models import added_rows, kernels
from research.models.config import ModelConfig
from research.models.specs import Params, make_specs
from research.models.transformer import Model
from research.ops import quantized
from research.pretrained import peft, save
from research.pretrained.peft.reading import Leaves

_SHARD_BYTES = 5 * 10**9
_FIELD = "rollout.engine = 'vllm'"


@dataclasses.dataclass(frozen=True, eq=False)
class Policy:
    """What must be known of the policy to write it for another program.

    Attributes:
      model: what it computes.
      options: config.adapter: {"kind": ..., option: value}; {} for none.
      origin: the config.json that it began with; {} for a model that began with us.
      base: what it began with, for the record in an adapter's folder.
      frozen_dtype: config.frozen_dtype, what is held of it where it isn't trained.
    """

    model: Model
    options: Mapping[str, Any]
    origin: Mapping[str, Any]
    base: str = ""
    frozen_dtype: str = "auto"

    def check(self) -> None:
        """Raises InputError where vLLM can't compute what the policy does."""
        adapter = self.model.adapter
        if adapter and (adapter.virtual_tokens or adapter.prefix or adapter.merged):
            raise InputError(
                f"adapter.kind = {self.options['kind']!r}: puts something in front of every document, which vLLM can't "
                f"({_FIELD}). Take another kind, such as 'lora', or the engine 'local'."
            )
        if self.model.config.prefix:
            raise InputError(f"model.prefix = True: vLLM reads prompts causally ({_FIELD}). Take the engine 'local'.")
        save.choose(self.config, dict(self.origin))

    @property
    def config(self) -> ModelConfig:
        """Of the model with its adapter merged and its added rows in one matrix."""
        c, adapter = self.model.config, self.model.adapter
        return added_rows.whole(adapter.grown(c) if adapter and adapter.grown else c)

    @property
    def hot(self) -> bool:
        """Whether the adapter can be put beside the model that a server began with: plain or rank-stabilised LoRA of
        the layers' maps, beside kernels that are as they were read, and nothing trained besides."""
        adapter, c = self.model.adapter, self.model.config
        if adapter is None or self.options["kind"] != "lora" or adapter.changes_base or c.added_rows:
            return False
        names = [name for name, _ in params_lib.named_leaves(self.model.specs) if name.endswith("lora/a")]
        return (
            set(adapter.trained) == {"adapter.targets"}
            and not self.options.get("dora")
            and self.frozen_dtype not in quantized.KINDS
            and all(name.startswith(("layers/attention/", "layers/mlp/")) for name in names)
            and not any("router" in name for name in names)
            and not c.num_experts
        )

    def leaves(self, params: Params) -> Leaves:
        """The parameters of the adapter, on the host. Every process calls it."""
        return peft.leaves_of(_on_host(_added(params)), self.model.specs)

    def write_adapter(self, path: Path, leaves: Leaves) -> None:
        """Writes the adapter as a folder of PEFT."""
        family, _ = save.choose(self.config, dict(self.origin))
        trained = peft.Trained("lora", bool(self.options.get("rslora")), leaves, {}, self.base, {})
        peft.write(path, family, self.model.config, trained)

    def whole(self, params: Params) -> Params:
        """The parameters of the model with its adapter merged. Every process calls it."""
        values = params_lib.stacked(params)
        if self.model.adapter or self.model.config.added_rows or quantized.any_in(values):
            values = self._merge(values)
        return _on_host(values)

    def write_whole(self, path: Path, values: Params, dtype: str) -> None:
        """Writes all of the model, as transformers' save_pretrained does, but without the tokenizer.

        Raises:
          InputError: a finite value isn't one in this dtype.
        """
        family, written = save.choose(self.config, dict(self.origin))
        path.mkdir()
        save.save(path, family, self.config, values, lambda name: dtype, _SHARD_BYTES)
        files.write_json(path / "config.json", {**written, "dtype" if "dtype" in written else "torch_dtype": dtype})

    @functools.cached_property
    def _merge(self) -> Any:
        return jax.jit(functools.partial(_merged, self.model.config, self.config))


def _merged(c: ModelConfig, whole: ModelConfig, values: Params) -> Params:
    """A model's parameters with nothing beside or in front of its kernels. Biases that only some maps have are 0 in the
    others."""
    values = kernels.merge(quantized.read_all(values, jnp.float32))
    if c.added_rows:
        values = {name: x for name, x in values.items() if not name.endswith("_added")} | added_rows.join(c, values)
    zeros = params_lib.tree_map(lambda spec: jnp.zeros(spec.shape, spec.dtype), make_specs(whole))
    return params_lib.overlay(zeros, values)


def _added(params: Params) -> Params:
    """What an adapter puts beside kernels."""
    found = {}
    for name, part in params.items():
        if name.removeprefix("embed_") in kernels.ADDED:
            found[name] = part
        elif isinstance(part, Mapping) and (below := _added(part)):
            found[name] = below
    return found


def _on_host(values: Params) -> Params:
    """Arrays that this process can read whole; those of a run of several processes are gathered."""
    if jax.process_count() == 1:
        return values
    return jax.tree.map(lambda x: multihost_utils.process_allgather(x, tiled=True), values)
