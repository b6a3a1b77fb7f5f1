"""What a family of checkpoints is: how its config and its tensors map to ours."""

import math
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from research import options, ranges
from research.errors import InputError
from research.models.config import ModelConfig

PREFIX = "prefix_lm"  # a field of ours in config.json: ModelConfig.prefix, which transformers has no counterpart of


class Tensor(NamedTuple):
    """A tensor of a checkpoint, and the parameters of ours that it holds.

    Attributes:
      name: in the checkpoint, with {layer} and {expert} for numbers.
      paths: ours, such as ("layers/attention/q/kernel",). Several where a checkpoint keeps as one tensor what we keep
        as several.
      layout: from the checkpoint's axes to ours without layers and experts, as einops writes it: "(H h) D -> D H h".
        Letters are those of `sizes`.
      axis: of our layout; several parameters lie one after the other along it.
      letters: sizes of letters that this layout alone uses, or uses for another size.
    """

    name: str
    paths: tuple[str, ...]
    layout: str
    axis: int = 0
    letters: Mapping[str, int] = types.MappingProxyType({})


def sizes(c: ModelConfig) -> dict[str, int]:
    """What the letters of a layout stand for."""
    H, K = c.num_heads, c.num_kv_heads
    return {
        "D": c.d_model,
        "H": H,
        "K": K,
        "h": c.dim_per_head,
        "heads": H + 2 * K,
        "part": 3,
        "F": c.d_ff,
        "FF": 2 * c.d_ff,
        "E": c.num_experts,
        "V": c.vocab_size,
        "P": c.max_length,
        "N": c.token_types,
        "C": c.num_labels,
        "out": c.d_model,
    }


def letters(tensor: Tensor, c: ModelConfig) -> dict[str, int]:
    """The sizes of the letters that a tensor's layout names, as einops.rearrange wants them."""
    size = {**sizes(c), **tensor.letters}
    return {letter: size[letter] for letter in re.findall(r"\w+", tensor.layout)}


def stored_shape(tensor: Tensor, c: ModelConfig) -> tuple[int, ...]:
    """The shape in the checkpoint: what is on the left of the layout's arrow."""
    size = letters(tensor, c)
    axes = re.findall(r"\([^)]*\)|\w+", tensor.layout.split("->")[0])
    return tuple(math.prod(size[letter] for letter in re.findall(r"\w+", axis)) for axis in axes)


def places(tensor: Tensor, c: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The name in the checkpoint and (layer, expert), as far as there are such, of each tensor that `tensor` means."""
    for layer in range(c.num_layers if "{layer}" in tensor.name else 1):
        for expert in range(c.num_experts if "{expert}" in tensor.name else 1):
            at = (*((layer,) if "{layer}" in tensor.name else ()), *((expert,) if "{expert}" in tensor.name else ()))
            yield tensor.name.format(layer=layer, expert=expert), at


# Fields of a config.json that don't change what a model computes: ids and names, training-time noise, output options.
_HARMLESS = (
    r"architectures|model_type|_name_or_path|transformers_version|auto_map|torch_dtype|dtype|use_cache|cache_implementation|"
    r"(bos|eos|pad|sep|cls|mask|unk|decoder_start)_token_id|.*dropout.*|.*_pdrop|initializer_.*|init_.*|pretraining_tp|"
    r"gradient_checkpointing|id2label|label2id|num_labels|task_specific_params|output_.*|return_dict|_?attn_implementation|"
    r"problem_type|summary_.*|router_aux_loss_coef|router_jitter_noise|max_window_layers|language|finetuning_task|"
    r"unsloth_.*|_sliding_window_pattern|sliding_window_pattern|tokenizer_class"
)


class Fields:
    """A config.json whose fields are taken out one by one; what is left at the end is not understood.

    Args:
      values: the JSON object.
      where: its file, for errors.
    """

    def __init__(self, values: Mapping[str, Any], where: str):
        self._left, self._all, self.where = dict(values), dict(values), where

    def take(self, name: str, *default: Any) -> Any:
        """The value of a field. Null counts as absent, and absent as `default`, if one is given.

        Raises:
          InputError: the field is absent and there is no default; or it isn't of the default's type, where there is one
            but None: a whole number is one with a fraction too.
        """
        value = self._left.pop(name, self._all.get(name))
        if value is not None and default and default[0] is not None:
            options.convert(type(default[0]), value, f"{self.where}: {name}")
        if value is None:
            if not default:
                raise InputError(f"{self.where}: lacks the field {name!r}. Copy the file anew from where the model is.")
            return default[0]
        return value

    def take_flag(self, name: str, default: bool) -> bool:
        """The value of a field that is true or false.

        Raises:
          InputError: it is neither.
        """
        value = self.take(name, default)
        if not isinstance(value, bool):
            raise InputError(f"{self.where}: {name} = {value!r}: must be true or false.")
        return value

    def take_number(self, name: str) -> float:
        """The value of a field that has to be there, a finite number."""
        return options.convert(float, self.take(name), f"{self.where}: {name}")

    def take_all(self, table: Mapping[str, str], **defaults: Any) -> dict[str, Any]:
        """Fields of ModelConfig from those of the file that mean the same.

        Args:
          table: the file's name -> ours.
          **defaults: by our name.

        Raises:
          InputError: a field is absent and has no default, or isn't of ModelConfig's type and range.
        """
        values, hints = {}, ranges.hints(ModelConfig)
        for name, ours in table.items():
            value = self.take(name, *((defaults[ours],) if ours in defaults else ()))
            values[ours] = options.convert(hints[ours], value, f"{self.where}: {name}")
        return values

    def expect(self, name: str, *allowed: Any) -> None:
        """Checks that a field, if it is there, has one of these values.

        Raises:
          InputError: it has another.
        """
        value = self.take(name, allowed[0])
        if not any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in allowed):
            raise InputError(
                f"{self.where}: {name} = {value!r:.80} is not supported, only {' or '.join(map(repr, allowed))}. "
                "It would change what the model computes."
            )

    def replace(self, name: str, value: Any) -> None:
        """Sets a field."""
        self._left[name] = self._all[name] = value

    def section(self, name: str) -> "Fields | None":
        """An object within it, or None."""
        value = self.take(name, None)
        if value is not None and not isinstance(value, Mapping):
            raise InputError(f"{self.where}: {name} = {value!r:.80}: must be an object. Copy the file anew.")
        return None if value is None else Fields(value, f"{self.where}: {name}")

    def finish(self) -> None:
        """Checks that every field was taken, or is known to change nothing, or is switched off.

        Raises:
          InputError: naming a field that isn't understood.
        """
        for name, value in self._left.items():
            if not re.fullmatch(_HARMLESS, name) and value not in (None, False):
                raise InputError(
                    f"{self.where}: the field {name!r} = {str(value)[:60]!r} is not known for this architecture, and "
                    "may change what the model computes. If you are sure that it doesn't, remove it from the file."
                )


def windows(types: Sequence[str], window: int) -> tuple[int, ...]:
    """ModelConfig.sliding_window from the kind of each layer: the shortest pattern that repeats."""
    sizes = [window if kind == "sliding_attention" else 0 for kind in types]
    for period in range(1, len(sizes) + 1):
        if all(size == sizes[i % period] for i, size in enumerate(sizes)):
            return tuple(sizes[:period])
    return (0,)
