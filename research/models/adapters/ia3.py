"""(IA)^3 (arXiv:2205.05638): vectors that keys, values and the inside of the MLP are multiplied by."""

import dataclasses

import jax

from research.errors import InputError
from research.models.adapters import targets as targets_lib
from research.models.adapters.types import Adapter, also_trained
from research.models.specs import Specs
from research.params import ParamSpec


def make(targets: str = "k|v|down", inputs: str = "down", also: str = "") -> Adapter:
    """Vectors beside linear maps, which begin as ones.

    Args:
      targets: the linear maps that have one, as those of lora.
      inputs: an expression for those of them whose input is multiplied; of the others the output is. "" for none.
      also: an expression on whole names of parameters that are trained besides.
    """
    return Adapter(Ia3(targets, inputs).specs, {"adapter.targets": r"(.*/)?ia3/(in|out)"} | also_trained(also))


@dataclasses.dataclass(frozen=True)
class Ia3:
    """The options of `make`."""

    targets: str
    inputs: str

    def specs(self, specs: Specs) -> Specs:
        """The specs of a model with the vectors beside them."""
        targets = targets_lib.find(specs, self.targets)
        targets_lib.check_whole(targets, self.targets)
        of_inputs = targets_lib.by_pattern(targets, {self.inputs: True} if self.inputs else {}, False, "inputs")
        for target in targets:
            lead, kernel = target.num_lead, target.kernel
            if "experts" in kernel.axes[:lead]:
                raise InputError(
                    f"targets = {self.targets!r}: {target.name} is of experts, which have none. Leave it out."
                )
            inputs, ins = all(of_inputs[target.name]), slice(lead, lead + target.num_in)
            if any(of_inputs[target.name]) != inputs:
                raise InputError(f"inputs = {self.inputs!r}: names some layers of {target.name}. Name all, or none.")
            axes = (
                (*range(lead), *range(ins.start, ins.stop))
                if inputs
                else (*range(lead), *range(ins.stop, len(kernel.shape)))
            )
            shape, names = tuple(kernel.shape[i] for i in axes), tuple(kernel.axes[i] for i in axes)
            vector = ParamSpec(shape, names, jax.nn.initializers.ones)
            specs = targets_lib.put(specs, target.path, {"ia3": {"in" if inputs else "out": vector}})
        return specs
