"""The head of a model, and the one scan that runs hidden states through it: no array of size [B, T, V] is ever held.

Logits are computed a chunk of time at a time and handed to a function `compare`, which says what is wanted of them: a
loss, the log-probabilities of some tokens, the likeliest tokens. A loss over the vocabulary is such a function and one
call of `weighted_sum` (which computes the gradient in the forward pass, while the logits are there), of `token_values`
(which computes the logits again in the backward pass) or of `detached_values`.

Axes: B batch, T time, t the time of one chunk, D model, V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero, custom_vjp_primal_tree_values
from jaxtyping import Array, Float, Int, PyTree

from research.devices import sharding
from research.devices.sharding import Rules
from research.ops.chunks import Chunks, chunk_size, time_parts
from research.ops.cpu import few_rows


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("stored", "bias", "added"),
    meta_fields=("softcap", "by_token", "rules", "added_from", "turned"),
)
@dataclasses.dataclass(frozen=True)
class Head:
    """Turns hidden states into logits: softcap * tanh((hidden @ kernel + bias) / softcap).

    Attributes:
      stored: the kernel as it lies in memory: [D, V], or [V, D] with `by_token`.
      bias: [V], or None.
      softcap: 0 means that logits aren't capped (Gemma 2, arXiv:2408.00118, section 2).
      by_token: `stored` is an embedding that the model shares with its head. Loops carry it as it is: XLA would write
        out its transpose.
      rules: logical axis -> mesh axes: how the mesh in context cuts hidden states and kernel. None where there is none.
      added: the kernel of n tokens that stands in the place of theirs in `stored`, whose axes it has; None for none. It
        takes their gradient, so that it may be trained where `stored` isn't.
      added_from: the first of these tokens.
      turned: `stored` is [V, D] for the sake of products of few hidden states (ops.cpu.few_rows).
    """

    stored: Float[Array, "D V"] | Float[Array, "V D"]
    bias: Float[Array, " V"] | None
    softcap: float
    by_token: bool = False
    rules: Rules | None = None
    added: Float[Array, "D n"] | Float[Array, "n D"] | None = None
    added_from: int = 0
    turned: bool = False

    @property
    def kernel(self) -> Float[Array, "D V"]:
        """[D, V], whichever way it is stored, with the added tokens in their place."""
        kernel = self.stored.T if self.by_token else self.stored
        if self.added is None:
            return kernel
        return self._with_added(kernel, self.added.T if self.by_token else self.added)

    @property
    def size(self) -> int:
        """V."""
        return self.stored.shape[self.axes.index("v")]

    @property
    def added_to(self) -> int:
        """The token after the last of `added`."""
        return self.added_from + (0 if self.added is None else self.added.shape[self.axes.index("v")])

    @property
    def axes(self) -> str:
        """Of `stored`: "dv" or "vd"."""
        return "vd" if self.by_token else "dv"

    def logits(self, hidden: Float[Array, "*B D"], columns: Int[Array, " C"] | None = None) -> Float[Array, "*B V"]:
        """Logits in float32 (float64 where hidden states are); the product runs in the dtype of `hidden`.

        Args:
          hidden: [..., D].
          columns: tokens; the logits are then [..., C], of these alone.
        """
        head = self if columns is None else self.columns(columns)
        kernel, dtype = head.stored.astype(hidden.dtype), accumulator(hidden)
        if head.turned:
            logits = few_rows.product(hidden, kernel)
        else:
            logits = jnp.einsum(f"...d,{head.axes}->...v", hidden, kernel, preferred_element_type=dtype)
        if head.added is not None:
            kernel = head.added.astype(hidden.dtype)
            own = jnp.einsum(f"...d,{head.axes}->...v", hidden, kernel, preferred_element_type=dtype)
            logits = head._with_added(logits, own)
        if head.bias is not None:
            logits += head.bias.astype(dtype).reshape((1,) * (logits.ndim - 1) + (-1,))
        return head.softcap * jnp.tanh(logits / head.softcap) if head.softcap else logits

    def logits_gradient(self, logits: Float[Array, "*B V"], g: Float[Array, "*B V"]) -> Float[Array, "*B V"]:
        """From the gradient by `logits` to that by what the soft-cap and the bias get, hidden @ kernel."""
        return g * (1 - jnp.square(logits / self.softcap)) if self.softcap else g

    def columns(self, columns: Int[Array, " C"]) -> "Head":
        """The head of some tokens alone."""
        stored, bias = self._at(self.stored, columns), None if self.bias is None else self.bias[columns]
        if self.added is not None:
            own = (columns >= self.added_from) & (columns < self.added_to)
            added = self._at(self.added, jnp.clip(columns - self.added_from, 0, self.added_to - self.added_from - 1))
            stored = jnp.where(own[:, None] if self.by_token else own[None], added.astype(stored.dtype), stored)
        return dataclasses.replace(self, stored=stored, bias=bias, added=None, added_from=0)

    def first(self, size: int) -> "Head":
        """The head of the first `size` tokens."""
        if self.size == size:
            return self
        own = max(size - self.added_from, 0)
        added = None if self.added is None or not own else self._at(self.added, slice(own))
        bias = None if self.bias is None else self.bias[:size]
        return dataclasses.replace(self, stored=self._at(self.stored, slice(size)), bias=bias, added=added)

    def _at(self, kernel: Array, tokens: Any) -> Array:
        return kernel[tokens] if self.by_token else kernel[:, tokens]

    def _with_added(self, x: Float[Array, "*n V"], own: Float[Array, "*n A"]) -> Float[Array, "*n V"]:
        """`x` with what is of the added tokens in their place.

        Where V is whole on each device it is written into `x`, where it is sharded each element is chosen: devices then
        needn't talk.
        """
        if sharding.axis_parts("vocab", self.rules) == 1:
            return jax.lax.dynamic_update_slice_in_dim(x, own.astype(x.dtype), self.added_from, axis=-1)
        around = (self.added_from, self.size - self.added_to)
        tokens = jnp.arange(self.size).reshape((1,) * (x.ndim - 1) + (-1,))
        is_added = (tokens >= self.added_from) & (tokens < self.added_to)
        return jnp.where(is_added, jnp.pad(own.astype(x.dtype), [(0, 0)] * (x.ndim - 1) + [around]), x)

    def gathered(self, dtype: Any) -> "Head":
        """The kernel in `dtype` and with all of D on each device: gathered here once, and not in every chunk."""
        stored = constrain(self.stored.astype(dtype), self._kernel_axes(), self.rules)
        added = None if self.added is None else constrain(self.added.astype(dtype), (None, None), self.rules)
        return dataclasses.replace(self, stored=stored, added=added)

    def token_shards(self, hidden: Float[Array, "B T D"]) -> tuple[int, int]:
        """Into how many parts the mesh in context cuts B and T; 1 where it can't evenly."""
        parts = sharding.axis_parts("batch", self.rules)
        return 1 if hidden.shape[0] % parts else parts, time_parts(hidden.shape[1], self.rules)

    def gradients(
        self, hidden: Float[Array, "B t D"], g: Float[Array, "B t V"], wanted: "_Wanted", shards: tuple[int, int]
    ) -> tuple[Float[Array, "B t D"] | None, tuple[Array | None, Array | None]]:
        """What a chunk adds to the gradients, each None where it isn't wanted.

        Args:
          hidden: of the chunk.
          g: the gradient by hidden @ kernel, in the dtype of `hidden`.
          wanted: which gradients.
          shards: see `token_shards`.

        Returns:
          The gradient by `hidden`; and those by `stored` and `added`, in their shapes. Where tokens are sharded, these
          are [rows, times, ...]: a sum for each shard, which stays where it is. Chunks add up so, and devices talk once
          at the end.
        """
        own, dtype = None, accumulator(hidden)
        if self.added is not None:
            own = g[..., self.added_from : self.added_to]
            g = self._with_added(g, jnp.zeros_like(own))
        g_hidden = None
        if wanted.hidden:
            back = functools.partial(jnp.einsum, f"btv,{self.axes}->btd", preferred_element_type=dtype)
            g_hidden = back(g, self.stored) if own is None else back(g, self.stored) + back(own, self.added)
            g_hidden = g_hidden.astype(hidden.dtype)
        stored = self._kernel_gradient(hidden, g, shards, self._kernel_axes()) if wanted.kernel else None
        added = self._kernel_gradient(hidden, own, shards, (None, None)) if wanted.added else None
        return g_hidden, (stored, added)

    def _kernel_gradient(
        self, hidden: Float[Array, "B t D"], g: Float[Array, "B t C"], shards: tuple[int, int], axes: tuple
    ) -> Float[Array, "..."]:
        """The gradient by the kernel of some tokens, whose logical axes are `axes`."""
        dtype = accumulator(hidden)
        if shards == (1, 1):
            return jnp.einsum(f"btd,btv->{self.axes}", hidden, g, preferred_element_type=dtype)
        rows, times = shards
        hidden, g = (x.reshape(rows, x.shape[0] // rows, times, x.shape[1] // times, x.shape[2]) for x in (hidden, g))
        gradient = jnp.einsum(f"abctd,abctv->ac{self.axes}", hidden, g, preferred_element_type=dtype)
        return constrain(gradient, ("batch", "time", *axes), self.rules)

    def zero_gradients(
        self, wanted: "_Wanted", shards: tuple[int, int], dtype: Any
    ) -> tuple[Array | None, Array | None]:
        """Zeros in the shapes of the gradients by `stored` and `added`; see `gradients`."""
        stored = self._zeros(self.stored, shards, dtype, self._kernel_axes()) if wanted.kernel else None
        return stored, self._zeros(self.added, shards, dtype, (None, None)) if wanted.added else None

    def _zeros(self, kernel: Array, shards: tuple[int, int], dtype: Any, axes: tuple) -> Array:
        if shards == (1, 1):
            return jnp.zeros(kernel.shape, dtype)
        return constrain(jnp.zeros((*shards, *kernel.shape), dtype), ("batch", "time", *axes), self.rules)

    def _kernel_axes(self) -> tuple[str | None, ...]:
        """Of `stored` within a loop over chunks."""
        return tuple({"d": None, "v": "vocab"}[axis] for axis in self.axes)


class Comparison(NamedTuple):
    """What a function `compare` says of a chunk's logits [B, t, V].

    Attributes:
      values: what may be differentiated: [B, t] for `weighted_sum`, a pytree of such arrays for `token_values`.
      details: pytree of arrays [B, t, ...] that take no gradient.
      gradient: (weights, a pytree like `values`) -> the gradient [B, t, V] of sum(weights * values) by the logits. It
        isn't called where no gradient is wanted, which `detached_values` never does.
    """

    values: PyTree
    details: PyTree = None
    gradient: Callable[[PyTree], Float[Array, "B t V"]] | None = None


# (logits [B, t, V], extras of the chunk, *shared) -> Comparison
Compare = Callable[..., Comparison]


def differentiated(function: Callable[..., PyTree]) -> Compare:
    """The `compare` of a function (logits, extras, *shared) -> values, whose gradient is left to jax."""

    def compare(logits: Float[Array, "B t V"], extras: PyTree, *shared: PyTree) -> Comparison:
        values, pullback = jax.vjp(lambda x: function(x, extras, *shared), logits)
        return Comparison(values, None, lambda weights: pullback(weights)[0])

    return compare


def weighted_sum(
    compare: Compare,
    hidden: Float[Array, "B T D"],
    head: Head,
    weights: Float[Array, "B T"],
    extras: PyTree = (),
    *,
    shared: tuple = (),
    skip: bool = False,
    chunk: int | None = None,
) -> tuple[Float[Array, ""], Float[Array, "B T"], PyTree]:
    """The sum over tokens of weight times value. Gradients are computed in the forward pass, a chunk at a time.

    In the backward pass they are only scaled: nothing is stored for it but the gradient itself, and nothing computed
    twice. What isn't differentiated costs nothing: with a frozen kernel there is no gradient [D, V]. Differentiable
    once, in reverse mode, with respect to hidden, head and weights.

    Args:
      compare: see Comparison. Its `values` are [B, t].
      hidden: last hidden states.
      head: the unembedding.
      weights: of each token.
      extras: pytree of arrays [B, T, ...] that are cut into chunks as the hidden states are, such as targets.
      shared: what `compare` gets whole, such as another model's head.
      skip: a position of weight 0 is left out: nothing in it is read, NaN included, and its values are 0.
      chunk: positions per chunk; by default what ops.chunks finds fit for each device.

    Returns:
      The sum, the values [B, T] and the details. Only the sum has a gradient.
    """
    sizes = [chunk or chunk_size(hidden, head.size, head.rules, frozen=frozen) for frozen in (False, True)]
    scan = _Scan(compare, sizes[0], skip, sizes[1])
    extras, shared = jax.lax.stop_gradient((extras, shared))
    return _weighted_sum(scan, hidden, head, weights, extras, shared)


def token_values(
    compare: Compare, hidden: Float[Array, "B T D"], head: Head, extras: PyTree = (), *, chunk: int | None = None
) -> PyTree:
    """The values of each token, all with gradients, whose backward pass computes each chunk's logits again.

    Args: see `weighted_sum`.
    """
    scan = _Scan(compare, chunk or chunk_size(hidden, head.size, head.rules))
    return _token_values(scan, hidden, head, jax.lax.stop_gradient(extras))


def detached_values(
    compare: Compare, hidden: Float[Array, "B T D"], head: Head, extras: PyTree = (), *, chunk: int | None = None
) -> PyTree:
    """The values of each token, without a gradient.

    Args: see `weighted_sum`.
    """
    scan = _Scan(compare, chunk or chunk_size(hidden, head.size, head.rules))
    hidden, head, extras = jax.lax.stop_gradient((hidden, head, extras))
    return scan.run(hidden, head, None, extras)[0]


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=(), meta_fields=("hidden", "kernel", "bias", "added")
)  # static, so that it may stand among the residuals of a backward pass
@dataclasses.dataclass(frozen=True)
class _Wanted:
    """Which gradients a backward pass will ask for."""

    hidden: bool
    kernel: bool
    bias: bool
    added: bool


@dataclasses.dataclass(frozen=True)
class _Scan:
    """The loop over chunks; see `weighted_sum`. `chunk_if_frozen` is of a kernel that takes no gradient; 0: `chunk`."""

    compare: Compare
    chunk: int
    skip: bool = False
    chunk_if_frozen: int = 0

    def run(
        self,
        hidden: Float[Array, "B T D"],
        head: Head,
        weights: PyTree,
        extras: PyTree,
        shared: tuple = (),
        wanted: _Wanted | None = None,
    ) -> tuple[PyTree, PyTree, Float[Array, "B T D"] | None, Head | None]:
        """Returns values and details [B, T, ...] and, where `wanted`, the gradients of sum(weights * values) by hidden
        and head, None for each that isn't."""
        frozen = self.chunk_if_frozen and wanted is not None and not wanted.kernel
        size = self.chunk_if_frozen if frozen else self.chunk
        chunks = Chunks(hidden.shape[1], size, time_parts(hidden.shape[1], head.rules))
        shards, zeros = head.token_shards(hidden), ((None, None), None)
        if wanted is not None:
            kernels = head.zero_gradients(wanted, shards, accumulator(hidden))
            zeros = kernels, jnp.zeros(head.bias.shape, accumulator(hidden)) if wanted.bias else None
        body = functools.partial(self._body, head.gathered(hidden.dtype), shared, wanted, shards)
        sums, (out, g_hidden) = jax.lax.scan(body, zeros, jax.tree.map(chunks.split, (hidden, weights, extras)))
        values, details = jax.tree.map(chunks.join, out)
        if wanted is None:
            return values, details, None, None
        (stored, added), bias = sums
        if stored is not None:
            stored = _over_shards(stored, shards).astype(head.stored.dtype)
        if added is not None:
            added = _over_shards(added, shards).astype(head.added.dtype)
        if bias is not None:
            bias = bias.astype(head.bias.dtype)
        g_hidden = None if g_hidden is None else chunks.join(g_hidden)
        return values, details, g_hidden, dataclasses.replace(head, stored=stored, bias=bias, added=added)

    def _body(self, head: Head, shared: tuple, wanted: _Wanted | None, shards: tuple[int, int], sums, x):
        """One chunk: adds to the gradients by kernel and bias, and returns what is wanted of its tokens."""
        hidden, weights, extras = x
        if self.skip:
            present = weights != 0
            hidden = jnp.where(present[:, :, None], hidden, 0)  # NaN times a gradient of 0 would be NaN
        logits = head.logits(hidden)
        values, details, gradient = self.compare(logits, extras, *shared)
        if self.skip:
            values, details = jax.tree.map(lambda v: jnp.where(present, v, 0), (values, details))
        if wanted is None:
            return sums, ((values, details), None)
        g = gradient(jax.tree.map(lambda w: w.astype(logits.dtype), weights))
        if self.skip:
            g = jnp.where(present[:, :, None], g, 0)
        g = head.logits_gradient(logits, g)
        g_bias = jnp.sum(g, axis=(0, 1)) if wanted.bias else None
        g_hidden, g_kernels = head.gradients(hidden, g.astype(hidden.dtype), wanted, shards)
        return jax.tree.map(jnp.add, sums, (g_kernels, g_bias)), ((values, details), g_hidden)


def _over_shards(gradient: Float[Array, "..."], shards: tuple[int, int]) -> Float[Array, "..."]:
    """The sum of what Head.gradients keeps for each shard."""
    return gradient if shards == (1, 1) else jnp.sum(gradient, axis=(0, 1))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _weighted_sum(scan: _Scan, hidden, head, weights, extras, shared):
    values, details, _, _ = scan.run(hidden, head, weights, extras, shared)
    return jnp.sum(weights.astype(values.dtype) * values), values, details


def _weighted_sum_forward(scan: _Scan, hidden, head, weights, extras, shared):
    wanted = _wanted(hidden, head)
    args = custom_vjp_primal_tree_values((hidden, head, weights, extras, shared))
    values, details, *gradients = scan.run(*args, wanted)
    weights = args[2]
    total = jnp.sum(weights.astype(values.dtype) * values)
    return (total, values, details), (*gradients, values.astype(weights.dtype))


def _weighted_sum_backward(scan: _Scan, residuals, cotangents):
    g = cotangents[0]
    if isinstance(g, SymbolicZero):
        return (None,) * 5
    scale = lambda x: (g * x.astype(g.dtype)).astype(x.dtype)  # noqa: E731
    return *jax.tree.map(scale, residuals), None, None


_weighted_sum.defvjp(_weighted_sum_forward, _weighted_sum_backward, symbolic_zeros=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _token_values(scan: _Scan, hidden, head, extras):
    return scan.run(hidden, head, None, extras)[0]


def _token_values_forward(scan: _Scan, hidden, head, extras):
    wanted = _wanted(hidden, head)
    args = custom_vjp_primal_tree_values((hidden, head, extras))
    return _token_values(scan, *args), (args, wanted)


def _token_values_backward(scan: _Scan, residuals, cotangents):
    (hidden, head, extras), wanted = residuals
    is_zero = lambda x: isinstance(x, SymbolicZero)  # noqa: E731
    whole = lambda x: jnp.zeros(x.shape, x.dtype) if is_zero(x) else x  # noqa: E731
    weights = jax.tree.map(whole, cotangents, is_leaf=is_zero)
    return *scan.run(hidden, head, weights, extras, wanted=wanted)[2:], None


_token_values.defvjp(_token_values_forward, _token_values_backward, symbolic_zeros=True)


def _wanted(hidden: Any, head: Head) -> _Wanted:
    """From the arguments that jax gives to a forward pass, each of which knows whether it is differentiated."""
    bias, added = (x is not None and x.perturbed for x in (head.bias, head.added))
    return _Wanted(hidden.perturbed, head.stored.perturbed, bias, added)


def accumulator(x: Float[Array, "..."]) -> Any:
    """The dtype of logits and of what is computed from them: float32, or float64 where `x` is."""
    return jnp.float64 if x.dtype == jnp.float64 else jnp.float32


def constrain(x: Array, axes: tuple[str | None, ...], rules: Rules | None) -> Array:
    """sharding.constrain, which does nothing without rules."""
    return x if rules is None else sharding.constrain(x, axes, rules)
