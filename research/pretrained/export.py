"""A model in a folder as transformers' save_pretrained writes it: config, safetensors, tokenizer, chat template."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from research import files
from research.models.config import ModelConfig
from research.pretrained import save

DTYPES = ("float32", "bfloat16", "float16")


class Exported(NamedTuple):
    """What was written.

    Attributes:
      architecture: the class that transformers reads it with.
      sizes: the bytes of each dtype.
      not_finite: names of tensors that hold NaN or infinity.
    """

    architecture: str
    sizes: dict[str, int]
    not_finite: tuple[str, ...]


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
    family, written = save.choose(config, origin.get("config", {}))
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
    return Exported(written["architectures"][0], sizes, not_finite)


def _ids(value: Any) -> set[int]:
    """The ids that a config.json or generation_config.json names: one, several or none."""
    return set() if value is None else set(value) if isinstance(value, list) else {value}
