"""Attention: one reference, the kernels that are faster where they apply, and the rule that chooses.

Axes: B batch, T query time, S key time, H query heads, K key/value heads, G = H / K query heads that share a
key/value head (grouped-query attention, arXiv:2305.13245), h head dimension. K and V are never repeated to H heads:
the G query heads of a key/value head are rows of one matmul, [B, K, T * G, h] against [B, K, S, h].
"""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding, PartitionSpec

from research.devices import sharding
from research.errors import InputError, did_you_mean

Array = jax.Array
_dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

IMPLEMENTATIONS = ("auto", "reference", "xla", "cpu", "cudnn", "splash")

# Finite, so that a row that may see nothing gets the mean of the values and not NaN.
_MASKED = -0.7 * float(np.finfo(np.float32).max)
_NAME = "attention"
_MIN_ROWS = 64  # of a block of "cpu": smaller matmuls are slow


def self_attention(
    q: Array,
    k: Array,
    v: Array,
    segment_ids: Array,
    *,
    scale: float,
    causal: bool = True,
    window: int = 0,
    softcap: float = 0.0,
    implementation: str = "auto",
    spec: PartitionSpec | None = None,
    interpret: bool = False,
) -> Array:
    """softmax(cap(scale * q k^T) + mask) v over packed rows; scores and softmax in float32.

    A token sees the tokens of its own segment only. Padding is a segment of its own (id 0): its output is finite
    and means nothing. Rematerialisation policies know what the backward pass needs of the forward pass by the name
    "attention" (jax.checkpoint_policies.save_only_these_names): with "cpu" and "splash" nothing of the attention is
    then computed again, the others repeat their scores.

    Implementations:
      reference: plain jax. Holds [B, H, T, T] float32, in the backward pass too. What the others are tested against.
      xla: jax.nn.dot_product_attention; the same memory. No softcap.
      cpu: blocks of query rows against the keys that they can see, with a gradient that recomputes the scores
        (FlashAttention's, arXiv:2205.14135), in plain jax. O(T) memory is kept for the backward pass, which must
        be in reverse mode. Partitions over B and heads like any jax code.
      cudnn: flash attention of NVIDIA GPUs. float16 or bfloat16, h a multiple of 8 and at most 128 (256 from Hopper
        on), T even, no softcap. jax takes packed segments and windows only as a dense mask, [B, 1, T, T] in q.dtype,
        which the backward pass doubles by a gradient that nobody reads; the causal half is still skipped.
      splash: Pallas kernel for TPUs. Segments, windows, softcap. T is padded to a multiple of 128. XLA can't
        partition it: under a mesh of more than one device (jax.set_mesh) it needs `spec`.
      auto: by sharding.platform(). cpu: "cpu" for T > 64, where there is more than one block. tpu: "splash" for
        T >= 128. gpu: "cudnn" on CUDA devices of compute capability 8.0 and later. "reference" for shorter T, on
        other platforms, and where that kernel can't do what is asked by the limits above.

    Where `spec` cuts T (sequence parallelism), each device has the queries of its part of T, and gathers the keys and
    values of all of it: with grouped queries they are small beside the rest, and the causal mask can be skipped over by
    splash as ever (for which T has to be a multiple of 128 times the parts). "cpu" has no such form.

    Args:
      q: [B, T, H, h], floating.
      k, v: [B, T, K, h] in q's dtype; H is a multiple of K.
      segment_ids: [B, T] int32.
      scale: of the scores; usually h ** -0.5.
      causal: a token doesn't see those after it.
      window: a token sees those less than `window` away, itself included: t - window + 1 .. t under causal. 0 is off.
      softcap: scores become softcap * tanh(scores / softcap) before the mask (Gemma 2, arXiv:2408.00118). 0 is off.
      implementation: one of IMPLEMENTATIONS.
      spec: how q's axes (B, T, heads, h) lie on the mesh in context; k and v lie likewise. "splash" needs it, and so
        does a T that is cut.
      interpret: runs the kernel of "splash" without a TPU, slowly; for tests.

    Returns:
      [B, T, H, h] in q.dtype.

    Raises:
      InputError: an unknown implementation, one that can't do what is asked, or heads that don't group.
    """
    if implementation not in IMPLEMENTATIONS:
        raise InputError(
            f"implementation={implementation!r}: no such one.{did_you_mean(implementation, IMPLEMENTATIONS)}"
        )
    if q.shape[2] % k.shape[2]:
        raise InputError(f"q has {q.shape[2]} heads, not a multiple of the {k.shape[2]} of k and v. Change either.")
    if implementation == "auto":
        implementation = _choose(q, softcap, spec)
    elif reason := _why_not(implementation, q, softcap, spec):
        raise InputError(f"implementation={implementation!r}: {reason}. Or use 'auto' or 'reference'.")

    if implementation == "cpu":
        return _cpu(q, k, v, segment_ids, scale, causal, window, softcap)
    if implementation == "splash":
        return _splash(q, k, v, segment_ids, scale, causal, window, softcap, spec, interpret)

    def masked(q: Array, k: Array, v: Array, mask: Array, causal: bool) -> Array:
        if implementation == "reference":
            k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
            return cached_attention(q, k, v, mask, scale=scale, softcap=softcap)
        if implementation == "xla":
            return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], scale=scale, implementation="xla")
        return _cudnn(q, k, v, mask, scale, causal)

    if _time_parts(spec) == 1:
        return checkpoint_name(masked(q, k, v, _mask(segment_ids, causal, window), causal), _NAME)

    def local(q: Array, k: Array, v: Array, at: Array, queries: Array, keys: Array) -> Array:
        every = jnp.arange(keys.shape[1], dtype=jnp.int32)
        return masked(q, k, v, _seen(queries, keys, at, every, causal, window), causal=False)

    B, T, heads, h = spec
    here, whole = PartitionSpec(B, T), PartitionSpec(B)
    keys = PartitionSpec(B, None, heads, h)
    specs = (spec, keys, keys, PartitionSpec(T), here, whole)
    local = jax.shard_map(local, in_specs=specs, out_specs=spec, check_vma=False)
    index = jnp.arange(q.shape[1], dtype=jnp.int32)
    return checkpoint_name(local(q, k, v, index, segment_ids, segment_ids), _NAME)


def cached_attention(q: Array, k: Array, v: Array, mask: Array, *, scale: float, softcap: float) -> Array:
    """Attention of a few queries over cached keys and values: the reference arithmetic under any mask.

    Args:
      q: [B, T, H, h].
      k, v: [B, K, S, h] in q's dtype: as the products want them, for a cache is read far oftener than written.
      mask: [B, T, S] bool, True where a query sees a key. A query that sees none gets a finite, meaningless output.
      scale, softcap: see self_attention.

    Returns:
      [B, T, H, h] in q.dtype.
    """
    s = _scores(_rows(q, k.shape[1]), k, mask, scale, softcap)
    p = jax.nn.softmax(s, axis=-1).astype(v.dtype)
    return _heads(jnp.einsum("bkrs,bksh->bkrh", p, v), q.shape[1])


def _choose(q: Array, softcap: float, spec: PartitionSpec | None) -> str:
    """The rule of "auto" (see self_attention)."""
    platform, T, h = sharding.platform(), q.shape[1], q.shape[3]
    kernel = "reference"
    if platform == "cpu" and T > _MIN_ROWS:
        kernel = "cpu"
    elif platform == "tpu" and T >= 128:
        kernel = "splash"
    elif platform == "gpu" and _capability() >= (8.0 if h <= 128 else 9.0):
        kernel = "cudnn"
    return "reference" if _why_not(kernel, q, softcap, spec) else kernel


def _capability() -> float:
    """Compute capability of this process's first GPU; 0 if it isn't a CUDA device."""
    value = str(getattr(jax.local_devices()[0], "compute_capability", ""))
    return float(value) if re.fullmatch(r"\d+\.\d+", value) else 0.0


def _why_not(implementation: str, q: Array, softcap: float, spec: PartitionSpec | None) -> str:
    """Why `implementation` can't do what is asked, naming the argument; "" if it can."""
    T, h = q.shape[1], q.shape[3]
    if implementation in ("xla", "cudnn") and softcap:
        return f"it has no softcap, and softcap={softcap}. Use 'cpu' or 'splash'"
    if implementation == "cudnn":
        if q.dtype not in (jnp.bfloat16, jnp.float16):
            return f"it takes bfloat16 and float16, and q is {q.dtype}. Change the compute dtype"
        if h % 8 or h > 256:
            return f"it takes head dimensions that are multiples of 8 up to 256, and q has {h}"
        if T % 2:
            return f"it takes sequences of even length, and q has {T}. Pad by one"
    if implementation == "cpu" and _time_parts(spec) > 1:
        return f"T must be whole on each device, and spec={spec}. Use 'reference'"
    if implementation == "splash":
        mesh, parts = jax.sharding.get_abstract_mesh(), _time_parts(spec)
        if spec is None and not mesh.empty and mesh.size > 1:
            return f"under a mesh of {mesh.size} devices it must know how q is laid out, and spec=None. Give spec"
        if spec is not None and any(sharding.num_parts(axes) > 1 for axes in spec[3:]):
            return f"h must be whole on each device, and spec={spec}. Split B, T and heads only"
        if parts > 1 and T % (128 * parts):
            return f"T is cut into {parts}, each of which must be a multiple of 128, and q has {T}"
    return ""


def _time_parts(spec: PartitionSpec | None) -> int:
    """Into how many parts the mesh in context cuts T."""
    return 1 if spec is None or len(spec) < 2 else sharding.num_parts(spec[1])


def _mask(segment_ids: Array, causal: bool, window: int, t: slice = slice(None), s: slice = slice(None)) -> Array:
    """[B, T, S] bool: whether queries at `t` see keys at `s`."""
    index = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)
    return _seen(segment_ids[:, t], segment_ids[:, s], index[t], index[s], causal, window)


def _seen(queries: Array, keys: Array, t: Array, s: Array, causal: bool, window: int) -> Array:
    """[B, T, S] bool, of segment ids [B, T] and [B, S] at the times t [T] and s [S]."""
    ahead = (t[:, None] - s[None, :])[None]
    mask = queries[:, :, None] == keys[:, None, :]
    if causal:
        mask &= ahead >= 0
    if window:
        mask &= jnp.abs(ahead) < window
    return mask


def _rows(x: Array, K: int) -> Array:
    """[B, T, H, h] -> [B, K, T * G, h]: the G heads that share keys are neighbouring rows."""
    B, T, H, h = x.shape
    return x.reshape(B, T, K, H // K, h).swapaxes(1, 2).reshape(B, K, T * (H // K), h)


def _heads(x: Array, T: int) -> Array:
    """The inverse of _rows: [B, K, T * G, h] -> [B, T, H, h]."""
    B, K, R, h = x.shape
    return x.reshape(B, K, T, R // T, h).swapaxes(1, 2).reshape(B, T, K * (R // T), h)


def _grouped(x: Array, G: int) -> Array:
    """[B, K, T * G, n] -> [B, K, T, G, n]."""
    B, K, R, n = x.shape
    return x.reshape(B, K, R // G, G, n)


def _scores(q: Array, k: Array, mask: Array, scale: float, softcap: float) -> Array:
    """Masked scores [B, K, T * G, S] float32 of q [B, K, T * G, h] and k [B, K, S, h]."""
    s = _dot("bkrh,bksh->bkrs", q, k) * scale
    if softcap:
        s = softcap * jnp.tanh(s / softcap)
    return jnp.where(mask[:, None, :, None], _grouped(s, q.shape[2] // mask.shape[1]), _MASKED).reshape(s.shape)


def _blocks(T: int, causal: bool, window: int) -> list[tuple[slice, slice]]:
    """Blocks of query times, each with the key times that any of them sees.

    At most 8 blocks, for each is compiled on its own, and 8 already skip 7/16 of the work.
    """
    size = _MIN_ROWS * -(-T // (8 * _MIN_ROWS))
    blocks = []
    for start in range(0, T, size):
        stop = min(start + size, T)
        first = max(0, start - window + 1) if window else 0
        last = stop if causal else min(T, stop + window - 1) if window else T
        blocks.append((slice(start, stop), slice(first, last)))
    return blocks


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6, 7))
def _cpu(
    q: Array, k: Array, v: Array, segment_ids: Array, scale: float, causal: bool, window: int, softcap: float
) -> Array:
    return _cpu_forward(q, k, v, segment_ids, scale, causal, window, softcap)[0]


# Both passes write each block's result over the queries that it came from. Nothing else would order the blocks, and
# XLA, left free, computes the scores of all of them before it uses any: the memory of a whole [T, T] again.
#
# What is computed element by element has the shape [B, K, T, G, S], and not that of the products, [B, K, T * G, S]: XLA
# then doesn't write it over its operand, and its older emitters (devices/compilation.py) vectorise no loop that does.


def _cpu_forward(q, k, v, segment_ids, scale, causal, window, softcap):
    T, K, G = q.shape[1], k.shape[2], q.shape[2] // k.shape[2]
    queries, keys, values = _rows(q, K), k.swapaxes(1, 2), v.swapaxes(1, 2)
    logsumexps = []
    for t, s in _blocks(T, causal, window):
        rows = slice(t.start * G, t.stop * G)
        mask = _mask(segment_ids, causal, window, t, s)
        scores = _scores(queries[:, :, rows], keys[:, :, s], mask, scale, softcap)
        top = scores.max(axis=-1, keepdims=True)
        p = jnp.exp(_grouped(scores, G) - _grouped(top, G)).reshape(scores.shape)
        total = p.sum(axis=-1, keepdims=True)
        out = _dot("bkrs,bksh->bkrh", p.astype(v.dtype), values[:, :, s]) / total
        queries = queries.at[:, :, rows].set(out.astype(q.dtype))
        logsumexps.append(top + jnp.log(total))
    out = checkpoint_name(_heads(queries, T), _NAME)
    logsumexp = checkpoint_name(jnp.concatenate(logsumexps, axis=2), _NAME)
    return out, (q, k, v, segment_ids, out, logsumexp)


def _cpu_backward(scale, causal, window, softcap, residuals, d_out):
    q, k, v, segment_ids, out, logsumexp = residuals
    T, K, G = q.shape[1], k.shape[2], q.shape[2] // k.shape[2]
    queries, keys, values, d_rows = _rows(q, K), k.swapaxes(1, 2), v.swapaxes(1, 2), _rows(d_out, K)
    delta = _rows(_dot("bthd,bthd->bth", d_out, out)[..., None], K)
    dk = dv = jnp.zeros(keys.swapaxes(2, 3).shape, jnp.float32)
    for t, s in _blocks(T, causal, window):
        rows = slice(t.start * G, t.stop * G)
        mask = _mask(segment_ids, causal, window, t, s)
        scores = _scores(queries[:, :, rows], keys[:, :, s], mask, scale, softcap)
        p = jnp.exp(_grouped(scores, G) - _grouped(logsumexp[:, :, rows], G)).reshape(scores.shape)
        dp = _dot("bkrh,bksh->bkrs", d_rows[:, :, rows], values[:, :, s])
        ds = (_grouped(p, G) * (_grouped(dp, G) - _grouped(delta[:, :, rows], G))).reshape(p.shape)
        if softcap:
            # Clipped, for masked scores are far out, and 0 * inf would be NaN there.
            ds *= 1 - jnp.clip(scores / softcap, -1, 1) ** 2
        p, ds = p.astype(v.dtype), ds.astype(q.dtype)
        # [h, S] and not [S, h]: the operand that has to be transposed is the small one.
        dk = dk.at[..., s].add(_dot("bkrh,bkrs->bkhs", queries[:, :, rows], ds))
        dv = dv.at[..., s].add(_dot("bkrh,bkrs->bkhs", d_rows[:, :, rows], p))
        dq = _dot("bkrs,bksh->bkrh", ds, keys[:, :, s]) * scale
        queries = queries.at[:, :, rows].set(dq.astype(q.dtype))
    dk = (dk * scale).transpose(0, 3, 1, 2).astype(k.dtype)
    return _heads(queries, T), dk, dv.transpose(0, 3, 1, 2).astype(v.dtype), None


_cpu.defvjp(_cpu_forward, _cpu_backward)


def _cudnn(q: Array, k: Array, v: Array, mask: Array, scale: float, causal: bool) -> Array:
    # The window is part of the mask: cuDNN has no sliding window beside a bias. is_causal lets it skip blocks.
    try:
        return jax.nn.dot_product_attention(
            q, k, v, mask=mask[:, None], scale=scale, is_causal=causal, implementation="cudnn"
        )
    except RuntimeError as error:  # no cuDNN here, or a limit of this GPU
        raise InputError(
            f"implementation='cudnn': {error} It needs an NVIDIA GPU and jax for CUDA "
            "(pip install 'understudy[gpu]'). Or use 'auto' or 'reference'."
        ) from error


def _splash(q, k, v, segment_ids, scale, causal, window, softcap, spec, interpret) -> Array:
    local = functools.partial(
        _splash_local, scale=scale, causal=causal, window=window, softcap=softcap, interpret=interpret
    )
    mesh, parts = jax.sharding.get_abstract_mesh(), _time_parts(spec)
    H = q.shape[2] // (sharding.num_parts(spec[2]) if spec is not None else 1)
    kernel = _splash_kernel(q.shape[1], H, parts, causal, window, softcap, interpret)
    local = functools.partial(_splash_local, scale=scale)
    if spec is not None and not mesh.empty:
        B, T, heads, h = spec
        keys = PartitionSpec(B, None, heads, h)
        kernel_spec = kernel.manual_sharding_spec(NamedSharding(mesh, PartitionSpec(None, T if parts > 1 else None)))
        specs = (kernel_spec, spec, keys, keys, PartitionSpec(B, T), PartitionSpec(B))
        # The kernel's outputs don't say over which mesh axes they vary, so that can't be checked.
        local = jax.shard_map(local, in_specs=specs, out_specs=spec, check_vma=False)
    return local(kernel, q, k, v, segment_ids, segment_ids)


def _splash_kernel(T: int, H: int, parts: int, causal: bool, window: int, softcap: float, interpret: bool) -> Any:
    """The kernel of H heads over a T that is cut into `parts`: it holds arrays about the mask, to be cut likewise."""
    # Imported here: Pallas takes a while, and only TPUs need it.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel_lib
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as mask_lib

    padded = -(-T // 128) * 128
    block = max(size for size in (128, 256, 384, 512) if padded % (size * parts) == 0)
    shape = (padded, padded)
    if window:
        mask = mask_lib.LocalMask(shape, (window - 1, 0 if causal else window - 1), 0)
    else:
        mask = mask_lib.CausalMask(shape) if causal else mask_lib.FullMask(shape)
    return kernel_lib.make_splash_mha(
        mask_lib.MultiHeadMask([mask] * H),
        block_sizes=kernel_lib.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
        attn_logits_soft_cap=softcap or None,
        residual_checkpoint_name=_NAME,
        head_shards=1,
        q_seq_shards=parts,
        interpret=interpret,
    )


def _splash_local(kernel, q, k, v, q_segments, k_segments, *, scale) -> Array:
    from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel import SegmentIds

    def heads_first(x: Array) -> Array:
        return jnp.pad(x, ((0, 0), (0, -x.shape[1] % 128), (0, 0), (0, 0))).swapaxes(1, 2)

    def padded(ids: Array) -> Array:  # padding is a segment that no token is in
        return jnp.pad(ids, ((0, 0), (0, -ids.shape[1] % 128)), constant_values=-1)

    scaled = (q.astype(jnp.float32) * scale).astype(q.dtype)
    ids = SegmentIds(padded(q_segments), padded(k_segments))
    out = jax.vmap(kernel, in_axes=(0, 0, 0, 0))(heads_first(scaled), heads_first(k), heads_first(v), ids)
    return out.swapaxes(1, 2)[:, : q.shape[1]]
