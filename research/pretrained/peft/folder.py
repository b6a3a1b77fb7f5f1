"""A folder of PEFT as it lies on the disk, and what to do with one that isn't read."""

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import safetensors

from research import files
from research.errors import InputError
from research.pretrained.safetensors_file import Entry, open_file

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
BASE = "understudy_base"  # in the metadata of TENSORS: params.fingerprint of the kernels that an adapter was made for

_MERGE = "Merge it into its base in PEFT (merge_and_unload), and read the whole model."
_ANEW = "PEFT can't merge it into its base either: adapt the model anew, by a kind that is offered."
_WHERE_TRAINED = (
    "Merge it where it was trained, beside the model that its init left; or convert it there, by PEFT's "
    "save_pretrained with path_initial_model_for_weight_conversion."
)
# What PEFT can't merge: kinds, and fields of LoRA.
_UNMERGED = re.compile(
    "ADAPTION_PROMPT|CARTRIDGE|CPT|MULTITASK_PROMPT_TUNING|POLY|PROMPT_TUNING|P_TUNING|PREFIX_TUNING|SHADOW|XLORA|"
    "alora_invocation_tokens|arrow_config|layer_replication"
)


class Folder(NamedTuple):
    """A folder of PEFT whose tensors haven't been read.

    Attributes:
      where: its path.
      config: its adapter_config.json.
      entries: its tensors, by their names.
      base: the fingerprint of what it was made for; empty where the folder has none.
    """

    where: Path
    config: dict[str, Any]
    entries: dict[str, Entry]
    base: dict[str, tuple[float, float]]


def is_folder(name: str | Path) -> bool:
    """Whether PEFT wrote this folder."""
    return (Path(name).expanduser() / CONFIG).is_file()


def open_folder(name: str | Path) -> Folder:
    """Opens a folder.

    Raises:
      InputError: it is no folder of PEFT, or damaged.
    """
    where = Path(name).expanduser()
    if not is_folder(where):
        raise InputError(f"{name}: holds no {CONFIG}. Name a folder that PEFT's save_pretrained or an export wrote.")
    if not (where / TENSORS).is_file():
        raise InputError(f"{where}: lacks {TENSORS}. Save it anew in PEFT, with safe_serialization=True.")
    entries = open_file(where / TENSORS)
    with safetensors.safe_open(where / TENSORS, framework="numpy") as file:
        noted = (file.metadata() or {}).get(BASE, "{}")
    try:
        base = {name: (float(mark[0]), float(mark[1])) for name, mark in json.loads(noted).items()}
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{where / TENSORS}: its metadata {BASE!r} is damaged. Copy it anew.") from error
    return Folder(where, files.read_json(where / CONFIG), entries, base)


@contextlib.contextmanager
def naming(where: Path) -> Iterator[None]:
    """What comes of a config or tensors of other types than PEFT writes becomes an InputError that names the folder."""
    try:
        yield
    except InputError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, re.error, RecursionError) as error:
        raise InputError(f"{where}: can't be understood ({error!r:.200}). Copy it anew.") from error


def remedy(kind: str, field: str = "") -> str:
    """What to do with a folder of a kind that isn't read for one of its fields; "" where it is the kind."""
    if field == "init_lora_weights":
        return _WHERE_TRAINED
    return _ANEW if _UNMERGED.fullmatch(kind) or _UNMERGED.fullmatch(field) else _MERGE
