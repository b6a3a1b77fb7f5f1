"""What happens inside the layers of the policy."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from research import params as params_lib
from research.diagnosis.probes.types import Measured
from research.diagnosis.subject import Batch, Subject
from research.models import blocks, virtual
from research.models.transformer import Model
from research.ops import moe
from research.run.assemble import Parts

_ROWS = 4  # of a batch that are looked at
_LAYERS = 4  # that are looked at, evenly over all
_SEEN = 8  # tokens that one must see, to have a choice


def measure(subject: Subject) -> Measured:
    """
    probe/attention_entropy: the entropy of attention over the logarithm of how many tokens are seen, the mean over
      heads, some layers and tokens that see at least 8; probe/attention_entropy_least: of the layer with the least.
    probe/router_load: of a mixture of experts, the share of tokens that go to the experts that most go to, as many as a
      token goes to.
    probe/dead_units: the share of the MLPs' units that are 0 for all tokens of some rows, where these can be.
    """
    c = subject.models["policy"].config
    params = virtual.realized(subject.params["policy"])
    if virtual.prefix_size(params) or not c.causal or subject.models["policy"].virtual_tokens:
        return Measured({})
    batch = {name: subject.batches[0][name][:_ROWS] for name in ("tokens", "segment_ids", "positions")}
    entropies, dead, load = jax.device_get(subject.programs.jit(_read)(params, batch))
    signals = {}
    if np.isfinite(entropies).any():
        signals["probe/attention_entropy"] = float(np.nanmean(entropies))
        signals["probe/attention_entropy_least"] = float(np.nanmin(entropies))
    if len(dead):
        signals["probe/dead_units"] = float(np.mean(dead))
    if len(load):
        signals["probe/router_load"] = float(np.mean(load))
    return Measured(signals)


def _read(parts: Parts, params: dict, batch: Batch) -> tuple[Array, Array, Array]:
    """Of some layers the entropy of attention, the share of dead units and the routers' load, [L] each; [0] where no
    unit can be dead, and without experts."""
    model = parts.models["policy"]
    layers = np.unique(np.linspace(1, model.config.num_layers, _LAYERS).astype(int)).tolist()
    _, states = model.hidden_at(params, batch, tuple(number - 1 for number in layers))
    entropies = [_entropy(model, params, x, batch, n) for x, n in zip(states, layers, strict=True)]
    dies = model.config.mlp == "relu" and not model.config.num_experts and model.config.block == "pre"
    dead = [_dead(model, params, x, batch, n) for x, n in zip(states, layers, strict=True)] if dies else []
    experts = bool(model.config.num_experts) and model.config.block == "pre"
    load = [_load(model, params, x, batch, n) for x, n in zip(states, layers, strict=True)] if experts else []
    return jnp.stack(entropies), jnp.asarray(dead), jnp.asarray(load)


def _entropy(model: Model, params: dict, x: Float[Array, "B T D"], batch: Batch, layer: int) -> Float[Array, ""]:
    c = model.config
    q, k, _ = model.attention_inputs(params, x, batch, layer)
    k = jnp.repeat(k, c.num_heads // c.num_kv_heads, axis=2)
    scores = jnp.einsum("bthd,bshd->bhts", q.astype(jnp.float32), k.astype(jnp.float32)) * c.scale
    if c.attention_softcap:
        scores = c.attention_softcap * jnp.tanh(scores / c.attention_softcap)
    segments, place = batch["segment_ids"], jnp.arange(x.shape[1])
    same = (segments[:, :, None] == segments[:, None, :]) & (segments[:, :, None] > 0)
    seen = same & (place[:, None] >= place[None])[None]
    probs = jax.nn.softmax(jnp.where(seen[:, None], scores, -1e30), axis=-1)
    entropy = -jnp.sum(jnp.where(seen[:, None], probs * jnp.log(probs + 1e-30), 0.0), axis=-1)
    count = jnp.sum(seen, axis=-1)[:, None]
    there = jnp.broadcast_to(count >= _SEEN, entropy.shape)
    share = entropy / jnp.log(jnp.maximum(count, 2).astype(jnp.float32))
    return jnp.sum(jnp.where(there, share, 0.0)) / jnp.sum(there, dtype=jnp.float32)


def _dead(model: Model, params: dict, x: Float[Array, "B T D"], batch: Batch, layer: int) -> Float[Array, ""]:
    """Of one layer: its MLP reads the sum of its input and attention, and here the input alone."""
    p = params_lib.layer(params["layers"], layer - 1)
    y = blocks.linear(p["mlp"]["up"], blocks.norm(model.config, p["mlp_norm"], x))
    alive = jnp.any((batch["segment_ids"] > 0)[..., None] & (y > 0), axis=(0, 1))
    return 1 - jnp.mean(alive.astype(jnp.float32))


def _load(model: Model, params: dict, x: Float[Array, "B T D"], batch: Batch, layer: int) -> Float[Array, ""]:
    """Of one layer: its router reads the sum of its input and attention, and here the input alone."""
    c, p = model.config, params_lib.layer(params["layers"], layer - 1)
    y = blocks.norm(c, p["mlp_norm"], x).astype(jnp.float32)
    logits = blocks.linear(p["mlp"]["router"], y).reshape(-1, c.num_experts)
    _, experts = moe.route(logits, c.experts_per_token, c.normalize_router)
    real = (batch["segment_ids"] > 0).reshape(-1)[:, None].astype(jnp.float32)
    counts = jnp.sum(jax.nn.one_hot(experts, c.num_experts) * real[..., None], axis=(0, 1))
    return jnp.sum(jax.lax.top_k(counts, c.experts_per_token)[0]) / jnp.sum(counts)
