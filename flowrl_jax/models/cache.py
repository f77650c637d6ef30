"""Keys and values that decoding keeps, as they are or in eight bits."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

_LARGEST = 127  # of int8, both ways: -128 has no opposite


class KVCache(NamedTuple):
    """The keys and values of one layer.

    Attributes:
        key: `[S, K, C, H]` of S slots, K key heads and C columns, or `[S, K, H, C]`, whichever the
            kernel that attends wants (see `decode_attention.column_axes`); float32, bfloat16 or
            int8.
        value: `[S, K, C, H]`, in the dtype of `key`.
        key_scale: `[S, K, C]` float32 that int8 keys are multiplied by; None for others.
        value_scale: as `key_scale`.
    """

    key: Any
    value: Any
    key_scale: Any = None
    value_scale: Any = None


def quantize(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Vectors in eight bits, each with a scale of its own by which its largest entry is 127.

    Args:
        x: `[..., H]` of a floating dtype.

    Returns:
        int8 of the shape of `x`, and their scales `[...]` float32: 0 for vectors of zeros, and of
        numbers so small that their scale is none (below 1e-36).
    """
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=-1) / _LARGEST
    steps = jnp.round(x / jnp.where(scale > 0, scale, 1.0)[..., None])
    # A scale that is not a normal number has lost bits: its quotients may go beyond.
    return jnp.clip(steps, -_LARGEST, _LARGEST).astype(jnp.int8), scale


def dequantize(x: jax.Array, scale: jax.Array, dtype: Any = jnp.float32) -> jax.Array:
    """What `quantize` rounded.

    Args:
        x: `[..., H]` int8.
        scale: `[...]` float32.
        dtype: of the result.
    """
    return (x.astype(jnp.float32) * scale[..., None]).astype(dtype)
