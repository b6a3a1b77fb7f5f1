"""BitFit (arXiv:2106.10199): the biases are trained, and nothing else."""

import dataclasses

import jax

from research.errors import InputError
from research.models.adapters import targets as targets_lib
from research.models.adapters.types import Adapter, also_trained
from research.models.config import ModelConfig
from research.models.specs import Specs
from research.params import ParamSpec


def make(add: bool = True, also: str = "") -> Adapter:
    """Trains all biases.

    Args:
      add: linear maps of layers that have no bias get one, which begins as 0; experts and routers get none. Else only
        biases that are there are trained.
      also: an expression on whole names of parameters that are trained besides.
    """
    specs = with_biases if add else with_own_biases
    grown = grown_config if add else None
    return Adapter(specs, {"adapter.kind": targets_lib.BIASES} | also_trained(also), grown=grown)


def with_own_biases(specs: Specs) -> Specs:
    """The specs of a model. Raises InputError where it has no biases."""
    if not targets_lib.has_biases(specs):
        raise InputError("add = False: the model has no biases. Leave it at True, which adds them.")
    return specs


def with_biases(specs: Specs) -> Specs:
    """The specs of a model with a bias in each linear map of its layers."""
    for target in targets_lib.find(specs, targets_lib.ALL):
        kernel, lead = target.kernel, target.num_lead
        if "experts" in kernel.axes[:lead] or "bias" in _at(specs, target.path):
            continue
        kept = (*range(lead), *range(lead + target.num_in, len(kernel.shape)))
        shape, axes = tuple(kernel.shape[i] for i in kept), tuple(kernel.axes[i] for i in kept)
        bias = ParamSpec(shape, axes, jax.nn.initializers.zeros)
        specs = targets_lib.put(specs, target.path, {"bias": bias})
    return specs


def grown_config(c: ModelConfig) -> ModelConfig:
    """The config of a model that has these biases of its own."""
    return dataclasses.replace(c, attention_bias=True, attention_out_bias=True, mlp_bias=not c.num_experts)


def _at(specs: Specs, path: tuple[str, ...]) -> Specs:
    for name in path:
        specs = specs[name]
    return specs
