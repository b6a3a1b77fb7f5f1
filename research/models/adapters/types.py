"""What an adapter is: parameters beside those of a model, and which parameters it trains."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax

from research.models.config import ModelConfig
from research.models.specs import Params, Specs

WRITTEN = ("adapter.also", "adapter.match")  # fields whose expressions are what the user wrote


@dataclasses.dataclass(frozen=True, eq=False)
class Adapter:
    """A way to change a model without changing all of it. See `adapters.load`.

    Attributes:
      specs: specs of a model -> the same with those of the adapter beside them. Raises InputError where the options
        don't fit the model.
      trained: what is trained: a field of the config -> the regular expression on whole names that it stands for, see
        params.matching. A parameter is trained where one of them matches.
      init: (parameters of the model and the adapter as they are drawn or read, key, the Model) -> the same as they
        begin; None where they begin as they are. It gets kernels in float32, and depends on nothing else, so that a run
        that goes on has the same. The Model's specs are those that the result is held in.
      changes_base: whether `init` changes parameters of the model itself.
      grown: (config of a model) -> that of the model that it becomes when the adapter is merged; None where it is the
        same.
      dropout: the share of the inputs of the adapter that training leaves out.
      virtual_tokens: how many tokens it puts in front of every document; see models.virtual.
      prefix: how many keys and values it puts in front of every document, in each layer.
      merged: what is left of it beside a model once kernels are merged, `realized` by models.virtual; None for nothing.
      kind: the module that made it.
    """

    specs: Callable[[Specs], Specs]
    trained: Mapping[str, str]
    init: Callable[[Params, jax.Array, Any], Params] | None = None
    changes_base: bool = False
    grown: Callable[[ModelConfig], ModelConfig] | None = None
    dropout: float = 0.0
    virtual_tokens: int = 0
    prefix: int = 0
    merged: "Adapter | None" = None
    kind: str = ""


def also_trained(pattern: str) -> dict[str, str]:
    """What the option `also` adds to Adapter.trained; "" adds nothing."""
    return {"adapter.also": pattern} if pattern else {}
