"""Tiny models with soft prompts and prefixes, and batches for them."""

import functools
from pathlib import Path

import goldens
import jax
import jax.numpy as jnp
import numpy as np

from research import params
from research.devices import sharding
from research.models import adapters, transformer
from research.pretrained import load

LLAMA = str(Path(goldens.__file__).parent / "golden" / "hf_tiny" / "llama")


@functools.cache
def llama():
    """The config of hf_tiny/llama, and its parameters."""
    found = load.open_pretrained(LLAMA)
    specs = transformer.make_model(found.config).specs
    return found.config, load.load(found, specs, params.shardings(specs, sharding.make_mesh({}, jax.devices()[:1])))


def with_adapter(c, base, tokenizer=None, seed=0, **spec):
    """A model with an adapter, and its parameters as they begin."""
    model = transformer.make_model(c, adapter=adapters.load(spec, tokenizer=tokenizer))
    _, added = params.split(model.specs, params.like(transformer.make_specs(c), model.specs))
    values = params.join(base, params.init(added, jax.random.key(seed)))
    if model.adapter.init is not None:
        values = model.adapter.init(values, jax.random.key(seed + 1), model)
    return model, values


def rows(ids, mask, first=0, count=0):
    """A batch of one document a row, padded on the right, with `count` virtual tokens from id `first` on."""
    ids, mask = np.asarray(ids), np.asarray(mask)
    is_virtual = np.broadcast_to(np.arange(count + ids.shape[1]) < count, (len(ids), count + ids.shape[1]))
    around = ((0, 0), (count, 0))
    tokens = np.where(is_virtual, first + np.arange(is_virtual.shape[1]), np.pad(ids, around))
    batch = {"tokens": tokens, "segment_ids": np.pad(mask, around, constant_values=1)}
    batch["positions"] = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    if count:
        batch["virtual"] = is_virtual
    return {name: jnp.asarray(x, jnp.int32) for name, x in batch.items()}


def logits(model, values, batch):
    return jnp.matmul(model.hidden(values, batch), model.unembed(values).kernel, precision="highest")
