"""Attention: one reference, the kernels that are faster where they apply, and the rule that chooses.

Axes: B batch, T query time, S key time, H query heads, K key/value heads, G = H / K query heads that share a
key/value head (grouped-query attention, arXiv:2305.13245), h head dimension. K and V are never repeated to H heads:
the G query heads of a key/value head are rows of one matmul, [B, K, T * G, h] against [B, K, S, h].
"""

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from research.devices import sharding
from research.errors import InputError, did_you_mean
from research.ops.cpu import attention as cpu
from research.ops.scores import NAME, Documents, Memory, Scores, dot, masked, to_heads, to_rows

IMPLEMENTATIONS = ("auto", "reference", "xla", "cpu", "cudnn", "splash")
WITH_MEMORY = ("reference", "cpu")  # those that take a Memory


def self_attention(
    q: Float[Array, "B T H h"],
    k: Float[Array, "B T K h"],
    v: Float[Array, "B T K h"],
    segment_ids: Int[Array, "B T"],
    *,
    scale: float,
    prefix: Int[Array, "B T"] | None = None,
    memory: Memory | None = None,
    causal: bool = True,
    window: int = 0,
    softcap: float = 0.0,
    implementation: str = "auto",
    spec: PartitionSpec | None = None,
    interpret: bool = False,
) -> Float[Array, "B T H h"]:
    """softmax(cap(scale * q k^T) + mask) v over packed rows; scores and softmax in float32.

    A token sees the tokens of its own segment only. Padding is a segment of its own (id 0): its output is finite
    and means nothing. Rematerialisation policies know what the backward pass needs of the forward pass by the name
    "attention" (jax.checkpoint_policies.save_only_these_names): with "cpu" and "splash" nothing of the attention is
    then computed again, the others repeat their scores.

    Implementations:
      reference: plain jax. Holds [B, H, T, T] float32, in the backward pass too. What the others are tested against.
      xla: jax.nn.dot_product_attention; the same memory. No softcap.
      cpu: ops.cpu.attention: blocks of query rows, or tiles of long rows, in plain jax. O(T) memory is kept for the
        backward pass, which must be in reverse mode. Partitions over B and heads like any jax code.
      cudnn: flash attention of NVIDIA GPUs. float16 or bfloat16, h a multiple of 8 and at most 128 (256 from Hopper
        on), T even, no softcap. jax takes packed segments and windows only as a dense mask, [B, 1, T, T] in q.dtype,
        which the backward pass doubles by a gradient that nobody reads; the causal half is still skipped,
        where there is no prefix.
      splash: Pallas kernel for TPUs. Segments, windows, softcap. With a prefix it runs twice: within the prefixes, and
        causally over all. T is padded to a multiple of 128. XLA can't partition it: under a mesh of more than one
        device (jax.set_mesh) it needs `spec`.
      auto: by sharding.platform(). cpu: "cpu" for T > 64, where there is more than one block. tpu: "splash" for
        T >= 128. gpu: "cudnn" on CUDA devices of compute capability 8.0 and later. "reference" for shorter T, on
        other platforms, and where that kernel can't do what is asked by the limits above. With a memory,
        "cpu" stands for the kernel of another platform, and the log says so.

    Where `spec` cuts T (sequence parallelism), each device has the queries of its part of T, and gathers the keys and
    values of all of it: with grouped queries they are small beside the rest, and the causal mask can be skipped over by
    splash as ever (for which T has to be a multiple of 128 times the parts). "cpu" has no such form.

    Args:
      q: [B, T, H, h], floating.
      k, v: [B, T, K, h] in q's dtype; H is a multiple of K.
      segment_ids: [B, T] int32.
      scale: of the scores; usually h ** -0.5.
      prefix: 1 at the first tokens of each document that all of the document may see, 0 elsewhere: those of a prefix
        see each other whole, and what follows is causal. None is no such tokens.
      memory: further keys and values, which every query sees; "reference" and "cpu" alone have it. None for none.
      causal: a token doesn't see those after it, but for those of its document's prefix.
      window: a token sees those less than `window` away, itself included: t - window + 1 .. t under causal. 0 is off.
      softcap: scores become softcap * tanh(scores / softcap) before the mask (Gemma 2, arXiv:2408.00118). 0 is off.
      implementation: one of IMPLEMENTATIONS.
      spec: how q's axes (B, T, heads, h) lie on the mesh in context; k and v lie likewise. "splash" needs it, and so
        does a T that is cut.
      interpret: runs the kernel of "splash" without a TPU, slowly; for tests.

    Returns:
      [B, T, H, h] in q.dtype.

    Raises:
      InputError: an unknown implementation, one that can't do what is asked, heads that don't group, or a prefix where
        nothing is causal.
    """
    if implementation not in IMPLEMENTATIONS:
        raise InputError(
            f"implementation={implementation!r}: no such one.{did_you_mean(implementation, IMPLEMENTATIONS)}"
        )
    if q.shape[2] % k.shape[2]:
        raise InputError(f"q has {q.shape[2]} heads, not a multiple of the {k.shape[2]} of k and v. Change either.")
    if prefix is not None and not causal:
        raise InputError("prefix: every token sees all of its document with causal=False. Leave either out.")
    if implementation == "auto":
        implementation = _choose(q, softcap, spec, memory is not None)
    elif reason := _why_not(implementation, q, softcap, spec, memory is not None):
        raise InputError(f"implementation={implementation!r}: {reason}. Or use 'auto' or 'reference'.")

    scores = Scores(scale, causal, window, softcap)
    documents = Documents(segment_ids, None if prefix is None else prefix > 0)
    if implementation == "cpu":
        return cpu.attention(scores, q, k, v, documents, memory)
    if implementation == "splash":
        return _splash(scores, q, k, v, documents, spec, interpret)
    if _time_parts(spec) == 1:
        mask, causal = scores.mask(documents), scores.all_before(documents)
        out = _masked(implementation, scores, q, k, v, mask, causal, memory)
    else:
        B, T, heads, h = spec
        here, whole, keys = PartitionSpec(B, T), PartitionSpec(B), PartitionSpec(B, None, heads, h)
        local = functools.partial(_masked_locally, implementation, scores)
        specs = (spec, keys, keys, PartitionSpec(T), here, whole, PartitionSpec(None, heads, h))
        local = jax.shard_map(local, in_specs=specs, out_specs=spec, check_vma=False)
        out = local(q, k, v, jnp.arange(q.shape[1], dtype=jnp.int32), documents, documents, memory)
    return checkpoint_name(out, NAME)


def cached_attention(
    q: Float[Array, "B T H h"],
    k: Float[Array, "B K h S"],
    v: Float[Array, "B K S h"],
    mask: Bool[Array, "B T S"],
    *,
    scale: float,
    softcap: float,
    memory: Memory | None = None,
) -> Float[Array, "B T H h"]:
    """Attention of a few queries over cached keys and values, under any mask.

    Exponentials are summed, and the outputs divided by the sums: there are fewer of these than of probabilities.

    Args:
      q: [B, T, H, h].
      k: [B, K, h, S] in q's dtype: as the product with queries wants it, for a cache is read far oftener than written.
      v: [B, K, S, h], likewise.
      mask: [B, T, S] bool, True where a query sees a key. A query that sees none gets a finite, meaningless output.
      scale, softcap, memory: see self_attention.

    Returns:
      [B, T, H, h] in q.dtype.
    """
    score, rows = Scores(scale, softcap=softcap), to_rows(q, k.shape[1])
    s, P = masked(score.of_products(dot("bkrh,bkhs->bkrs", rows, k)), mask), 0
    if memory is not None:  # the scores are joined, and not the keys, since that would copy the whole cache
        P = memory.keys.shape[0]
        keys, values = memory.rows(q.shape[0])
        s = jnp.concatenate([score.unmasked(rows, keys), s], axis=-1)
    p = jnp.exp(s - jnp.max(s, axis=-1, keepdims=True))
    total, p = jnp.sum(p, axis=-1, keepdims=True), p.astype(v.dtype)
    out = dot("bkrs,bksh->bkrh", p[..., P:], v)
    if memory is not None:
        out = out + dot("bkrp,bkph->bkrh", p[..., :P], values)
    return to_heads((out / total).astype(q.dtype), q.shape[1])


def _reference(
    scores: Scores,
    q: Float[Array, "B T H h"],
    k: Float[Array, "B S K h"],
    v: Float[Array, "B S K h"],
    mask: Bool[Array, "B T S"],
    memory: Memory | None,
) -> Float[Array, "B T H h"]:
    K, P = k.shape[2], 0 if memory is None else memory.keys.shape[0]
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    if memory is not None:
        keys, values = memory.rows(q.shape[0])
        k, v = jnp.concatenate([keys, k], axis=2), jnp.concatenate([values, v], axis=2)
        mask = jnp.pad(mask, ((0, 0), (0, 0), (P, 0)), constant_values=True)
    p = jax.nn.softmax(scores(to_rows(q, K), k, mask), axis=-1).astype(v.dtype)
    return to_heads(jnp.einsum("bkrs,bksh->bkrh", p, v), q.shape[1])


def _masked(
    implementation: str,
    scores: Scores,
    q: Float[Array, "B T H h"],
    k: Float[Array, "B S K h"],
    v: Float[Array, "B S K h"],
    mask: Bool[Array, "B T S"],
    causal: bool,
    memory: Memory | None = None,
) -> Float[Array, "B T H h"]:
    """The implementations that take a mask; `causal` says that it hides all keys after a query."""
    if implementation == "reference":
        return _reference(scores, q, k, v, mask, memory)
    if implementation == "xla":
        return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], scale=scores.scale, implementation="xla")
    return _cudnn(q, k, v, mask, scores.scale, causal)


def _masked_locally(
    implementation: str,
    scores: Scores,
    q: Float[Array, "B t H h"],
    k: Float[Array, "B T K h"],
    v: Float[Array, "B T K h"],
    times: Int[Array, " t"],
    queries: Documents,
    keys: Documents,
    memory: Memory | None,
) -> Float[Array, "B t H h"]:
    """One device's part of the queries, against all keys; `queries` and `keys` are their documents."""
    mask = scores.seen(queries, keys, times, jnp.arange(k.shape[1], dtype=jnp.int32))
    return _masked(implementation, scores, q, k, v, mask, False, memory)


def _choose(q: Float[Array, "B T H h"], softcap: float, spec: PartitionSpec | None, memory: bool = False) -> str:
    """The rule of "auto" (see self_attention)."""
    platform, T, h = sharding.platform(), q.shape[1], q.shape[3]
    kernel = "reference"
    if platform == "cpu" and T > cpu.MIN_ROWS:
        kernel = "cpu"
    elif platform == "tpu" and T >= 128:
        kernel = "splash"
    elif platform == "gpu" and _capability() >= (8.0 if h <= 128 else 9.0):
        kernel = "cudnn"
    if memory and kernel not in WITH_MEMORY:
        other = "cpu" if T > cpu.MIN_ROWS and not _why_not("cpu", q, softcap, spec, memory) else "reference"
        _note_instead(kernel, other)
        return other
    return "reference" if _why_not(kernel, q, softcap, spec, memory) else kernel


@functools.cache  # once a process
def _note_instead(kernel: str, other: str) -> None:
    logging.warning(
        "Attention is %r in place of %r, which has no keys that all queries see (a prefix), and is slower.",
        other,
        kernel,
    )


def _capability() -> float:
    """Compute capability of this process's first GPU; 0 if it isn't a CUDA device."""
    value = str(getattr(jax.local_devices()[0], "compute_capability", ""))
    return float(value) if re.fullmatch(r"\d+\.\d+", value) else 0.0


def _why_not(
    implementation: str, q: Float[Array, "B T H h"], softcap: float, spec: PartitionSpec | None, memory: bool
) -> str:
    """Why `implementation` can't do what is asked, naming the argument; "" if it can."""
    T, h = q.shape[1], q.shape[3]
    if memory and implementation not in WITH_MEMORY:
        return "it has no keys that all queries see (a prefix). Use 'cpu'"
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


def _cudnn(
    q: Float[Array, "B T H h"],
    k: Float[Array, "B S K h"],
    v: Float[Array, "B S K h"],
    mask: Bool[Array, "B T S"],
    scale: float,
    causal: bool,
) -> Float[Array, "B T H h"]:
    # The window is part of the mask: cuDNN has no sliding window beside a bias. is_causal lets it skip blocks.
    try:
        return jax.nn.dot_product_attention(
            q, k, v, mask=mask[:, None], scale=scale, is_causal=causal, implementation="cudnn"
        )
    except RuntimeError as error:  # no cuDNN here, or a limit of this GPU
        raise InputError(
            f"implementation='cudnn': {error} It needs an NVIDIA GPU and jax for CUDA "
            "(pip install -e '.[gpu]'). Or use 'auto' or 'reference'."
        ) from error


def _splash(
    scores: Scores,
    q: Float[Array, "B T H h"],
    k: Float[Array, "B T K h"],
    v: Float[Array, "B T K h"],
    documents: Documents,
    spec: PartitionSpec | None,
    interpret: bool,
) -> Float[Array, "B T H h"]:
    mesh, parts = jax.sharding.get_abstract_mesh(), _time_parts(spec)
    H = q.shape[2] // (sharding.num_parts(spec[2]) if spec is not None else 1)
    kinds = (scores,) if documents.prefix is None else (scores, dataclasses.replace(scores, causal=False))
    kernels = tuple(_splash_kernel(q.shape[1], H, parts, kind, interpret) for kind in kinds)
    local = functools.partial(_splash_local, scale=scores.scale)
    if spec is not None and not mesh.empty:
        B, T, heads, h = spec
        keys = PartitionSpec(B, None, heads, h)
        cuts = (PartitionSpec(None, None if parts == 1 or _sees_all(kind) else T) for kind in kinds)
        kernel_specs = tuple(
            kernel.manual_sharding_spec(NamedSharding(mesh, cut)) for kernel, cut in zip(kernels, cuts, strict=True)
        )
        specs = (kernel_specs, spec, keys, keys, PartitionSpec(B, T), PartitionSpec(B))
        # The kernel's outputs don't say over which mesh axes they vary, so that can't be checked.
        local = jax.shard_map(local, in_specs=specs, out_specs=spec, check_vma=False)
    return local(kernels, q, k, v, documents, documents)


def _sees_all(scores: Scores) -> bool:
    """Whether the mask hides nothing: all parts of T then have the same kernel, of a part's queries."""
    return not (scores.causal or scores.window)


def _splash_kernel(T: int, H: int, parts: int, scores: Scores, interpret: bool) -> Any:
    """The kernel of H heads over a T that is cut into `parts`: it holds arrays about the mask, to be cut likewise, but
    where that hides nothing."""
    # Imported here: Pallas takes 0.3 s, and only TPUs need it.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel_lib
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as mask_lib

    padded = -(-T // 128) * 128
    block = max(size for size in (128, 256, 384, 512) if padded % (size * parts) == 0)
    shape = (padded, padded)
    if scores.window:
        before = scores.window - 1
        mask = mask_lib.LocalMask(shape, (before, 0 if scores.causal else before), 0)
    else:
        mask = mask_lib.CausalMask(shape) if scores.causal else mask_lib.FullMask((padded // parts, padded))
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
        attn_logits_soft_cap=scores.softcap or None,
        residual_checkpoint_name=NAME,
        head_shards=1,
        q_seq_shards=1 if _sees_all(scores) else parts,
        interpret=interpret,
    )


def _splash_local(
    kernels: tuple[Any, ...],
    q: Float[Array, "B T H h"],
    k: Float[Array, "B S K h"],
    v: Float[Array, "B S K h"],
    queries: Documents,
    keys: Documents,
    *,
    scale: float,
) -> Float[Array, "B T H h"]:
    """`kernels`: one over whole documents, and with prefixes one within these, where every token sees all others."""
    scaled = (q.astype(jnp.float32) * scale).astype(q.dtype)
    out = _splash_call(kernels[0], scaled, k, v, queries.segments, keys.segments)
    if queries.prefix is None:
        return out
    # What is in no prefix is a segment for itself, whose output isn't taken.
    segments = (jnp.where(each.prefix, each.segments, -2) for each in (queries, keys))
    within = _splash_call(kernels[1], scaled, k, v, *segments)
    return jnp.where(queries.prefix[:, :, None, None], within, out)


def _splash_call(
    kernel: Any,
    q: Float[Array, "B T H h"],
    k: Float[Array, "B S K h"],
    v: Float[Array, "B S K h"],
    q_segments: Int[Array, "B T"],
    k_segments: Int[Array, "B S"],
) -> Float[Array, "B T H h"]:
    # Imported here, as above.
    from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel import SegmentIds

    # Padding is a segment that no token is in.
    ids = (jnp.pad(x, ((0, 0), (0, -x.shape[1] % 128)), constant_values=-1) for x in (q_segments, k_segments))
    heads_first = [jnp.pad(x, ((0, 0), (0, -x.shape[1] % 128), (0, 0), (0, 0))).swapaxes(1, 2) for x in (q, k, v)]
    out = jax.vmap(kernel, in_axes=(0, 0, 0, 0))(*heads_first, SegmentIds(*ids))
    return out.swapaxes(1, 2)[:, : q.shape[1]]
