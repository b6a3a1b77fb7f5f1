"""What a model or an adapter is before its parameters are read."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from research.models.adapters import Adapter
from research.models.config import ModelConfig
from research.sources.tokenizers import Tokenizer

if TYPE_CHECKING:  # it imports this module
    from research.loading.run_adapters import RunAdapter


class ModelSource(NamedTuple):
    """A model that is there; its parameters haven't been read.

    Attributes:
      name: as it was asked for.
      config: what it computes, in the default dtype of this process's devices.
      rules: logical axis -> mesh axis.
      tokenizer: () -> its tokenizer; raises InputError where there is none.
      template: how prompts are put to it.
      read: (specs, placements) -> parameters, in the specs' dtypes.
      origin: what an export writes again: {"config", "generation", "dtypes"}; empty for a model that began with us.
      front: what stands in front of its documents (Adapter.merged), whose parameters `read` gives where the specs
        have them; None for nothing.
      holding_error: () -> of a run that held kernels quantised its frozen_dtype, and how far they are from those that
        it began with (quantized.relative_error); None of any other model. It reads what the run began with.
      run_adapter: the adapter of a run that has one; `read` merges it where it can be.
    """

    name: str
    config: ModelConfig
    rules: dict[str, Any]
    tokenizer: Callable[[], Tokenizer]
    has_tokenizer: bool
    template: str
    read: Callable[[Any, Any], Any]
    origin: dict[str, Any]
    front: Adapter | None = None
    holding_error: Callable[[], tuple[str, float] | None] = lambda: None
    run_adapter: "RunAdapter | None" = None


class AdapterSource(Protocol):
    """An adapter that has been trained, in a run or by PEFT; its parameters haven't been read."""

    @property
    def options(self) -> dict[str, Any]:
        """{"kind": ..., option: value}."""

    def fill(self, values: Any) -> Any:
        """Parameters of a model and the adapter, with the trained ones in their place.

        Raises:
          InputError: the adapter was made for another model.
        """


class Base(NamedTuple):
    """The model that a role begins with.

    Attributes:
      name: of the model.
      open: () -> the model. A run whose checkpoints hold all parameters doesn't need it, and may outlive it.
    """

    name: str
    open: Callable[[], ModelSource]
