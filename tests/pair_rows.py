"""Pairs of answers for tests of what learns from rewards: how rows hold them, and what a step makes of them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from research import train
from research.objectives.terms import Inputs, row_numbers
from research.sources import fields


def packed(names, rows, seq_len, vocab_size, seed=0):
    """Rows with several pairs each, of some the second answer the better one."""
    batch = fields.fake(fields.spec(names, rows, {"time": seq_len}), vocab_size, seed=seed)
    batch["side"] = np.where((batch["pair"] % 2 == 0) & (batch["pair"] > 0), 1 - batch["side"], batch["side"])
    return batch


def alone(batch):
    """The same pairs, each in a row of its own; rows of padding fill up a multiple of the batch."""
    size, seq_len = batch["pair"].shape
    places = [(row, pair) for row in range(size) for pair in np.unique(batch["pair"][row]) if pair > 0]
    out = fields.empty(tuple(batch), len(places) + -len(places) % size, {"time": seq_len})
    for i, (row, pair) in enumerate(places):
        here = batch["pair"][row] == pair
        for name, values in batch.items():
            out[name][i, : here.sum()] = values[row, here]
        out["segment_ids"][i] = np.where(out["pair"][i] > 0, out["segment_ids"][i] % 2 + 1, 0)
    return out


def gradients(model, terms, values, batch, microbatches=1):
    """The gradient of the terms' sum, and of each its loss, weight and metrics."""
    step = train.TrainStep(terms, {"policy": model}, optax.sgd(0.1), lambda t: t, microbatches)
    inputs = Inputs(jax.random.PRNGKey(0), jnp.zeros((), jnp.int32), row_numbers(batch), {})
    grads, outs = step.gradients({"policy": values}, {}, batch, inputs)
    return grads, {name: (out.loss_sum, out.weight, out.metrics) for name, out in outs.items()}
