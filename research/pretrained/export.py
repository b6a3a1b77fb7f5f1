"""A model in a folder as transformers' save_pretrained writes it: config, safetensors, tokenizer, chat template."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from research import files
from research.models.config import ModelConfig
from research.pretrained import save

DTYPES = ("float32", "bfloat16", "float16")
_PAD = "<|pad|>"


class Exported(NamedTuple):
    """What was written.

    Attributes:
      architecture: the class that transformers reads it with.
      sizes: the bytes of each dtype.
      not_finite: names of tensors that hold NaN or infinity.
      pad: of a classifier or reward model whose pad was replaced: what was wrong with it, and the new one.
    """

    architecture: str
    sizes: dict[str, int]
    not_finite: tuple[str, ...]
    pad: str = ""


def export(
    output: Path,
    config: ModelConfig,
    values: Any,
    origin: Mapping[str, Any],
    tokenizer: Any,
    *,
    dtype: str | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> Exported:
    """Writes a model. A kill leaves no `output`. What ends a text, for other tools, is what ends it here.

    Args:
      output: a folder that doesn't exist yet.
      config: of the model.
      values: its parameters.
      origin: what the model began with: {"config", "generation", "dtypes"}; empty where it began with us.
      tokenizer: a sources.tokenizers.Tokenizer, or None for none.
      dtype: of all tensors; by default what each was in the checkpoint that the model began with.
      max_shard_bytes: a new file is begun before one grows above this.

    Raises:
      InputError: no architecture of transformers computes what the model does, or a tensor has a value that its dtype
        can't hold.
    """
    dtypes, generation = origin.get("dtypes", {}), origin.get("generation", {})
    pad = _Pad.of(config, tokenizer, origin.get("config", {})) if config.num_labels and tokenizer else _Pad(tokenizer)
    tokenizer, (config, values) = pad.tokenizer, pad.with_row(config, values)
    family, written = save.choose(config, origin.get("config", {}))
    written = {**written, **pad.fields}
    with files.whole_folder(output) as folder:
        if tokenizer:
            tokenizer.save(folder)
        sizes, not_finite = save.save(
            folder,
            family,
            config,
            values,
            dtype=lambda name: dtype or dtypes.get(name, "float32"),
            max_shard_bytes=max_shard_bytes,
        )
        written = {**written, "dtype" if "dtype" in written else "torch_dtype": max(sizes, key=sizes.get)}
        if tokenizer:
            ids = {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos}
            stop = set(tokenizer.stop)
            written = {**ids, **written}
            if not _ids(written["eos_token_id"]) <= stop:
                written["eos_token_id"] = tokenizer.eos
            generation = dict(generation or ids)
            if _ids(generation.get("eos_token_id")) != stop:
                generation["eos_token_id"] = list(tokenizer.stop)
        files.write_json(folder / "config.json", written)
        if generation:
            files.write_json(folder / "generation_config.json", generation)
    return Exported(written["architectures"][0], sizes, not_finite, pad.note)


@dataclasses.dataclass(frozen=True)
class _Pad:
    """What fills up the rows that transformers reads with a classifier: it takes the logits at the last token that
    isn't the pad, and so must find none at a document's end.

    Attributes:
      tokenizer: the model's, which has the pad; None for none.
      fields: of config.json.
      note: see Exported.pad.
    """

    tokenizer: Any
    fields: Mapping[str, int] = dataclasses.field(default_factory=dict)
    note: str = ""

    @classmethod
    def of(cls, config: ModelConfig, tokenizer: Any, origin: Mapping[str, Any]) -> "_Pad":
        """The pad that tokenizer and `origin`, the config.json that the model began with, name, where it ends no
        document; else the tokenizer's unk_token, or a token of its own, with an embedding of zeros."""
        name, number = tokenizer.variables.get("pad_token"), origin.get("pad_token_id")
        if name is None and isinstance(number, int) and 0 <= number < tokenizer.size:
            name = tokenizer.backend.id_to_token(number)
        ends = [tokenizer.backend.id_to_token(i) for i in tokenizer.stop]
        why = "there was no pad" if name is None else f"the pad {name} ends documents" if name in ends else ""
        if why:
            unknown = tokenizer.variables.get("unk_token")
            name = _PAD if unknown is None or unknown in ends else unknown
        tokenizer = tokenizer.with_tokens((name,)).with_variables({"pad_token": name})
        number = tokenizer.backend.token_to_id(name)
        return cls(tokenizer, {"pad_token_id": number}, f"{why}, and now it is {name} ({number})" if why else "")

    def with_row(self, config: ModelConfig, values: Any) -> tuple[ModelConfig, Any]:
        """The model with an embedding of zeros for the pad, where it has none."""
        more = self.tokenizer.size - config.vocab_size if self.fields else 0
        if more <= 0:
            return config, values
        none = np.zeros((more, config.d_model), np.float32)
        embed = np.concatenate([np.asarray(values["embed"], np.float32), none])
        return dataclasses.replace(config, vocab_size=self.tokenizer.size), {**values, "embed": embed}


def _ids(value: Any) -> set[int]:
    """The ids that a config.json or generation_config.json names: one, several or none."""
    return set() if value is None else set(value) if isinstance(value, list) else {value}
