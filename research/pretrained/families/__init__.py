"""Families of checkpoints: one module for each `model_type` of transformers, found by its name.

A module has
  ARCHITECTURES: the classes of transformers that it reads; the first is what an export is of.
  read(fields) -> dict: fields of ModelConfig from those of config.json.
  write(config) -> dict: fields of config.json; `read` of it gives the config back if the family can hold the model.
  tensors(config) -> list[Tensor].
It may have
  BODY: what the names of all but the head begin with, "model" by default; some files leave it out.
  COPIES: tensors that its files may hold a second time -> what they must be copies of, besides a tied head.
  SPARE: regular expressions of tensors that its files may hold and no computation of ours reads.
"""

import importlib
import pkgutil
from types import ModuleType

from research.errors import InputError, did_you_mean


def names() -> list[str]:
    """The model types there are."""
    return [m.name for m in pkgutil.iter_modules(__path__) if m.name != "common"]


def load(model_type: str, where: str) -> ModuleType:
    """The family of a `model_type`.

    Raises:
      InputError: there is none of that name.
    """
    if model_type not in names():
        raise InputError(
            f"{where}: model_type = {model_type!r:.80}: no such architecture here.{did_you_mean(model_type, names())}"
        )
    return importlib.import_module(f"{__name__}.{model_type}")
