"""A tokenizer for a `make` that needs one, where options are checked and the run's tokenizer isn't known yet."""

import inspect
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from research.sources import special_tokens
from research.sources.tokenizers import Tokenizer, TokenizerSpec, make_tokenizer


def tokenizer(module: ModuleType, options: Mapping[str, Any], of_run: Mapping[str, Any]) -> Tokenizer | None:
    """One of bytes, with the special tokens that a view or an objective needs.

    None where the `make` of its module has a default for its parameter `tokenizer`, and so does without one.

    Args:
      module, options, of_run: see special_tokens.needed_by.
    """
    if inspect.signature(module.make).parameters["tokenizer"].default is not inspect.Parameter.empty:
        return None
    byte = make_tokenizer(TokenizerSpec(kind="byte"), lambda: iter(()))
    return byte.with_tokens(special_tokens.needed_by(module, byte, options, of_run))
