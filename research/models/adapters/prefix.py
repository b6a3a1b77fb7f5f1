"""Prefix tuning (arXiv:2101.00190): keys and values in front of every document, in each layer, are trained."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from research.errors import InputError
from research.models import kernels, virtual
from research.models.adapters import p_tuning, prompt
from research.models.adapters.types import Adapter, also_trained
from research.models.specs import Params, Specs
from research.params import ParamSpec
from research.ranges import Count, Size

INITS = ("random", "zero", "text")


def make(
    tokens: Size = 20,
    init: str = "random",
    text: str = "",
    projection: bool = False,
    hidden: Count = 0,
    decay: bool = False,
    also: str = "",
    tokenizer: Any = None,
) -> Adapter:
    """Keys and values that every query of a layer sees, in windows too; positions begin after them.

    Args:
      tokens: P, how many in each layer.
      init: "random": normal with a deviation of 1, as PEFT has it; "zero"; "text": the model's own keys and values of a
        text's tokens, of which the first P are taken, or all again and again.
      text: for init = "text".
      projection: they are computed by a small network from P embeddings (PEFT's PrefixEncoder), and not parameters
        themselves.
      hidden: its hidden units; 0: K * h, as many as an entry has numbers.
      decay: whether weight decay applies to keys, values and kernels.
      also: an expression on whole names of parameters that are trained besides, such as "head" or ".*norm/.*".
      tokenizer: the run's; None where options are only to be checked.

    Raises:
      InputError: a value can't be used.
    """
    ids = prompt.text_ids(init, INITS, text, tokenizer)
    if projection and init != "random":
        raise InputError(f"init = {init!r}: is of keys and values that are trained themselves. Set projection = False.")
    if hidden and not projection:
        raise InputError(f"hidden = {hidden}: is of projection = True. Leave it out.")
    specs = Projected(tokens, hidden, decay).specs if projection else Entries(tokens, init, decay).specs
    own = {"adapter.kind": rf"prefix_encoder/.*|{_OWN}" if projection else _OWN} | also_trained(also)
    begin = Begin(virtual.cyclic(ids, tokens) if ids else []) if init == "text" else None
    return Adapter(specs, own, init=begin, prefix=tokens, merged=merged(tokens))


_OWN = r"layers/attention/prefix/.*"


def merged(tokens: int) -> Adapter:
    """The adapter of a model that is loaded with its prefixes: keys and values, however they were trained."""
    return Adapter(Entries(tokens, "zero", False).specs, {}, prefix=tokens, kind="prefix")


@dataclasses.dataclass(frozen=True)
class Entries:
    """Keys and values that are parameters themselves; see `make`."""

    tokens: int
    init: str
    decay: bool

    def specs(self, specs: Specs) -> Specs:
        """The specs of a model with theirs."""
        L, K, h = _sizes(specs)
        axes = ("layers", "virtual_tokens", "kv_heads", "head_dim")
        begin = jax.nn.initializers.normal(1.0) if self.init == "random" else jax.nn.initializers.zeros
        entry = ParamSpec((L, self.tokens, K, h), axes, begin, ("virtual_tokens",), decays=self.decay)
        return _beside_attention(specs, {"keys": entry, "values": entry})


@dataclasses.dataclass(frozen=True)
class Projected:
    """Keys and values by a small network: its embeddings and first map are of all layers, its second map of each."""

    tokens: int
    hidden: int
    decay: bool

    def specs(self, specs: Specs) -> Specs:
        """The specs of a model with theirs."""
        L, K, h = _sizes(specs)
        E = self.hidden or K * h
        encoder = {
            "embed": prompt.table(self.tokens, K * h, self.decay),
            "inner": p_tuning.affine(K * h, E, self.decay),
        }
        axes, begin = ("layers", "rank", "kv_heads", "head_dim"), prompt.Symmetric(E**-0.5)
        kernel = ParamSpec((L, E, K, h), axes, begin, ("rank",), decays=self.decay)
        bias = ParamSpec((L, K, h), (axes[0], *axes[2:]), begin)
        maps = {
            f"{name}_{part}": spec for name in ("keys", "values") for part, spec in (("kernel", kernel), ("bias", bias))
        }
        return _beside_attention({**specs, "prefix_encoder": encoder}, maps)


def _sizes(specs: Specs) -> tuple[int, int, int]:
    """L, K and h of a model."""
    L, _, K, h = specs["layers"]["attention"]["k"]["kernel"].shape
    return L, K, h


def _beside_attention(specs: Specs, prefix: Specs) -> Specs:
    layers = specs["layers"]
    return {**specs, "layers": {**layers, "attention": {**layers["attention"], "prefix": prefix}}}


@dataclasses.dataclass(frozen=True)
class Begin:
    """Adapter.init of prefixes that begin as the cache of a text.

    Attributes:
      ids: P tokens; [] where they aren't known, as in a plan: prefixes then begin as they are drawn.
    """

    ids: list[int]

    def __call__(self, params: Params, key: jax.Array, model: Any) -> Params:
        """Raises InputError for a model that has no cache."""
        if not self.ids:
            return params
        P, positions = len(self.ids), jnp.arange(len(self.ids), dtype=jnp.int32)
        base = model.unstack(kernels.bare(params))
        mask = (positions[:, None] >= positions[None])[None]
        ids = jnp.asarray(self.ids, jnp.int32)[None]
        _, cache = model.decode(base, ids, positions[None], mask, model.init_cache(1, P), 0)
        keys = jnp.stack([keys[0].transpose(2, 0, 1) for keys, _ in cache])
        values = jnp.stack([values[0].swapaxes(0, 1) for _, values in cache])
        return _beside_attention(params, {"keys": keys, "values": values})
