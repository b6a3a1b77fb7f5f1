"""The transformer: one ModelConfig, pure functions over a pytree of arrays.

Axes: B batch, T time, S cached time, D model, H query heads, K key/value heads, h head dimension, F feed-forward,
V vocabulary, E experts, L layers. Parameters are stored in float32 with layers stacked along L; the computation is in
`dtype`.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from research import params as params_lib
from research.devices import sharding
from research.devices.sharding import Rules
from research.errors import InputError
from research.models import added_rows, blocks, decoding, kernels, virtual
from research.models.adapters.types import Adapter
from research.models.config import REMAT, ModelConfig
from research.models.decoding import Cache
from research.models.shared_prompts import SharedPrompts, joined, parted
from research.models.specs import Params, make_specs
from research.ops import moe
from research.ops.attention import self_attention
from research.ops.head import Head
from research.ops.moe import Routing
from research.ops.rope import Angles

Batch = Mapping[str, jax.Array]

# The parameters that follow the last hidden states; a head that is tied has none but the bias.
HEAD = ("head", "head_bias", "head_added", "head_bias_added")


class Model(NamedTuple):
    """Pure functions closed over a ModelConfig, never over parameters.

    Attributes:
      specs: pytree of ParamSpec.
      hidden: (params, batch) -> [B, T, D], the last hidden states after the final norm, in the compute dtype. `batch`
        holds tokens, segment_ids, positions, each [B, T] int32; of a prefix LM `prefix` too: without it, it is causal.
        With `dropout_keys`, uint32 [B, 2], an adapter leaves out a part of its inputs.
      hidden_at: (params, batch, layers) -> (hidden, states): the residual stream [B, T, D] after each of the layers,
        which are numbered from 1; 0 is the embedding, and negative ones count from the end.
      routed: as `hidden_at`, of a mixture of experts: (hidden, states, Routing of all layers).
      attention_inputs: (params, state, batch, layer) -> queries [B, T, H, h], keys and values [B, T, K, h] of a layer,
        as attention takes them, from the state before it.
      unembed: (params) -> Head, kernel [D, V] or [D, num_labels].
      rules: logical axis -> mesh axes, of all that these functions lay out on the mesh in context.
      init_cache: (batch size, length S) -> empty Cache.
      unstack: (params, rows=1) -> params with "layers" as a tuple of trees, as `decode` and `unembed` want them for
        steps of so many rows. Decoding loops run it once, outside the loop: slicing stacked weights inside copies them
        at every token.
      decode: (unstacked params, tokens [B, T], positions [B, T], mask [B, T, S], cache, index) -> ([B, T, D], cache).
        Writes the keys and values of the T tokens from entry `index` of the cache on; `mask` says which of the S cached
        entries each token may see (sliding windows are applied on top, by cache index).
      of: the role whose parameters it shares, but for those that it has itself; "" for none.
      adapter: what is trained beside its kernels, and in its specs; None for none.
      synced: whether it follows the role `of`, of which it has what is trained as it was a while ago.
    """

    config: ModelConfig
    specs: Params
    hidden: Callable[[Params, Batch], jax.Array]
    hidden_at: Callable[..., tuple[jax.Array, tuple[jax.Array, ...]]]
    attention_inputs: Callable[..., tuple[jax.Array, jax.Array, jax.Array]]
    unembed: Callable[[Params], Head]
    rules: Rules
    init_cache: Callable[[int, int], Cache]
    unstack: Callable[..., Params]
    decode: Callable[..., tuple[jax.Array, Cache]]
    of: str = ""
    adapter: Adapter | None = None
    synced: bool = False
    routed: Callable[..., tuple[jax.Array, tuple[jax.Array, ...], Routing]] | None = None

    @property
    def virtual_tokens(self) -> int:
        """How many tokens stand before every document, with ids from config.vocab_size on; see models.virtual."""
        return self.adapter.virtual_tokens if self.adapter else 0

    @property
    def max_length(self) -> int:
        """The longest document that it may be given: config.max_length less what its adapter puts before each."""
        return self.config.max_length - (self.adapter.virtual_tokens + self.adapter.prefix if self.adapter else 0)


def make_model(config: ModelConfig, rules: Rules = sharding.RULES, adapter: Adapter | None = None) -> Model:
    """Returns the model's functions; `rules` maps logical axes to the mesh.

    Raises:
      InputError: the adapter doesn't fit the model.
    """
    rules = sharding.make_rules(rules)
    specs = make_specs(config)
    return Model(
        config=config,
        specs=adapter.specs(specs) if adapter else specs,
        hidden=functools.partial(hidden, config, rules),
        hidden_at=functools.partial(hidden_at, config, rules),
        attention_inputs=functools.partial(attention_inputs, config),
        unembed=functools.partial(unembed, config, rules),
        rules=rules,
        init_cache=functools.partial(decoding.init_cache, config, rules),
        unstack=functools.partial(decoding.unstack, config),
        decode=functools.partial(decoding.decode, config, rules),
        adapter=adapter,
        routed=functools.partial(routed, config, rules) if config.num_experts else None,
    )


def sharing(model: Model, prompts: SharedPrompts) -> Model:
    """The same model for batches whose rows share prompts: `hidden` and `hidden_at` compute these once."""
    return model._replace(
        hidden=functools.partial(model.hidden, prompts=prompts),
        hidden_at=functools.partial(model.hidden_at, prompts=prompts),
        routed=functools.partial(model.routed, prompts=prompts) if model.routed else None,
    )


def in_compute_dtype(model: Model) -> Params:
    """The specs of a model that isn't trained: kernels are in the dtype that they are used in."""
    dtype = jnp.dtype(model.config.dtype)
    return params_lib.tree_map(lambda s: dataclasses.replace(s, dtype=dtype) if s.contracts else s, model.specs)


def _layer(
    c: ModelConfig,
    rules: Rules,
    prompts: SharedPrompts | None,
    window: int,
    number: int | None,
    x: Float[Array, "B T D"],
    p: Params,
    documents: tuple[Int[Array, "B T"], Int[Array, "B T"] | None],
    angles: tuple[Angles | None, Angles | None],
    shared: Params | None,
) -> tuple[Float[Array, "B T D"], Routing | None]:
    """One layer of training: its output, and of a mixture of experts what the router did.

    Args:
      p: its parameters, or with a `number` a stack that it is taken from; see _Stack.
      documents: the batch's segment_ids and prefix.
      prompts, shared: see _Stack.
    """
    p = p if number is None else jax.tree.map(lambda w: w[number], p)
    p = kernels.with_shared(p, shared)

    def attend(y: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        q, k, v = blocks.project_qkv(c, p["attention"], y, angles[1] if window else angles[0])
        q, k, v = (parted(prompts, x) for x in (q, k, v))
        q = sharding.constrain(q, ("batch", "time", "heads", "head_dim"), rules)
        k = sharding.constrain(k, ("batch", "time", "kv_heads", "head_dim"), rules)
        v = sharding.constrain(v, ("batch", "time", "kv_heads", "head_dim"), rules)
        y = self_attention(
            q,
            k,
            v,
            documents[0],
            prefix=documents[1],
            scale=c.scale,
            causal=c.causal,
            window=window,
            softcap=c.attention_softcap,
            memory=virtual.memory(p["attention"], q.dtype, rules),
            implementation=c.attention,
            spec=sharding.partition(("batch", "time", "heads", "head_dim"), rules),
        )
        return blocks.linear(p["attention"]["o"], joined(prompts, y), contract=2, precision=c.precision)

    x, choices = blocks.block(c, rules, p, x, attend)
    choices = [parted(prompts, y) for y in choices or ()]
    return x, moe.routing(*choices, (documents[0] > 0).astype(jnp.float32)) if choices else None


@dataclasses.dataclass(frozen=True, eq=False)
class _Stack:
    """The layers of a model and what all of them read of a batch.

    They run under a scan, one period of config.sliding_window at a time.

    Attributes:
      layers: params["layers"], which may lie in pieces (params.cut).
      documents: the batch's segment_ids and prefix.
      angles: RoPE's, of layers without and with a window.
      dropout_keys: uint32 [B, 2]; None where nothing is left out.
      shared: what VeRA's maps of all layers read (kernels.with_shared); None without it.
      prompts: how the rows share prompts, which x and the angles are joined by; None where they don't.
    """

    config: ModelConfig
    rules: Rules
    layers: Params
    documents: tuple[Int[Array, "B T"], Int[Array, "B T"] | None]
    angles: tuple[Angles | None, Angles | None]
    dropout_keys: Array | None
    shared: Params | None
    prompts: SharedPrompts | None

    def run(
        self, x: Float[Array, "B T D"], first: int, stop: int
    ) -> tuple[Float[Array, "B T D"], list[Routing | None]]:
        """Layers `first` to `stop` - 1, counted from 0, which lie in one piece. What their routers did comes in pieces,
        each of them [layers, ...]; None without routers."""
        period = len(self.config.sliding_window)
        if period == 1:  # one layer a turn: with an axis for the period XLA would copy all weights
            x, routing = jax.lax.scan(lambda x, p: self._layer(x, p, 0), x, self._cut(first, stop))
            return x, [routing]
        start = min(-(-first // period) * period, stop)
        periods = (stop - start) // period
        end, routings = start + periods * period, []
        if first < start:
            x, routing = self._unrolled(x, self._cut(first, start), first)
            routings.append(routing)
        if periods:
            stacks = jax.tree.map(lambda w: w.reshape(periods, period, *w.shape[1:]), self._cut(start, end))
            x, routing = jax.lax.scan(lambda x, p: self._unrolled(x, p, scanned=True), x, stacks)
            routings.append(jax.tree.map(lambda y: y.reshape(periods * period, *y.shape[2:]), routing))
        if end < stop:
            x, routing = self._unrolled(x, self._cut(end, stop))
            routings.append(routing)
        return x, routings

    def _cut(self, first: int, stop: int) -> Params:
        """Layers `first` to `stop` - 1, stacked."""
        layers, numbers = params_lib.layer_range(self.layers, first, stop), jnp.arange(first, stop)
        if self.dropout_keys is not None:
            layers = kernels.with_dropout_keys(layers, self.dropout_keys, numbers)
        return blocks.with_divisors(self.config, layers, numbers)

    def _unrolled(
        self, x: Float[Array, "B T D"], stack: Params, first: int = 0, scanned: bool = False
    ) -> tuple[Float[Array, "B T D"], Routing | None]:
        routings = []
        for number in range(jax.tree.leaves(stack)[0].shape[0]):
            x, routing = self._layer(x, stack, first + number, number, scanned)
            routings.append(routing)
        return x, jax.tree.map(lambda *layers: jnp.stack(layers), *routings)

    def _layer(
        self, x: Float[Array, "B T D"], p: Params, i: int, number: int | None = None, scanned: bool = True
    ) -> tuple[Float[Array, "B T D"], Routing | None]:
        """Layer i. With a `number`, `p` is a stack, and cut inside of what is recomputed, so that remat keeps no cut.

        Outside a scan the compiler must be kept from sharing what is to be computed again.
        """
        c = self.config
        window = c.sliding_window[i % len(c.sliding_window)]
        layer = functools.partial(_layer, c, self.rules, self.prompts, window, number)
        if c.remat != "none":
            layer = jax.checkpoint(layer, policy=REMAT[c.remat], prevent_cse=not scanned)
        return layer(x, p, self.documents, self.angles, self.shared)


def hidden(
    c: ModelConfig, rules: Rules, params: Params, batch: Batch, prompts: SharedPrompts | None = None
) -> Float[Array, "B T D"]:
    """See Model.hidden and `sharing`."""
    return hidden_at(c, rules, params, batch, (), prompts)[0]


def hidden_at(
    c: ModelConfig,
    rules: Rules,
    params: Params,
    batch: Batch,
    layers: Sequence[int],
    prompts: SharedPrompts | None = None,
) -> tuple[Float[Array, "B T D"], tuple[Float[Array, "B T D"], ...]]:
    """See Model.hidden_at and `sharing`."""
    return routed(c, rules, params, batch, layers, prompts)[:2]


def routed(
    c: ModelConfig,
    rules: Rules,
    params: Params,
    batch: Batch,
    layers: Sequence[int],
    prompts: SharedPrompts | None = None,
) -> tuple[Float[Array, "B T D"], tuple[Float[Array, "B T D"], ...], Routing | None]:
    """See Model.routed and `sharing`; without experts there is no Routing.

    A scan ends at each of `layers` and another begins, so that only these states are held; and where a piece of the
    layers ends (params.cut), so that no array of all of them is made.
    """
    numbers = [layer_number(c, layer) for layer in layers]
    params = virtual.realized(params)
    segment_ids, positions = batch["segment_ids"], batch["positions"] + virtual.prefix_size(params)
    documents = (segment_ids, batch.get("prefix") if c.prefix else None)
    lengths = joined(prompts, blocks.document_lengths(segment_ids, positions))
    tokens, positions = joined(prompts, batch["tokens"]), joined(prompts, positions)
    types = joined(prompts, batch["token_types"]) if "token_types" in batch else None
    angles, shared = blocks.rotations(c, positions, lengths), params.get("vera")
    stack = _Stack(c, rules, params["layers"], documents, angles, batch.get("dropout_keys"), shared, prompts)
    x = blocks.embed(c, rules, params, tokens, positions, types)
    states, first, routings = {0: x}, 0, []
    for stop in sorted({*numbers, *(piece.stop for piece in params_lib.layer_pieces(params["layers"]))} - {0}):
        with jax.named_scope("layers"):
            x, more = stack.run(x, first, stop)
        routings += more
        first = stop
        if stop in numbers:
            states[stop] = x
    routing = jax.tree.map(lambda *pieces: jnp.concatenate(pieces), *routings)
    x = parted(prompts, blocks.final(c, params, x))
    return x, tuple(parted(prompts, states[number]) for number in numbers), routing


def layer_number(c: ModelConfig, layer: int) -> int:
    """The number of a layer that may count from the end. Raises InputError where there is no such layer."""
    if not -c.num_layers - 1 <= layer <= c.num_layers:
        raise InputError(f"layer {layer}: the model has {c.num_layers}, numbered from 1; 0 is the embedding.")
    return layer if layer >= 0 else c.num_layers + 1 + layer


def attention_inputs(
    c: ModelConfig, params: Params, x: Float[Array, "B T D"], batch: Batch, layer: int
) -> tuple[Float[Array, "B T H h"], Float[Array, "B T K h"], Float[Array, "B T K h"]]:
    """See Model.attention_inputs."""
    i = layer_number(c, layer) - 1
    if i < 0:
        raise InputError(f"layer {layer}: is the embedding, which has no attention. The first layer is 1.")
    if virtual.prefix_size(virtual.realized(params)):
        raise InputError(
            f"layer {layer}: attention can't be compared where each query sees a prefix too. Compare hidden states, or "
            "use another adapter."
        )
    p = kernels.with_shared(params_lib.layer(params["layers"], i), params.get("vera"))
    p = blocks.with_divisors(c, p, i)
    if c.block in ("pre", "sandwich", "parallel"):
        x = blocks.norm(c, p["attention_norm"], x)
    positions = batch["positions"]
    angles = blocks.rotations(c, positions, blocks.document_lengths(batch["segment_ids"], positions))
    return blocks.project_qkv(
        c, p["attention"], x, angles[1] if c.sliding_window[i % len(c.sliding_window)] else angles[0]
    )


def unembed(c: ModelConfig, rules: Rules, params: Params) -> Head:
    """The kernel that turns hidden states into logits, its bias and soft-cap."""
    tied = "head" not in params
    kernel, bias = params["embed" if tied else "head"], params.get("head_bias")
    turned = "head_turned" in params
    if turned:
        kernel = params["head_turned"]
    head = Head(kernel, bias, c.logit_softcap, tied or turned, rules, turned=turned)
    if not c.added_rows or c.num_labels:
        return head
    if c.head_bias:
        bias = added_rows.put(c, bias, params["head_bias_added"], axis=0)
    added = params["embed_added"] if tied else params["head_added"].T if turned else params["head_added"]
    return dataclasses.replace(head, bias=bias, added=added, added_from=c.added_from)
