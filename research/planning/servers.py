"""What the servers of a run with rewards need of memory: the other side of a plan."""

import dataclasses
import math

import jax.numpy as jnp

from research import config as config_lib
from research import params
from research.config import Config
from research.devices.chips import GIB
from research.models import adapters, transformer
from research.models.specs import make_specs
from research.planning.topology import Topology

_SHARE = 0.92  # of a chip's memory, which vLLM takes (--gpu-memory-utilization)


@dataclasses.dataclass(frozen=True)
class ServerMemory:
    """Bytes of one server. Where it has several chips, they share them.

    Attributes:
      servers: how many there are.
      dtype: of weights and cache.
      weights: of the policy, its adapter merged.
      answers, tokens: the most answers at once (rollout.in_flight), and the most tokens of each with its prompt.
      cache: keys and values of all of these tokens, in all layers.
      adapter: of two versions of a LoRA that is put beside the weights; 0 for none.
    """

    servers: int
    dtype: str
    weights: int
    answers: int
    tokens: int
    cache: int
    adapter: int

    @property
    def used(self) -> int:
        return self.weights + self.cache + self.adapter

    def describe(self, topology: Topology) -> str:
        """The figures on a line, with how many chips as those of the run would hold them."""
        chips = ""
        if topology.kind != "cpu":
            count = math.ceil(self.used / (_SHARE * topology.chip.memory))
            chips = f", as {count} such {'chip has' if count == 1 else 'chips have'}"
        adapter = f", adapters {_size(self.adapter)}" if self.adapter else ""
        return (
            f"{self.servers} with {_size(self.used)} each, beside the run{chips}. weights {_size(self.weights)} in "
            f"{self.dtype}{adapter}, cache {_size(self.cache)}: {self.answers} answers at once (rollout.in_flight) of "
            f"{self.tokens:,} tokens with their prompts"
        )


def make(config: Config, vocab_size: int) -> ServerMemory | None:
    """The memory of each server; None where the run answers by itself.

    Args:
      config: with the compute dtype of the machine, in which servers are taken to serve too.
      vocab_size: of the tokenizer.
    """
    spec = config.rollout
    if not config.rewards or spec.engine != "vllm":
        return None
    c = config_lib.model_config(config, vocab_size)
    size = jnp.dtype(c.dtype).itemsize
    of_token = 2 * c.num_layers * c.num_kv_heads * c.dim_per_head * size
    adapter = 0
    if config.adapter.get("kind") == "lora":
        model = transformer.make_model(c, adapter=adapters.load(config.adapter))
        adapter = 2 * size * (params.count(model.specs) - params.count(make_specs(c)))
    return ServerMemory(
        servers=len(spec.servers),
        dtype=c.dtype,
        weights=params.count(make_specs(c)) * size,
        answers=spec.in_flight,
        tokens=config.seq_len,
        cache=spec.in_flight * config.seq_len * of_token,
        adapter=adapter,
    )


def _size(size: float) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB else f"{size / 2**20:.3g} MiB"
