"""Models whose next token is a table's entry for the last one, so that a test knows what they write."""

import jax
import jax.numpy as jnp

from research.devices.sharding import RULES
from research.models.config import ModelConfig
from research.models.transformer import Model
from research.ops.head import Head


def make(size, max_length=64, scale=1, **config):
    """A model of `size` tokens whose parameters are the table [V]; an encoder's says what stands at each place.

    Its logits are `scale` at that token, and 0 at the others.
    """
    return Model(
        config=ModelConfig(vocab_size=size, max_length=max_length, **config),
        specs=None,
        hidden=lambda params, batch: scale * jax.nn.one_hot(params[batch["positions"]], size),
        hidden_at=None,
        attention_inputs=None,
        rules=RULES,
        unembed=lambda params: Head(jnp.eye(size), None, 0.0),
        init_cache=lambda batch_size, length: (
            (jnp.zeros((batch_size, 1, 1, length)), jnp.zeros((batch_size, 1, length, 1))),
        ),
        unstack=lambda params, rows=1: params,
        decode=lambda params, tokens, positions, mask, cache, index: (
            scale * jax.nn.one_hot(params[tokens], size),
            cache,
        ),
    )


def chain(size, ids, last=0):
    """A table that goes on from each id with the next, and from all others with `last`."""
    assert len(set(ids)) == len(ids)
    return jnp.full(size, last, jnp.int32).at[jnp.array(ids[:-1])].set(jnp.array(ids[1:]))


def answering(tokenizer, text, after="<|assistant|>"):
    """A table that says `text`, whose bytes all differ, after a special token or a letter, and ends."""
    first = tokenizer.special(after) or ord(after)
    return chain(tokenizer.size, [first, *tokenizer.encode(text), tokenizer.eos])
