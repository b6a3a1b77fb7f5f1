"""Prompt tuning (arXiv:2104.08691): P virtual tokens in front of every document, whose embeddings are trained."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from research.errors import InputError, did_you_mean
from research.models import added_rows, virtual
from research.models.adapters.types import Adapter, also_trained
from research.models.specs import Params, Specs
from research.params import ParamSpec
from research.ranges import Size

INITS = ("random", "text", "vocabulary")


def make(
    tokens: Size = 20, init: str = "random", text: str = "", decay: bool = False, also: str = "", tokenizer: Any = None
) -> Adapter:
    """Virtual tokens with embeddings of their own.

    Args:
      tokens: P, how many.
      init: "random": normal with a deviation of 1, as PEFT has it; "text": the embeddings of a text's tokens, of which
        the first P are taken, or all again and again (PEFT's rule); "vocabulary": those of random tokens.
      text: for init = "text".
      decay: whether weight decay applies to them.
      also: an expression on whole names of parameters that are trained besides, such as "head" or ".*norm/.*".
      tokenizer: the run's; None where options are only to be checked.

    Raises:
      InputError: a value can't be used.
    """
    ids = text_ids(init, INITS, text, tokenizer)
    begin = Begin(init, tokens, ids, None if tokenizer is None else tokenizer.size)
    return Adapter(
        plain(tokens, decay),
        {"adapter.kind": r"prompt/rows"} | also_trained(also),
        init=None if init == "random" else begin,
        virtual_tokens=tokens,
        merged=merged(tokens),
    )


def text_ids(init: str, inits: tuple[str, ...], text: str, tokenizer: Any) -> list[int]:
    """The ids of `text`; [] without a tokenizer, and where it isn't asked for.

    Raises:
      InputError: there is no such init, it goes without the text, or with one that has no tokens.
    """
    if init not in inits:
        raise InputError(f"init = {init!r}: no such choice.{did_you_mean(init, inits)}")
    if init != "text" and text:
        raise InputError(f"text = {text!r}: is of init = 'text'. Leave it out, or set init.")
    if init == "text" and not text:
        raise InputError("text = '': init = 'text' begins with one. Give it.")
    if init != "text" or tokenizer is None:
        return []
    ids = tokenizer.encode(text)
    if not ids:
        raise InputError(f"text = {text!r}: has no tokens. Give another.")
    return ids


def merged(tokens: int) -> Adapter:
    """The adapter of a model that is loaded with its virtual tokens: their rows, however they were trained."""
    return Adapter(plain(tokens), {}, virtual_tokens=tokens, kind="prompt")


def plain(tokens: int, decay: bool = False) -> Callable[[Specs], Specs]:
    """Adapter.specs of rows that are parameters themselves."""
    return Rows(tokens, decay).specs


@dataclasses.dataclass(frozen=True)
class Rows:
    """See `plain`."""

    tokens: int
    decay: bool

    def specs(self, specs: Specs) -> Specs:
        return {**specs, "prompt": {"rows": table(self.tokens, specs["embed"].shape[1], self.decay)}}


def table(tokens: int, width: int, decay: bool) -> ParamSpec:
    """The spec of P rows, which begin as those of torch's Embedding."""
    axes = ("virtual_tokens", "embed_replicated")
    return ParamSpec((tokens, width), axes, jax.nn.initializers.normal(1.0), axes[:1], decays=decay)


@dataclasses.dataclass(frozen=True)
class Symmetric:
    """An initializer: uniform in +-bound."""

    bound: float

    def __call__(self, key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -self.bound, self.bound)


@dataclasses.dataclass(frozen=True)
class Begin:
    """Adapter.init of rows that begin as embeddings of the model's.

    Attributes:
      init: "text" or "vocabulary".
      tokens: P.
      ids: of the text; [] where they aren't known, as in a plan: rows then begin as they are drawn.
      vocab_size: of the tokenizer; None where it isn't known.
    """

    init: str
    tokens: int
    ids: list[int]
    vocab_size: int | None

    def __call__(self, params: Params, key: jax.Array, model: Any) -> Params:
        c = dataclasses.replace(model.config, dtype="float32")
        if self.init == "text" and not self.ids:
            return params
        if self.init == "text":
            ids = jnp.asarray(virtual.cyclic(self.ids, self.tokens), jnp.int32)
        else:
            ids = jax.random.randint(key, (self.tokens,), 0, self.vocab_size or c.vocab_size)
        return {**params, "prompt": {"rows": embeddings(c, params, ids)}}


def embeddings(c: Any, params: Params, ids: Array) -> Float[Array, "P D"]:
    """What the first layer is given at tokens, but for what depends on positions."""
    x = added_rows.look_up(c, params, ids[None])[0]
    return x * c.d_model**0.5 if c.embed_scale else x
