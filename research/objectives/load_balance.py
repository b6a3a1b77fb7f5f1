"""Even loads of experts: keeps the routers of a mixture from sending all tokens to a few experts."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from research.errors import InputError
from research.objectives.types import Batch, Context, Forward, LossOut, Objective
from research.ops import moe


def make(pooled: bool = False, whole_batch: bool = True) -> Objective:
    """The load-balancing loss of the policy's experts (Switch Transformer, arXiv:2101.03961, equations 4 to 6; with k
    experts a token as in Mixtral of transformers): E sum_e f_e P_e, with f_e the share of tokens that go to an expert
    and P_e the mean of its probability. It is k where loads are even. All tokens count but padding.

    Args:
      pooled: loads are those of all layers together, as in transformers; else each layer's, of whose losses this is the
        mean.
      whole_batch: loads are those of the whole batch, which takes one more forward pass where there are microbatches;
        else each microbatch's own, as most others have it, of whose losses this is the mean by tokens.
    """
    return LoadBalance(pooled, whole_batch).objective()


@dataclasses.dataclass(frozen=True)
class LoadBalance:
    """The loss of uneven loads. The attributes are the options of `make`."""

    pooled: bool
    whole_batch: bool

    def objective(self) -> Objective:
        """This as an objective."""
        return Objective(loss=self.loss, gather=self.gather if self.whole_batch else None, bits_per_byte=False)

    def gather(self, forward: Forward, batch: Batch) -> tuple[Float[Array, "B L E"], Float[Array, " B"]]:
        """How many tokens of each row go to each expert, and how many there are."""
        routing = forward.routing()
        return jnp.moveaxis(routing.counts, 1, 0), routing.tokens[0]

    def loss(self, forward: Forward, batch: Batch, context: Context) -> LossOut:
        """The loss, by tokens."""
        check_all_sources(forward, batch)
        routing = forward.routing()
        counts, tokens = context.gathered if self.whole_batch else self.gather(forward, batch)
        probabilities = jnp.sum(routing.probabilities, axis=1)
        loss = moe.load_balance(jnp.sum(counts, axis=0), jnp.sum(tokens), probabilities, self.pooled)
        return LossOut(loss, jnp.sum(routing.tokens[0]), {})


def check_all_sources(forward: Forward, batch: Batch) -> None:
    """Raises InputError where the term is tied to some of the data's sources."""
    if batch is not forward.batch:
        raise InputError("sources: routers are judged by all tokens of a batch. Leave it out.")
