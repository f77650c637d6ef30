"""Attention of one new token per slot over the keys and values that decoding keeps.

All slots write the same column at a step, so that the write is one slice of the cache. What a slot
may attend to are the last so many columns up to that one: nothing else has to be masked or known.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from flowrl_jax.models.attention import MASKED, capped, platform_device
from flowrl_jax.models.cache import KVCache, quantize
from flowrl_jax.models.decode_kernel import decode_attention

_WITHOUT_KERNEL = ("TPU v2", "TPU v3")  # their compiler refuses its bfloat16 products


class Held(NamedTuple):
    """The columns of a cache that slots may attend to.

    Attributes:
        column: scalar int32, the newest column.
        length: `[S]` int32, how many columns a slot's row has, up to the newest one and with it; 0
            for a slot without a row, whose output means nothing.
    """

    column: jax.Array
    length: jax.Array


def decode_kernel(wanted: str) -> str:
    """The kernel that decoding attends with on the devices that are traced for: "xla" or "pallas".

    Args:
        wanted: `TransformerConfig.decode_kernel`.
    """
    if wanted != "auto":
        return wanted
    device = platform_device()
    has = device.platform == "tpu" and device.device_kind not in _WITHOUT_KERNEL
    return "pallas" if has else "xla"


def make_cache(key: jax.Array, value: jax.Array, dtype: jnp.dtype) -> KVCache:
    """A cache of given columns.

    Args:
        key: `[S, K, C, H]`.
        value: `[S, K, C, H]`.
        dtype: that they are kept in; int8 for eight bits with a scale for each of their vectors.
    """
    if dtype != jnp.int8:
        return KVCache(key.astype(dtype), value.astype(dtype))
    (key, key_scale), (value, value_scale) = quantize(key), quantize(value)
    return KVCache(key, value, key_scale, value_scale)


def write(cache: KVCache, key: jax.Array, value: jax.Array, column: jax.Array) -> KVCache:
    """The cache with one column written, in place where it may.

    Args:
        cache: of a layer.
        key: `[S, K, 1, H]` in the compute dtype.
        value: `[S, K, 1, H]`.
        column: scalar int32, where.
    """
    new = make_cache(key, value, cache.key.dtype)

    def put(old, x):
        return jax.lax.dynamic_update_slice_in_dim(old, x, column, axis=2)

    return jax.tree.map(put, cache, new)


def attend_cached(
    query: jax.Array,
    cache: KVCache,
    held: Held,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    kernel: str = "auto",
) -> jax.Array:
    """Grouped-query attention of one token per slot, softmax in float32.

    Args:
        query: `[S, N, 1, H]`; N query heads, a multiple of K.
        cache: of the layer, the token's own column in it.
        held: what each slot may attend to.
        scale: multiplies the scores.
        window: columns that a token looks back to, its own included; 0 means all.
        softcap: scores s become `softcap * tanh(s / softcap)`; 0 leaves them.
        kernel: see `decode_kernel`. "pallas", for TPU, reads what each slot may attend to; "xla"
            all columns.

    Returns:
        `[S, N, 1, H]` in the dtype of `query`.
    """
    if decode_kernel(kernel) == "pallas":
        options = {"scale": scale, "window": window, "softcap": softcap}
        return decode_attention(query[:, :, 0], cache, *held, **options)[:, :, None]
    slots, heads, _, head_dim = query.shape
    kv_heads, columns = cache.key.shape[1:3]
    grouped = query.reshape(slots, kv_heads, heads // kv_heads, head_dim)
    # Keys are the left factor here, which XLA's CPU backend need not transpose. Were the scores
    # turned before they are masked, XLA would exchange the factors again.
    key = cache.key if cache.key_scale is None else cache.key.astype(query.dtype)
    scores = jnp.einsum("skch,skgh->skcg", key, grouped, preferred_element_type=jnp.float32)
    if cache.key_scale is not None:
        scores *= cache.key_scale[..., None]
    age = held.column - jnp.arange(columns)
    reach = jnp.minimum(held.length, window) if window else held.length
    visible = (age >= 0) & (age < reach[:, None])
    scores = capped(scores * scale, softcap)
    scores = jnp.where(visible[:, None, :, None], scores, MASKED)
    probs = jax.nn.softmax(jnp.swapaxes(scores, 2, 3), axis=-1)
    if cache.value_scale is not None:
        probs *= cache.value_scale[:, :, None]
    value = cache.value if cache.value_scale is None else cache.value.astype(query.dtype)
    out = jnp.einsum("skgc,skch->skgh", probs.astype(value.dtype), value)
    return out.reshape(query.shape).astype(query.dtype)
