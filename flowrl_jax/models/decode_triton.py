"""Attention of one new token per row to its cache, on NVIDIA GPUs: jax's own Triton kernel.

The columns are cut into splits, which are attended to side by side, and what comes of them is
added up. A split that a row may not attend to is not read, nor are blocks after the newest column.
In vain is read less than a split before a row's first column, and less than a block after its last.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.gpu.decode_attention import decode_attn_unbatched

from flowrl_jax.models.attention import interpreted
from flowrl_jax.models.cache import KVCache
from flowrl_jax.models.decode_layout import on_devices, padded

# Columns: smaller splits read less in vain, but each of them writes a result for every query head.
SPLIT = 256
_DTYPES = (jnp.bfloat16, jnp.float32)
_HEAD_DIMS = (16, 256)  # tensor cores multiply no less, and shared memory holds little more
_HEADS = 16  # query heads of a product: fewer are filled up
_BLOCK = 128  # columns of a product, at most
# Keys of a block. Values lie beside them and the next block's are on their way: 64 KiB of shared
# memory, of which the smallest chips give a program 99.
_BLOCK_BYTES = 2**14


def refusal(
    *, head_dim: int = 16, softcap: float = 0.0, dtype: Any = jnp.float32, kept: Any = None
) -> str:
    """Why the kernel cannot attend; empty where it can. What is left out is something it can do.

    Args:
        head_dim: width of a head.
        softcap: of the scores; 0 leaves them.
        dtype: the compute dtype.
        kept: dtype that keys and values are kept in; the compute dtype by default.
    """
    dtype = jnp.dtype(dtype)
    kept = jnp.dtype(dtype if kept is None else kept)
    least, most = _HEAD_DIMS
    if head_dim & (head_dim - 1) or not least <= head_dim <= most:
        return f"takes powers of two from {least} to {most}, not model.head_dim={head_dim}"
    if softcap:
        return f"cannot soft-cap scores (at {softcap:g}, as this model does)"
    if dtype not in _DTYPES:
        return f"computes in bfloat16 and float32, not in model.dtype={dtype.name}"
    if kept != dtype:
        return (
            f"reads keys and values in model.dtype={dtype.name}, not in {kept.name} (rollout.cache)"
        )
    return ""


def triton_attention(
    query: jax.Array, cache: KVCache, column: jax.Array | int, length: jax.Array, **options: Any
) -> jax.Array:
    """`triton_attention_kernel` on every device for its own slots and heads.

    Where key heads are fewer than shards, each shard attends with all key heads that it holds.

    Args:
        query, cache, column, length: as there, of the whole model.
        options: `scale` and `window`, as there.

    Returns:
        As there.
    """
    run = functools.partial(triton_attention_kernel, **options, interpret=interpreted())
    return on_devices(run, query, cache, column, length)


def triton_attention_kernel(
    query: jax.Array,
    cache: KVCache,
    column: jax.Array | int,
    length: jax.Array,
    *,
    scale: float,
    window: int = 0,
    first_head: jax.Array | int = 0,
    group: int = 0,
    interpret: bool = False,
) -> jax.Array:
    """Grouped-query attention of one token per slot, with softmax in float32, on one device.

    Columns that a slot may not attend to have no weight, but may be read: none may hold NaN or
    infinity. A cache whose C is no multiple of `SPLIT` is padded first, which reads and writes all
    of it.

    Args:
        query: `[S, N, H]`; N query heads, a multiple of K.
        cache: of one layer, S slots and C columns, in the dtype of `query`: see `refusal`.
        column: scalar int32, the newest column, of all slots.
        length: `[S]` int32, columns that a slot may attend to: `(column - length, column]`. 0 is
            an idle slot.
        scale: multiplies the scores.
        window: columns that a token looks back to, its own included; 0 means all.
        first_head: where the query heads begin among those that K key heads have, if they are a
            part of them; scalar int32.
        group: query heads per key head; N / K by default.
        interpret: of `pallas_call`, to run it without a GPU.

    Returns:
        `[S, N, H]` in the dtype of `query`; zeros in idle slots.
    """
    slots, heads, head_dim = query.shape
    kv_heads = cache.key.shape[1]
    group = group or heads // kv_heads
    cache = padded(cache, SPLIT)
    columns = cache.key.shape[2]
    every = query
    if heads < group * kv_heads:
        # The kernel knows no query heads that straddle key heads: those of other devices are zero.
        every = jnp.zeros((slots, group * kv_heads, head_dim), query.dtype)
        every = jax.lax.dynamic_update_slice_in_dim(every, query, first_head, axis=1)
    # A key head of a slot, cut into splits: the cache is neither copied nor turned.
    in_splits = (slots * kv_heads, columns // SPLIT, SPLIT, head_dim)
    base = jnp.arange(0, columns, SPLIT)
    end = jnp.asarray(column, jnp.int32) + 1
    begin = end - (jnp.minimum(length, window) if window else length)
    parts = _attend(scale, interpret)(
        every.reshape(slots * kv_heads, group, head_dim),
        cache.key.reshape(in_splits),
        cache.value.reshape(in_splits),
        jnp.repeat(begin, kv_heads)[:, None] - base,
        jnp.broadcast_to(end - base, in_splits[:2]),
    )
    out = _sum(*parts).reshape(every.shape).astype(query.dtype)
    if heads < every.shape[1]:
        out = jax.lax.dynamic_slice_in_dim(out, first_head, heads, axis=1)
    return out


def _attend(scale: float, interpret: bool) -> Any:
    """The kernel over R key heads of slots and P splits of each.

    Args:
        scale: multiplies the scores.
        interpret: of `pallas_call`.

    Returns:
        Of queries `[R, G, H]`, keys and values `[R, P, SPLIT, H]` and the columns of a split that
        may be attended to, from one and before another `[R, P]` int32: what `_sum` takes.
    """

    def of_split(query, key, value, begin, end):
        return decode_attn_unbatched(
            query,
            key,
            value,
            begin,
            end,
            sm_scale=scale,
            block_h=_HEADS,
            block_k=min(_BLOCK, max(16, _BLOCK_BYTES // (key.shape[1] * key.dtype.itemsize))),
            k_splits=1,
            num_warps=None,
            num_stages=2,
            grid=None,
            interpret=interpret,
            debug=False,
            return_residuals=True,
            normalize_output=False,
        )

    return jax.vmap(jax.vmap(of_split, in_axes=(None, 0, 0, 0, 0)))


def _sum(parts: jax.Array, totals_and_tops: tuple[jax.Array, jax.Array]) -> jax.Array:
    """The softmax over splits, in float32; the kernel's own sum of them rounds at every step.

    Args:
        parts: `[R, P, G, H]`, weighted sums of values of P splits.
        totals_and_tops: both `[R, P, G]` float32: the sums of their weights, and their largest
            scores, whose weight is 1.

    Returns:
        `[R, G, H]` float32; zeros where nothing has a weight.
    """
    totals, tops = totals_and_tops
    # The barrier is that of jax's own sum: it says that XLA's GPU compiler makes NaN without it.
    top = jax.lax.optimization_barrier(tops.max(axis=1, keepdims=True))
    shares = jnp.exp(tops - top)
    total = (shares * totals).sum(axis=1)  # 1 or more, or else 0
    out = (shares[..., None] * parts.astype(jnp.float32)).sum(axis=1)
    return out / jnp.maximum(total, 1.0)[..., None]
