"""VeRA (arXiv:2310.11454): two random matrices that all maps share and that stay, and vectors that are trained."""

import dataclasses
from typing import Any

import jax

from research.errors import InputError
from research.models.adapters import targets as targets_lib
from research.models.adapters.lora import constant
from research.models.adapters.types import Adapter, also_trained
from research.models.specs import Specs
from research.params import ParamSpec
from research.ranges import Fraction, Real, Size


def make(
    rank: Size = 256,
    targets: str = targets_lib.ALL,
    exclude: str = "",
    d: Real = 0.1,
    dropout: Fraction = 0.0,
    also: str = "",
) -> Adapter:
    """Vectors beside linear maps.

    Args:
      rank: r, of the shared matrices A and B, which are as large as the largest map needs.
      targets, exclude: the linear maps that have vectors, as those of lora.
      d: what the vector between A and B begins with. The one after B begins with 0.
      dropout: the share of a map's input that A doesn't see in training.
      also: an expression on whole names of parameters that are trained besides.

    Raises:
      InputError: a value can't be used.
    """
    if d == 0:
        raise InputError("d = 0: must not be 0: both vectors would begin as 0, and neither would have a gradient.")
    trained = {"adapter.targets": r"(.*/)?vera/(d|out)"} | also_trained(also)
    return Adapter(Vera(rank, targets, exclude, float(d), dropout).specs, trained, dropout=dropout)


@dataclasses.dataclass(frozen=True)
class Vera:
    """The options of `make`."""

    rank: int
    targets: str
    exclude: str
    d: float
    dropout: float

    def specs(self, specs: Specs) -> Specs:
        """The specs of a model with the vectors and the shared matrices beside them."""
        targets, r = targets_lib.find(specs, self.targets, self.exclude), self.rank
        targets_lib.check_whole(targets, self.targets)
        for target in targets:
            kernel, lead = target.kernel, target.num_lead
            if "experts" in kernel.axes[:lead] or not target.stacked:
                raise InputError(f"targets = {self.targets!r}: {target.name} can't have vectors of VeRA. Leave it out.")
            outs = (*range(lead), *range(lead + target.num_in, len(kernel.shape)))
            own = {
                "d": ParamSpec((kernel.shape[0], r), ("layers", "rank"), jax.nn.initializers.constant(self.d)),
                "out": ParamSpec(
                    tuple(kernel.shape[i] for i in outs), tuple(kernel.axes[i] for i in outs), jax.nn.initializers.zeros
                ),
            }
            if self.dropout:
                own["dropout"] = constant(target, [self.dropout] * kernel.shape[0])
            specs = targets_lib.put(specs, target.path, {"vera": own})
        ins, outs = max(target.ins for target in targets), max(target.outs for target in targets)
        # Not sharded: each map takes a part of them.
        a = ParamSpec((ins, r), ("rank", "rank"), Uniform((6 / ins) ** 0.5))
        b = ParamSpec((r, outs), ("rank", "rank"), Uniform((6 / r) ** 0.5))
        return {**specs, "vera": {"a": a, "b": b}}


@dataclasses.dataclass(frozen=True)
class Uniform:
    """An initializer: uniform within +-bound, He's of the number of inputs (arXiv:1502.01852), as PEFT has it."""

    bound: float

    def __call__(self, key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -self.bound, self.bound)
