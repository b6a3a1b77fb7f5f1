"""P-tuning (arXiv:2103.10385): virtual tokens whose embeddings a small network computes from others.

The network is PEFT's PromptEncoder with an MLP, which is PEFT's default. Its LSTM isn't offered: like the MLP it is
thrown away after training, so that nothing else can be told by it, and it would be the one recurrent network here.
"""

import dataclasses

from research.models.adapters import prompt
from research.models.adapters.types import Adapter, also_trained
from research.models.specs import Specs
from research.params import ParamSpec
from research.ranges import Count, Size


def make(tokens: Size = 20, hidden: Count = 0, decay: bool = False, also: str = "") -> Adapter:
    """Virtual tokens by an MLP with two hidden layers.

    Args:
      tokens: how many.
      hidden: units of either hidden layer; 0: as wide as the model.
      decay: whether weight decay applies to the embeddings and the kernels.
      also: an expression on whole names of parameters that are trained besides, such as "head" or ".*norm/.*".

    Raises:
      InputError: a value can't be used.
    """
    own = {"adapter.kind": r"prompt/.*"} | also_trained(also)
    return Adapter(Encoder(tokens, hidden, decay).specs, own, virtual_tokens=tokens, merged=prompt.merged(tokens))


@dataclasses.dataclass(frozen=True)
class Encoder:
    """The options of `make`."""

    tokens: int
    hidden: int
    decay: bool

    def specs(self, specs: Specs) -> Specs:
        """The specs of a model with those of the network."""
        D = specs["embed"].shape[1]
        E = self.hidden or D
        parts = {
            "embed": prompt.table(self.tokens, D, self.decay),
            "inner": affine(D, E, self.decay),
            "middle": affine(E, E, self.decay),
            "outer": affine(E, D, self.decay),
        }
        return {**specs, "prompt": parts}


def affine(size: int, units: int, decay: bool) -> Specs:
    """The specs of a linear map of a small network, which begins as torch's Linear does."""
    axes, begin = ("embed_replicated", "rank"), prompt.Symmetric(size**-0.5)
    return {
        "kernel": ParamSpec((size, units), axes, begin, axes[:1], decays=decay),
        "bias": ParamSpec((units,), axes[1:], begin),
    }
