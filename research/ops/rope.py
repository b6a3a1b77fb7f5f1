"""Rotary position embeddings (RoFormer, arXiv:2104.09864), and the ways to stretch them to longer texts.

Axes: B batch, T time, h head dimension, R = rotary_dim / 2 pairs that are turned.
"""

import dataclasses
import math
from typing import Annotated

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64, Int

from research import ranges
from research.errors import InputError, did_you_mean
from research.ranges import Count, NotNegative, Positive, Range

Angles = tuple[Float[Array, "B T 1 R"], Float[Array, "B T 1 R"]]  # cos and sin

KINDS = ("none", "linear", "llama3", "yarn", "longrope")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How frequencies differ from theta^(-2i / rotary_dim).

    Attributes:
      kind: "none"; "linear" divides all by `factor` (arXiv:2306.15595); "llama3" divides those whose wavelength is long
        against original_length, with a smooth border (Llama 3.1's code); "yarn" does so along a ramp over the
        dimensions (arXiv:2309.00071, section 3.2); "longrope" divides each by a factor of its own, `long_factors` in a
        sequence of more than original_length tokens, else `short_factors` (arXiv:2402.13753).
      factor: how many times longer texts may be.
      original_length: the longest sequence before stretching.
      attention_factor: cos and sin are multiplied by it, hence scores by its square; 0 takes the paper's: yarn
        0.1 ln(factor) + 1 (equation 22), longrope sqrt(1 + ln(factor) / ln(original_length)); else 1.
      low_freq_factor, high_freq_factor: of llama3: wavelengths above original_length / low_freq_factor are divided by
        `factor`, those below original_length / high_freq_factor stay.
      beta_fast, beta_slow: of yarn: dimensions that turn at least beta_fast times within original_length stay, those
        that turn less than beta_slow times are divided.
      truncate: of yarn: the ramp's ends are whole dimensions.
      short_factors, long_factors: of longrope, R each.
    """

    kind: str = "none"
    factor: Annotated[float, Range(1)] = 1.0
    original_length: Count = 0
    attention_factor: NotNegative = 0.0
    low_freq_factor: Positive = 1.0
    high_freq_factor: Positive = 4.0
    beta_fast: Positive = 32.0
    beta_slow: Positive = 1.0
    truncate: bool = True
    short_factors: tuple[Positive, ...] = ()
    long_factors: tuple[Positive, ...] = ()

    def check(self, rotary_dim: int) -> None:
        """Raises InputError where a value can't work for `rotary_dim` dimensions."""
        ranges.check(self, "model.rope_scaling")
        if self.kind not in KINDS:
            raise InputError(
                f"model.rope_scaling.kind = {self.kind!r}: no such choice.{did_you_mean(self.kind, KINDS)}"
            )
        if self.kind in ("llama3", "yarn", "longrope") and self.original_length < 2:
            raise InputError(
                f"model.rope_scaling.original_length = {self.original_length}: {self.kind!r} needs the longest "
                "sequence before stretching, in tokens."
            )
        for field in ("short_factors", "long_factors"):
            count = len(getattr(self, field))
            if self.kind == "longrope" and count != rotary_dim // 2:
                raise InputError(
                    f"model.rope_scaling.{field}: has {count} numbers, and {rotary_dim // 2} pairs of dimensions are "
                    "turned. Give one for each."
                )


def frequencies(
    theta: float, rotary_dim: int, scaling: RopeScaling, *, long: bool = False
) -> Float64[np.ndarray, " R"]:
    """Radians per position of each pair, [R] float64; `long`: in a sequence longer than original_length."""
    frequency = theta ** (-np.arange(0, rotary_dim, 2, dtype=np.float64) / rotary_dim)
    if scaling.kind == "linear":
        return frequency / scaling.factor
    if scaling.kind == "longrope":
        return frequency / np.array(scaling.long_factors if long else scaling.short_factors)
    turns = scaling.original_length * frequency / (2 * math.pi)
    if scaling.kind == "llama3":
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        keep = np.clip((turns - low) / (high - low), 0, 1)
    elif scaling.kind == "yarn":

        def dimension(turns: float) -> float:
            """Which pair turns so many times within original_length."""
            return rotary_dim * math.log(scaling.original_length / (turns * 2 * math.pi)) / (2 * math.log(theta))

        first, last = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
        if scaling.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, rotary_dim - 1)
        keep = 1 - np.clip((np.arange(rotary_dim // 2) - first) / (last - first or 0.001), 0, 1)
    else:
        return frequency
    return frequency * keep + frequency / scaling.factor * (1 - keep)


def attention_factor(scaling: RopeScaling) -> float:
    """What cos and sin are multiplied by."""
    if scaling.attention_factor:
        return scaling.attention_factor
    if scaling.kind == "yarn":
        return 0.1 * math.log(scaling.factor) + 1
    if scaling.kind == "longrope":
        return math.sqrt(1 + math.log(scaling.factor) / math.log(scaling.original_length))
    return 1.0


def rope_angles(
    theta: float,
    rotary_dim: int,
    scaling: RopeScaling,
    positions: Int[Array, "B T"],
    lengths: Int[Array, "B _"] | None = None,
) -> Angles:
    """cos and sin of each token's rotation.

    Args:
      theta: base of the frequencies.
      rotary_dim: how many dimensions of a head are turned.
      scaling: of the frequencies.
      positions: [B, T] int32.
      lengths: [B, T] or [B, 1] int32, of the sequence that each token is in; longrope alone reads it.
    """
    angle = _turn(positions, frequencies(theta, rotary_dim, scaling))
    if scaling.kind == "longrope":
        stretched = _turn(positions, frequencies(theta, rotary_dim, scaling, long=True))
        angle = jnp.where((lengths > scaling.original_length)[:, :, None, None], stretched, angle)
    factor = attention_factor(scaling)
    return jnp.cos(angle) * factor, jnp.sin(angle) * factor


def _turn(positions: Int[Array, "B T"], frequency: Float64[np.ndarray, " R"]) -> Float[Array, "B T 1 R"]:
    """Radians of each token's pairs."""
    return positions[:, :, None, None].astype(jnp.float32) * frequency.astype(np.float32)[None, None, None, :]


def rope(x: Float[Array, "B T N h"], angles: Angles) -> Float[Array, "B T N h"]:
    """Turns the first 2R of h dimensions, in pairs (x[i], x[i + R]): the layout of Llama in transformers.

    Args:
      x: [B, T, heads, h].
      angles: of `rope_angles`.
    """
    cos, sin = angles
    R = cos.shape[-1]
    a, b = x[..., :R].astype(jnp.float32), x[..., R : 2 * R].astype(jnp.float32)
    turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
    return turned if x.shape[-1] == 2 * R else jnp.concatenate([turned, x[..., 2 * R :]], axis=-1)
