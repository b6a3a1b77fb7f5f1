"""How well a model predicts held-out tokens: means over the whole set, made from sums."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research.errors import InputError
from research.metrics import means
from research.objectives.types import next_token_targets

Batch = Mapping[str, Any]


def make_perplexity(
    eval_step: Callable[..., dict[str, tuple[jax.Array, jax.Array]]],
    batches: Sequence[Batch],
    token_bytes: np.ndarray,
    *,
    use_loss_mask: bool,
    put: Callable[[Batch], Batch] = lambda batch: batch,
) -> Callable[[Any, Any], dict[str, float]]:
    """Returns evaluate(params, frozen) -> metric -> mean over all of `batches`.

    The metrics are those of `eval_step`, and from its `nll` (nats per supervised token, one for each term of a
    composed objective)
      perplexity: exp(nll).
      bits_per_byte: nll summed, in bits, over the bytes of text that the supervised targets stand for; it compares
        models across tokenizers. With one term only. An end-of-text token costs bits and stands for no byte.

    Args:
      eval_step: (params, frozen, batch, key) -> name -> (sum, weight), jitted.
      batches: this process's rows of each held-out batch, as a Source gives them.
      token_bytes: [V] int32, UTF-8 bytes of each token.
      use_loss_mask: supervise the tokens of `loss_mask`, as the objective does; else all tokens.
      put: takes a batch to the devices, for the global batch there.

    Raises:
      InputError: there is no batch or, when called, no supervised token.
    """
    if not batches:
        raise InputError(
            "data: nothing is held out to evaluate on. Raise data.eval_fraction, name data.eval_path, or set "
            "eval.every = 0."
        )

    @jax.jit
    def bits_and_bytes(nll_sum: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
        targets, weights = next_token_targets(batch, batch["loss_mask"] if use_loss_mask else None)
        sizes = jnp.asarray(token_bytes, jnp.float32)[targets]
        return nll_sum / math.log(2), jnp.sum(sizes * weights)

    def evaluate(params: Any, frozen: Any) -> dict[str, float]:
        parts = []
        for i, batch in enumerate(batches):
            batch = put(batch)
            out = eval_step(params, frozen, batch, jax.random.fold_in(jax.random.key(0), i))
            if "nll" in out:
                out = out | {"bits_per_byte": bits_and_bytes(out["nll"][0], batch)}
            parts.append(out)
        result = means(parts)
        if "loss" not in result:
            raise InputError(
                "data: no token of the held-out data is supervised. Raise data.eval_fraction or data.seq_len."
            )
        perplexities = {
            name.removesuffix("nll") + "perplexity": _exp(value)
            for name, value in result.items()
            if name.split("/")[-1] == "nll"
        }
        return result | perplexities

    return evaluate


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf  # math.exp raises where the result is no float
