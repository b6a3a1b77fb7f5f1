"""How low-rank parts begin where that depends on the kernel, or is more than random numbers."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from research.models import kernels
from research.models.specs import Params, Specs
from research.ops import quantized

# "pissa": the largest r singular vectors of the kernel (arXiv:2404.02948, equations 2 to 4), "olora": the first r of
# its QR decomposition (arXiv:2406.01775, section 3), "loftq": the best of rank r beside a quantised kernel
# (arXiv:2310.08659, algorithm 1). The kernel gets what they leave. "orthogonal": A and B of orthogonal subspaces, so
# that their product is 0 and both have a gradient at once.
CHANGE_BASE = ("pissa", "olora", "loftq")
KINDS = (*CHANGE_BASE, "orthogonal")
_LOFTQ_STEPS = 1  # as in PEFT: more change little


@dataclasses.dataclass(frozen=True)
class Begin:
    """Adapter.init of LoRA.

    Attributes:
      kind: one of KINDS, or another, which changes nothing.
      dora: whether magnitudes begin as the norms of the kernels' columns.
    """

    kind: str
    dora: bool

    def __call__(self, values: Params, key: jax.Array, model: Any) -> Params:
        """See Adapter.init."""
        return self._visit(values, key, model.specs)

    def _visit(self, values: Params, key: jax.Array, specs: Specs) -> Params:
        if not isinstance(values, dict):
            return values
        if "lora" in values and "kernel" in values:
            return self._map(values, key, specs)
        keys = jax.random.split(key, len(values))
        return {name: self._visit(values[name], keys[i], specs[name]) for i, name in enumerate(sorted(values))}

    def _map(self, p: Params, key: jax.Array, specs: Specs) -> Params:
        if self.kind in KINDS:
            p = self._begun(p, key, specs)
        if self.dora:
            p = {**p, "lora": {**p["lora"], "magnitude": kernels.column_norms(p)}}
        return p

    def _begun(self, p: Params, key: jax.Array, specs: Specs) -> Params:
        lora, kernel = p["lora"], p["kernel"]
        a, b, scale, lead, _ = kernels.flat(lora, kernel.shape)
        w = kernel.reshape(*lead, a.shape[-2], b.shape[-1])
        used = jnp.any(a != 0, axis=-2, keepdims=True)  # columns beyond a layer's own rank stay 0
        scale = jnp.where(scale == 0, 1, scale)
        match self.kind:
            case "orthogonal":
                a, b = _orthogonal(key, a.shape, b.shape)
                rest = w
            case "loftq":
                return self._loftq(p, w, scale, used, specs)
            case _:
                a, b = (_pissa if self.kind == "pissa" else _olora)(w, scale, used)
                rest = w - scale * jnp.matmul(a, b, precision="highest")
        return _put(p, a, b, rest.reshape(kernel.shape))

    def _loftq(self, p: Params, w: Array, scale: Array, used: Array, specs: Specs) -> Params:
        kernel, like = p["kernel"], specs["kernel"]
        product = jnp.zeros_like(w)
        for _ in range(_LOFTQ_STEPS):
            held = quantized.hold((w - product).reshape(kernel.shape), like)
            a, b = _pissa(w - quantized.read(held, jnp.float32).reshape(w.shape), scale, used)
            product = scale * jnp.matmul(a, b, precision="highest")
        return _put(p, a, b, held)


def _put(p: Params, a: Array, b: Array, kernel: Params) -> Params:
    lora = p["lora"]
    own = {"a": a.reshape(lora["a"].shape), "b": b.reshape(lora["b"].shape)}
    return {**p, "kernel": kernel, "lora": {**lora, **own}}


def _pissa(w: Float[Array, "... I O"], scale: Array, used: Array) -> tuple[Array, Array]:
    """A [..., I, r] and B [..., r, O] of which scale A B is the best approximation of w."""
    r = used.shape[-1]
    u, s, v = jnp.linalg.svd(w, full_matrices=False)
    root = jnp.where(used, jnp.sqrt(s[..., None, :r] / scale), 0)
    return u[..., :r] * root, root.swapaxes(-1, -2) * v[..., :r, :]


def _olora(w: Float[Array, "... I O"], scale: Array, used: Array) -> tuple[Array, Array]:
    """A and B from the QR decomposition of the transpose, as PEFT has it: the kernel loses scale A B."""
    del scale
    r = used.shape[-1]
    q, upper = jnp.linalg.qr(w.swapaxes(-1, -2))
    a, b = upper[..., :r, :].swapaxes(-1, -2), q[..., :r].swapaxes(-1, -2)
    return jnp.where(used, a, 0), jnp.where(used.swapaxes(-1, -2), b, 0)


def _orthogonal(key: jax.Array, a: tuple[int, ...], b: tuple[int, ...]) -> tuple[Array, Array]:
    """A [..., I, r] and B [..., r, O], whose product is 0: they are made of the even and the odd rows of an orthogonal
    matrix (PEFT's init_lora_weights="orthogonal"), with deviations of 0.1."""
    r, lead = a[-1], a[:-2]
    keys = jax.random.split(key, 3)
    q, _ = jnp.linalg.qr(jax.random.normal(keys[0], (*lead, r, r)))
    left = jax.random.normal(keys[1], (*lead, a[-2], r // 2)) @ q[..., 0::2, :]
    right = q[..., 1::2, :].swapaxes(-1, -2) @ jax.random.normal(keys[2], (*lead, r // 2, b[-1]))
    return left / 10, right / 10
